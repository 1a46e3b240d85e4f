"""Which backend runs, decided once and in one place."""

from __future__ import annotations

from kbit.errors import UnsupportedError, UsageError
from kbit.ops.backend import Backend
from kbit.ops.reference_backend import ReferenceBackend

DEVICES = ("auto", "cpu", "cuda")


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
