"""x W^T for few tokens against the reference: every width and data type, odd shapes, every way to store scales."""

from __future__ import annotations

import pytest
import torch
from format_cases import normal, parse
from triton_cases import DTYPES, HALF, assert_within, product_bound, rounded, unit

triton = pytest.importorskip("triton")

from kbit.formats.blockwise import quantize_blockwise  # noqa: E402
from kbit.formats.quant_tensor import QuantTensor  # noqa: E402
from kbit.host.errors import UnsupportedError  # noqa: E402
from kbit.kernels import reference  # noqa: E402
from kbit.kernels.triton.codecs.layout import prepare_weight  # noqa: E402
from kbit.kernels.triton.product.configs import GemvConfig, Problem, gemv_candidates  # noqa: E402
from kbit.kernels.triton.product.gemv import GATES, gemv  # noqa: E402


def quantized(text: str, rows: int, columns: int, seed: int = 0) -> QuantTensor:
    return quantize_blockwise(normal(rows, columns, seed, 0.05), parse(text))


def check(
    device: str, text: str, shape: tuple[int, int, int], dtype: torch.dtype, config: GemvConfig | None = None
) -> None:
    """One product (M, N, K) against the reference."""
    tokens, rows, columns = shape
    weight = quantized(text, rows, columns)
    x = normal(tokens, columns, seed=1).to(dtype)
    got = gemv(x.to(device), prepare_weight(weight, device, dtype), config=config)
    assert got.dtype == dtype
    bound = product_bound(x, weight.dequantize(), dtype, dtype, decoded=6)
    assert_within(got.float(), reference.linear(x, weight), bound)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("family", ["int", "nf", "lloyd", "float", "dynamic", "quantile"])
