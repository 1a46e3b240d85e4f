"""x W^T for many tokens, and the dispatch by their number, against the reference."""

from __future__ import annotations

import pytest
import torch
from format_cases import normal, parse
from triton_cases import HALF, ON_GPU, assert_within, product_bound, rounded, unit

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from kbit.formats.blockwise import quantize_blockwise  # noqa: E402
from kbit.formats.quant_tensor import QuantTensor  # noqa: E402
from kbit.host.errors import UnsupportedError  # noqa: E402
from kbit.kernels import reference  # noqa: E402
from kbit.kernels.triton.codecs.layout import TritonWeight, prepare_weight  # noqa: E402
from kbit.kernels.triton.product import gemm as gemm_module  # noqa: E402
from kbit.kernels.triton.product import gemm_rounded as rounding  # noqa: E402
from kbit.kernels.triton.product.configs import (  # noqa: E402
    GemmConfig,
    Problem,
    gemm_candidates,
    gemm_config,
    rounded_config,
)
from kbit.kernels.triton.product.gemm import gemm  # noqa: E402
from kbit.kernels.triton.product.gemv import GATES  # noqa: E402
from kbit.kernels.triton.product.limits import ROUNDED_TOKENS  # noqa: E402
from kbit.kernels.triton.product.matmul import describe, gated_matmul, matmul  # noqa: E402
from kbit.kernels.triton.product.round_fp8 import e4m3  # noqa: E402
from kbit.kernels.triton.product.rounded import check_arch, segment_of, with_activations  # noqa: E402


@triton.jit
def to_e4m3(x_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, e4m3(tl.load(x_ptr + at)))


SUMS = GemmConfig(2, 16, 64, 1, 4, 2)  # scales multiply sums
WEIGHTS = GemmConfig(2, 128, 64, 1, 4, 2)  # scales multiply weights


def quantized(text: str, rows: int, columns: int, seed: int = 0, scale: float = 0.05) -> QuantTensor:
    return quantize_blockwise(normal(rows, columns, seed, scale), parse(text))


def for_bits(config: GemmConfig, bits: int) -> GemmConfig:
    """The configuration with chunks that hold every plane of a width."""
    columns = {2: 128, 6: 128, 3: 256, 5: 256, 7: 256}.get(bits, 64)
    return GemmConfig(config.tiles, config.tokens, columns, config.split, config.warps, config.stages)


def check(
    device: str,
    weight: QuantTensor,
    tokens: int,
    dtype: torch.dtype = torch.float16,
    config: GemmConfig | None = None,
) -> None:
    x = normal(tokens, weight.shape[1], seed=1).to(dtype)
    got = gemm(x.to(device), prepare_weight(weight, device, dtype), config=config)
    assert got.dtype == dtype
    bound = product_bound(x, weight.dequantize(), dtype, dtype, decoded=6)
    assert_within(got.float(), reference.linear(x, weight), bound)


@pytest.mark.parametrize("config", [SUMS, WEIGHTS], ids=["sums", "weights"])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("family", ["int", "nf", "lloyd"])
def test_every_width(device: str, family: str, bits: int, config: GemmConfig) -> None:
    check(device, quantized(f"{family}{bits}-b64", 40, 256), 11, config=for_bits(config, bits))


