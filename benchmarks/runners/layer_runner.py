"""One linear layer at a time, in kbit, torch and bitsandbytes, as a runner (protocol.py).

    printf '%s\\n' '{"do": "prepare", "kernel": "torch-int4", "rows": 14336, "columns": 4096}' \\
        '{"do": "run", "tokens": 1}' | python benchmarks/runners/layer_runner.py --threads 2

Actions: prepare(kernel, rows, columns, spread), run(tokens, seconds), bandwidth(seconds). `kernel` is a key of KERNELS,
or a kbit format such as nf4-b64. A layer is held in so many copies, used in turn, that together they take `spread`
bytes, more than any cache: a decoder reads every matrix once per token. Results are compared with the product of the
unquantized weights and the relative error is reported, so that a kernel that leaves work out does not win by it.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from protocol import claim_stdout, serve

GROUP = 64  # weights per scale, as in kbit's default formats

Product = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Layer:
    """x -> x W^T.

    Attributes:
        run: takes x (M, K) in `dtype`, gives (M, N).
        nbytes: of the weights and all that goes with them.
        dtype: what it wants x in.
        scale: (N,), what the result is still to be multiplied by, if anything.
    """

    run: Product
    nbytes: int
    dtype: torch.dtype = torch.bfloat16
    scale: torch.Tensor | None = None


def size(*parts: torch.Tensor) -> int:
    return sum(part.numel() * part.element_size() for part in parts)


def torch_fp32(weight: torch.Tensor) -> Layer:
    matrix = weight.clone()
    return Layer(lambda x: torch.nn.functional.linear(x, matrix), size(matrix), torch.float32)


def torch_bf16(weight: torch.Tensor) -> Layer:
    matrix = weight.bfloat16()
    return Layer(lambda x: torch.nn.functional.linear(x, matrix), size(matrix))


def torch_bf16_packed(weight: torch.Tensor) -> Layer:
    """oneDNN's bf16 product on weights in the layout of its choice: what torch.compile uses when weights are frozen."""
    matrix = weight.bfloat16()
    packed = torch.ops.mkldnn._reorder_linear_weight(matrix, 512)
    return Layer(lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""), size(matrix))


def torch_int8_gemm(weight: torch.Tensor) -> Layer:
    """oneDNN's int8 product: codes in, int32 sums out; nobody quantizes x or applies scales."""
    scale = weight.abs().amax(1) / 127
    codes = (weight / scale[:, None]).round().to(torch.int8)
    return Layer(lambda x: torch._int_mm(x, codes.t()), size(codes), torch.int8, scale)


def torch_int8(weight: torch.Tensor) -> Layer:
    """Weight-only int8, a bf16 scale per row."""
    scale = weight.abs().amax(1) / 127
    codes, scales = (weight / scale[:, None]).round().to(torch.int8), scale.bfloat16()
    return Layer(lambda x: torch.ops.aten._weight_int8pack_mm(x, codes, scales), size(codes, scales))


def torch_int4(weight: torch.Tensor) -> Layer:
    """Weight-only int4, a bf16 scale and offset per group; what gpt-fast and torchao call on CPUs."""
    groups = weight.view(len(weight), -1, GROUP)
    low, high = groups.amin(2), groups.amax(2)
    scale = (high - low) / 15
    codes = ((groups - low[..., None]) / scale[..., None]).round().clamp(0, 15).to(torch.int32).view(weight.shape)
    # The kernel's value of a code is (code - 8) * scale + zero.
    scales = torch.stack([scale, low + 8 * scale], -1).transpose(0, 1).contiguous().bfloat16()  # (K / group, N, 2)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
    run = torch.ops.aten._weight_int4pack_mm_for_cpu
    return Layer(lambda x: run(x, packed, GROUP, scales), size(packed, scales))


def bitsandbytes_nf4(weight: torch.Tensor) -> Layer:
    import bitsandbytes

    options: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": False}
    rows, columns = weight.shape
    layer = bitsandbytes.nn.Linear4bit(columns, rows, bias=False, compute_dtype=torch.bfloat16, **options)
    layer.weight = bitsandbytes.nn.Params4bit(weight.clone(), requires_grad=False, **options)
    layer = layer.to("cpu").eval()
    layer(torch.zeros(1, columns, dtype=torch.bfloat16))  # rearranges the weights where the CPU has a kernel for that
    return Layer(layer, size(layer.weight.data, layer.weight.quant_state.absmax))


KERNELS: dict[str, Callable[[torch.Tensor], Layer]] = {
    "torch-fp32": torch_fp32,
    "torch-bf16": torch_bf16,
    "torch-bf16-packed": torch_bf16_packed,
    "torch-int8-gemm": torch_int8_gemm,
    "torch-int8": torch_int8,
    "torch-int4": torch_int4,
    "bitsandbytes-nf4": bitsandbytes_nf4,
}


