"""x W^T for many tokens, and the dispatch by their number, against the reference."""

from __future__ import annotations

import pytest
import torch
from format_cases import normal, parse
from triton_cases import HALF, assert_within, product_bound, rounded, unit

triton = pytest.importorskip("triton")

from kbit.errors import UnsupportedError  # noqa: E402
from kbit.formats.blockwise import quantize_blockwise  # noqa: E402
from kbit.formats.quant_tensor import QuantTensor  # noqa: E402
from kbit.kernels import reference  # noqa: E402
from kbit.kernels.triton import gemm as gemm_module  # noqa: E402
from kbit.kernels.triton.configs import GemmConfig, Problem, gemm_candidates, gemm_config  # noqa: E402
from kbit.kernels.triton.gemm import gemm  # noqa: E402
from kbit.kernels.triton.gemm_int8 import gemm_int8, quantize_tokens  # noqa: E402
from kbit.kernels.triton.layout import prepare_weight  # noqa: E402
from kbit.kernels.triton.matmul import describe, gated_matmul, matmul  # noqa: E402

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
@pytest.mark.parametrize("kind", reference.ACTIVATIONS)
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
            for config in [gemm_config("sm_90", problem), *gemm_candidates("sm_90", problem)]:
                assert problem.columns % (config.columns * config.split) == 0


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


def rounded_tokens(x: torch.Tensor) -> torch.Tensor:
    """x as int8 activations stand for it."""
    scales = x.float().abs().amax(1, keepdim=True) / 127
    inverse = torch.where(scales > 0, 1 / scales, 0.0)
    return (x.float() * inverse + 0.5).floor() * scales


def test_tokens_as_int8(device: str) -> None:
    x = normal(3, 100, seed=1).half()
    x[1] = 0
    values, scales = quantize_tokens(x.to(device), 128)
    index = torch.arange(128)
    k8, t, k0 = index % 16 // 8, index % 8 // 2, index % 2
    values = values.cpu()[:, index // 16 * 16 + t * 4 + k8 * 2 + k0].float()
    assert not values[:, 100:].any()
    error = (values[:, :100] * scales.cpu()[:, None] - x.float()).abs()
    assert (error <= scales.cpu()[:, None] * (0.5 + 1e-4)).all()


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("text", [f"int{k}-b64" for k in range(2, 9)] + ["int4-row", "int4-b32-dq", "int8-b96-bf16"])
def test_int8_activations(device: str, text: str, tokens: int) -> None:
    """Equal to the product of the rounded activations, to float32's rounding."""
    weight = quantized(text, 40, 288)
    x = normal(tokens, 288, seed=1).half()
    residual = normal(tokens, 40, seed=3)
    got = gemm_int8(x.to(device), prepare_weight(weight, device), residual=residual.to(device), out_dtype=torch.float32)
    x = rounded_tokens(x)
    expected = reference.linear(x, weight) + residual
    bound = product_bound(x, weight.dequantize(), torch.float32, decoded=8) + 4 * rounded(expected, torch.float32)
    assert_within(got, expected, bound)


def test_int8_activations_need_integer_codes() -> None:
    x = normal(2, 64).half()
    for text in ("nf4-b64", "int4-b64-asym", "int4-b16"):
        with pytest.raises(UnsupportedError, match="symmetric integer"):
            gemm_int8(x, prepare_weight(quantized(text, 16, 64), "cpu"))
