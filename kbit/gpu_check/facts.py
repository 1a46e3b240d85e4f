"""Step 0: whose GPU this is, and with which software."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.util import find_spec

from kbit import __version__
from kbit.backends.gpu import driver_version, kernels_hash
from kbit.gpu_check.place import Place, Row
from kbit.host.errors import UnsupportedError


def items(place: Place) -> Sequence[str]:
    return ["facts"]


def run(place: Place, item: str) -> list[Row]:
    """One row: the GPU, its driver, versions, and whether kbit's compiled module is there.

    Raises:
        UnsupportedError: there is no GPU.
    """
    import numpy
    import torch

    if place.device != "cpu" and not torch.cuda.is_available():
        raise UnsupportedError("torch sees no GPU. Is there one, and is this torch a CUDA or ROCm build?")
    import triton

    from kbit.kernels.triton.target import current_arch

    row: Row = {
        "gpu": "Triton's interpreter",
        "driver": "",
        "kbit": __version__,
        "kernels": kernels_hash(),
        "torch": str(torch.__version__),
        "triton": str(triton.__version__),
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "compiled_module": _has_compiled_module(),
    }
    if place.device == "cpu":
        return [row]
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return [
        row
        | {
            "gpu": properties.name,
            "driver": driver_version(),
            "arch": current_arch(),
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda or f"HIP {torch.version.hip}",
        }
    ]


def _has_compiled_module() -> bool:
    try:
        return find_spec("kbit._native") is not None
    except ImportError:  # a checkout that is not compiled says what to do
        return False
