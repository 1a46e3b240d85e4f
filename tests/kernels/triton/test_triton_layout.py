"""Weights prepared for the Triton kernels: every code and scale is where the layout says, padding is zero, sizes are told."""

from __future__ import annotations

import pytest
import torch
from format_cases import normal, parse
from triton_cases import unit

triton = pytest.importorskip("triton")

from kbit.formats.blockwise import quantize_blockwise  # noqa: E402
from kbit.formats.quant_format import SUPERBLOCK, plane_widths  # noqa: E402
from kbit.host.errors import UnsupportedError  # noqa: E402
from kbit.kernels.triton.codecs.layout import TritonWeight, columns_multiple, prepare_weight  # noqa: E402


def codes_of(weight: TritonWeight) -> torch.Tensor:
    """The codes of a prepared weight, uint8 (N', K'), one bit field at a time as the layout's docstring says."""
    rows, columns = weight.padded
    n, k = torch.arange(rows)[:, None], torch.arange(columns)[None]
    codes = torch.zeros(rows, columns, dtype=torch.int64)
    shift = 0
    for width, plane in zip(plane_widths(weight.bits), weight.planes, strict=True):
        piece, step = k // (256 // width), k % (256 // width) // 16
        k8, t, k0, n8, g = k % 16 // 8, k % 8 // 2, k % 2, n % 16 // 8, n % 8
        pair = (step * 2 + k8) * 2 + n8  # among a lane's 64 / width pairs of a piece
        widest = max(plane_widths(weight.bits))
        word, within = pair // (16 // width), pair % (16 // width)
        place = within % (16 // widest) * widest + within // (16 // widest) * width
        bit = 2 * place + k0 * width if weight.kind == "pairs" else place + 16 * k0
        words = plane[n // 16, piece, g * 4 + t, word].long()
        codes |= ((words >> bit) & (2**width - 1)) << shift
        shift += width
    return codes.to(torch.uint8)


def scales_of(weight: TritonWeight, name: str) -> torch.Tensor:
    """Scales or offsets, float32 (N, blocks)."""
    rows, blocks = weight.shape[0], weight.blocks
    values = getattr(weight, name).transpose(1, 2).reshape(weight.padded[0], -1)[:rows, :blocks].float()
    factors = getattr(weight, f"{name}_super")
    if factors is not None:
        values = values * factors[torch.arange(rows * blocks).view(rows, blocks) // SUPERBLOCK]
    return values


@pytest.mark.parametrize(
    "text", [f"int{k}-b64" for k in range(2, 9)] + ["nf2-b16", "nf3-b48", "nf4-row", "quantile5-b32"]
)
@pytest.mark.parametrize("shape", [(1, 16), (17, 64), (40, 333)])
def test_codes_and_scales_are_where_the_layout_says(text: str, shape: tuple[int, int]) -> None:
    weight = quantize_blockwise(normal(*shape), parse(text))
    prepared = prepare_weight(weight, "cpu")
    assert prepared.padded[0] % 16 == 0
    assert prepared.padded[1] % columns_multiple(weight.format.bits) == 0
    codes = codes_of(prepared)
    assert torch.equal(codes[: shape[0], : shape[1]], weight.codes())
    assert not codes[shape[0] :].any()
    assert not codes[:, shape[1] :].any()
    assert torch.equal(scales_of(prepared, "scales"), weight.scales)
    assert all(plane.shape[2:] == (32, 4) and plane.dtype == torch.int32 for plane in prepared.planes)


@pytest.mark.parametrize("text", ["int4-b32-asym-dq", "nf4-b16-dq", "int3-b64-asym-bf16", "int8-row-fp32"])
def test_scales_keep_their_stored_width(text: str) -> None:
    weight = quantize_blockwise(normal(35, 500), parse(text))
    prepared = prepare_weight(weight, "cpu")
    assert torch.equal(scales_of(prepared, "scales"), weight.scales)
    assert prepared.scales is not None
    assert prepared.scales.dtype == weight.stored["scales"].dtype
    if weight.offsets is not None:
        assert torch.equal(scales_of(prepared, "offsets"), weight.offsets)


@pytest.mark.parametrize(
    "text", ["nf4-b64", "nf3-b64", "lloyd2-b64", "dynamic8-b64", "float4e2m1-b32", "float8e5m2-b64"]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_tables_are_the_codebook_rounded_once(text: str, dtype: torch.dtype) -> None:
    weight = quantize_blockwise(normal(16, 64), parse(text))
    prepared = prepare_weight(weight, "cpu", dtype)
    assert prepared.table is not None
    table = prepared.table
    if prepared.kind == "pairs":
        bits = weight.format.bits
        index = torch.arange(2**bits)
        spread = torch.zeros_like(index)  # the first code of a pair, in the pair's index
        shift = 0
        for width in plane_widths(bits):
            spread |= ((index >> shift) & (2**width - 1)) << (2 * shift)
            shift += width
        table = table.view(dtype).view(-1, 2)[spread, 0]
    levels = table.double() * prepared.multiplier
    smallest = torch.finfo(dtype).smallest_normal * unit(dtype) * 2 * prepared.multiplier
    error = (levels - weight.codebook.double()).abs()
    assert (error <= unit(dtype) * weight.codebook.double().abs() * (1 + 1e-6) + smallest).all()


def test_float_grids_are_exact_in_half_precision() -> None:
    for text in ("float4e2m1-b32", "float3e2m0-b32", "float6e2m3-b32", "fp4-b64"):
        weight = quantize_blockwise(normal(16, 64), parse(text))
        prepared = prepare_weight(weight, "cpu")
        if prepared.kind == "table":
            assert prepared.table is not None
            error = (prepared.table.double() * prepared.multiplier - weight.codebook.double()).abs()
            assert error.max() <= 2.0**-24, text


def test_a_float_weight_passes_through() -> None:
    weight = normal(5, 7)
    prepared = prepare_weight(weight, "cpu", torch.bfloat16)
    assert prepared.format == "dense"
    assert prepared.dense is not None
    assert torch.equal(prepared.dense, weight.bfloat16())
    assert prepared.nbytes == 5 * 7 * 2


def test_size_is_that_of_the_file_plus_padding() -> None:
    weight = quantize_blockwise(normal(64, 1024), parse("nf4-b64-dq"))
    prepared = prepare_weight(weight, "cpu")
    factors = prepared.scales_super
    assert factors is not None
    assert prepared.nbytes - weight.nbytes == 16 * 2 + 4 * (len(factors) - len(weight.stored["scales_super"]))
    assert len(factors) <= len(weight.stored["scales_super"]) + 1


def test_other_activation_types_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="float64"):
        prepare_weight(normal(4, 4), "cpu", torch.float64)
