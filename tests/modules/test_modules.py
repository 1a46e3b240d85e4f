"""k-bit layers in models of torch: what they compute, what flows back through them, and what moving them leaves alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from matmul_cases import exact, inputs, int8_bound, weights
from torch import nn
from toy_codec import NestedBits
from triton_cases import ON_GPU, unit

import kbit
from kbit.formats.quant_format import QuantFormat
from kbit.formats.quant_tensor import QuantTensor
from kbit.kernels import reference
from kbit.modules.convert import dequantize_, kbit_layers, set_compute
from kbit.modules.embedding import KbitEmbedding
from kbit.modules.linear import KbitLinear
from kbit.modules.packed import PackedMatrix
from kbit.modules.products import product_of

FORMATS = ["lloyd2-b16", "nf3-b64", "nf4-b64-dq", "lloyd5-b32", "int6-b64-asym", "float7-b64", "int8-row-fp32"]


def bits_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: values.clone() for name, values in module.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_products_are_those_of_the_values(format: str, dtype: torch.dtype) -> None:
    weight, bias = weights(format, 37, 100), torch.randn(37)
    layer = KbitLinear([weight], bias)
    x = inputs(6, 100).to(dtype).view(2, 3, 100)
    expected, size = exact(weight, x.reshape(6, 100).float())
    found = layer(x)
    assert (found.dtype, found.shape) == (dtype, (2, 3, 37))
    exactly = torch.from_numpy(expected) + bias.double()
    sums = 100 * unit(torch.float32) * torch.from_numpy(size)  # of at most 100 terms, in any order
    # The product and the sum with the bias are each rounded to x's type.
    bound = sums + 2.02 * unit(dtype) * (exactly.abs() + bias.abs().double())
    assert ((found.reshape(6, 37).double() - exactly).abs() <= bound).all()
    assert layer.computes.startswith("native")


def test_int8_is_within_its_rounding() -> None:
    weight, x = weights("nf4-b64", 37, 192), inputs(5, 192)
    layer = KbitLinear([weight], compute="int8")
    expected, size = exact(weight, x)
    difference = abs(layer(x).numpy() - expected)
    assert (difference <= int8_bound(weight, x) + 192 * 2.0**-22 * size).all()
    assert difference.max() > 0
    assert abs(set_compute(nn.Sequential(layer), "fp32")(x).numpy() - expected).max() < difference.max()


def test_parts_in_another_order() -> None:
    parts = [weights("nf3-b16", 20, 48), weights("int8-b16", 12, 48)]
    order = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    layer, x = KbitLinear(parts, order=order), inputs(4, 48).requires_grad_()
    whole = torch.cat([part.dequantize() for part in parts])[order]
    assert torch.equal(layer.weight, whole)
    torch.testing.assert_close(layer(x), x @ whole.T, rtol=1e-5, atol=1e-4)
    layer(x).square().sum().backward()
    grad, x.grad = x.grad, None
    (x @ whole.T).square().sum().backward()
    assert grad is not None
    assert x.grad is not None
    torch.testing.assert_close(grad, x.grad, rtol=1e-4, atol=1e-4 * float(x.grad.abs().max()))


def test_gradients_flow_to_inputs_and_biases_only() -> None:
    weight, bias = weights("nf4-b64", 16, 64), torch.randn(16)
    layer, plain = KbitLinear([weight], bias.requires_grad_()), nn.Linear(64, 16)
    plain.weight.data, plain.bias.data = weight.dequantize(), bias.detach().clone()
    x, y = (inputs(3, 64).requires_grad_() for _ in range(2))
    (layer(x) ** 2).sum().backward()
    (plain(y) ** 2).sum().backward()
    assert x.grad is not None
    assert y.grad is not None
    assert layer.bias is not None
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-5 * float(y.grad.abs().max()))
    torch.testing.assert_close(layer.bias.grad, plain.bias.grad, rtol=1e-5, atol=1e-4)
    assert [name for name, _ in layer.named_parameters()] == ["bias"]


def test_a_format_without_kernels_is_multiplied_by_the_reference() -> None:
    values = torch.randn(8, 40, generator=torch.Generator().manual_seed(2))
    codec = NestedBits(4)
    matrix = codec.encode(lambda start, stop: values[start:stop], (8, 40))
    layer, x = KbitLinear([matrix]), inputs(3, 40)
    assert layer.computes == "reference"
    assert torch.equal(layer(x), reference.linear(x, matrix))


def test_triton_multiplies_the_same(device: str) -> None:
    """In the interpreter, unless there is a GPU."""
    from kbit.modules.products import _TritonProduct

    weight, x = weights("nf4-b64", 33, 128), inputs(3, 128)
    product = _TritonProduct(weight.to(device)) if not ON_GPU else product_of(weight.to(device), "fp32")
    for dtype in (torch.float16, torch.bfloat16):
        rounded = x.to(dtype)
        expected, size = exact(weight, rounded.float())
        # Values of the codebook times scales are rounded to the type; sums are in float32.
        bound = (2 * unit(dtype) + 128 * unit(torch.float32)) * size + 1e-6
        assert (abs(product(rounded.to(device)).cpu().numpy() - expected) <= bound).all()


def test_casts_and_copies_leave_codes_and_scales_alone() -> None:
    model = kbit.quantize_(nn.Sequential(nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 5)), bits=3)
    x, before = inputs(2, 48), bits_of(model)
    expected = model(x)
    copied = copy.deepcopy(model)
    model.to(torch.bfloat16).to(torch.float32).half().float()
    packed = {name: values for name, values in model.state_dict().items() if "packed" in name}
    assert same(packed, {name: before[name] for name in packed})
    assert torch.equal(copied(x), expected)
    other = kbit.quantize_(nn.Sequential(nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 5)), bits=3)
    assert not torch.equal(other(x), expected)
    other.load_state_dict(before)
    assert same(bits_of(other), before)
    assert torch.equal(other(x), expected)


def test_what_is_quantized_and_what_is_left() -> None:
    class Own(nn.Linear):
        pass

    def model() -> Any:
        torch.manual_seed(5)
        return nn.ModuleDict({"body": nn.ModuleList([nn.Linear(32, 32), Own(32, 32)]), "head": nn.Linear(32, 7)})

    made = kbit.quantize_(model(), format="int5-b32", skip=["head"])
    assert [name for name, _ in kbit_layers(made)] == ["body.0"]
    expected = QuantFormat.parse("int5-b32").encode(lambda a, b: model()["body"][0].weight[a:b].detach(), (32, 32))
    assert same(dict(made["body"][0].parts[0].stored), dict(expected.stored))
    values = made["body"][0].weight
    plain = dequantize_(made)
    assert not list(kbit_layers(plain))
    assert torch.equal(plain["body"][0].weight, values)
    with pytest.raises(kbit.UsageError, match="no linear layer to quantize"):
        kbit.quantize_(nn.Sequential(nn.ReLU()))
    with pytest.raises(kbit.UsageError, match="bits 1: use a whole number from 2 to 8"):
        kbit.quantize_(model(), bits=1)
    with pytest.raises(kbit.UsageError, match="compute 'fp8': use one of fp32, int8, bf16"):
        kbit.quantize_(model(), compute="fp8")
    with pytest.raises(kbit.UsageError, match="put it into a module"):
        kbit.quantize_(nn.Linear(4, 4))
    damaged = model()
    damaged["head"].weight.data[3, 1] = float("nan")
    with pytest.raises(kbit.KbitError, match="head.weight"):
        kbit.quantize_(damaged)


def test_an_embedding_looks_rows_up(tmp_path: Any) -> None:
    table = weights("lloyd6-b64", 50, 96)
    layer = KbitEmbedding(table, dtype=torch.float16)
    ids = torch.tensor([[3, 49, 0], [7, 7, 12]])
    assert torch.equal(layer(ids), table.dequantize(torch.float16)[ids])
    torch.save(layer.state_dict(), tmp_path / "table.pt")
    again = KbitEmbedding(PackedMatrix(weights("lloyd6-b64", 50, 96)), dtype=torch.float16)
    again.load_state_dict(torch.load(tmp_path / "table.pt"))
    assert torch.equal(again.weight, layer.weight)


def test_a_matrix_keeps_its_parts() -> None:
    matrix = weights("nf4-b64-dq", 9, 130)
    packed = PackedMatrix(matrix)
    found: QuantTensor = packed.matrix
    assert found.stored.keys() == matrix.stored.keys()
    assert all(found.stored[name] is matrix.stored[name] for name in matrix.stored)
    assert torch.equal(found.dequantize(), matrix.dequantize())
