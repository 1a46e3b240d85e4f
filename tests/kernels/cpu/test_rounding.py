"""Rounding with feedback, held against its meaning: every code is the nearest to its target, given the errors before it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from kbit import _native

EPS = torch.finfo(torch.float32).eps
SHARES = torch.linspace(0.5, 1.0, 11)


class Rounded(NamedTuple):
    codes: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor | None
    residual: torch.Tensor


class Case(NamedTuple):
    rows: int
    columns: int
    bits: int
    block: int
    asymmetric: bool
    scale_type: str
    feedback: bool
    correction: bool


CASES = [
    Case(1, 1, 2, 16, False, "fp16", True, False),
    Case(16, 64, 4, 64, False, "fp16", True, True),
    Case(19, 131, 3, 64, False, "fp16", True, True),
    Case(5, 200, 8, 16, True, "bf16", True, False),
    Case(33, 90, 2, 90, True, "fp32", True, True),
    Case(7, 300, 5, 256, False, "fp32", True, True),
    Case(16, 70, 4, 32, False, "bf16", False, False),
    Case(2, 129, 6, 4096, False, "fp16", True, False),
]


def inputs(case: Case, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    lower = torch.tril(0.3 * normal(case.columns, case.columns) / case.columns**0.5, -1)
    levels = torch.sort(normal(2**case.bits)).values
    levels = (levels / levels.abs().max()).unique()
    return {
        "weights": normal(case.rows, case.columns),
        "correction": 0.2 * normal(case.rows, case.columns) if case.correction else None,
        "feedback": lower.T.contiguous() if case.feedback else None,
        "importance": normal(case.columns).square() + 0.1,
        "levels": levels,
        "codes_of_levels": torch.randperm(len(levels), generator=generator).to(torch.uint8),
    }


def run(case: Case, given: dict[str, Any], isa: str = "", **changes: Any) -> Rounded:
    blocks = -(-case.columns // min(case.block, case.columns))
    out = Rounded(
        torch.full((case.rows, case.columns), 255, dtype=torch.uint8),
        torch.full((case.rows, blocks), torch.nan),
        torch.full((case.rows, blocks), torch.nan) if case.asymmetric else None,
        torch.full((case.rows, case.columns), torch.nan),
    )
    settings = {
        **given,
        "block": case.block,
        "scale_type": case.scale_type,
        "asymmetric": case.asymmetric,
        "shares": SHARES,
        "given_scales": None,
        "given_offsets": None,
        **changes,
    }
    _native.round_matrix(**settings, **out._asdict(), isa=isa)
    return out


def spread(values: torch.Tensor | None, case: Case) -> torch.Tensor:
    if values is None:
        return torch.zeros(case.rows, case.columns, dtype=torch.float64)
    return values.double().repeat_interleave(min(case.block, case.columns), dim=1)[:, : case.columns]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_codes_are_nearest_to_their_targets(case: Case) -> None:
    given = inputs(case)
    found = run(case, given)
    level_of_code = torch.empty(256, dtype=torch.float64)
    level_of_code[given["codes_of_levels"].long()] = given["levels"].double()
    scales, offsets = spread(found.scales, case), spread(found.offsets, case)
    values = level_of_code[found.codes.long()] * scales + offsets
    weights = given["weights"].double()
    error = weights - values
    targets = weights.clone()
    if case.correction:
        targets += given["correction"].double()
    if case.feedback:
        targets += error @ given["feedback"].double().T
    size = targets.abs().max() + scales.max() + offsets.abs().max()
    bound = EPS * (case.columns + 8) * float(size)
    assert (found.residual.double() - (targets - values)).abs().max() <= bound
    every = given["levels"].double()[:, None, None] * scales + offsets  # (L, N, K)
    nearest = (targets - every).abs().amin(dim=0)
    assert ((targets - values).abs() - nearest).max() <= bound


@pytest.mark.parametrize("case", [case for case in CASES if case.correction or not case.feedback], ids=str)
def test_scales_are_no_worse_than_any_share(case: Case) -> None:
    """For the last block of a row, whose targets hold no feedback yet."""
    given = inputs(case)
    found = run(case, given)
    width = min(case.block, case.columns)
    begin = (case.columns - 1) // width * width
    targets = (given["weights"] + (given["correction"] if case.correction else 0.0))[:, begin:].double()
    importance, levels = given["importance"][begin:].double(), given["levels"].double()

    def cost(scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        values = levels[:, None, None] * scale[:, None] + offset[:, None]
        return (importance * (targets - values).square().amin(dim=0)).sum(dim=1)

    low, high = targets.amin(dim=1), targets.amax(dim=1)
    span = (high - low) / 2 if case.asymmetric else targets.abs().amax(dim=1)
    middle = (high + low) / 2 if case.asymmetric else torch.zeros_like(span)
    offsets = torch.zeros_like(span) if found.offsets is None else found.offsets[:, -1].double()
    chosen = cost(found.scales[:, -1].double(), offsets)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[case.scale_type]
    for share in [*SHARES.tolist(), 1.0]:
        tried = cost((span * share).float().to(dtype).double(), middle.float().to(dtype).double())
        assert (chosen <= tried * (1 + 1e-4) + 1e-6).all()


@pytest.mark.parametrize("isa", _native.instruction_sets())
@pytest.mark.parametrize("case", CASES, ids=str)
def test_instruction_sets_agree_bit_for_bit(case: Case, isa: str) -> None:
    given = inputs(case)
    plain, fast = run(case, given, "scalar"), run(case, given, isa)
    for one, other in zip(plain, fast, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


def test_scales_can_be_given() -> None:
    case = CASES[2]
    given = inputs(case)
    scales = torch.full((case.rows, 3), 0.7)
    assert torch.equal(run(case, given, given_scales=scales).scales, scales)


def test_values_of_the_grid_stay_as_they_are() -> None:
    case = Case(16, 64, 4, 16, False, "fp16", False, False)
    levels = torch.linspace(-1, 1, 15)
    picked = torch.randint(0, 15, (16, 64), generator=torch.Generator().manual_seed(1))
    picked[:, ::16] = 14  # the largest of each block is there
    given = {**inputs(case), "weights": levels[picked], "levels": levels}
    given["codes_of_levels"] = torch.arange(15, dtype=torch.uint8)
    found = run(case, given)
    assert torch.equal(found.codes.long(), picked)
    assert torch.equal(found.scales, torch.ones_like(found.scales))


@pytest.mark.parametrize(
    "weights",
    [torch.zeros(4, 32), torch.full((4, 32), 1e-30), torch.full((4, 32), 60000.0)],
    ids=["0", "tiny", "large"],
)
def test_extreme_weights(weights: torch.Tensor) -> None:
    case = Case(4, 32, 3, 16, False, "fp16", True, False)
    found = run(case, {**inputs(case), "weights": weights})
    assert bool(torch.isfinite(found.scales).all())
    assert bool(torch.isfinite(found.residual).all())
    assert int(found.codes.max()) < 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feedback": torch.zeros(3, 3)}, "feedback must have shape"),
        ({"importance": torch.zeros(3)}, "importance"),
        ({"block": 0}, "at least one column"),
        ({"scale_type": "fp8"}, "fp8"),
        ({"levels": torch.tensor([1.0, 0.0]), "codes_of_levels": torch.zeros(2, dtype=torch.uint8)}, "ascend"),
        ({"levels": torch.tensor([0.0, np.inf]), "codes_of_levels": torch.zeros(2, dtype=torch.uint8)}, "finite"),
        ({"given_scales": torch.zeros(1, 1)}, "given scales must have shape"),
    ],
)
def test_wrong_arguments_are_refused(changes: dict[str, Any], message: str) -> None:
    case = CASES[1]
    with pytest.raises(ValueError, match=message):
        run(case, inputs(case), **changes)