@pytest.mark.parametrize("config", [SUMS, WEIGHTS], ids=["sums", "weights"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("text", ["int4-b64", "nf4-b64", "int8-b64", "nf3-b64", "int3-b64-asym", "int5-b64"])
def test_every_activation_type(device: str, text: str, dtype: torch.dtype, config: GemmConfig) -> None:
    check(device, quantized(text, 33, 256), 9, dtype, for_bits(config, parse(text).bits))


@pytest.mark.parametrize("config", [SUMS, WEIGHTS], ids=["sums", "weights"])
@pytest.mark.parametrize(
    "text", ["nf4-b16", "nf4-b48-dq", "int4-row", "int4-b32-asym-dq", "int3-b128-asym-bf16", "int8-row-fp32"]
)
def test_every_way_to_store_scales(device: str, text: str, config: GemmConfig) -> None:
    check(device, quantized(text, 33, 272), 9, config=for_bits(config, parse(text).bits))


@pytest.mark.parametrize("shape", [(5, 1, 16), (17, 70, 100), (33, 130, 257), (65, 40, 128), (150, 17, 333)])
@pytest.mark.parametrize("text", ["nf4-b64", "int3-b64"])
def test_odd_shapes(device: str, text: str, shape: tuple[int, int, int]) -> None:
    tokens, rows, columns = shape
    check(device, quantized(text, rows, columns), tokens)


@pytest.mark.parametrize("split", [1, 2, 4])
@pytest.mark.parametrize("dtype", HALF)
def test_splitting_the_columns_is_repeatable(device: str, dtype: torch.dtype, split: int) -> None:
    weight = quantized("int4-b64", 40, 512)
    config = GemmConfig(2, 16, 64, split, 4, 2)
    check(device, weight, 13, dtype, config)
    x, prepared = normal(13, 512, seed=1).to(dtype).to(device), prepare_weight(weight, device, dtype)
    assert torch.equal(gemm(x, prepared, config=config), gemm(x, prepared, config=config))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3])
def test_weights_of_any_size_keep_half_precision(device: str, scale: float) -> None:
    """Scaled weights are rounded to half precision: their exponent is moved to where it has all its bits."""
    check(device, quantized("nf4-b64-bf16", 33, 256, scale=scale), 9, torch.float16, WEIGHTS)


@pytest.mark.parametrize("split", [1, 2])
def test_bias_residual_and_output_type(device: str, split: int) -> None:
    weight = quantized("nf4-b64", 40, 512)
    x, bias, residual = normal(9, 512, seed=1).half(), normal(1, 40, seed=2)[0], normal(9, 40, seed=3).half()
    config = GemmConfig(2, 16, 64, split, 4, 2)
    got = gemm(
        x.to(device),
        prepare_weight(weight, device),
        bias.to(device),
        residual.to(device),
        torch.float32,
        config=config,
    )
    assert got.dtype == torch.float32
    expected = reference.linear(x, weight, bias) + residual.float()
    bound = product_bound(x, weight.dequantize(), torch.float32, torch.float16) + 4 * rounded(expected, torch.float32)
    assert_within(got, expected, bound)


@pytest.mark.parametrize("tokens", [1, 4, 5, 20])
@pytest.mark.parametrize("text", ["nf4-b64", "int8-b64"])
def test_matmul_chooses_by_tokens(device: str, text: str, tokens: int) -> None:
    weight = quantized(text, 40, 256)
    prepared = prepare_weight(weight, device)
    assert describe(prepared, tokens) == ("gemv" if tokens <= 4 else "gemm")
    x = normal(tokens, 256, seed=1).half()
    bound = product_bound(x, weight.dequantize(), x.dtype, x.dtype)
    assert_within(matmul(x.to(device), prepared).float(), reference.linear(x, weight), bound)


def test_a_float_weight_is_torchs(device: str) -> None:
    weight = normal(24, 64).half()
    prepared = prepare_weight(weight, device)
    assert describe(prepared, 3) == "torch.matmul"
    x, bias = normal(3, 64, seed=1).half(), normal(1, 24, seed=2)[0]
    got = matmul(x.to(device), prepared, bias.to(device))
    assert_within(got.float(), reference.linear(x, weight, bias), product_bound(x, weight, x.dtype, x.dtype) * 2)


