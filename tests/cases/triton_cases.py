"""Where the tests of Triton kernels run; how far a result may be from the reference: `kbit.gpu_check.bounds`.

Importing this sets TRITON_INTERPRET=1 unless KBIT_TEST_DEVICE=cuda, so it must come before anything imports triton.
"""

from __future__ import annotations

import os

import pytest
import torch

from kbit.gpu_check.bounds import FP32_UNIT as FP32_UNIT
from kbit.gpu_check.bounds import assert_within as assert_within
from kbit.gpu_check.bounds import product_bound as product_bound
from kbit.gpu_check.bounds import rounded as rounded
from kbit.gpu_check.bounds import unit as unit

ON_GPU = os.environ.get("KBIT_TEST_DEVICE", "cpu") == "cuda"
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HALF = (torch.float16, torch.bfloat16)


@pytest.fixture(scope="session")
def device() -> str:
    """ "cuda" where KBIT_TEST_DEVICE says so, else "cpu": kernels run in Triton's interpreter, repaired."""
    if ON_GPU:
        if not torch.cuda.is_available():
            pytest.fail("KBIT_TEST_DEVICE=cuda, but torch sees no GPU")
        return "cuda"
    pytest.importorskip("triton")
    from triton_interpreter import install

    install()
    return "cpu"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With KBIT_SAMPLE=n, keep about n tests, spread evenly over each test function's cases, and at least one of each.

    (A hook where this module is loaded with -p triton_cases, as tools/ttsem_check.py does.)
    """
    sample = int(os.environ.get("KBIT_SAMPLE", "0"))
    if not sample:
        return
    functions: dict[str, list[pytest.Item]] = {}
    for item in items:
        functions.setdefault(item.nodeid.split("[")[0], []).append(item)
    each = max(1, sample // max(1, len(functions)))
    items[:] = [cases[i * len(cases) // each] for cases in functions.values() for i in range(each) if i < len(cases)]