class OneLayer:
    """A model of one matrix, for a backend to run: its head is the layer (a kbit.graph.backend.Definition)."""

    rotation_depends_on_length = False

    def __init__(self, embedding: Any, weight: Any) -> None:
        self.embedding, self.weight = embedding, weight

    def body(self, ops: Any, ids: Any) -> Any:
        return ops.embed(self.embedding, ids)

    def head(self, ops: Any, hidden: Any) -> Any:
        return ops.logits(self.weight, hidden)

    def rotation(self, positions: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        raise AssertionError("there is no attention to rotate for")


def kbit_copies(format: str, weight: torch.Tensor, spread: int, options: dict[str, Any]) -> list[Layer]:
    """The layer in a kbit format on the CPU backend, quantized once and prepared as often as `spread` asks."""
    from kbit.backends.select import select_backend
    from kbit.formats.blockwise import quantize_blockwise
    from kbit.formats.quant_format import QuantFormat

    backend = select_backend("cpu", **options)
    embedding = backend.prepare(torch.zeros(16, weight.shape[1]), lookup=True)
    packed = quantize_blockwise(weight, QuantFormat.parse(format))
    layers: list[Layer] = []
    while not layers or len(layers) * layers[0].nbytes < spread:
        prepared = backend.prepare(copy.deepcopy(packed))
        runner = backend.bind(OneLayer(embedding, prepared))
        layers.append(Layer(runner.logits, prepared.nbytes, torch.float32))
    return layers


class Runner:
    """The prepared copies of one layer."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options, self.layers = options, list[Layer]()
        self.columns = self.turn = 0

    def prepare(self, kernel: str, rows: int, columns: int, spread: int = 0) -> dict[str, Any]:
        """Make the layer, in as many copies as it takes to reach `spread` bytes (at least one)."""
        self.layers.clear()
        self.columns, self.turn = columns, 0
        weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) / columns**0.5
        if kernel in KERNELS:
            make = KERNELS[kernel]
            self.layers.append(make(weight))
            while len(self.layers) * self.layers[0].nbytes < spread:
                self.layers.append(make(weight))
        else:
            self.layers.extend(kbit_copies(kernel, weight, spread, self.options))
        return {"bytes": self.layers[0].nbytes, "copies": len(self.layers), "relative_error": self._error(weight)}

    def run(self, tokens: int, seconds: float = 0.3) -> dict[str, Any]:
        """Multiply x (tokens, K) by copy after copy for about `seconds`; time per product."""
        x = self._x(tokens)
        count, begin = 0, perf_counter()
        while (passed := perf_counter() - begin) < seconds or count < 2:
            self.layers[self.turn].run(x)
            self.turn = (self.turn + 1) % len(self.layers)
            count += 1
        return {"seconds": passed / count, "bytes": self.layers[0].nbytes}

    def _x(self, tokens: int) -> torch.Tensor:
        """Whole numbers that int8 and bf16 hold exactly, so that all kernels see the same input."""
        x = (torch.randn(tokens, self.columns, generator=torch.Generator().manual_seed(1)) * 30).round()
        return x.clamp(-127, 127).to(self.layers[0].dtype)

    def _error(self, weight: torch.Tensor) -> float:
        """|x W^T - result| / |x W^T| for 32 tokens (oneDNN's int8 product wants more than 16)."""
        x, layer = self._x(32), self.layers[0]
        result = layer.run(x).float()
        if layer.scale is not None:
            result = result * layer.scale
        exact = x.float() @ weight.t()
        return float((result - exact).norm() / exact.norm())


def bandwidth(seconds: float = 0.5) -> dict[str, float]:
    """Bytes per second that this process reads from memory with its threads: the best of many sums over 256 MB."""
    data = torch.ones(64 << 20, dtype=torch.float32)
    best, count, end = float("inf"), 0, perf_counter() + seconds
    while perf_counter() < end or count < 5:
        begin = perf_counter()
        data.sum()
        best = min(best, perf_counter() - begin)
        count += 1
    return {"bytes_per_second": size(data) / best}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--compute", help="kbit's arithmetic: int8, bf16 or fp32; its default if not given")
    arguments = parser.parse_args()
    out = claim_stdout()
    torch.set_grad_enabled(False)
    torch.set_num_threads(arguments.threads)
    runner = Runner({"threads": arguments.threads, "compute": arguments.compute})
    serve(out, {"kernels": list(KERNELS)}, {"prepare": runner.prepare, "run": runner.run, "bandwidth": bandwidth})


if __name__ == "__main__":
    main()