@pytest.mark.parametrize("tokens", [2, 9])
@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("texts", [("nf4-b64", "nf4-b64"), ("nf4-b64", "int8-b64"), ("nf4-b64", "dense")])
def test_gate_and_up(device: str, texts: tuple[str, str], kind: str, tokens: int) -> None:
    gate = quantized(texts[0], 24, 256)
    up = normal(24, 256, 5, 0.05).half() if texts[1] == "dense" else quantized(texts[1], 24, 256, seed=5)
    x = normal(tokens, 256, seed=1).half()
    got = gated_matmul(x.to(device), prepare_weight(gate, device), prepare_weight(up, device), kind)
    g, u = reference.linear(x, gate), reference.linear(x, up)
    expected = reference.activate(g, u, kind)
    error_g = product_bound(x, gate.dequantize(), torch.float32, torch.float16)
    dense_up = up if isinstance(up, torch.Tensor) else up.dequantize()
    error_u = product_bound(x, dense_up, torch.float16 if texts[1] == "dense" else torch.float32, torch.float16)
    # |act'| is at most 1.13 for each of these activations, |act(g)| at most |g|.
    bound = 1.13 * error_g * (u.abs() + error_u) + g.abs() * error_u + 4 * unit(torch.float16) * expected.abs() + 1e-7
    assert_within(got.float(), expected, bound)


