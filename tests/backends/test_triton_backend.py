"""The Triton backend against the reference: whole tiny models through the kernels, in Triton's interpreter or on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoder_cases import CASES, DictSource, tame_tensors, tiny_config
from half_precision_cases import assert_close
from native_cases import random_ids
from triton_cases import assert_within, product_bound
from triton_model_cases import on, reference, source_of

from kbit.formats.quant_tensor import QuantTensor
from kbit.formats.registry import parse_format
from kbit.host.errors import UnsupportedError, UsageError
from kbit.kernels import reference as reference_ops
from kbit.models.load import load_decoder
from kbit.models.params import QKV

pytest.importorskip("triton")

from kbit.backends.triton.backend import TritonBackend
from kbit.kernels.triton.product import gemm_rounded
from kbit.kernels.triton.product.rounded import segment_of
from kbit.kernels.triton.rows.embed import embed

pytestmark = pytest.mark.usefixtures("one_thread")

# Every switch of the decoder that is its own path here: biases, a tied head, one key head, ungated and other activations,
# tables by length, windows; norms of heads, caps and factors, two rotations, partial ones, layers without, rotation before
# the norm; latent attention.
FAMILIES = ["llama", "llama-tied", "llama-biases", "llama-multi-query", "llama-gelu", "llama-dynamic", "mistral-window"]
FAMILIES += ["qwen3", "gemma2", "gemma3", "phi3", "smollm3-listed", "hunyuan", "gpt2", "gpt_neox", "youtu"]
FAMILIES += ["gemma4-dense", "gemma4-e"]
# Norms after sums, projections of embeddings; ELU; a squared relu as gate, norms before last linears.
FAMILIES += ["opt-350m", "apertus", "bitnet"]


@pytest.mark.parametrize("name", FAMILIES)
def test_prefill_and_decoding(device: str, name: str) -> None:
    """Two rows: 11 tokens, then 3 at once (a draft), then one by one; half of the families with quantized weights."""
    source = source_of(name, "nf4-b16" if FAMILIES.index(name) % 2 else None)
    ours, theirs = on(device, source), reference(source)
    ids = random_ids(2, 16)
    caches = ours.new_cache(2, 70), theirs.new_cache(2, 70)
    for part in ids.split([11, 3, 1, 1], dim=1):
        assert_close(ours.forward(part, caches[0]), theirs.forward(part, caches[1]), source)
    assert caches[0].lengths.tolist() == [16, 16]


def test_wide_heads(device: str) -> None:
    """As Gemma 4's full layers have them: cut into parts, beside narrow ones."""
    source = source_of("gemma4-dense", "nf4-b16", global_head_dim=320)
    ours, theirs = on(device, source), reference(source)
    caches = ours.new_cache(2, 20), theirs.new_cache(2, 20)
    for part in random_ids(2, 11).split([10, 1], dim=1):
        assert_close(ours.forward(part, caches[0]), theirs.forward(part, caches[1]), source)


@pytest.mark.parametrize("name", ["qwen2-moe", "glm4-moe", "gpt-oss", "llama4", "phimoe"])
def test_experts(device: str, name: str) -> None:
    """Grouped products; a shared expert behind a gate; groups with a bias; attention with sinks; scaled input, and
    attention within stretches; one expert after another."""
    rope = tiny_config(name).get("rope_parameters", {})
    longer = {key: 2 * rope[key] for key in ("short_factor", "long_factor") if key in rope}
    source = source_of(name, "nf4-b16", **({"rope_parameters": {**rope, **longer}} if longer else {}))
    ours, theirs = on(device, source), reference(source)
    ids = random_ids(2, 10)
    caches = ours.new_cache(2, 20), theirs.new_cache(2, 20)
    for part in ids.split([8, 1, 1], dim=1):
        assert_close(ours.forward(part, caches[0]), theirs.forward(part, caches[1]), source)


def test_experts_of_mixed_formats(device: str) -> None:
    """By matrix and by expert; of quantile formats each has a table of its own."""
    formats = ["nf4-b16", "trellis3-l12-o4", "quantile4-b16", "trellis3-l12"]
    source = source_of("qwen2-moe", "nf4-b16")
    tensors = dict(source.data)
    for index, name in enumerate(sorted(name for name in tensors if ".experts." in name)):
        whole = tensors[name]
        assert isinstance(whole, QuantTensor)
        dense = whole.dequantize()
        tensors[name] = parse_format(formats[index % 7 % 4]).encode(lambda a, b, w=dense: w[a:b], whole.shape)
    source = DictSource(source.config, tensors)
    ours, theirs = on(device, source), reference(source)
    caches = ours.new_cache(2, 20), theirs.new_cache(2, 20)
    for part in random_ids(2, 9).split([8, 1], dim=1):
        assert_close(ours.forward(part, caches[0]), theirs.forward(part, caches[1]), source)


