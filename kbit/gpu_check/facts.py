"""Step 0: whose GPU this is, and with which software."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from kbit import __version__
from kbit.gpu_check.place import Place, Row
from kbit.host.errors import UnsupportedError

NVIDIA_VERSION, AMD_VERSION = Path("/proc/driver/nvidia/version"), Path("/sys/module/amdgpu/version")


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
    from kbit.tuning.stored import kernels_hash

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


def driver_version() -> str:
    """The kernel driver's, as it says it; "" where nothing does. Touches no GPU."""
    for file in (NVIDIA_VERSION, AMD_VERSION):
        try:
            line = file.read_text(errors="replace").splitlines()[0]
        except (OSError, IndexError):
            continue
        words = [word for word in line.split() if word[:1].isdigit() and "." in word]
        return words[0] if words else line.strip()
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return said.strip().splitlines()[0] if said.strip() else ""


def _has_compiled_module() -> bool:
    try:
        return find_spec("kbit._native") is not None
    except ImportError:  # a checkout that is not compiled says what to do
        return False
