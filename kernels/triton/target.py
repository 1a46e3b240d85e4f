"""Which GPU the kernels are about to run on, by name."""

from __future__ import annotations

import triton


def current_arch() -> str:
    """The architecture of the active GPU: "sm_90", "gfx942" and so on; "interpreter" where Triton interprets.

    Raises:
        RuntimeError: there is no GPU (from Triton).
    """
    if triton.knobs.runtime.interpret:
        return "interpreter"
    target = triton.runtime.driver.active.get_current_target()
    if target.backend == "cuda":
        return f"sm_{target.arch}"
    return str(target.arch).split(":")[0]
