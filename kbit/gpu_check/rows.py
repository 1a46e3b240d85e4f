"""Kernels that take every row by itself, lookup and (de)quantization, against the reference."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from kbit.formats.blockwise import quantize_blockwise
from kbit.formats.nested import NestedFormat
from kbit.formats.nested_codec import scales_at
from kbit.formats.quant_format import QuantFormat
from kbit.gpu_check.bounds import FP32_UNIT, assert_equal, assert_within, rounded, unit
from kbit.gpu_check.products import normal, quantized
from kbit.kernels import reference
from kbit.kernels.triton.attention.rotary import rotary
from kbit.kernels.triton.attention.softcap import softcap
from kbit.kernels.triton.codecs.dequantize import dequantize, dequantize_nested
from kbit.kernels.triton.codecs.layout import prepare_weight
from kbit.kernels.triton.codecs.quantize import quantize
from kbit.kernels.triton.rows.activate import KINDS, activate
from kbit.kernels.triton.rows.embed import embed
from kbit.kernels.triton.rows.norm import layer_norm, rms_norm

EPS = 1e-5


def norm_bound(expected: torch.Tensor, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """A mean of K squares is within K u (relative), its root within half of that; a handful of roundings follow."""
    return expected.abs() * (columns / 2 + 8) * FP32_UNIT + rounded(expected, dtype) * (1 + unit(dtype))


def check_rms_norm(device: str, rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> float:
    """The sum with a residual is rounded as torch rounds it, bit for bit; the norm is that of the rounded sum."""
    x, residual = (normal(rows, columns, seed + index).to(dtype) for index in (0, 2))
    weight = normal(1, columns, seed + 1)[0]
    out, summed = rms_norm(x.to(device), weight.to(device), EPS, residual.to(device), out_dtype=torch.float32)
    expected = reference.rms_norm(x + residual, weight, EPS)
    equal = assert_equal(summed, x + residual)
    return max(equal, assert_within(out, expected, norm_bound(expected, columns, torch.float32)))


def check_layer_norm(device: str, rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> float:
    x, weight = normal(rows, columns, seed).to(dtype) + 3, normal(1, columns, seed + 1)[0].to(dtype)
    shift = normal(1, columns, seed + 2)[0].to(dtype)
    out, _ = layer_norm(x.to(device), weight.to(device), shift.to(device), EPS)
    exact = torch.nn.functional.layer_norm(x.double(), (columns,), weight.double(), shift.double(), EPS).float()
    # The mean is within K u of mean|x|; divided by the deviation that moves every result by as much.
    deviation = (x.double().var(-1, unbiased=False, keepdim=True) + EPS).sqrt().float()
    moved = weight.float().abs() * (columns + 8) * FP32_UNIT * (x.float().abs().mean(-1, keepdim=True) / deviation + 1)
    return assert_within(out, exact, 2 * moved + norm_bound(exact.abs() + 1, columns, dtype))


def check_activate(device: str, kind: str, dtype: torch.dtype, seed: int = 0) -> float:
    gate, up = (3 * normal(3, 1030, seed)).to(dtype), normal(3, 1030, seed + 1).to(dtype)
    gate[0, :4] = torch.tensor([0.0, -0.0, 60.0, -60.0])
    out = activate(gate.to(device), up.to(device), kind)
    expected = reference.activate(gate, up, kind)
    # Sigmoid and the normal distribution function are within about 4 u of 1, so errors are relative to |gate up|.
    size = gate.float().abs() * up.float().abs()
    return assert_within(out, expected, 16 * FP32_UNIT * (size + expected.abs()) + 2 * rounded(expected, dtype))


def check_softcap(device: str, dtype: torch.dtype, seed: int = 0) -> float:
    """Relative errors: small logits keep their digits."""
    x = (normal(1, 2000, seed)[0] * 10.0 ** normal(1, 2000, seed + 1)[0]).to(dtype)
    out = softcap(x.to(device), 30.0)
    expected = 30.0 * torch.tanh(x.double() / 30.0)
    return assert_within(out, expected, 8 * FP32_UNIT * expected.abs() + 2 * rounded(expected, dtype))


def check_rotary(device: str, heads: int, dim: int, half: int, dtype: torch.dtype, seed: int = 0) -> float:
    x = normal(2 * 5 * heads, dim, seed).view(2, 5, heads, dim).to(dtype)
    angles = 100 * normal(10, half, seed + 1).view(2, 5, half)
    out = rotary(x.to(device), angles.cos().to(device), angles.sin().to(device))
    expected = reference.rope(x, angles.cos(), angles.sin())
    # A difference of two products is within 3 u of the sum of their magnitudes, whether the last one is fused or not.
    size = reference.rope(x.abs(), angles.cos().abs(), angles.sin().abs()).abs() + expected.abs()
    first, second = x[..., :half] * angles.cos()[:, :, None], x[..., half : 2 * half] * angles.sin()[:, :, None]
    size[..., :half] = first.abs().float() + second.abs().float()
    return assert_within(out, expected, 4 * FP32_UNIT * size + 2 * rounded(expected, dtype))


def check_codes(device: str, text: str, seed: int = 0) -> float:
    """Quantizing and dequantizing on the device: the CPU's bits."""
    x = normal(5, 333, seed)
    x[0, :48] = 0.0
    x[1] = x[1].abs() + 1
    expected = quantize_blockwise(x, QuantFormat.parse(text))
    found = quantize(x.to(device), QuantFormat.parse(text))
    for name, part in expected.stored.items():
        assert_equal(found.stored[name], part)
    return assert_equal(dequantize(found), expected.dequantize())


