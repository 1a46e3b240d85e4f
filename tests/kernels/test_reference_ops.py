"""The reference operations against torch.nn.functional and against themselves in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from reference_cases import EPS, assert_within, randn

from kbit.formats.blockwise import quantize_blockwise
from kbit.formats.quant_format import QuantFormat
from kbit.host.errors import UnsupportedError
from kbit.kernels import reference


@pytest.mark.parametrize(("lead", "k", "n"), [*itertools.product([(), (1,), (3, 5), (2, 0)], [1, 17, 96], [1, 33])])
def test_linear(lead: tuple[int, ...], k: int, n: int) -> None:
    x, weight, bias = randn(*lead, k), randn(n, k, seed=1), randn(n, seed=2)
    exact = x.double() @ weight.double().T
    # A float32 dot product of n terms is off by at most n eps sum |x||w|, in any order (Higham, section 3.1).
    bound = (k + 1) * EPS * (x.abs().double() @ weight.abs().double().T + bias.abs())
    assert_within(reference.linear(x, weight), exact, bound)
    assert_within(reference.linear(x, weight, bias), exact + bias, bound)
    assert_within(reference.logits(x, weight), exact, bound)
    half = reference.linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16())
    assert_within(
        half, F.linear(x.bfloat16().double(), weight.bfloat16().double(), bias.bfloat16().double()), bound * 1.1
    )


@pytest.mark.parametrize("text", ["nf4-b16", "int3-b32-asym", "int5-row", "nf4-b64-dq"])
def test_quantized_linear_and_embed(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = quantize_blockwise(randn(37, 70), QuantFormat.parse(text))
    dense = weight.dequantize()
    x, bias = randn(2, 3, 70), randn(37)
    expected = reference.linear(x, dense, bias)
    assert torch.equal(reference.linear(x, weight, bias), expected)
    ids = torch.tensor([[0, 36, 5], [5, 5, 1]])
    assert torch.equal(reference.embed(weight, ids), dense[ids])
    # In pieces of 4 rows (the last one shorter): the same weights, perhaps summed in another order.
    monkeypatch.setattr(reference, "SCRATCH_BYTES", 4 * 4 * 70)
    bound = 2 * 71 * EPS * (x.abs() @ dense.abs().T + bias.abs())
    assert_within(reference.linear(x, weight, bias), expected, bound)
    assert torch.equal(reference.embed(dense.half(), ids), dense.half()[ids].float())


@pytest.mark.parametrize("scale", [1.0, 1e-10, 1e15, 0.0])
@pytest.mark.parametrize("shape", [(1,), (7,), (2, 3, 48), (1, 1, 577)])
def test_rms_norm(shape: tuple[int, ...], scale: float) -> None:
    x, weight = randn(*shape) * scale, randn(shape[-1], seed=1)
    exact = F.rms_norm(x.double(), shape[-1:], weight.double(), 1e-6)
    # The mean square is off by K eps relatively, its root by half of that, and three products follow.
    assert_within(reference.rms_norm(x, weight, 1e-6), exact, (shape[-1] / 2 + 5) * EPS * exact.abs())


@pytest.mark.parametrize("kind", reference.ACTIVATIONS)
def test_activations(kind: str) -> None:
    gate = torch.cat([randn(3, 50) * 4, torch.tensor([[0.0, -0.0, 1e-30, 88.0, -88.0] * 10] * 3)])
    up = randn(6, 50, seed=1)
    x = gate.double()
    exact = {
        "silu": x / (1 + torch.exp(-x)),
        "gelu": x * 0.5 * torch.erfc(-x / math.sqrt(2)),
        "gelu_tanh": 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        "relu": x.clamp(min=0),
        "elu": x.clamp(min=0) + torch.expm1(x.clamp(max=0)),
    }[kind]
    # gelu's factor 1 + erf cancels for negative x, so errors are relative to |x|, not to the result.
    assert_within(reference.activate(gate, None, kind), exact, 8 * EPS * x.abs())
    assert_within(reference.activate(gate, up, kind), exact * up, 9 * EPS * (x * up).abs())
    edge = reference.activate(torch.tensor([1e30, -1e30]), None, kind)
    assert edge.tolist() == pytest.approx([1e30, -1.0 if kind == "elu" else 0.0])


def test_unknown_activation() -> None:
    with pytest.raises(UnsupportedError, match="'mish' is not one of silu"):
        reference.activate(torch.zeros(1), None, "mish")
