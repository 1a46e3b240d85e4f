"""Blockwise quantization: what is stored, how far off it may be, and what happens at the edges of the number range."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from format_cases import BASES, BITS, FULL_RANGE, STORAGE, UNIT, assert_same, bits_of, normal, parse

from kbit.formats.blockwise import quantize_blockwise, quantize_rows
from kbit.formats.quant_format import QuantFormat
from kbit.formats.quant_tensor import QuantTensor
from kbit.host.errors import KbitError


def blocks_of(fmt: QuantFormat, rows: int, columns: int) -> Iterator[tuple[int, int, slice]]:
    """(row, block, columns of the block) of a matrix."""
    size = fmt.block_size or columns
    for row in range(rows):
        for block, start in enumerate(range(0, columns, size)):
            yield row, block, slice(start, min(start + size, columns))


# --- what is stored -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [f"{base}-b16" for base in BASES])
def test_thin_matrices(text: str) -> None:
    for shape in ((1, 1), (1, 7), (7, 1), (1, 33), (33, 1)):
        for fmt in (parse(text), parse(text.replace("-b16", "-row"))) if "8" not in text else (parse(text),):
            x = normal(*shape, seed=4)
            q = quantize_blockwise(x, fmt)
            assert q.nbytes == fmt.nbytes(*shape)
            assert ((q.dequantize() - x).abs() <= error_bound(x, q)).all()


@pytest.mark.parametrize("text", ["nf4-b64", "int3-b16-asym", "float5-b48", "int8-row"])
def test_blocks_are_independent_and_rows_start_anew(text: str) -> None:
    """Each block alone, as a one-row matrix, has the same codes and scale: none reaches into a neighbour."""
    fmt = parse(text)
    x = normal(5, 150, seed=1)
    q = quantize_blockwise(x, fmt)
    codes, scales = q.codes(), q.scales
    for row, block, columns in blocks_of(fmt, *q.shape):
        alone = quantize_blockwise(x[row : row + 1, columns], fmt)
        assert torch.equal(alone.codes()[0], codes[row, columns])
        assert torch.equal(alone.scales[0, 0], scales[row, block])


@pytest.mark.parametrize("text", ["int8-row", "nf4-b64", "quantile3-b64", "int4-b64-asym"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_input_types(text: str, dtype: torch.dtype) -> None:
    x = normal(3, 100).to(dtype)
    before = x.clone()
    assert_same(quantize_blockwise(x, parse(text)), quantize_blockwise(x.float(), parse(text)))
    assert torch.equal(x, before)


@pytest.mark.parametrize("text", ["int8-row", "nf4-b64", "quantile3-b64", "int4-b64-asym"])
def test_views_and_parameters(text: str) -> None:
    fmt = parse(text)
    x = normal(80, 100)
    for view in (x.t(), x[:, ::2], x[::3, 7:], x[:1].expand(4, 100)):
        assert_same(quantize_blockwise(view, fmt), quantize_blockwise(view.clone().contiguous(), fmt))
    q = quantize_blockwise(torch.nn.Parameter(x), fmt)
    assert_same(q, quantize_blockwise(x, fmt))
    assert not any(array.requires_grad for array in q.stored.values())


# --- how far off it may be ------------------------------------------------------------------------------------------


def error_bound(x: torch.Tensor, q: QuantTensor) -> torch.Tensor:
    """The largest error the format allows for every weight, from the block's statistics.

    A block's weights lie within h of its centre c (symmetric: c = 0, h = max|x|; with offset: midpoint and half the
    range). Stored are s and o, which differ from h and c by ds and do. A normalised weight within the codebook's
    reach r is at most half a gap g from a level, one beyond it as far as it is out: the error is at most
    max(s g / 2, h + do - s r). Roundings: 1/s, x - o and their product put the normalised value off by 4 units
    relative; a border, the product with s and the sum with o by one unit each of s, s and s + |o|; half-range and
    midpoint by one each: 8 units of h + do + s + |o| in all.

    Also asserts that ds and do are no larger than what the scales' stored type allows.
    """
    fmt = q.format
    levels = np.unique(q.codebook.double().numpy())
    levels = levels[levels >= -1]
    gap = float(np.diff(levels).max()) if len(levels) > 1 else 0.0
    reach = min(float(levels[-1]), -float(levels[0]))
    scales, offsets = q.scales.double(), q.offsets
    wide = x.double()
    rows, columns = q.shape
    half, centre = torch.zeros_like(scales), torch.zeros_like(scales)
    for row, block, place in blocks_of(fmt, rows, columns):
        low, high = wide[row, place].min(), wide[row, place].max()
        if fmt.asymmetric:
            half[row, block], centre[row, block] = (high - low) / 2, (high + low) / 2
        else:
            half[row, block] = wide[row, place].abs().max()
    off = torch.zeros_like(scales) if offsets is None else (offsets.double() - centre).abs()
    assert ((scales - half).abs() <= storage_error(half, fmt, signed=False)).all()
    assert (off <= storage_error(centre.abs(), fmt, signed=True)).all()
    bound = torch.maximum(scales * gap / 2, half + off - scales * reach)
    bound += 8 * UNIT * (half + off + scales + (centre.abs() + off))
    per_weight = torch.empty_like(wide)
    for row, block, place in blocks_of(fmt, rows, columns):
        per_weight[row, place] = bound[row, block]
    return per_weight


def storage_error(values: torch.Tensor, fmt: QuantFormat, *, signed: bool) -> torch.Tensor:
    """How far a stored scale or offset may be from its value.

    16-bit types: half a unit in the last place: 2^-11 relative for fp16 (2^-25 below its normal range), 2^-8 for
    bf16. Double-quantized: half a step of 1/255 (offsets: 1/127) of the superblock's largest; a whole step for scales
    that would round to zero and are kept at one. Everything: two units of float32 arithmetic.
    """
    arithmetic = 2 * UNIT * values
    if fmt.double_quant:
        step = values.flatten().clone()
        for start in range(0, len(step), 256):
            step[start : start + 256] = step[start : start + 256].max() / (127 if signed else 255)
        step = step.view_as(values)
        lifted = (values > 0) & (values < step / 2) & (not signed)
        return torch.where(lifted, step, step / 2) + arithmetic + 4 * UNIT * step * 255
    relative = {"fp16": 2.0**-11, "bf16": 2.0**-8, "fp32": 0.0}[fmt.scale_dtype]
    absolute = 2.0**-25 if fmt.scale_dtype == "fp16" else 0.0
    return (values * relative).clamp(min=absolute) + arithmetic


@pytest.mark.parametrize("text", [*(f"{base}-b64" for base in BASES), *STORAGE])
def test_error_is_within_half_a_gap(text: str) -> None:
    x = normal(5, 200, seed=2)
    x[1] *= 1e-3  # rows of different size, and a block that lies off zero
    x[2, :64] = 5 + 0.1 * x[2, :64]
    x[3] *= 100
    q = quantize_blockwise(x, parse(text))
    error = (q.dequantize() - x).abs()
    assert (error <= error_bound(x, q)).all()


@pytest.mark.parametrize("text", [*(f"{base}-b64" for base in BASES), *STORAGE])
def test_every_weight_gets_its_nearest_level(text: str) -> None:
    """Brute force over the codebook in float64, with the stored scales."""
    x = normal(3, 150, seed=3)
    q = quantize_blockwise(x, parse(text))
    size = q.format.block_size or 150
    scales = q.scales.double().repeat_interleave(size, 1)[:, :150]
    offsets = torch.zeros(()) if q.offsets is None else q.offsets.double().repeat_interleave(size, 1)[:, :150]
    levels = q.codebook.double()
    levels = levels[levels >= -1]
    distance = (x.double() - offsets)[:, :, None] - levels * scales[:, :, None]  # (N, K, levels)
    error = (x.double() - q.dequantize().double()).abs()
    slack = 8 * UNIT * (x.double().abs() + scales + offsets.abs())  # as in error_bound
    assert (error <= distance.abs().amin(dim=2) + slack).all()


def test_double_quantized_scales_decode_by_superblocks_of_256() -> None:
    fmt = parse("int4-b16-asym-dq")
    x = normal(9, 16 * 33, seed=5, scale=0.02)  # 297 blocks: the second superblock is short
    x[4] *= 50
    q = quantize_blockwise(x, fmt)
    assert q.offsets is not None
    for name, decoded in (("scales", q.scales), ("offsets", q.offsets)):
        codes = q.stored[name].flatten().tolist()
        factors = q.stored[f"{name}_super"].tolist()
        assert len(factors) == 2
        expected = [code * factors[i // 256] for i, code in enumerate(codes)]
        np.testing.assert_allclose(decoded.flatten().numpy(), expected, rtol=2 * UNIT)
        assert max(map(abs, codes[:256])) == max(map(abs, codes[256:])) == (255 if name == "scales" else 127)
    assert q.stored["offsets"].min() < 0


def test_double_quantization_never_loses_a_block() -> None:
    x = normal(1, 16 * 300)
    x[0, 16:32] *= 1e-6  # far below half a step of the largest scale
    x[0, 32:48] = 0
    q = quantize_blockwise(x, parse("nf4-b16-dq"))
    assert q.stored["scales"][0, 1] == 1
    assert q.stored["scales"][0, 2] == 0
    assert not q.dequantize()[0, 32:48].any()


@pytest.mark.parametrize("bits", BITS)
def test_symmetric_int_never_uses_the_level_below_minus_one(bits: int) -> None:
    """Not even where double quantization stores a scale so much too small that it would be the nearest."""
    x = torch.zeros(1, 32)
    x[0, 0], x[0, 16:] = 255.0, -1.4  # scales 255 and 1.4, stored as 255 and 1
    q = quantize_blockwise(x, parse(f"int{bits}-b16-dq"))
    assert q.scales.tolist() == [[255.0, 1.0]]
    assert set(q.codes()[0, 16:].tolist()) == {1}
    assert (q.dequantize()[0, 16:] == -1).all()


# --- quantizing what is already quantized ---------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("base", FULL_RANGE)
def test_quantizing_twice_changes_nothing(base: str, scale: str) -> None:
    """With scales computed anew: where the codebook holds -1 and 1, a block's largest weight gives its scale back.

    The scale has to be stored to better than half the gap next to 1, so this holds for normal 16-bit numbers.
    """
    x = normal(4, 200, seed=6, scale=0.05)
    once = quantize_blockwise(x, parse(f"{base}-b64-{scale}"))
    values = once.dequantize()
    twice = quantize_blockwise(values, once.format)
    assert_same(once, twice)
    assert torch.equal(bits_of(twice.dequantize()), bits_of(values))


@pytest.mark.parametrize("text", [*(f"{base}-b64" for base in BASES), *STORAGE])
def test_projection_onto_a_fixed_grid_changes_nothing_the_second_time(text: str) -> None:
    x = normal(4, 200, seed=7, scale=0.05)
    x[1, :64] += 0.1
    x[2, 64:128] = 0
    x[3, :64] *= 1e-7  # an fp16 scale of zero for a block that is not zero
    once = quantize_blockwise(x, parse(text))
    values = once.dequantize()
    twice = quantize_blockwise(values, once.format, like=once)
    assert torch.equal(bits_of(twice.dequantize()), bits_of(values))
    # With an offset this needs float32 to resolve (level * scale + offset) - offset to half a gap: |offset| < 2^14
    # scale at 8 bits. Here it is a few scales at most.
    assert_same(once, twice)


@pytest.mark.parametrize("text", ["nf4-b64", "int3-b16-asym-dq", "quantile4-row"])
def test_like_keeps_the_grid(text: str) -> None:
    fmt = parse(text)
    first = quantize_blockwise(normal(4, 100, seed=8), fmt)
    other = quantize_blockwise(normal(4, 100, seed=9), fmt, like=first)
    for suffix in first.stored:
        if not suffix.startswith("plane"):
            assert torch.equal(first.stored[suffix], other.stored[suffix])
    assert torch.equal(first.codebook, other.codebook)
    assert not torch.equal(first.codes(), other.codes())


def test_like_of_another_kind_is_refused() -> None:
    q = quantize_blockwise(normal(4, 64), parse("nf4"))
    with pytest.raises(KbitError, match=r"nf4-b64 \(4, 64\), not nf4-b64 \(5, 64\)"):
        quantize_blockwise(normal(5, 64), parse("nf4"), like=q)
    with pytest.raises(KbitError, match="not nf3-b64"):
        quantize_blockwise(normal(4, 64), parse("nf3"), like=q)


# --- the edges of the number range ----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [*(f"{base}-b32" for base in BASES), *STORAGE])
def test_zeros_stay_zeros(text: str) -> None:
    q = quantize_blockwise(torch.zeros(3, 100), parse(text))
    assert not q.dequantize().any()
    x = normal(3, 128, seed=1)
    x[1] = 0
    x[2, 32:64] = 0
    q = quantize_blockwise(x, parse(text))
    values = q.dequantize()
    # With offsets in 8 bits a zero block's offset is zero all the same.
    assert not values[1].any()
    if q.format.block_size in (16, 32):
        assert not values[2, 32:64].any()


@pytest.mark.parametrize("text", [f"{base}-b64" for base in BASES])
def test_negative_zero_is_zero(text: str) -> None:
    x = normal(2, 128, seed=2)
    x[:, ::5] = 0.0
    signed = x.clone()
    signed[:, ::5] = -0.0
    assert_same(quantize_blockwise(signed, parse(text)), quantize_blockwise(x, parse(text)))
    assert_same(
        quantize_blockwise(-torch.zeros(2, 64), parse(text)), quantize_blockwise(torch.zeros(2, 64), parse(text))
    )


@pytest.mark.parametrize("text", [f"{base}-b64" for base in BASES])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_one_huge_weight_per_block(text: str, sign: float) -> None:
    x = normal(2, 128, seed=3, scale=1e-4)
    x[:, 5::64] = sign * 30000.0
    q = quantize_blockwise(x, parse(text))
    values = q.dequantize()
    assert ((values - x).abs() <= error_bound(x, q)).all()
    if q.format.dtype in ("int", "float", "nf"):
        # 30000 is an fp16 number, and 1 and -1 are levels; an offset cancels exactly (15000 + 15000).
        np.testing.assert_allclose(values[:, 5::64], x[:, 5::64], rtol=2**-10)


@pytest.mark.parametrize("base", ["nf4", "int8", "float4", "int4-asym", "quantile4", "lloyd3"])
def test_scale_overflow_names_the_tensor_and_the_remedy(base: str) -> None:
    x = normal(4, 64)
    x[2, 3] = 2e5
    with pytest.raises(KbitError, match=r"^model\.w: scales up to .* do not fit fp16: use --scale-dtype bf16$"):
        quantize_rows(lambda a, b: x[a:b], (4, 64), parse(f"{base}-b64"), name="model.w")
    for remedy in ("bf16", "fp32", "dq"):
        q = quantize_blockwise(x, parse(f"{base}-b64-{remedy}"))
        assert ((q.dequantize() - x).abs() <= error_bound(x, q)).all()


def test_offset_overflow_names_the_tensor_and_the_remedy() -> None:
    x = 1e5 + normal(2, 64)
    with pytest.raises(KbitError, match=r"^w: offsets up to 1e\+05 do not fit fp16: use --scale-dtype bf16$"):
        quantize_rows(lambda a, b: x[a:b], (2, 64), parse("int4-b64-asym"), name="w")


@pytest.mark.parametrize("text", ["nf4-fp32", "int4-asym-fp32", "lloyd4-fp32", "nf4-dq", "int8-row-fp32"])
def test_the_whole_float32_range(text: str) -> None:
    largest = torch.finfo(torch.float32).max
    x = normal(2, 64).clamp(-1, 1) * largest
    x[0, :2] = torch.tensor([largest, -largest])
    values = quantize_blockwise(x, parse(text)).dequantize()
    assert torch.isfinite(values).all()
    # Relative to the largest: half the widest gap of a 4-bit codebook is at most 1/6 (NF4's .30 at its ends).
    assert ((values / largest - x / largest).abs() <= 1 / 6).all()


def test_bf16_overflow_asks_for_fp32() -> None:
    x = torch.full((1, 64), torch.finfo(torch.float32).max)
    with pytest.raises(KbitError, match="do not fit bf16: use --scale-dtype fp32"):
        quantize_blockwise(x, parse("nf4-bf16"))


def test_scales_below_the_normal_range_are_refused() -> None:
    tiny = normal(2, 64, scale=1e-6)
    with pytest.raises(KbitError, match=r"^w: scales of at most .* below the normal fp16 range: .*bf16$"):
        quantize_rows(lambda a, b: tiny[a:b], (2, 64), parse("nf4"), name="w")
    for text in ("nf4-bf16", "nf4-fp32", "nf4-dq", "int4-asym-fp32"):
        q = quantize_blockwise(tiny, parse(text))
        assert ((q.dequantize() - tiny).abs() <= error_bound(tiny, q)).all()
    subnormal = normal(2, 64, scale=1e-41)
    for text in ("nf4-bf16", "nf4-fp32"):
        with pytest.raises(KbitError, match="below the normal .* range: leave"):
            quantize_blockwise(subnormal, parse(text))


def test_a_few_subnormal_blocks_beside_normal_ones() -> None:
    x = normal(4, 256, seed=4)
    x[0, :64] *= 1e-6  # fp16 scale among the subnormals
    x[1, :64] *= 1e-9  # fp16 scale of zero
    x[2, :64] *= 1e-41  # subnormal in float32
    for text in ("nf4", "int3-asym", "lloyd4", "dynamic8", "float8e7m0"):
        q = quantize_blockwise(x, parse(text))
        assert ((q.dequantize() - x).abs() <= error_bound(x, q)).all()
        assert not q.scales[1, 0]
        assert not q.scales[2, 0]


@pytest.mark.parametrize("value", [0.5, -3.0, 0.1, 1e-3, 40000.0])
@pytest.mark.parametrize("bits", BITS)
def test_constant_rows_are_their_offset(bits: int, value: float) -> None:
    q = quantize_blockwise(torch.full((3, 70), value), parse(f"int{bits}-b32-asym"))
    assert (q.dequantize() == torch.tensor(value).half().float()).all()
    assert not q.scales.any()
    assert len(set(q.codes().flatten().tolist())) == 1  # one code, however the offset was rounded


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("base", ["nf4", "int3-asym", "quantile4", "lloyd2", "nf4-dq"])
def test_nan_and_infinity_are_refused_by_name(base: str, bad: float) -> None:
    fmt = parse(base)
    x = normal(5, 70)
    q = quantize_blockwise(x, fmt)
    x[3, 69] = bad
    for like in (None, q):
        with pytest.raises(KbitError, match=r"^layers\.3\.w: 1 weights are NaN or infinite in rows 0 to 4"):
            quantize_rows(lambda a, b: x[a:b], (5, 70), fmt, like=like, name="layers.3.w")


def test_a_double_too_large_for_float32_is_refused() -> None:
    x = torch.full((2, 64), 1e300, dtype=torch.float64)
    with pytest.raises(KbitError, match="128 weights are NaN or infinite"):
        quantize_blockwise(x, parse("nf4"))


@pytest.mark.parametrize("shape", [(0, 64), (64, 0), (0, 0)])
def test_empty_matrices_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(KbitError, match=f"is empty, {shape[0]} x {shape[1]}"):
        quantize_blockwise(torch.zeros(shape), parse("nf4"))
