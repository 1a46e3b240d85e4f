"""Which backend runs, and on how many threads: decided once and in one place."""

from __future__ import annotations

import torch

from kbit.errors import UnsupportedError, UsageError
from kbit.ops.backend import Backend
from kbit.ops.reference_backend import ReferenceBackend

DEVICES = ("auto", "cpu", "cuda")
# More than any machine has. OpenMP ends the process (without a word) when it cannot start its threads.
MAX_THREADS = 1024


def select_backend(device: str, *, expand: bool = True) -> Backend:
    """The backend for a --device value.

    Args:
        device: "auto" (the best this version has: the CPU), "cpu" or "cuda".
        expand: see ReferenceBackend.

    Raises:
        UsageError: no such device.
        UnsupportedError: a device this version has no backend for. It never runs elsewhere instead.
    """
    if device in ("auto", "cpu"):
        return ReferenceBackend(expand=expand)
    if device == "cuda":
        raise UnsupportedError("--device cuda: this version has no GPU backend yet; use --device cpu (or auto)")
    raise UsageError(f"--device {device}: no such device; use one of {', '.join(DEVICES)}")


def check_threads(threads: int) -> None:
    """
    Raises:
        UsageError: a --threads value below 1 or above MAX_THREADS.
    """
    if not 1 <= threads <= MAX_THREADS:
        raise UsageError(f"--threads {threads}: expected at least 1 and at most {MAX_THREADS}")


def set_threads(threads: int | None) -> None:
    """Applies a --threads value, for the whole process; None leaves torch's choice.

    Raises:
        UsageError: see check_threads.
    """
    if threads is not None:
        check_threads(threads)
        torch.set_num_threads(threads)
