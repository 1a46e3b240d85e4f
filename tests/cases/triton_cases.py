"""Where the tests of Triton kernels run, and how far a result may be from the reference.

Importing this sets TRITON_INTERPRET=1 unless KBIT_TEST_DEVICE=cuda, so it must come before anything imports triton.
"""

from __future__ import annotations

import os

import pytest
import torch

ON_GPU = os.environ.get("KBIT_TEST_DEVICE", "cpu") == "cuda"
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HALF = (torch.float16, torch.bfloat16)
FP32_UNIT = 2.0**-24


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


def unit(dtype: torch.dtype) -> float:
    """Rounding unit: the largest relative error of rounding to nearest. 2^-11, 2^-8 and 2^-24 for fp16, bf16, fp32."""
    return torch.finfo(dtype).eps / 2


def rounded(expected: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Bound on the error of rounding `expected` to dtype once, smallest numbers included."""
    return unit(dtype) * expected.abs().float() + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2


def product_bound(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.dtype,
    operands: torch.dtype = torch.float32,
    *,
    decoded: int = 3,
) -> torch.Tensor:
    """How far x W^T may be from the reference's, element by element: (M, K) and (N, K) -> (M, N).

    A sum of K products in any order is within K u of the sum of magnitudes (Higham, section 3.1), here and in the
    reference; the weights and x carry the rounding of the type that they are multiplied in.

    Args:
        x: as the kernel gets it.
        weight: as the reference has it.
        out: type of the result.
        operands: type of the factors: fp16 or bf16 where tensor cores multiply.
        decoded: roundings of a decoded weight (code to level, times scale, plus offset).
    """
    magnitudes = x.abs().float() @ weight.abs().float().T
    sums = 2 * x.shape[-1] * FP32_UNIT
    factors = decoded * FP32_UNIT + (0 if operands == torch.float32 else 2 * unit(operands))
    error = (sums + factors) * magnitudes
    return error + rounded(x.float() @ weight.float().T, out) * (1 + 2 * unit(out))


def assert_within(got: torch.Tensor, expected: torch.Tensor, bound: torch.Tensor | float) -> None:
    """|got - expected| <= bound everywhere, with the worst element in the message."""
    assert got.shape == expected.shape, f"{tuple(got.shape)} is not {tuple(expected.shape)}"
    error = (got.double().cpu() - expected.double().cpu()).abs()
    limit = torch.as_tensor(bound, dtype=torch.float64).cpu().expand_as(error)
    assert not torch.isnan(error).any(), f"{int(torch.isnan(error).sum())} results are NaN"
    wrong = error > limit
    if wrong.any():
        worst = (error / limit.clamp(min=1e-300)).flatten().argmax()
        index = tuple(int(i) for i in torch.unravel_index(worst, error.shape))
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} are too far off; worst at {index}: {got[index].item()!r} is not "
            f"{expected[index].item()!r} within {limit[index].item():.3g}"
        )