def test_experts_that_have_no_kernel(device: str) -> None:
    with pytest.raises(UnsupportedError, match="quantized experts alone.*use --device cpu"):
        on(device, source_of("qwen3-moe"))


@pytest.mark.parametrize("format", ["int2-b16", "nf3-b32-dq", "int4-b64-asym", "lloyd5-b16", "int8-row-fp32"])
def test_formats(device: str, format: str) -> None:
    source = source_of("llama", format)
    ours, theirs = on(device, source), reference(source)
    caches = ours.new_cache(1, 20), theirs.new_cache(1, 20)
    for part in random_ids(1, 10).split([9, 1], dim=1):
        assert_close(ours.forward(part, caches[0]), theirs.forward(part, caches[1]), source)


def test_bf16(device: str) -> None:
    source = source_of("llama", "nf4-b16")
    ours, theirs = on(device, source, compute="bf16"), reference(source)
    caches = ours.new_cache(1, 20), theirs.new_cache(1, 20)
    for part in random_ids(1, 8).split([7, 1], dim=1):
        assert_close(ours.forward(part, caches[0]), theirs.forward(part, caches[1]), source, unit=2.0**-8)


def test_ragged_batches(device: str) -> None:
    """Rows of different lengths, idle rows among them."""
    source = source_of("llama", "nf4-b16")
    ours, theirs = on(device, source), reference(source)
    caches = ours.new_cache(3, 80), theirs.new_cache(3, 80)
    for index, taken in enumerate([(7, 5, 1), (0, 9, 3), (1, 1, 1), (0, 0, 0), (2, 0, 10)]):
        lengths = torch.tensor(taken)
        ids = random_ids(3, max(*taken, 1), seed=index)
        expected = theirs.forward(ids, caches[1], lengths)
        found = ours.forward(ids, caches[0], lengths)
        for row, length in enumerate(taken):
            if length:
                assert_close(found[row, :length], expected[row, :length], source)
    assert caches[0].lengths.tolist() == caches[1].lengths.tolist()


@pytest.mark.parametrize("kv", ["8", "4", "2"])
def test_a_cache_of_codes(device: str, kv: str) -> None:
    """The same tokens one by one and at once: what a pass attends to is what the cache holds, also for its own tokens."""
    source = source_of("llama")
    ours = on(device, source, kv=kv)
    ids = random_ids(1, 6)
    together = ours.forward(ids, ours.new_cache(1, 8))
    cache = ours.new_cache(1, 8)
    apart = torch.cat([ours.forward(part, cache) for part in ids.split(1, dim=1)], dim=1)
    assert_close(together, apart.cpu(), source)
    worst = float((together.cpu() - reference(source).forward(ids, reference(source).new_cache(1, 8))).abs().max())
    assert worst > 0  # codes were used


def test_rows_of_a_cache(device: str) -> None:
    """select, truncate and grow leave what they should."""
    source = source_of("llama", "nf4-b16")
    ours, theirs = on(device, source), reference(source)
    caches = ours.new_cache(2, 20), theirs.new_cache(2, 20)
    for decoder, cache in ((ours, caches[0]), (theirs, caches[1])):
        decoder.forward(random_ids(2, 9), cache)
        cache.truncate(torch.tensor([9, 4]))
        cache.select(torch.tensor([1, 0, 1]))
        cache.grow(100)
    assert caches[0].lengths.tolist() == [4, 9, 4]
    assert caches[0].capacity == 100
    step = random_ids(3, 2, seed=5)
    assert_close(ours.forward(step, caches[0]), theirs.forward(step, caches[1]), source)
    with pytest.raises(UsageError, match="do not fit"):
        caches[0].reserve([90, 95, 1])


def test_generation_calls(device: str) -> None:
    """extend, hidden_states and logits are forward in pieces."""
    source = source_of("llama", "nf4-b16")
    ours = on(device, source)
    ids = random_ids(1, 6)
    whole = ours.forward(ids, ours.new_cache(1, 8)).cpu()
    assert torch.equal(torch.from_numpy(ours.extend(ids[0].tolist(), ours.new_cache(1, 8), last_only=False)), whole[0])
    hidden = ours.hidden_states(ids, ours.new_cache(1, 8))
    assert torch.equal(ours.logits(hidden).cpu(), whole)
    # The head is then another kernel, for few rows, which sums in another order.
    assert_close(ours.forward(ids, ours.new_cache(1, 8), last_only=True), whole[:, -1:], source)