def check_embed(device: str, text: str, dtype: torch.dtype, seed: int = 0) -> float:
    """Rows looked up in the layout of products: tables are rounded to the type of the activations, the rest once."""
    weight = quantized(text, 21, 130, seed, 1.0)
    prepared = prepare_weight(weight, device, dtype)
    ids = torch.tensor([[20, 0, 7], [15, 16, 7]])
    found = embed(prepared, ids.to(device))
    expected = weight.dequantize()
    scales, format = weight.stored["scales"].float(), weight.format
    if isinstance(format, NestedFormat):
        scales = scales_at(format, weight.stored, format.bits)
    scale = scales.abs().repeat_interleave(prepared.block_size, 1)[:, :130]
    size = scale + expected.abs()
    # A rounding for the table entry (of at most 1, or smaller than the smallest normal number), five of fp32.
    bound = (unit(dtype) * (1 if prepared.kind != "int" else 0) + 5 * FP32_UNIT) * size + rounded(expected, dtype)
    return assert_within(found, expected[ids], (bound * (1 + unit(dtype)))[ids])


def check_nested_values(device: str, text: str, seed: int = 0) -> float:
    """Every width of a nested matrix as the CPU decodes it, to the bit."""
    weight = quantized(text, 5, 333, seed)
    ids = torch.tensor([4, 0, 4])
    worst = 0.0
    for width in weight.format.widths:
        expected = weight.dequantize(width=width)
        found = dequantize_nested(weight.to(device), width)
        worst = max(worst, assert_equal(found, expected))
        found = dequantize_nested(weight.to(device), width, torch.float16, ids.to(device))
        worst = max(worst, assert_equal(found, expected[ids].half()))
    return worst


def cases(seed: int) -> dict[str, Callable[[str], float]]:
    """Checks by name."""
    half, single = torch.float16, torch.float32
    found: dict[str, Callable[[str], float]] = {}
    for rows, columns in ((1, 1), (3, 37), (2, 4096), (2, 9000)):
        for dtype in (half, torch.bfloat16, single):
            name = f"{rows}x{columns} {str(dtype).removeprefix('torch.')}"
            found[f"rms_norm {name}"] = partial(check_rms_norm, rows=rows, columns=columns, dtype=dtype, seed=seed)
            if columns > 1:
                found[f"layer_norm {name}"] = partial(
                    check_layer_norm, rows=rows, columns=columns, dtype=dtype, seed=seed
                )
    for kind in KINDS:
        found[f"activate {kind}"] = partial(check_activate, kind=kind, dtype=half, seed=seed)
    found["softcap"] = partial(check_softcap, dtype=single, seed=seed)
    for heads, dim, part in ((3, 64, 32), (9, 80, 40), (12, 96, 16)):
        found[f"rotary {heads}x{dim}"] = partial(check_rotary, heads=heads, dim=dim, half=part, dtype=half, seed=seed)
    for bits in range(2, 9):
        for text in (f"int{bits}-b64", f"nf{bits}-b32-dq", f"int{bits}-b48-asym-dq"):
            found[f"quantize, dequantize {text}"] = partial(check_codes, text=text, seed=seed)
        for text in (f"int{bits}-b32", f"nf{bits}-b32", f"nested2..{bits}-b32"):
            found[f"embed {text}"] = partial(check_embed, text=text, dtype=half, seed=seed)
    for text in ("nested2..8-b64", "nested3..6-row-bf16"):
        found[f"dequantize {text}"] = partial(check_nested_values, text=text, seed=seed)
    return found
