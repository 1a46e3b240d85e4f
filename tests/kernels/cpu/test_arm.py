"""The kernels for Arm, compiled by Debian's cross-compiler and run under qemu-user, or natively on Arm.

Verified this way: every kernel of the sets "neon" and "i8mm" gives the plain C++ kernels' bytes, and those give the
bytes that they give on this machine. Not verified: speed, and any real Arm processor that this is not run on.
"""

from __future__ import annotations

import platform
from pathlib import Path

from machine_code_cases import machine_code, run_check

ON_ARM = platform.machine() in ("aarch64", "arm64")


@machine_code(*(("c++",) if ON_ARM else ("aarch64-linux-gnu-g++", "qemu-aarch64", "c++")))
def test_arm_kernels_equal_plain_ones(tmp_path: Path) -> None:
    check = run_check("arm", tmp_path)
    if not ON_ARM:
        assert check.stdout.startswith("the same results")
