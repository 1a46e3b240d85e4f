"""What the machine can do at best, taken in the rounds of whatever is held against it."""

from __future__ import annotations

from measuring import Contestant
from peers import Worker

PRODUCT = (4096, 4096)  # rows and columns of the product that stands for what the cores can do
PRODUCT_TOKENS = 512
PRODUCT_KERNELS = ("torch-int8-gemm", "torch-fp32")


def read_bandwidth(worker: Worker) -> Contestant:
    """GB/s that the threads of a layer_runner read from memory."""
    return Contestant(
        "memory", "read GB/s", lambda: float(worker.ask("bandwidth", seconds=0.3)["bytes_per_second"]) / 1e9
    )


def product_rate(worker: Worker) -> Contestant:
    """GFLOP/s of a product of 512 tokens in torch: int8 (oneDNN), or float32 where the CPU has none.

    Args:
        worker: a layer_runner.
    """
    rows, columns = PRODUCT
    kernel, why = "", ""
    for name in PRODUCT_KERNELS:
        try:
            worker.ask("prepare", kernel=name, rows=rows, columns=columns)
            worker.ask("run", tokens=PRODUCT_TOKENS, seconds=0.05)
            kernel = name
            break
        except RuntimeError as error:  # torch has not every kernel on every CPU
            why = str(error)
    assert kernel, why

    def product() -> float:
        seconds = float(worker.ask("run", tokens=PRODUCT_TOKENS)["seconds"])
        return 2 * rows * columns * PRODUCT_TOKENS / seconds / 1e9

    return Contestant("torch", f"{kernel} {rows}x{columns} GFLOP/s", product)