def test_every_width_and_data_type(device: str, family: str, bits: int) -> None:
    check(device, f"{family}{bits}-b64", (1, 24, 320), torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("text", [f"int{k}-b64" for k in range(2, 9)] + ["nf2-b64", "nf3-b64", "nf4-b64", "nf6-b64"])
def test_every_activation_type(device: str, text: str, dtype: torch.dtype) -> None:
    check(device, text, (2, 24, 320), dtype)


@pytest.mark.parametrize("tokens", range(1, 9))
@pytest.mark.parametrize("text", ["int4-b64", "nf3-b32"])
def test_up_to_eight_tokens(device: str, text: str, tokens: int) -> None:
    check(device, text, (tokens, 20, 192), torch.float16)


@pytest.mark.parametrize("shape", [(1, 1, 16), (3, 17, 100), (1, 33, 257), (2, 16, 1024), (1, 70, 77)])
@pytest.mark.parametrize("text", ["nf4-b64", "int3-b128", "int8-b64", "lloyd2-b64"])
def test_odd_shapes(device: str, text: str, shape: tuple[int, int, int]) -> None:
    check(device, text, shape, torch.float16)


BASES, BLOCKS, SCALES = (
    ("nf4", "int3-asym", "lloyd2", "quantile5", "int8-asym"),
    ("b16", "b48", "b512", "row"),
    ("", "-bf16", "-fp32", "-dq"),
)
# Every data type meets every block size and every type of scales, and every block size every type of scales.
MET = [f"{base}-{block}{SCALES[(i + j) % 4]}" for i, base in enumerate(BASES) for j, block in enumerate(BLOCKS)]


@pytest.mark.parametrize("text", MET)
def test_every_block_size_and_scale_type(device: str, text: str) -> None:
    check(device, text, (1, 20, 272), torch.float16)


@pytest.mark.parametrize("dtype", HALF)
def test_offsets_that_dwarf_the_scale(device: str, dtype: torch.dtype) -> None:
    """Weights far from zero: the offset times the sum of x is most of the result."""
    weight = quantize_blockwise(normal(16, 128) * 0.01 + 3.0, parse("int4-b32-asym"))
    x = normal(2, 128, seed=1).to(dtype)
    got = gemv(x.to(device), prepare_weight(weight, device, dtype))
    bound = product_bound(x, weight.dequantize(), dtype, dtype)
    assert_within(got.float(), reference.linear(x, weight), bound)


@pytest.mark.parametrize("config", [GemvConfig(w, c, s) for w in (2, 4) for c in (64, 256) for s in (1, 2, 4)], ids=str)
def test_every_division_of_the_columns(device: str, config: GemvConfig) -> None:
    check(device, "int4-b64", (2, 20, 1280), torch.float16, config)


def test_candidates_fit_the_columns() -> None:
    for bits in range(2, 9):
        problem = Problem(1, 64, 768, bits, 64)
        for config in gemv_candidates("sm_90", problem):
            assert problem.columns % config.columns == 0


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_bias_and_residual(device: str, split: int, dtype: torch.dtype) -> None:
    weight = quantized("nf4-b64", 24, 256)
    x, bias, residual = normal(3, 256, seed=1).half(), normal(1, 24, seed=2)[0].to(dtype), normal(3, 24, seed=3).half()
    got = gemv(
        x.to(device),
        prepare_weight(weight, device),
        bias.to(device),
        residual.to(device),
        torch.float32,
        config=GemvConfig(2, 64, split),
    )
    assert got.dtype == torch.float32
    expected = reference.linear(x, weight, bias) + residual.float()
    bound = product_bound(x, weight.dequantize(), torch.float32, torch.float16) + rounded(expected, torch.float32) * 4
    assert_within(got, expected, bound)


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("kind", GATES)
def test_gate_and_up_in_one_kernel(device: str, kind: str, split: int) -> None:
    gate, up = quantized("nf4-b64", 24, 256), quantized("nf4-b64", 24, 256, seed=5)
    x = normal(2, 256, seed=1).half()
    config = GemvConfig(2, 64, split)
    got = gemv(x.to(device), prepare_weight(gate, device), up=prepare_weight(up, device), kind=kind, config=config)
    g, u = reference.linear(x, gate), reference.linear(x, up)
    expected = reference.activate(g, u, kind)
    wide = torch.float32
    error_g = product_bound(x, gate.dequantize(), wide, torch.float16)
    error_u = product_bound(x, up.dequantize(), wide, torch.float16)
    # |act'| is at most 1.13 for each of these activations, |act(g)| at most |g|.
    bound = 1.13 * error_g * (u.abs() + error_u) + g.abs() * error_u + 4 * unit(torch.float16) * expected.abs() + 1e-7
    assert_within(got.float(), expected, bound)


def test_rows_of_a_wider_matrix(device: str) -> None:
    """x may be a slice: rows far apart."""
    weight = quantized("int4-b64", 16, 128)
    x = normal(3, 400, seed=1).half()
    got = gemv(x.to(device)[:, 100:228], prepare_weight(weight, device))
    part = x[:, 100:228]
    assert_within(
        got.float(), reference.linear(part, weight), product_bound(part, weight.dequantize(), x.dtype, x.dtype)
    )


def test_what_does_not_fit_is_refused() -> None:
    weight = prepare_weight(quantized("nf4-b64", 16, 64), "cpu")
    x = normal(1, 64).half()
    for arguments, message in [
        ((normal(1, 63).half(), weight), "does not match"),
        ((x.float(), weight), "prepared for"),
        ((normal(9, 64).half(), weight), "1 to 8 tokens"),
        ((normal(64, 2).half().t()[:2], weight), "contiguous rows"),
        ((x, weight, normal(1, 15)[0]), "bias"),
        ((x, weight, None, normal(1, 15)), "residual"),
    ]:
        with pytest.raises(UnsupportedError, match=message):
            gemv(*arguments)
    other = prepare_weight(quantized("int4-b64", 16, 64), "cpu")
    with pytest.raises(UnsupportedError, match="not alike"):
        gemv(x, weight, up=other, kind="silu")
    with pytest.raises(UnsupportedError, match="swish"):
        gemv(x, weight, up=weight, kind="swish")
