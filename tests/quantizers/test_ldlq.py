"""Rounding with a calibration: what its errors cost, in every kind of format, and that nothing else changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from rounding_cases import problem

from kbit.calibration.factors import Factors
from kbit.formats.blockwise import quantize_blockwise
from kbit.formats.planes_codec import PlanesTensor
from kbit.formats.quant_format import QuantFormat
from kbit.host.errors import KbitError
from kbit.quantizers.ldlq import Feedback, round_matrix, round_with
from kbit.quantizers.settings import Settings

SEARCH, ONE_SIDED, TWO_SIDED = Settings(feedback=False), Settings(two_sided=False), Settings()


FORMATS = ["nf3-b64", "lloyd2-b32", "int4-b64-asym", "nf4-b64-dq", "quantile3-b64", "float4e2m1-b16-bf16", "lloyd3-row"]


@pytest.mark.parametrize("text", [*FORMATS, "int8-b32-fp32"])
def test_each_step_costs_less(text: str) -> None:
    format = QuantFormat.parse(text)
    weight, factors = problem()
    costs = [factors.divergence(weight - quantize_blockwise(weight, format).dequantize())]
    for settings in (SEARCH, ONE_SIDED, TWO_SIDED):
        rounded = round_matrix(weight, format, factors, settings)
        assert rounded.format == format
        assert {name: tuple(part.shape) for name, part in rounded.stored.items()} == {
            name: part.shape for name, part in format.parts(*weight.shape).items()
        }
        costs.append(factors.divergence(weight - rounded.dequantize()))
    assert max(costs[:2]) > costs[2] > costs[3]


@pytest.mark.parametrize("text", FORMATS)
def test_searched_scales_cost_less_of_what_they_are_searched_for(text: str) -> None:
    """The diagonal alone, that is: of the whole factor they may cost more, where directions are shared."""
    format = QuantFormat.parse(text)
    weight, factors = problem()
    errors = [weight - quantize_blockwise(weight, format).dequantize()]
    errors.append(weight - round_matrix(weight, format, factors, SEARCH).dequantize())
    plain, searched = (float((error.square() @ factors.inputs.diagonal()).sum()) for error in errors)
    assert searched <= plain * 1.02  # the damping is searched for, too


@pytest.mark.parametrize("shape", [(1, 1), (1, 70), (17, 16), (16, 33), (35, 129)])
@pytest.mark.parametrize("text", FORMATS)
def test_odd_shapes(text: str, shape: tuple[int, int]) -> None:
    weight, factors = problem(*shape)
    rounded = round_matrix(weight, QuantFormat.parse(text), factors, TWO_SIDED)
    assert rounded.shape == shape
    assert bool(torch.isfinite(rounded.dequantize()).all())


@pytest.mark.parametrize("text", ["nf4-b64", "int3-b32-asym", "nf4-b64-dq"])
def test_without_factors_and_search_it_is_rounding_to_nearest(text: str) -> None:
    format = QuantFormat.parse(text)
    weight, _ = problem()
    rounded = round_matrix(weight, format, None, Settings(search=False))
    plain = quantize_blockwise(weight, format)
    assert all(torch.equal(rounded.stored[name], plain.stored[name]) for name in plain.stored)


def test_equal_factors_of_all_directions_leave_nothing_to_pass_on() -> None:
    weight, _ = problem()
    identity = Factors(torch.eye(96), torch.eye(40))
    format = QuantFormat.parse("nf3-b64")
    two_sided, searched = (round_matrix(weight, format, identity, s) for s in (TWO_SIDED, SEARCH))
    assert torch.equal(two_sided.codes(), searched.codes())
    assert torch.equal(two_sided.scales, searched.scales)


@pytest.mark.parametrize("inputs", [torch.zeros(96, 96), torch.ones(96, 96), torch.eye(96) * 1e-20])
def test_factors_that_say_little(inputs: torch.Tensor) -> None:
    """Inputs that are never there, that are all the same, or tiny."""
    weight, _ = problem()
    rounded = round_matrix(weight, QuantFormat.parse("nf4-b64"), Factors(inputs, torch.zeros(40, 40)), TWO_SIDED)
    assert float((rounded.dequantize() - weight).square().mean()) < 1.5 * weight.square().mean()


def test_a_head_is_rounded_one_sided() -> None:
    weight, factors = problem()
    assert factors.outputs is not None
    diagonal = Factors(factors.inputs, factors.outputs.diagonal())
    format = QuantFormat.parse("nf3-b64")
    assert torch.equal(
        round_matrix(weight, format, diagonal, TWO_SIDED).codes(),
        round_matrix(weight, format, factors, ONE_SIDED).codes(),
    )


def test_threads_do_not_show() -> None:
    weight, factors = problem(64, 160)
    format, found = QuantFormat.parse("nf3-b64"), []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(round_matrix(weight, format, factors, TWO_SIDED).codes())
    torch.set_num_threads(before)
    assert torch.equal(*found)


def test_broken_weights_are_refused() -> None:
    weight, factors = problem()
    weight[3, 5] = torch.nan
    with pytest.raises(KbitError, match="q_proj: 1 weights are NaN or infinite"):
        round_matrix(weight, QuantFormat.parse("nf4-b64"), factors, TWO_SIDED, name="q_proj")
    weight[3, 5] = 1e9
    with pytest.raises(KbitError, match=r"q_proj: scales up to 1e\+09 do not fit fp16"):
        round_matrix(weight, QuantFormat.parse("nf4-b64"), factors, TWO_SIDED, name="q_proj")


STATIC, ORDERED = Settings(static_scales=True), Settings(static_scales=True, act_order=True)


def plainly(weight: torch.Tensor, factors: Factors, ordered: PlanesTensor, order: torch.Tensor) -> torch.Tensor:
    """One-sided feedback column by column, in float64, under the scales of `ordered`: what the codes stand for."""
    columns = weight.shape[1]
    block = ordered.format.block_size or columns
    scales = ordered.scales.double().repeat_interleave(block, dim=1)[:, :columns]
    offsets = 0 * scales
    if ordered.offsets is not None:
        offsets = ordered.offsets.double().repeat_interleave(block, dim=1)[:, :columns]
    inputs = factors.inputs.double()[order[:, None], order]
    inputs = inputs / inputs.diagonal().mean()
    lower = torch.linalg.cholesky(inputs + ORDERED.input_damping * torch.eye(columns))
    lower = lower / lower.diagonal()
    values, error = weight.double().clone(), torch.zeros_like(weight, dtype=torch.float64)
    for place in reversed(range(columns)):
        column = int(order[place])
        target = weight[:, column].double() + error @ lower[:, place]
        every = ordered.codebook.double()[:, None] * scales[:, column] + offsets[:, column]
        values[:, column] = every.gather(0, (every - target).abs().argmin(dim=0)[None])[0]
        error[:, place] = weight[:, column].double() - values[:, column]
    return values


@pytest.mark.parametrize("shape", [(1, 1), (1, 70), (17, 16), (16, 33), (35, 129)])
@pytest.mark.parametrize("text", ["nf3-b64", "int4-b32-asym", "nf4-b64-dq", "lloyd3-row"])
def test_act_order_is_feedback_in_another_order(text: str, shape: tuple[int, int]) -> None:
    weight, factors = problem(*shape)
    order = torch.argsort(factors.inputs.diagonal(), stable=True)
    one_sided = replace(ORDERED, two_sided=False)
    found = round_matrix(weight, QuantFormat.parse(text), factors, one_sided)
    plain = plainly(weight, factors, found, order)
    # Targets that lie between two values to within float32's rounding may go either way, and change those after them.
    alike = ((found.dequantize() - plain).abs() < 1e-4).all(dim=1)
    assert alike.float().mean() > 0.9


@pytest.mark.parametrize("text", FORMATS)
def test_static_scales_are_those_of_the_weights_alone(text: str) -> None:
    weight, factors = problem()
    format = QuantFormat.parse(text)
    live, static, ordered = (
        round_matrix(weight, format, factors, settings) for settings in (TWO_SIDED, STATIC, ORDERED)
    )
    costs = [factors.divergence(weight - rounded.dequantize()) for rounded in (static, ordered)]
    nearest = factors.divergence(weight - quantize_blockwise(weight, format).dequantize())
    assert max(costs) < 0.8 * nearest
    importance = Feedback.of(factors, STATIC, 96).importance
    alone = round_with(weight, format, Feedback(None, importance, None, None), Settings())
    assert torch.equal(static.scales, alone.scales)
    assert not torch.equal(static.codes(), ordered.codes())
    assert format.double_quant or not torch.equal(static.scales, live.scales)


def test_options_that_came_later_leave_the_default_as_it_was() -> None:
    assert set(Settings().identity) == {
        "feedback", "two_sided", "sweeps", "search", "input_damping", "output_damping"
    }  # fmt: skip
    assert ORDERED.identity["act_order"]
