"""The kernels as torch operators: registered rightly (torch.library.opcheck), and torch.compile sees no break."""

from __future__ import annotations

import pytest
import torch
from triton_cases import ON_GPU

from kbit.formats.blockwise import quantize_blockwise
from kbit.formats.quant_format import QuantFormat

pytest.importorskip("triton")

from kbit.kernels.triton import library
from kbit.kernels.triton.attention.kv_layout import KVFormat, new_pages, plain_block_table
from kbit.kernels.triton.codecs.layout import TritonWeight, prepare_weight
from kbit.kernels.triton.product.gemm_rounded import gemm_rounded
from kbit.kernels.triton.product.matmul import gated_matmul, matmul
from kbit.kernels.triton.product.rounded import with_activations

# Schema, fake implementation and dispatch; gradients there are none.
TESTS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
FORMATS = ["nf4-b16", "int3-b16-asym", "nf3-b32-dq", "lloyd6-b16", "quantile4-b32"]


def weight_of(format: str, device: str, rows: int = 37, columns: int = 48, seed: int = 0) -> TritonWeight:
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return prepare_weight(quantize_blockwise(values, QuantFormat.parse(format)), device)


def half(device: str, *shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).half().to(device)


@pytest.mark.parametrize("format", FORMATS)
def test_a_weight_survives_the_journey(device: str, format: str) -> None:
    weight = weight_of(format, device)
    found = library.unpack(*library.pack(weight))
    for name in weight.__dataclass_fields__:
        before, after = getattr(weight, name), getattr(found, name)
        if name == "planes":
            assert all(a is b for a, b in zip(before, after, strict=True))
        else:
            assert after is before or after == before
    x = half(device, 2, 48)
    assert torch.equal(torch.ops.kbit.matmul(x, *library.pack(weight)), matmul(x, weight))


def test_products(device: str) -> None:
    weight, other = (library.pack(weight_of("nf4-b16", device, seed=seed)) for seed in (0, 1))
    x, residual = half(device, 3, 48), half(device, 3, 37).float()
    torch.library.opcheck(library.matmul, (x, *weight), test_utils=TESTS)
    torch.library.opcheck(library.matmul, (x, *weight, half(device, 37), residual, torch.float32), test_utils=TESTS)
    torch.library.opcheck(library.gated_matmul, (x, *weight, *other, "silu"), test_utils=TESTS)
    torch.library.opcheck(library.embed, (*weight, torch.tensor([3, 36], device=device)), test_utils=TESTS)


