"""Products with quantized weights against the reference, one launch each: the worst error in units of the bound."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from kbit.formats.outlier_weights import add_outliers
from kbit.formats.quant_tensor import QuantTensor
from kbit.formats.registry import parse_format
from kbit.formats.rotation import rotate
from kbit.formats.trellis import TrellisFormat
from kbit.formats.trellis_code import TileFactors, levels
from kbit.gpu_check.bounds import assert_within, product_bound, rounded, unit
from kbit.gpu_check.synthetic import random_codes
from kbit.kernels import reference, reference_trellis
from kbit.kernels.reference_trellis import in_units
from kbit.kernels.triton.codecs.layout import prepare_weight
from kbit.kernels.triton.codecs.trellis_search import search_symbols
from kbit.kernels.triton.product.gemm import gemm
from kbit.kernels.triton.product.gemv import gemv
from kbit.kernels.triton.product.grouped import group_tokens, grouped_config, grouped_matmul, stack_experts
from kbit.kernels.triton.product.matmul import gated_matmul, matmul
from kbit.kernels.triton.product.rounded import check_arch, segment_of, with_activations
from kbit.kernels.triton.rows.embed import embed
from kbit.kernels.triton.target import current_arch


def normal(rows: int, columns: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale


def quantized(text: str, rows: int, columns: int, seed: int = 0, scale: float = 0.05) -> QuantTensor:
    weight = normal(rows, columns, seed, scale)
    return parse_format(text).encode(lambda start, stop: weight[start:stop], (rows, columns))


def check_product(
    device: str,
    weight: QuantTensor,
    tokens: int,
    dtype: torch.dtype = torch.float16,
    *,
    run: Callable[..., torch.Tensor] = matmul,
    seed: int = 1,
) -> float:
    """x W^T of so many tokens by `run`: gemv, gemm, or matmul, which chooses.

    Raises:
        TooFarError: beyond the bound, as all checks here.
    """
    x = normal(tokens, weight.shape[1], seed).to(dtype)
    got = run(x.to(device), prepare_weight(weight, device, dtype))
    bound = product_bound(x, weight.dequantize(), dtype, dtype, decoded=6)
    return assert_within(got.float(), reference.linear(x, weight), bound)


def check_gated(device: str, text: str, tokens: int, kind: str, seed: int = 1) -> float:
    """act(x G^T) * (x U^T)."""
    gate, up = quantized(text, 40, 512, seed), quantized(text, 40, 512, seed + 5)
    x = normal(tokens, 512, seed + 1).half()
    got = gated_matmul(x.to(device), prepare_weight(gate, device), prepare_weight(up, device), kind)
    g, u = reference.linear(x, gate), reference.linear(x, up)
    expected = reference.activate(g, u, kind)
    error_g = product_bound(x, gate.dequantize(), torch.float32, torch.float16)
    error_u = product_bound(x, up.dequantize(), torch.float32, torch.float16)
    # |act'| is at most 1.13 for each of these activations, |act(g)| at most |g|.
    bound = 1.13 * error_g * (u.abs() + error_u) + g.abs() * error_u + 4 * unit(torch.float16) * expected.abs() + 1e-7
    return assert_within(got.float(), expected, bound)


def check_with_residual(device: str, text: str, tokens: int, seed: int = 1) -> float:
    """x W^T + bias + residual, in float32."""
    weight = quantized(text, 40, 512, seed)
    x, bias, residual = normal(tokens, 512, seed + 1).half(), normal(1, 40, seed + 2)[0], normal(tokens, 40, seed + 3)
    residual = residual.half()
    got = matmul(
        x.to(device), prepare_weight(weight, device), bias.to(device), residual.to(device), out_dtype=torch.float32
    )
    expected = reference.linear(x, weight, bias) + residual.float()
    bound = product_bound(x, weight.dequantize(), torch.float32, torch.float16, decoded=6)
    return assert_within(got, expected, bound + 4 * rounded(expected, torch.float32))


def check_trellis(
    device: str, text: str, shape: tuple[int, int, int], dtype: torch.dtype = torch.float16, seed: int = 0
) -> float:
    """A product (M, N, K) with a trellis, against float64 from the rotated weights and tokens."""
    tokens, rows, columns = shape
    weight = random_codes(text, rows, columns, seed)
    x = normal(tokens, columns, seed + 1).to(dtype)
    prepared = prepare_weight(weight, device, dtype)
    got = matmul(x.to(device), prepared, out_dtype=torch.float32).double().cpu()
    expected, bound = trellis_product_and_bound(x, weight, dtype)
    return assert_within(got, expected, bound)


def trellis_product_and_bound(
    x: torch.Tensor, weight: QuantTensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """A product with a trellis (M, N) in float64, from the rotated weights and tokens, and how far a kernel may be off.

    Args:
        x: (M, K).
        weight: (N, K).
        dtype: that rotated tokens are rounded to.
    """
    format, (rows, columns) = weight.format, weight.shape
    assert isinstance(format, TrellisFormat)
    mixed = format.columns_mixed(columns)
    turned = rotate(x.double(), weight.stored["signs"], mixed)
    values = format.decode_rotated(weight, slice(0, rows)).double()
    full = torch.nn.functional.pad(x.double().abs(), (0, turned.shape[1] - columns))
    sums = (full.view(len(x), -1, mixed).sum(-1) / mixed**0.5).repeat_interleave(mixed, dim=1)
    # A rotated token is rounded once to its type, after some float32 roundings of its block's sum; levels once.
    error = unit(dtype) * turned.abs() + (mixed.bit_length() + 2) * 2.0**-24 * sums
    size = turned.abs() @ values.abs().T
    bound = error @ values.abs().T + (unit(dtype) + (turned.shape[1] + 4) * 2.0**-24) * size
    # Weights that are kept apart meet the tokens as they are, in float32.
    apart = add_outliers(torch.zeros(rows, columns), weight.stored, columns, torch.arange(rows)).double()
    bound += (format.outliers + 4) * 2.0**-24 * (x.double().abs() @ apart.abs().T)
    return turned @ values.T + x.double() @ apart.T, 1.01 * bound


def check_rounded(device: str, kind: str, text: str, tokens: int, seed: int = 1) -> float:
    """A product whose activations are rounded to 8 bits, against that of the reference's rounded ones.

    Raises:
        UnsupportedError: this GPU, or format, does not round so.
    """
    check_arch(kind, current_arch())
    quant = quantized(text, 48, 512, seed)
    x = normal(tokens, 512, seed + 1).half()
    weight = with_activations(prepare_weight(quant, device), kind)
    got = matmul(x.to(device), weight, out_dtype=torch.float32)
    turned = reference.round_int8(x, segment_of(weight)) if kind == "int8" else reference.round_fp8(x)
    dense = embed(weight, torch.arange(weight.shape[0], device=device), dtype=torch.float32).cpu()
    # What rounding a codebook costs: int8 has steps of 1/127 of it at most, e4m3 of 1/16 of each value.
    loss = 0.0 if weight.table8 is None else 2.0**-5
    bound = product_bound(turned, dense, torch.float32, decoded=8) + loss * (turned.abs() @ dense.abs().T)
    return assert_within(got, turned @ dense.T, bound + 2.0**-24)


def check_search(device: str, text: str, seed: int = 0, passed_on: bool = False) -> float:
    """A tile's trellis codes, against the search's definition: all or nothing. passed_on: errors are, within it."""
    format = TrellisFormat.parse(text)
    values = in_units(levels(format, torch.arange(1 << format.window)).float() * format.step)
    wanted = in_units(normal(1, 256, seed))
    wanted[:, ::50] = 32767  # beyond all values
    factors = given = None
    if passed_on:
        factors = TileFactors.of(*(0.2 * normal(16, 16, seed + part)[None] for part in (1, 2)))
        given = TileFactors(factors.columns.to(device), factors.rows.to(device))
    got = search_symbols(format, wanted.to(device), values.to(device), given).cpu()
    expected = reference_trellis.search_symbols(wanted[0], values, format.bits, factors, half=format.half)[None]
    return assert_within(got.float(), expected.float(), torch.full(got.shape, 0.5))


def check_grouped(device: str, text: str, tokens: int, top: int, count: int, seed: int = 0) -> float:
    """Every token with the experts it was sent to, against one product each."""
    dtype = torch.float16
    if text.startswith("trellis"):
        weights = [random_codes(text, 40, 112, seed + expert) for expert in range(count)]
        signs = weights[0].stored["signs"]  # the experts of a layer have one rotation
        weights = [QuantTensor(w.format, w.shape, {**w.stored, "signs": signs}, w.codebook) for w in weights]
    else:  # Sizes differ, so that one expert's scales are not another's.
        weights = [quantized(text, 40, 128, seed + expert, 0.05 * (1 + expert)) for expert in range(count)]
    stacked = stack_experts([prepare_weight(weight, device, dtype) for weight in weights])
    x = normal(tokens, weights[0].shape[1], seed + 9).to(dtype)
    ids = torch.rand(tokens, count, generator=torch.Generator().manual_seed(seed + 3)).topk(top, dim=1).indices
    config = grouped_config(stacked, tokens * top, count)
    groups = group_tokens(ids.to(device), count, config.tokens)
    got = grouped_matmul(x.to(device), stacked, groups, torch.float32).cpu()
    worst = 0.0
    for entry, expert in enumerate(ids.reshape(-1).tolist()):
        row = x[entry // top : entry // top + 1]
        if text.startswith("trellis"):
            expected, bound = trellis_product_and_bound(row, weights[expert], dtype)
        else:
            bound = product_bound(row, weights[expert].dequantize(), torch.float32, dtype, decoded=6)
            expected = reference.linear(row, weights[expert])
        worst = max(worst, assert_within(got[entry : entry + 1].to(expected.dtype), expected, bound))
    return worst


FAMILIES = ("int", "nf", "lloyd", "float", "dynamic", "quantile")
STORAGE = ("nf4-b16", "nf4-b48-dq", "int4-row", "int4-b32-asym-dq", "int3-b128-asym-bf16", "int8-row-fp32")


def cases(seed: int) -> dict[str, Callable[[str], float]]:
    """Checks by name: every width of every data type, ways to store scales, types, epilogues; odd and whole shapes."""
    found: dict[str, Callable[[str], float]] = {}

    def product(name: str, text: str, shape: tuple[int, int, int], dtype: torch.dtype, run: Any) -> None:
        tokens, rows, columns = shape
        label = f"{name} {text} {tokens}x{rows}x{columns} {str(dtype).removeprefix('torch.')}"
        found[label] = lambda device: check_product(
            device, quantized(text, rows, columns, seed), tokens, dtype, run=run, seed=seed + 1
        )

    for bits in range(2, 9):
        for family in FAMILIES:
            product("gemv", f"{family}{bits}-b64", (1, 104, 1040), torch.float16, gemv)
            product("gemm", f"{family}{bits}-b64", (11, 104, 1040), torch.float16, gemm)
        for family in ("int", "nf"):
            product("gemv", f"{family}{bits}-b64", (4, 256, 2048), torch.bfloat16, gemv)
            product("gemm", f"{family}{bits}-b64", (70, 256, 2048), torch.float16, gemm)
            product("gemm", f"{family}{bits}-b64", (300, 256, 1024), torch.bfloat16, gemm)
        # The widest width of these is `bits`: what a wider file is at that width.
        product("gemv", f"nested2..{bits}-b64", (1, 104, 1040), torch.float16, gemv)
        product("gemv", f"nested2..{bits}-row-bf16", (4, 256, 2048), torch.bfloat16, gemv)
        product("gemm", f"nested2..{bits}-b64", (11, 104, 1040), torch.float16, gemm)
        product("gemm", f"nested2..{bits}-b32-bf16", (300, 256, 1024), torch.bfloat16, gemm)
    for text in STORAGE:
        product("gemv", text, (2, 33, 272), torch.float16, gemv)
        product("gemm", text, (40, 33, 272), torch.float16, gemm)
    for tokens in (1, 33):  # weights kept apart are added to what is not rounded to half precision yet
        product("outliers", "nf4-b64-o64", (tokens, 40, 320), torch.float16, partial(matmul, out_dtype=torch.float32))
    for tokens in (2, 30):
        for kind in ("silu", "gelu", "gelu_tanh", "relu"):
            found[f"gated {kind} nf4-b64 {tokens}"] = partial(
                check_gated, text="nf4-b64", tokens=tokens, kind=kind, seed=seed
            )
        for text in ("nested2..5-b64", "nf3-b64-o64"):
            found[f"gated silu {text} {tokens}"] = partial(
                check_gated, text=text, tokens=tokens, kind="silu", seed=seed
            )
        found[f"residual int5-b64 {tokens}"] = partial(check_with_residual, text="int5-b64", tokens=tokens, seed=seed)
    further = ("trellis2-sum4", "trellis3-l12-h64", "trellis2.5", "trellis5.5", "trellis4-o64")
    for text in (*(f"trellis{bits}" for bits in range(2, 9)), *further):
        for tokens in (1, 33):
            found[f"trellis {text} {tokens}"] = partial(check_trellis, text=text, shape=(tokens, 40, 320), seed=seed)
    for text in ("trellis2-l8", "trellis2.5-l12", "trellis3-l10", "trellis3.5-l12", "trellis5-l12", "trellis6"):
        found[f"trellis_search {text}"] = partial(check_search, text=text, seed=seed)
    for text in ("trellis2-l8", "trellis2.5-l10", "trellis3-l10", "trellis4", "trellis4.5-l12", "trellis5.5-l12"):
        name = f"trellis_search {text} within tiles"
        found[name] = partial(check_search, text=text, seed=seed, passed_on=True)
    for kind in ("int8", "fp8"):
        for text in (*(f"int{bits}-b128" for bits in range(2, 9)), "nf4-b64", "nf3-b64", "lloyd5-b64", "int4-row"):
            found[f"gemm_{kind} {text} 70"] = partial(check_rounded, kind=kind, text=text, tokens=70, seed=seed)
    texts = ("nf4-b64", "int4-b32-asym-dq", "nf3-b64-dq", "int8-row", "lloyd2-b64", "nested2..5-b64")
    for text in (*texts, "nf4-b64-o16", "trellis2", "trellis3", "trellis3.5-o16"):
        for tokens, top, count in ((5, 2, 4), (40, 1, 3)):
            name = f"grouped {text} {tokens} tokens {count} experts"
            found[name] = partial(check_grouped, text=text, tokens=tokens, top=top, count=count, seed=seed)
    return found