def test_more_elements_than_a_launch_may_have(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = prepare_weight(quantized("int4-b64", 48, 128), device)
    x, residual, gate = (normal(70, width, seed=width).half().to(device) for width in (128, 48, 48))
    whole = gemm(x, weight, None, residual, gate=gate, kind="silu", config=SUMS)
    launches = []
    monkeypatch.setattr(gemm_module, "MOST_ELEMENTS", 33 * 128)  # two tiles of 16 tokens
    monkeypatch.setattr(gemm_module, "launch", lambda *a, launch=gemm_module.launch: (launches.append(a), launch(*a)))
    assert torch.equal(gemm(x, weight, None, residual, gate=gate, kind="silu", config=SUMS), whole)
    assert [len(launch[0]) for launch in launches] == [32, 32, 6]


def test_no_tokens(device: str) -> None:
    prepared = prepare_weight(quantized("nf4-b64", 24, 64), device)
    assert matmul(torch.empty(0, 64, dtype=torch.float16, device=device), prepared).shape == (0, 24)


def test_configurations_fit_the_problem() -> None:
    for bits in range(2, 9):
        for tokens in (5, 16, 17, 64, 65, 1000):
            problem = Problem(tokens, 4096, 11008, bits, 64)
            if 11008 % 256 and bits in (3, 5, 7):
                problem = Problem(tokens, 4096, 11264, bits, 64)
            rounded = [rounded_config("sm_90", problem, kind, 64) for kind in ("int8", "fp8")]
            for config in [gemm_config("sm_90", problem), *gemm_candidates("sm_90", problem), *rounded]:
                assert problem.columns % (config.columns * config.split) == 0
            for arch in ("gfx90a", "gfx942"):  # of whose 64 KB of shared memory x may have half
                config = gemm_config(arch, problem)
                assert 2 * config.tokens * config.columns <= 1 << 15


def test_what_does_not_fit_is_refused() -> None:
    weight = prepare_weight(quantized("nf4-b64", 16, 64), "cpu")
    x = normal(9, 64).half()
    with pytest.raises(UnsupportedError, match="does not match"):
        matmul(normal(9, 63).half(), weight)
    with pytest.raises(UnsupportedError, match="swish"):
        gated_matmul(x, weight, weight, "swish")
    with pytest.raises(UnsupportedError, match="not alike"):
        gated_matmul(x, weight, prepare_weight(quantized("nf4-b64", 17, 64), "cpu"), "silu")
    with pytest.raises(UnsupportedError, match="split 3 ways"):
        gemm(x, weight, config=GemmConfig(2, 16, 64, 3, 4, 2))


# Products with activations in 8 bits: the kernel, how it rounds, and what its columns are.
EIGHT = ("int8", "fp8")


def marked(text: str, kind: str, rows: int, columns: int, device: str) -> tuple[QuantTensor, TritonWeight]:
    weight = quantized(text, rows, columns)
    return weight, with_activations(prepare_weight(weight, device), kind)


def rounded_weight(weight: QuantTensor, prepared: TritonWeight, kind: str) -> torch.Tensor:
    """The weight that a rounded product multiplies with: (N, K) float32."""
    if prepared.table8 is None:
        return weight.dequantize()
    table = prepared.table8.cpu()
    if prepared.kind == "pairs":  # entries of two codes: the code 0 beside each
        codes = torch.arange(2**prepared.bits)
        if prepared.bits == 3:  # the planes of 2 and 1 bits lie side by side, not the codes
            codes = (codes & 3) | (codes >> 2) << 4
        table = table[codes].to(torch.int8)  # the lower 16 bits
    levels = (table if kind == "int8" else table.view(torch.float8_e4m3fn)).float() * prepared.multiplier8
    assert (levels - weight.codebook).abs().max() <= weight.codebook.abs().max() * (2**-7 if kind == "int8" else 2**-4)
    return QuantTensor(weight.format, weight.shape, weight.stored, levels).dequantize()


def rounded_x(x: torch.Tensor, prepared: TritonWeight) -> torch.Tensor:
    if prepared.activations == "int8":
        return reference.round_int8(x, segment_of(prepared))
    return reference.round_fp8(x)


@pytest.mark.parametrize("text", ["int4-b64", "int3-b128", "nf2-b32"])
@pytest.mark.parametrize("kind", EIGHT)
def test_tokens_in_8_bits(device: str, kind: str, text: str) -> None:
    """To the bit what the reference makes of them, in the order of the weight's columns, zeros behind them."""
    _, prepared = marked(text, kind, 16, 300, device)
    x = normal(3, 300, seed=1).half() * torch.logspace(-4, 3, 300)
    x[1] = 0
    tokens = rounding.round_tokens(x.half().to(device), prepared)
    values, scales = tokens.values.float().cpu(), tokens.scales.cpu()
    scales = scales.repeat_interleave(values.shape[1] // len(scales), 0).T
    order = 32 if text.startswith("int3") else 16
    index = torch.arange(values.shape[1])
    t, k0, k8, step = index % 8 // 2, index % 2, index % 16 // 8, index % order // 16
    place = k8 * 16 + t * 4 + k0 * 2 + step if order == 32 else t * 4 + k0 * 2 + k8
    values = (values * scales)[:, index // order * order + place]
    assert not values[:, 300:].any()
    assert torch.equal(values[:, :300], rounded_x(x.half(), prepared))


@pytest.mark.skipif(ON_GPU, reason="a kernel's part, called alone")
def test_every_e4m3_value_and_every_tie(device: str) -> None:
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    values = values[values.isfinite()].sort().values
    between = (values[1:] + values[:-1]) / 2
    x = torch.cat([values, between, between.nextafter(values[1:]), between.nextafter(values[:-1])])
    x = torch.nn.functional.pad(x, (0, 1024 - len(x)))
    out = torch.empty(1024, dtype=torch.int8)
    to_e4m3[(1,)](x, out, 1024)
    assert torch.equal(out.view(torch.float8_e4m3fn).float(), x.to(torch.float8_e4m3fn).float())


NARROW = [f"int{bits}-b64" for bits in range(2, 6)] + ["int4-row", "int4-b32-dq", "nf2-b64", "nf3-b32", "nf4-b128"]
NARROW += ["lloyd5-b64", "float4e2m1-b32"]
WIDE = ["int6-b64", "int7-b64", "int8-b64", "int8-b96-bf16"]


@pytest.mark.parametrize(
    ("kind", "text"), [*(("int8", text) for text in NARROW + WIDE), *(("fp8", text) for text in NARROW)]
)
def test_8_bit_activations(device: str, kind: str, text: str) -> None:
    """Equal to the product of what was rounded, to float32's rounding."""
    tokens = 9
    weight, prepared = marked(text, kind, 40, 288, device)
    x, residual, bias = normal(tokens, 288, seed=1).half(), normal(tokens, 40, seed=3), normal(1, 40, seed=2)[0]
    on = [tensor.to(device) for tensor in (x, bias, residual)]
    got = rounding.gemm_rounded(on[0], prepared, on[1], on[2], torch.float32)
    x, dense = rounded_x(x, prepared), rounded_weight(weight, prepared, kind)
    expected = reference.linear(x, dense, bias) + residual
    bound = product_bound(x, dense, torch.float32, decoded=8) + 8 * rounded(expected, torch.float32)
    assert_within(got, expected, bound)


@pytest.mark.parametrize("kind", EIGHT)
def test_marked_weights_round_many_tokens_only(device: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain and gated, the tokens of both matrices rounded once; few tokens as ever."""
    assert ROUNDED_TOKENS >= 8
    monkeypatch.setattr("kbit.kernels.triton.product.matmul.ROUNDED_TOKENS", 8)
    calls = []
    monkeypatch.setattr(rounding, "round_tokens", lambda *a, run=rounding.round_tokens: (calls.append(a), run(*a))[1])
    texts = ("int4-b64", "lloyd5-b64", "int3-b64")
    pairs = [
        (marked(text, kind, 24, 256, device)[1], prepare_weight(quantized(text, 24, 256), device)) for text in texts
    ]
    for tokens, name in ((3, "gemv"), (8, "gemm"), (9, f"gemm_{kind}")):
        x = normal(tokens, 256, seed=1).half().to(device)
        for with_mark, plain in pairs:
            calls.clear()
            assert describe(with_mark, tokens) == name
            got = matmul(x, with_mark), gated_matmul(x, with_mark, with_mark, "silu")
            if tokens <= 8:
                assert torch.equal(got[0], matmul(x, plain))
                assert torch.equal(got[1], gated_matmul(x, plain, plain, "silu"))
                assert not calls
            else:
                assert torch.equal(got[0], rounding.gemm_rounded(x, with_mark))
                gates = rounding.gemm_rounded(x, with_mark, out_dtype=torch.float32)
                assert torch.equal(got[1], rounding.gemm_rounded(x, with_mark, gate=gates, kind="silu"))
                expected = torch.nn.functional.silu(gates) * rounding.gemm_rounded(
                    x, with_mark, out_dtype=torch.float32
                )
                assert_within(got[1].float(), expected.cpu(), 2 * rounded(expected.cpu(), torch.float16))
                assert len(calls) == 6  # one of them for both products of gated_matmul
    # int4's and lloyd5's columns stand in the same order, int3's do not.
    int4, lloyd5, int3 = (with_mark for with_mark, _ in pairs)
    for up, roundings in ((lloyd5, 1), (int3, 2)):
        calls.clear()
        gated_matmul(x, int4, up, "silu")
        assert len(calls) == roundings


def test_8_bit_activations_refuse_what_they_cannot_do() -> None:
    for kind, text, reason in (
        ("int8", "int4-b64-asym", "offsets"),
        ("int8", "int4-b16", "32 columns"),
        ("fp8", "nf4-b48", "32 columns"),
        ("int8", "lloyd6-b64", "codebook of more than 5 bits"),
        ("fp8", "int8-b64", "4 significant bits"),
    ):
        with pytest.raises(UnsupportedError, match=f"--compute {kind} does not run {text}: .*{reason}.*--compute fp16"):
            with_activations(prepare_weight(quantized(text, 16, 64), "cpu"), kind)
    with pytest.raises(UnsupportedError, match="float32 activations"):
        with_activations(prepare_weight(quantized("int4-b64", 16, 64), "cpu", torch.float32), "int8")
    with pytest.raises(UnsupportedError, match="sm_89.*this is gfx942.*int8"):
        check_arch("fp8", "gfx942")
    weight = with_activations(prepare_weight(quantized("int4-b64", 16, 64), "cpu"), "int8")
    tokens = rounding.round_tokens(normal(9, 64).half(), weight)
    other = with_activations(prepare_weight(quantized("int4-b32", 16, 64), "cpu"), "int8")
    with pytest.raises(UnsupportedError, match="these tokens were rounded for"):
        rounding.gemm_rounded(normal(9, 64).half(), other, rounded=tokens)
    with pytest.raises(UnsupportedError, match="int4-b64 is not marked"):
        rounding.gemm_rounded(normal(9, 64).half(), prepare_weight(quantized("int4-b64", 16, 64), "cpu"))
    dense = prepare_weight(normal(16, 64), "cpu")
    assert with_activations(dense, "int8") is dense
