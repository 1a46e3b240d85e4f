"""Blockwise quantization and dequantization on the GPU against kbit/formats: equal bit for bit."""

from __future__ import annotations

import pytest
import torch
from format_cases import BASES, STORAGE, assert_same, bits_of, normal, parse
from triton_cases import DTYPES, assert_within, rounded, unit

from kbit.formats.blockwise import block_statistics as cpu_block_statistics
from kbit.formats.blockwise import quantize_blockwise
from kbit.formats.quant_format import QuantFormat
from kbit.host.errors import KbitError

pytest.importorskip("triton")
from kbit.kernels.triton.codecs.dequantize import dequantize, dequantize_planes
from kbit.kernels.triton.codecs.layout import prepare_weight
from kbit.kernels.triton.codecs.quantize import block_statistics, encode, quantize
from kbit.kernels.triton.rows.embed import embed

# Every data type at every width, in blocks that do not divide the odd row; and every way to store scales.
FORMATS = [*(f"{base}-b32" if "asym" not in base else base.replace("-asym", "-b32-asym") for base in BASES), *STORAGE]


@pytest.mark.parametrize("text", FORMATS)
def test_every_format(text: str, device: str) -> None:
    """Both directions, on a matrix with odd rows, a block of zeros, a value on a border, and a row of one sign."""
    format = parse(text)
    x = normal(3, 101)
    x[0, :48] = 0.0
    x[1] = x[1].abs() + 1
    x[2, 1] = x[2, 0] / 2
    expected = quantize_blockwise(x, format)
    found = quantize(x.to(device), format)
    assert_same(found.to("cpu"), expected)
    assert torch.equal(bits_of(dequantize(found).cpu()), bits_of(expected.dequantize()))


@pytest.mark.parametrize("text", ["nf4-b64", "int3-b48-asym-dq", "float8e4m3-row", "lloyd7-b16-bf16"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (2, 64), (3, 2049), (2, 5000)], ids=str)
def test_shapes(text: str, shape: tuple[int, int], device: str) -> None:
    """One weight, less than a byte, rows longer than a program's tile."""
    format, x = parse(text), normal(*shape, seed=1)
    found = quantize(x.to(device), format)
    expected = quantize_blockwise(x, format)
    assert_same(found.to("cpu"), expected)
    assert torch.equal(dequantize(found).cpu(), expected.dequantize())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_types_of_x_and_of_the_result(dtype: torch.dtype, device: str) -> None:
    x = normal(4, 96, seed=2).to(dtype)
    found = quantize(x.to(device), parse("nf4-b64"))
    expected = quantize_blockwise(x, parse("nf4-b64"))
    assert_same(found.to("cpu"), expected)
    assert torch.equal(dequantize(found, dtype).cpu(), expected.dequantize(dtype))


@pytest.mark.parametrize("text", ["nf4-b64", "int5-b32-asym-dq", "quantile3-b16-dq", "int8-row"])
def test_chosen_rows(text: str, device: str) -> None:
    weight = quantize_blockwise(normal(9, 70, seed=3), parse(text))
    ids = torch.tensor([[8, 0, 3], [3, 3, 1]])
    rows = dequantize(weight.to(device), torch.float32, ids.to(device))
    assert torch.equal(rows.cpu(), weight.dequantize()[ids])
    assert dequantize(weight.to(device), ids=ids[:0].to(device)).shape == (0, 3, 70)


def test_projection_is_idempotent(device: str) -> None:
    """Quantizing what was dequantized, with the same grid, gives the same codes."""
    for text in ("nf4-b64-dq", "int4-b32-asym", "dynamic6-b48"):
        once = quantize(normal(5, 150, seed=4).to(device), parse(text))
        twice = quantize(dequantize(once), parse(text), like=once)
        assert_same(twice.to("cpu"), once.to("cpu"))


@pytest.mark.parametrize("asymmetric", [True, False])
@pytest.mark.parametrize("block", [16, 48, 4096, 0])
def test_statistics(block: int, asymmetric: bool, device: str) -> None:
    x = normal(2, 4500, seed=5, scale=1e30)
    found = block_statistics(x.to(device), block, asymmetric)
    expected = cpu_block_statistics(x, QuantFormat("int", 4, block, asymmetric))
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert torch.equal(one.cpu(), other)


def test_rows_with_a_stride(device: str) -> None:
    wide = normal(3, 200, seed=6)
    found = quantize(wide.to(device)[:, 50:150], parse("int4-b32"))
    assert_same(found.to("cpu"), quantize_blockwise(wide[:, 50:150], parse("int4-b32")))


def test_refusals(device: str) -> None:
    x = normal(2, 32).to(device)
    with pytest.raises(KbitError, match="nothing to quantize"):
        quantize(x[:0], parse("nf4-b64"))
    with pytest.raises(KbitError, match="1 weights are NaN or infinite"):
        quantize(
            torch.cat(
                [
                    x,
                    torch.full((1, 32), 1.0, device=device).index_fill(
                        1, torch.tensor([3], device=device), float("nan")
                    ),
                ]
            ),
            parse("nf4-b64"),
        )
    with pytest.raises(KbitError, match="do not fit fp16"):
        quantize(x * 1e6, parse("nf4-b64"))
    with pytest.raises(KbitError, match="`like` is"):
        quantize(x, parse("nf4-b64"), like=quantize(x, parse("nf4-b32")))
    with pytest.raises(ValueError, match="borders"):
        encode(x, x, None, x[0], x[0], 4, 32)
    with pytest.raises(ValueError, match="planes"):
        dequantize_planes([x], x, None, None, None, x, 32, 3, 32)


# Every width of each kind of table, and every way to store scales, in each type of activations.
PREPARED = [
    *(
        f"{base}-b32"
        for base in ("int2", "int3", "int8", "nf2", "nf3", "nf4", "lloyd5", "dynamic6", "float7e2m4", "nf8")
    ),
    *("int3-b32-asym", "int7-b48-asym-dq", "nf4-row", "nf4-b16-dq", "quantile5-b48-bf16", "lloyd2-row-fp32"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("text", PREPARED)
def test_embed_from_the_matmul_layout(text: str, dtype: torch.dtype, device: str) -> None:
    """Tables are rounded to the type of the activations, everything else is fp32 and rounded once."""
    weight = quantize_blockwise(normal(21, 130, seed=7), parse(text))
    prepared = prepare_weight(weight, device, dtype)
    ids = torch.tensor([[20, 0, 7], [15, 16, 7]])
    found = embed(prepared, ids.to(device))
    assert found.dtype == dtype
    assert found.shape == (2, 3, 130)
    expected = weight.dequantize()
    scales = weight.scales.abs()
    scale = scales.repeat_interleave(weight.format.block_size, 1)[:, :130] if weight.format.block_size else scales
    # A rounding for the table entry (of at most 1, or smaller than the smallest normal number), five of fp32.
    size = scale * expected.new_ones(()) + expected.abs()
    bound = (unit(dtype) * (1 if prepared.kind != "int" else 0) + 5 * 2.0**-24) * size + rounded(expected, dtype)
    assert_within(found, expected[ids], (bound * (1 + unit(dtype)))[ids])
    assert_within(embed(prepared, None, torch.float32), expected, bound)