def test_merged_weights_are_held_once(device: str) -> None:
    """q, k and v are one matrix in memory, of which their own tensors are views."""
    decoder = on(device, source_of("llama", "nf4-b16"))
    q, k, v = (linear.weight for linear in decoder.weights.layers[0].linears(QKV))
    pointers = [weight.data.planes[0].untyped_storage().data_ptr() for weight in (q, k, v)]  # type: ignore[attr-defined]
    assert len(set(pointers)) == 1


def test_refuses(device: str) -> None:
    config = {**tiny_config("llama"), "head_dim": 14, "num_key_value_heads": 3}
    with pytest.raises(UnsupportedError, match="multiple of 16"):
        on(device, DictSource(config, tame_tensors(config)))
    if not torch.cuda.is_available():
        with pytest.raises(UnsupportedError, match="no GPU"):
            TritonBackend("cuda")


@pytest.mark.parametrize(
    ("kind", "format", "unit"),
    [
        *(("int8", f"int{bits}-b32", 2.0**-7) for bits in range(2, 9)),
        ("fp8", "lloyd5-b32", 2.0**-5),
    ],
)
def test_activations_in_8_bits(
    device: str, kind: str, format: str, unit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every product of the layers is that of rounded activations, the head's and a single token's are not.

    A model's logits say little about it: what half precision moves is rounded another way, and from there on the two
    differ as if one of them had not been rounded. So products are compared, each with its own activations.
    """
    monkeypatch.setattr("kbit.kernels.triton.product.matmul.ROUNDED_TOKENS", 8)
    products: list[tuple[tuple[Any, ...], dict[str, Any], torch.Tensor]] = []
    run = gemm_rounded.gemm_rounded

    def watched(*arguments: Any, **options: Any) -> torch.Tensor:
        out: torch.Tensor = run(*arguments, **options)
        products.append((arguments, options, out))
        return out

    monkeypatch.setattr(gemm_rounded, "gemm_rounded", watched)
    source = source_of("llama", format, num_hidden_layers=1)
    ours, theirs = on(device, source, compute=kind), reference(source)
    ids, caches = random_ids(1, 10), (ours.new_cache(1, 20), theirs.new_cache(1, 20))
    assert_close(ours.forward(ids[:, :9], caches[0]), theirs.forward(ids[:, :9], caches[1]), source, unit)
    assert len(products) == 5  # q, k and v at once
    for (x, weight, bias, residual, _), options, out in products:
        x, out = x.cpu(), out.float().cpu()
        rounded = reference_ops.round_int8(x, segment_of(weight)) if kind == "int8" else reference_ops.round_fp8(x)
        dense = embed(weight, torch.arange(weight.shape[0], device=out.device), dtype=torch.float32).cpu()
        expected = rounded @ dense.T
        # What rounding a codebook costs: int8 has steps of 1/127 of it at most, e4m3 of 1/16 of each value.
        loss = 0.0 if weight.table8 is None else 2.0**-5
        bound = product_bound(rounded, dense, out.dtype, decoded=8) + loss * (rounded.abs() @ dense.abs().T)
        if options["gate"] is not None:
            gate = reference_ops.activate(options["gate"].cpu(), None, options["kind"])
            expected, bound = gate * expected, gate.abs() * bound
        if residual is not None:
            expected = expected + residual.cpu()
        assert bias is None
        assert_within(out, expected, bound + 2.0**-10 * expected.abs() + 2.0**-24)
    if format == "int4-b32":
        products.clear()
        ours.forward(ids[:, 9:], caches[0])
        assert not products


def test_compute_says_what_it_rounds(device: str) -> None:
    for kind in ("int8", "fp8"):
        backend = TritonBackend(device, compute=kind)
        assert f"{kind} compute for more than 64 tokens at once, else fp16, fp16 KV cache" in backend.describe()
        with pytest.raises(UnsupportedError, match=f"--compute {kind} does not run nf4-b16.*multiple of 32"):
            load_decoder(source_of("llama", "nf4-b16"), TritonBackend(device, compute=kind))
        with pytest.raises(UnsupportedError, match=f"--compute {kind} is for quantized weights"):
            load_decoder(source_of("llama"), TritonBackend(device, compute=kind))


assert set(FAMILIES) <= set(CASES)
