"""Products with weights that are kept apart from codes in planes, against the reference: few tokens and many, gates,
experts, activations in 8 bits. (Those of trellises are among the trellis's own tests.)"""

from __future__ import annotations

import pytest
import torch
from format_cases import normal
from matmul_cases import weights

triton = pytest.importorskip("triton")

from kbit.backends.triton.weight import TritonMatrix, merge  # noqa: E402
from kbit.formats.quant_tensor import QuantTensor  # noqa: E402
from kbit.host.errors import UnsupportedError  # noqa: E402
from kbit.kernels import reference  # noqa: E402
from kbit.kernels.triton import library  # noqa: E402
from kbit.kernels.triton.codecs.dequantize import dequantize  # noqa: E402
from kbit.kernels.triton.codecs.layout import prepare_weight  # noqa: E402
from kbit.kernels.triton.product.grouped import (  # noqa: E402
    group_tokens,
    grouped_config,
    grouped_matmul,
    stack_experts,
)
from kbit.kernels.triton.product.matmul import gated_matmul, matmul  # noqa: E402
from kbit.kernels.triton.product.rounded import with_activations  # noqa: E402
from kbit.kernels.triton.rows.embed import embed  # noqa: E402


def giants(format: str, rows: int, columns: int) -> QuantTensor:
    """A matrix whose weights that are kept apart are most of what it adds up to."""
    matrix = weights(format, rows, columns)
    matrix.stored["outliers"].mul_(10)
    return matrix


def close(got: torch.Tensor, expected: torch.Tensor, x: torch.Tensor, *matrices: QuantTensor) -> bool:
    """Within float32's roundings of sums of K products."""
    size = sum(x.abs() @ matrix.dequantize().abs().T for matrix in matrices)
    return bool(((got - expected).abs() <= 3 * x.shape[1] * 2.0**-24 * size + 1e-6).all())


@pytest.mark.parametrize("tokens", [1, 4, 7, 70])
@pytest.mark.parametrize("format", ["nf4-b64-o32", "int3-b32-asym-o4", "lloyd2-b64-dq-o64"])
def test_few_tokens_and_many(device: str, format: str, tokens: int) -> None:
    for rows, columns in ((33, 128), (17, 200)):
        matrix, x = giants(format, rows, columns), normal(tokens, columns, seed=1)
        prepared = prepare_weight(matrix, device, torch.float32)
        expected = reference.linear(x, matrix)
        assert close(matmul(x.to(device), prepared).cpu(), expected, x, matrix)
        bias, residual = normal(1, rows, seed=2)[0], normal(tokens, rows, seed=3)
        got = matmul(x.to(device), prepared, bias.to(device), residual.to(device)).cpu()
        assert close(got, expected + bias + residual, x, matrix)
        tensors, description = library.pack(prepared)
        assert torch.equal(
            torch.ops.kbit.matmul(x.to(device), tensors, description).cpu(), matmul(x.to(device), prepared).cpu()
        )


@pytest.mark.parametrize("tokens", [2, 9])
def test_before_the_gates_activation(device: str, tokens: int) -> None:
    gate, up, x = giants("nf4-b64-o32", 20, 128), weights("nf4-b64", 20, 128), normal(tokens, 128, seed=1)
    for first, second in ((gate, up), (up, gate), (gate, gate)):
        pair = [prepare_weight(matrix, device, torch.float32) for matrix in (first, second)]
        got = gated_matmul(x.to(device), *pair, "silu").cpu()
        expected = reference.activate(reference.linear(x, first), reference.linear(x, second), "silu")
        assert torch.allclose(got, expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("gated", [False, True])
def test_experts_that_keep_different_numbers(device: str, gated: bool) -> None:
    matrices = [giants("nf4-b64-o32", 40, 128), weights("nf4-b64", 40, 128), giants("nf4-b64-o4", 40, 128)]
    stacked = stack_experts([prepare_weight(matrix, device, torch.float32) for matrix in matrices])
    ids = torch.tensor([[0, 2], [1, -1], [2, 0], [-1, 1]])
    x, gate = normal(4, 128, seed=1), normal(8, 40, seed=2)
    out = torch.full((8, 40), torch.nan, device=device)
    groups = group_tokens(ids.to(device), 3, grouped_config(stacked, 8, 3).tokens)
    more = {"gate": gate.to(device), "kind": "relu"} if gated else {}
    grouped_matmul(x.to(device), stacked, groups, out=out, **more)  # type: ignore[arg-type]
    for entry, expert in enumerate(ids.reshape(-1).tolist()):
        got = out[entry : entry + 1].cpu()
        if expert < 0:
            assert got.isnan().all()
            continue
        row = x[entry // 2 : entry // 2 + 1]
        expected = reference.linear(row, matrices[expert]) * (gate[entry : entry + 1].clamp(min=0) if gated else 1)
        assert torch.allclose(got, expected, atol=1e-3, rtol=1e-4)


def test_activations_in_8_bits_are_not_those_that_they_meet(device: str) -> None:
    """What is kept apart is multiplied with tokens as they are."""
    matrix, x = giants("nf4-b64-o64", 48, 512), normal(40, 512, seed=1).half()
    plain = QuantTensor(matrix.format.keeping(0), matrix.shape, matrix.stored, matrix.codebook)  # type: ignore[attr-defined]
    codes = with_activations(prepare_weight(QuantTensor(plain.format, plain.shape, {
        name: array for name, array in matrix.stored.items() if not name.startswith("outlier")
    }, matrix.codebook), device), "int8")  # fmt: skip
    both = with_activations(prepare_weight(matrix, device), "int8")
    difference = matmul(x.to(device), both, out_dtype=torch.float32) - matmul(
        x.to(device), codes, out_dtype=torch.float32
    )
    apart = matrix.dequantize() - plain.format.decode(plain, slice(0, 48))
    assert torch.allclose(difference.cpu(), x.float() @ apart.T, atol=1e-3, rtol=1e-3)


def test_dequantized_as_on_the_cpu(device: str) -> None:
    matrix, ids = giants("nf3-b64-dq-o64", 20, 200), torch.tensor([[3, 19], [0, 3]])
    there = matrix.to(device)
    for dtype in (torch.float32, torch.float16):
        assert torch.equal(dequantize(there, dtype).cpu(), matrix.dequantize(dtype))
        found = dequantize(there, dtype, ids.to(device)).cpu()
        assert torch.equal(found, matrix.dequantize(dtype)[ids])


def test_what_does_not_know_of_them(device: str) -> None:
    """Matrices of one input are not merged; rows are not looked up."""
    pair = [TritonMatrix(prepare_weight(weights("nf4-b64-o4", 32, 128), device, torch.float16)) for _ in range(2)]
    assert merge((pair[0], pair[1])) is None
    with pytest.raises(UnsupportedError, match="not looked up"):
        embed(pair[0].data, torch.tensor([1], device=device))
