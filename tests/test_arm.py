"""The kernels for Arm, compiled by Debian's cross-compiler and run under qemu-user, or natively on Arm.

Verified this way: every kernel of the sets "neon" and "i8mm" gives the plain C++ kernels' bytes, and those give the
bytes that they give on this machine. Not verified: speed, and any real Arm processor that this is not run on.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CHECK = Path(__file__).parents[1] / "tools" / "arm" / "check.sh"
ON_ARM = platform.machine() in ("aarch64", "arm64")
NEEDED = ("c++",) if ON_ARM else ("aarch64-linux-gnu-g++", "qemu-aarch64", "c++")
MISSING = [name for name in NEEDED if shutil.which(name) is None]


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("KBIT_TEST_MACHINE_CODE"), reason="takes minutes: set KBIT_TEST_MACHINE_CODE=1")
@pytest.mark.skipif(platform.system() != "Linux", reason="tools/arm/check.sh is for Linux")
@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
def test_arm_kernels_equal_plain_ones(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("CXX", "ARM_CXX")}
    check = subprocess.run(
        ["sh", CHECK, tmp_path, "quick"], env=environment, capture_output=True, text=True, timeout=1800
    )
    assert check.returncode == 0, check.stdout + check.stderr
    comparisons, differences = re.findall(r"(\d+) comparisons, (\d+) differences", check.stderr)[0]
    assert int(comparisons) > 3000
    assert int(differences) == 0
    if not ON_ARM:
        assert check.stdout.startswith("the same results")
