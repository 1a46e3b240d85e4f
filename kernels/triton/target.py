"""Which GPU the kernels are about to run on, and its name."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
import triton


def active(device: torch.device | str) -> AbstractContextManager[Any]:
    """Within this block kernels are launched on `device`.

    Triton launches on the thread's current GPU wherever the tensors are, and every thread begins with GPU 0. Devices
    other than GPUs (the interpreter's) need nothing.
    """
    device = torch.device(device)
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def current_arch() -> str:
    """The architecture of the active GPU: "sm_90", "gfx942" and so on; "interpreter" where Triton interprets.

    Raises:
        RuntimeError: there is no GPU (from Triton).
    """
    if triton.knobs.runtime.interpret:
        return "interpreter"
    driver = triton.runtime.driver.active
    return _arch(driver, driver.get_current_device())


@lru_cache(maxsize=64)
def _arch(driver: Any, device: int) -> str:
    # Asked at every launch; the driver would ask the runtime each time (on ROCm for all properties of the GPU).
    target = driver.get_current_target()
    if target.backend == "cuda":
        return f"sm_{target.arch}"
    return str(target.arch).split(":")[0]
