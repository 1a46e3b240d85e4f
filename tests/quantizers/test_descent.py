"""Coordinate descent over a rounded matrix: against its plain meaning, and that it only ever lowers the cost."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from rounding_cases import problem

from kbit import _native
from kbit.calibration.factors import Factors
from kbit.formats.blockwise import matrix_codebook, quantize_blockwise, used_levels
from kbit.formats.quant_format import QuantFormat
from kbit.quantizers.descent import Curvature, Rounded, descend
from kbit.quantizers.ldlq import round_matrix
from kbit.quantizers.settings import Settings

TWO_SIDED = Settings()
FORMATS = ["nf3-b64", "int4-b64-asym", "lloyd2-b32", "nf4-b64-dq", "lloyd3-row", "int8-b32-fp32"]
SHAPES = [(1, 1), (5, 70), (16, 64), (35, 129)]


def start(text: str, shape: tuple[int, int]) -> tuple[torch.Tensor, Rounded, Curvature]:
    """A matrix rounded to nearest, in float32 scales of the stored values, and what its errors cost."""
    format = QuantFormat.parse(text)
    weight, factors = problem(*shape)
    assert factors.outputs is not None
    matrix = quantize_blockwise(weight, format)
    levels, codes_of_levels = used_levels(matrix_codebook(weight, format))
    rounded = Rounded(
        levels, codes_of_levels, min(format.block_size or shape[1], shape[1]),
        "fp32" if format.double_quant else format.scale_dtype, format.double_quant, matrix.codes(), matrix.scales.clone(),
        None if matrix.offsets is None else matrix.offsets.clone(),
    )  # fmt: skip
    return weight, rounded, Curvature(factors.inputs, factors.outputs)


def values(rounded: Rounded) -> torch.Tensor:
    table = torch.zeros(256, dtype=torch.float64)
    table[rounded.codes_of_levels.int()] = rounded.levels.double()
    columns = rounded.codes.shape[1]
    found = table[rounded.codes.int()] * rounded.scales.double().repeat_interleave(rounded.block, 1)[:, :columns]
    if rounded.offsets is not None:
        found += rounded.offsets.double().repeat_interleave(rounded.block, 1)[:, :columns]
    return found


def cost(weight: torch.Tensor, rounded: Rounded, curvature: Curvature) -> float:
    error = weight.double() - values(rounded)
    outputs = torch.eye(len(error)) if curvature.outputs is None else curvature.outputs
    return float((outputs.double() @ error @ curvature.inputs.double() * error).sum())


def plain_sweep(weight: torch.Tensor, rounded: Rounded, curvature: Curvature) -> None:
    """What one sweep means: every number in turn to the best of its values, in the kernel's order, in float64.

    Slopes are computed anew for every step.
    """
    inputs = curvature.inputs.double()
    outputs = torch.eye(len(weight)).double() if curvature.outputs is None else curvature.outputs.double()
    levels, block, columns = rounded.levels.double(), rounded.block, weight.shape[1]
    kind = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[rounded.scale_type]

    def slope(rows: slice | int, at: slice | int) -> torch.Tensor:
        return (outputs[rows] @ (weight.double() - values(rounded)) @ inputs)[..., at]

    for top in reversed(range(0, len(weight), 16)):
        rows = range(top, min(top + 16, len(weight)))
        for n in reversed(range(rounded.scales.shape[1])):
            at = slice(n * block, min((n + 1) * block, columns))
            numbers = [] if rounded.fixed_scales else [rounded.scales] + [o for o in [rounded.offsets] if o is not None]
            for number in numbers:
                for r in rows:
                    shape = values(replace(rounded, scales=torch.ones_like(rounded.scales), offsets=None))[r, at]
                    factor = shape if number is rounded.scales else torch.ones_like(shape)
                    bend = float(outputs[r, r] * (factor @ inputs[at, at] @ factor))
                    if bend <= 0 or (number is rounded.scales and number[r, n] <= 0):
                        continue
                    next = (number[r, n].double() + factor @ slope(r, at) / bend).to(kind).float()
                    if number is rounded.scales and next <= 0:
                        continue
                    before = cost(weight, rounded, curvature)
                    kept = number[r, n].clone()
                    number[r, n] = next
                    if cost(weight, rounded, curvature) >= before:
                        number[r, n] = kept
            for j in reversed(range(at.start, at.stop)):
                for r in rows:
                    scale = float(rounded.scales[r, n])
                    offset = 0.0 if rounded.offsets is None else float(rounded.offsets[r, n])
                    if scale > 0:
                        best = values(rounded)[r, j] + slope(r, j) / (outputs[r, r] * inputs[j, j])
                        nearest = (levels * scale + offset - best).abs().argmin()
                        rounded.codes[r, j] = rounded.codes_of_levels[nearest]


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("shape", [(1, 1), (17, 21)])
def test_equals_its_plain_meaning(text: str, shape: tuple[int, int]) -> None:
    """A value that lies between two levels to rounding may fall either way: the cost is the same to that order."""
    weight, rounded, curvature = start(text, shape)
    _, plain, _ = start(text, shape)
    descend(rounded, weight - values(rounded).float(), curvature, 1)
    plain_sweep(weight, plain, curvature)
    assert float((rounded.codes == plain.codes).float().mean()) > 0.98
    assert cost(weight, rounded, curvature) == pytest.approx(cost(weight, plain, curvature), rel=2e-3)


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("two_sided", [False, True])
def test_every_sweep_lowers_the_cost(text: str, shape: tuple[int, int], two_sided: bool) -> None:
    weight, rounded, curvature = start(text, shape)
    if not two_sided:
        curvature = replace(curvature, outputs=None)
    scales = rounded.scales.clone()
    costs = [cost(weight, rounded, curvature)]
    for _ in range(3):
        descend(rounded, weight - values(rounded).float(), curvature, 1)
        costs.append(cost(weight, rounded, curvature))
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(costs))
    if shape[1] > 1:
        assert costs[1] < 0.97 * costs[0]
    if text.endswith("dq"):
        assert torch.equal(rounded.scales, scales)


def test_several_sweeps_are_single_ones_in_turn() -> None:
    weight, together, curvature = start("nf3-b64", (35, 129))
    _, singly, _ = start("nf3-b64", (35, 129))
    descend(together, weight - values(together).float(), curvature, 2)
    for _ in range(2):
        descend(singly, weight - values(singly).float(), curvature, 1)
    assert float((together.codes == singly.codes).float().mean()) > 0.99


@pytest.mark.parametrize("isa", _native.instruction_sets())
@pytest.mark.parametrize("text", ["nf3-b64", "int4-b64-asym"])
def test_every_instruction_set_has_the_same_bits(isa: str, text: str) -> None:
    found = []
    for name in ("scalar", isa):
        weight, rounded, curvature = start(text, (13, 129))
        change, size = torch.empty(13, 129), len(weight)
        error = weight - values(rounded).float()
        assert curvature.outputs is not None
        slopes = curvature.outputs @ error @ curvature.inputs
        _native.descend_rows(
            slopes, curvature.inputs, curvature.outputs[:size, :size], rounded.levels, rounded.codes_of_levels,
            rounded.block, rounded.scale_type, False, rounded.codes, rounded.scales, rounded.offsets, change, name,
        )  # fmt: skip
        found.append((rounded.codes, rounded.scales, change))
        assert torch.allclose(change, error - (weight - values(rounded).float()), atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("inputs", [torch.zeros(96, 96), torch.ones(96, 96), torch.eye(96) * 1e-20])
def test_factors_that_say_little(inputs: torch.Tensor) -> None:
    """Inputs that are never there, that are all the same, or tiny."""
    weight, _ = problem()
    settings = replace(TWO_SIDED, sweeps=2)
    rounded = round_matrix(weight, QuantFormat.parse("nf4-b64"), Factors(inputs, torch.zeros(40, 40)), settings)
    assert float((rounded.dequantize() - weight).square().mean()) < 1.5 * weight.square().mean()


@pytest.mark.parametrize("change", [{"block": 0}, {"codes": torch.zeros(3, 3, dtype=torch.uint8)}])
def test_wrong_arguments_are_refused(change: dict[str, object]) -> None:
    weight, rounded, curvature = start("nf3-b64", (5, 70))
    with pytest.raises(ValueError, match=r"a block has|codes must have shape \(5, 70\)"):
        descend(replace(rounded, **change), weight, curvature, 1)  # type: ignore[arg-type]


def test_rounding_ends_with_it() -> None:
    for text in ("nf3-b64", "int4-b64-asym", "nf4-b64-dq"):
        weight, factors = problem()
        format = QuantFormat.parse(text)
        costs = [
            factors.divergence(weight - round_matrix(weight, format, factors, settings).dequantize())
            for settings in (TWO_SIDED, replace(TWO_SIDED, sweeps=2))
        ]
        assert costs[1] < 0.97 * costs[0]