@pytest.mark.parametrize(("kind", "format"), [("int8", "int4-b32"), ("fp8", "nf3-b32")])
def test_products_with_activations_in_8_bits(
    device: str, kind: str, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a weight's products round travels with it."""
    monkeypatch.setattr("kbit.kernels.triton.product.matmul.ROUNDED_TOKENS", 4)
    weights = [with_activations(weight_of(format, device, seed=seed), kind) for seed in (0, 1)]
    packed = [library.pack(weight) for weight in weights]
    x = half(device, 5, 48)
    assert torch.equal(torch.ops.kbit.matmul(x, *packed[0]), gemm_rounded(x, weights[0]))
    torch.library.opcheck(library.matmul, (x, *packed[0], None, None, torch.float32), test_utils=TESTS)
    torch.library.opcheck(library.gated_matmul, (x, *packed[0], *packed[1], "silu"), test_utils=TESTS)


def test_rows(device: str) -> None:
    x, scale = half(device, 3, 48), half(device, 48).float()
    torch.library.opcheck(library.rms_norm, (x, scale, 1e-5, torch.float32), test_utils=TESTS)
    torch.library.opcheck(library.add_rms_norm, (x, x.float(), scale, 1e-5), test_utils=TESTS)
    torch.library.opcheck(library.layer_norm, (x, scale, scale, 1e-5), test_utils=TESTS)
    torch.library.opcheck(library.activate, (x, x, "gelu"), test_utils=TESTS)
    torch.library.opcheck(library.softcap, (x, 30.0), test_utils=TESTS)


def test_attention(device: str) -> None:
    """4-bit keys, 8-bit values: append five tokens, attend from all and from the last."""
    keys, values = (new_pages(1, 2, KVFormat(kind, 32), device) for kind in ("4", "8"))
    q, k, v = half(device, 5, 4, 32), half(device, 5, 2, 32, seed=2), half(device, 5, 2, 32, seed=3)
    angles = torch.rand(5, 16, device=device)
    slots = torch.arange(5, device=device)
    kinds = ("4", "8")
    torch.library.opcheck(
        library.kv_append, (q, k, v, angles.cos(), angles.sin(), slots, keys, values, *kinds), test_utils=TESTS
    )
    table = plain_block_table(1, 5, device)
    lengths = torch.tensor([5], dtype=torch.int32, device=device)
    last = (q[None, 4:], keys, values, table, slots[None, 4:], lengths, 0.2, *kinds)
    torch.library.opcheck(library.attention_decode, last, test_utils=TESTS)
    bounds = torch.tensor([0, 5], dtype=torch.int32, device=device)
    every = (q, bounds, keys, values, table, lengths, 0.2, *kinds, 5)
    torch.library.opcheck(library.attention_prefill_paged, every, test_utils=TESTS)


@pytest.mark.parametrize("longest", [3, 20])
def test_recurrent_layers(device: str, longest: int) -> None:
    """Tokens one after another, and in chunks."""
    states, x = torch.zeros(4, 2, 16, 16, device=device), half(device, 1 + longest, 96)
    gates, rates = half(device, 1 + longest, 2).float(), half(device, 2).float()
    bounds, before, after = (
        torch.tensor(values, dtype=torch.int32, device=device) for values in ([0, 1, 1 + longest], [-1, 2], [1, 3])
    )
    slots = (bounds, before, after, longest)
    torch.library.opcheck(library.gated_delta, (x, gates, gates, rates, states, *slots, 2), test_utils=TESTS)
    torch.library.opcheck(
        library.state_space, (x, gates, rates, rates, states, *slots, 2, torch.float32), test_utils=TESTS
    )
    inputs = torch.zeros(4, 2, 96, device=device)
    arguments = (x, half(device, 3 * 96), half(device, 96), inputs, *slots)
    torch.library.opcheck(library.short_convolution, arguments, test_utils=TESTS)


def test_dequantize(device: str) -> None:
    values = torch.randn(7, 48, generator=torch.Generator().manual_seed(0))
    tensor = quantize_blockwise(values, QuantFormat.parse("int3-b16-asym")).to(device)
    stored = tensor.stored
    arguments = (
        list(tensor.planes), stored["scales"], None, stored["offsets"], None, tensor.codebook, 48, 3, 16, torch.float32
    )  # fmt: skip
    torch.library.opcheck(library.dequantize_planes, arguments, test_utils=TESTS)
    assert torch.equal(library.dequantize_planes(*arguments).cpu(), tensor.dequantize().cpu())


def test_compiled_without_a_break(device: str) -> None:
    """An MLP as torch.compile sees it: one graph, the same result."""
    gate, up, down = (
        weight_of("nf4-b16", device),
        weight_of("nf4-b16", device, seed=1),
        weight_of("nf4-b16", device, 48, 37),
    )
    packed = [library.pack(weight) for weight in (gate, up, down)]
    scale = torch.ones(48, device=device)

    def mlp(x: torch.Tensor) -> torch.Tensor:
        h = torch.ops.kbit.rms_norm(x, scale, 1e-5, torch.float16)
        inner = torch.ops.kbit.gated_matmul(h, *packed[0], *packed[1], "silu")
        return torch.ops.kbit.matmul(inner, *packed[2], None, x, torch.float32)

    x = half(device, 2, 48).float()
    compiled = torch.compile(mlp, backend="inductor" if ON_GPU else "aot_eager", fullgraph=True)
    h = library.rms_norm(x, scale, 1e-5, torch.float16)
    expected = matmul(gated_matmul(h, gate, up, "silu"), down, None, x, torch.float32)
    assert torch.equal(compiled(x), expected)
