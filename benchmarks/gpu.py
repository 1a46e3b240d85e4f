"""What the GPU's benchmarks measure with (`kbit.gpu_check.measuring`), and whose GPU it is.

None of this has run on a GPU here; tests/benchmarks/test_gpu_benchmarks.py runs it with stand-ins for what a GPU does.
"""

from __future__ import annotations

from typing import Any

import torch

from kbit.gpu_check.measuring import Rotation as Rotation
from kbit.gpu_check.measuring import assert_product as assert_product
from kbit.gpu_check.measuring import bandwidth, peak
from kbit.gpu_check.measuring import copies_for as copies_for
from kbit.gpu_check.measuring import relative_error as relative_error
from kbit.gpu_check.measuring import roofline as roofline
from kbit.gpu_check.measuring import timed as timed


def facts() -> dict[str, Any]:
    """What ran it, for a report."""
    import triton

    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": str(torch.__version__),
        "triton": str(triton.__version__),
        "copy_GB_per_s": bandwidth() / 1e9,
        "fp16_TFLOP_per_s": peak() / 1e12,
    }
