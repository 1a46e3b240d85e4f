"""The planner's memory model against what the backends really allocate, and against a process that runs a model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import encoder_cases
import numpy as np
import pytest
import torch
from decoder_cases import DictSource, tame_tensors, tiny_config

from kbit import _native
from kbit.backends.cpu.backend import NativeBackend
from kbit.backends.cpu.kv_cache import new_pool
from kbit.backends.cpu.weight import prepare
from kbit.checkpoint.resolve import open_model
from kbit.formats.blockwise import quantize_blockwise
from kbit.formats.quant_format import QuantFormat
from kbit.formats.registry import parse_format
from kbit.formats.trellis import TrellisFormat
from kbit.graph.batch import Batch
from kbit.host.errors import UnsupportedError, UsageError
from kbit.kernels.triton.attention.kv_layout import KVFormat, pages_for
from kbit.kernels.triton.codecs.layout import prepare_weight
from kbit.models.check import stored_spec
from kbit.models.families import spec_from_config
from kbit.models.load import load_decoder
from kbit.models.opening import open_model as open_canonical
from kbit.planner.memory import cache_bytes, predict_memory, prepared_bytes, program_bytes, tokenizer_bytes
from kbit.planner.models import find_models
from kbit.planner.process_probe import probe
from kbit.planner.weights import Weight, parameters, planned_weights, stored_bits, stored_weights
from kbit.quantizers.convert import convert
from kbit.quantizers.plan import make_plan

FORMATS = [
    *(f"int{bits}-b64" for bits in range(2, 9)),
    *("nf4-b16", "int3-b32-asym", "nf4-b64-dq", "int4-b64-asym-dq", "int8-row-fp32", "lloyd5-b128-bf16", "quantile4-b64"),
]  # fmt: skip
LLAMA = {
    "model_type": "llama",
    "vocab_size": 260,
    "hidden_size": 48,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("shape", [(48, 64), (50, 144), (16, 336)], ids=str)
def test_prepared_weights(text: str, shape: tuple[int, int]) -> None:
    """To the byte, padding included, on both backends (a table of levels aside, at most 1 kB)."""
    format = QuantFormat.parse(text)
    packed = quantize_blockwise(torch.randn(shape), format)
    weight = Weight("w", "linear", *shape, format)
    assert prepared_bytes(weight) == prepare(packed, _native.Context("scalar", 1)).nbytes
    assert weight.stored_bytes == format.nbytes(*shape)
    uploaded = prepare_weight(packed, "cpu", torch.float16)
    table = 0 if uploaded.table is None else uploaded.table.numel() * uploaded.table.element_size()
    # A superblock's factors are padded to whole rows, which may take one more.
    assert 0 <= uploaded.nbytes - table - prepared_bytes(weight, "triton") <= 16


@pytest.mark.parametrize(
    "text", ["trellis2-l10", "trellis3-l10", "trellis3.5-l10", "trellis5-l10-h32", "trellis7", "trellis8"]
)
@pytest.mark.parametrize("shape", [(48, 64), (50, 136)], ids=str)
def test_prepared_trellises(text: str, shape: tuple[int, int]) -> None:
    """To the byte; a GPU reads scales of whole tiles, which the CPU's tiles of 64 columns outweigh."""
    format = parse_format(text)
    assert isinstance(format, TrellisFormat)
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    matrix = format.encode(lambda start, stop: weights[start:stop], shape)
    weight = Weight("w", "linear", *shape, format)
    assert prepared_bytes(weight) == prepare(matrix, _native.Context("scalar", 1)).nbytes
    assert weight.stored_bytes == format.nbytes(*shape) == matrix.nbytes
    assert prepared_bytes(weight, "triton") == prepare_weight(matrix, "cpu", torch.float16).nbytes


@pytest.mark.parametrize(
    ("kept", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)]
)
def test_prepared_floats(kept: str, dtype: torch.dtype) -> None:
    matrix = torch.randn(37, 100, dtype=torch.float32).to(dtype)
    weight = Weight("w", "head", 37, 100, kept)
    assert prepared_bytes(weight) == prepare(matrix, _native.Context("scalar", 1)).nbytes
    assert prepared_bytes(weight, "triton") == prepare_weight(matrix, "cpu", torch.float16).nbytes


@pytest.mark.parametrize("kind", ["fp32", "fp16", "8", "4", "3", "2"])
@pytest.mark.parametrize("head_dim", [16, 48, 64, 80])
@pytest.mark.parametrize("context", [1, 100, 256])
def test_caches(kind: str, head_dim: int, context: int) -> None:
    spec = spec_from_config({**LLAMA, "head_dim": head_dim})
    pool = new_pool(spec.layers, spec.kv_heads, head_dim, kind, 3 * pages_for(context))
    assert cache_bytes(spec, context, 3, kind) == pool.nbytes
    if kind == "fp32":
        with pytest.raises(UnsupportedError, match="fp32"):
            cache_bytes(spec, context, 3, kind, "triton")
        return
    page = KVFormat(kind, head_dim).page_bytes
    pages = 3 * pages_for(context) * spec.kv_heads * spec.layers
    assert cache_bytes(spec, context, 3, kind, "triton") == 2 * pages * page


@pytest.mark.parametrize("kind", ["fp32", "fp16", "8", "3"])
def test_caches_of_layers_that_differ(kind: str) -> None:
    """Those that attend to other layers' keys have none."""
    for name in ("gemma4-e", "gemma4-dense"):
        spec = spec_from_config(tiny_config(name))
        native = new_pool(spec.cache_layers, *spec.cache_heads, kind, 3 * pages_for(100)).nbytes
        assert cache_bytes(spec, 100, 3, kind) == native
        if kind != "fp32":
            heads = zip(*spec.cache_heads, strict=True)  # type: ignore[arg-type]
            triton = sum(3 * pages_for(100) * 2 * count * KVFormat(kind, dim).page_bytes for count, dim in heads)
            assert cache_bytes(spec, 100, 3, kind, "triton") == triton


def test_caches_that_cannot_be() -> None:
    spec = spec_from_config({**LLAMA, "head_dim": 24})
    with pytest.raises(UnsupportedError, match="24 features"):
        cache_bytes(spec, 100, 1, "4")
    with pytest.raises(UnsupportedError, match="KV cache of 5"):
        cache_bytes(spec, 100, 1, "5")


@pytest.mark.parametrize("rows", [1, 40, 200])
@pytest.mark.parametrize("compute", ["int8", "fp32"])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"num_key_value_heads": 4, "tie_word_embeddings": True},
        {"head_dim": 16, "intermediate_size": 48, "num_hidden_layers": 1},
    ],
    ids=["grouped", "plain-tied", "narrow"],
)
def test_programs(
    tmp_path: Path, write_model: Callable[..., Path], config: dict[str, object], compute: str, rows: int
) -> None:
    """Buffers and scratch of a recorded program, to the byte; resident memory is a part of it."""
    folder = write_model(tmp_path / "model", **{**LLAMA, **config})
    backend = NativeBackend(2, compute=compute, kv="fp16", isa="scalar")
    with open_model(str(folder)) as source:
        spec = spec_from_config(source.config)
        weights = stored_weights(source, spec)
        decoder = load_decoder(source, backend)
    decoder.extend([1] * rows, decoder.new_cache(1, rows))
    native = decoder._runner._program.nbytes  # type: ignore[attr-defined]
    assert program_bytes(spec, weights, rows, compute, 2) == native
    assert 0 < program_bytes(spec, weights, rows, compute, 2, resident=True) <= native
    use = predict_memory(spec, weights, context=rows, compute=compute, threads=2)
    assert use.weights == decoder.weights.nbytes


@pytest.mark.parametrize("compute", ["int8", "fp32"])
@pytest.mark.parametrize("tied", [True, False])
def test_programs_of_trellises(tmp_path: Path, write_model: Callable[..., Path], tied: bool, compute: str) -> None:
    """Inputs are kept twice, as they are and rotated; of a model that `kbit quantize` wrote."""
    folder = write_model(tmp_path / "model", **{**LLAMA, "num_hidden_layers": 1, "tie_word_embeddings": tied})
    with open_model(str(folder)) as source:
        convert(source, make_plan(source, parse_format("trellis3-l10"), embedding_bits=8), tmp_path / "out")
    with open_canonical(str(tmp_path / "out")) as source:
        spec = spec_from_config(source.config)
        weights = stored_weights(source, spec)
        decoder = load_decoder(source, NativeBackend(2, compute=compute, isa="scalar"))
    decoder.extend([1] * 40, decoder.new_cache(1, 40))
    native = decoder._runner._program.nbytes  # type: ignore[attr-defined]
    assert program_bytes(spec, weights, 40, compute, 2) == native
    assert 0 < program_bytes(spec, weights, 40, compute, 2, resident=True) <= native
    assert predict_memory(spec, weights, context=40, compute=compute).weights == decoder.weights.nbytes


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("compute", ["int8", "fp32"])
@pytest.mark.parametrize(
    "name",
    [
        "qwen2-moe",
        "glm4-moe",
        "gpt-oss",
        "deepseek-v2",
        "gemma4-moe",
        "gemma4-e",
        "qwen3_5",
        "qwen3-next",
        "lfm2-moe",
        "granite-hybrid-moe",
        "bamba",
    ],
)
def test_programs_with_experts(published: Callable[[str], Path], name: str, compute: str, rows: int) -> None:
    with open_canonical(str(published(name))) as source:
        spec = spec_from_config(source.config)
        weights = stored_weights(source, spec)
        decoder = load_decoder(source, NativeBackend(2, compute=compute, isa="scalar"))
    decoder.extend([1] * rows, decoder.new_cache(1, rows))
    native = decoder._runner._program.nbytes  # type: ignore[attr-defined]
    assert program_bytes(spec, weights, rows, compute, 2) == native
    assert 0 < program_bytes(spec, weights, rows, compute, 2, resident=True) <= native
    assert predict_memory(spec, weights, context=rows, compute=compute).weights == decoder.weights.nbytes


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("compute", ["int8", "fp32"])
def test_programs_with_latents(compute: str, rows: int) -> None:
    """And their caches: one head of keys, and no values."""
    sizes = {"kv_lora_rank": 208, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
    config = {**tiny_config("deepseek-v2"), **sizes}
    source = DictSource(config, tame_tensors(config))
    spec = spec_from_config(config)
    decoder = load_decoder(source, NativeBackend(2, compute=compute, isa="scalar"))
    cache = decoder.new_cache(1, rows)
    decoder.extend([1] * rows, cache)
    weights = stored_weights(source, spec)
    native = decoder._runner._program.nbytes  # type: ignore[attr-defined]
    assert program_bytes(spec, weights, rows, compute, 2) == native
    assert 0 < program_bytes(spec, weights, rows, compute, 2, resident=True) <= native
    assert cache_bytes(spec, rows) == cache.nbytes == spec.layers * 64 * (208 + 16) * 2
    assert cache_bytes(spec, rows, backend="triton") > cache.nbytes  # of every head


@pytest.mark.parametrize("family", ["Bert", "ModernBert", "NomicBert"])
def test_programs_of_encoders(tmp_path: Path, family: str) -> None:
    """A text goes through at once, however long."""
    folder = encoder_cases.saved(encoder_cases.model_of(family), tmp_path / "model")
    with open_canonical(str(folder)) as source:
        spec = stored_spec(source, spec_from_config(source.config))
        decoder = load_decoder(source, NativeBackend(2, compute="int8", kv="fp32", isa="scalar"), spec=spec)
        weights = stored_weights(source, spec)
    ids = encoder_cases.ids_of(90)
    cache = decoder.new_cache(1, 90)
    decoder.run_hidden(Batch.of(ids, [0], "all"), cache)
    native = decoder._runner._program.nbytes  # type: ignore[attr-defined]
    assert program_bytes(spec, weights, 90, "int8", 2) == native
    use = predict_memory(spec, weights, context=90, kv="fp32", threads=2)
    assert use.cache == cache.nbytes
    assert use.weights == decoder.weights.nbytes


def test_weights_that_a_token_goes_through() -> None:
    """The figures that are published with these models: 12.9 of 46.7, 3.3 of 30.5, 3.6 of 20.9 without the embedding."""
    found = {
        name: find_models([name])[0][0] for name in ("mixtral-8x7b", "qwen3-30b-a3b", "gpt-oss-20b", "llama-3.1-8b")
    }
    assert round(found["mixtral-8x7b"].active_parameters / 1e9, 1) == 12.9
    assert round(found["qwen3-30b-a3b"].active_parameters / 1e9, 2) == 3.35
    oss = found["gpt-oss-20b"]
    assert round((oss.active_parameters - oss.spec.vocab_size * oss.spec.hidden_size) / 1e9, 1) == 3.6
    assert found["llama-3.1-8b"].active_parameters == found["llama-3.1-8b"].total_parameters


def test_blocks_of_several_sizes_share_buffers() -> None:
    """int8 products of other segments keep their own codes (kernels/cpu/program/program_scratch.h)."""
    spec = spec_from_config(LLAMA)
    one = planned_weights(spec, QuantFormat.parse("int4-b64"))
    two = planned_weights(spec, QuantFormat.parse("int4-b64"), head=QuantFormat.parse("int8-b32"))
    assert program_bytes(spec, two, 64, "int8", 1) > program_bytes(spec, one, 64, "int8", 1)
    assert program_bytes(spec, two, 64, "fp32", 1) == program_bytes(spec, one, 64, "fp32", 1)


def test_a_large_head_counts_while_it_is_loaded() -> None:
    """A head in 16 bits passes through float32: 6 bytes a weight, after all else is there."""
    spec = spec_from_config({**LLAMA, "vocab_size": 400_000, "tie_word_embeddings": False})
    weights = planned_weights(spec, QuantFormat.parse("int4-b64"))
    head = 400_000 * 48
    before = sum(prepared_bytes(weight) for weight in weights if weight.role != "head")
    use = predict_memory(spec, weights, context=64, prompt=8)
    assert use.loading == before + 6 * head + use.tokenizer
    assert 0.5 * tokenizer_bytes(400_000) < use.tokenizer < tokenizer_bytes(400_000)
    assert use.peak == use.loading > use.running
    small = planned_weights(spec, QuantFormat.parse("int4-b64"), head=QuantFormat.parse("int8-b64"))
    assert predict_memory(spec, small, context=64, prompt=8).loading < use.loading


def test_sizes_grow_with_what_is_asked() -> None:
    spec = spec_from_config({**LLAMA, "head_dim": 16})
    weights = planned_weights(spec, QuantFormat.parse("nf4-b64"))
    uses = [predict_memory(spec, weights, context=tokens, kv=kv) for kv in ("2", "8", "fp16") for tokens in (64, 512)]
    assert all(later.cache > earlier.cache for earlier, later in zip(uses[::2], uses[1::2], strict=True))
    assert uses[0].cache < uses[2].cache < uses[4].cache
    assert tokenizer_bytes(128_256) > tokenizer_bytes(32_000)
    assert parameters(weights) == sum(np.prod(shape) for shape in spec.expected_tensors().values())
    assert stored_bits(weights, "linear") == 8 * sum(w.stored_bytes for w in weights if w.role == "linear")
    for context, batch in ((0, 1), (1, 0)):
        with pytest.raises(UsageError, match="at least 1"):
            predict_memory(spec, weights, context=context, batch=batch)
    with pytest.raises(UsageError, match="fp8"):
        planned_weights(spec, "fp8")


@pytest.mark.skipif(sys.platform != "linux", reason="allocators and what counts as resident differ elsewhere")
def test_a_process_takes_what_was_predicted(smollm2_gguf: Path, tmp_path: Path) -> None:
    """Peak resident memory of `kbit run` on SmolLM2, less the constant of a process: 1 % off when it was written.

    Page sizes and allocators of other machines may take more, and a machine whose memory is in demand takes mapped pages
    back (a fifth less is resident then); benchmarks/test_plan.py tells how far off it is.
    """
    command = [sys.executable, "-m", "kbit", "run", "-", "--model", str(smollm2_gguf), "--max-tokens", "4", "--json"]
    with open_model(str(smollm2_gguf)) as source:
        spec = spec_from_config(source.config)
        weights = stored_weights(source, spec)
    for _ in range(3):
        constant = probe(1, "int8").nbytes
        done = subprocess.run(
            [*command, "--threads", "1", "--kv-bits", "8"],
            input="The old man went down to the sea. " * 70,
            capture_output=True,
            text=True,
            check=True,
            cwd=tmp_path,
        )
        answer = json.loads(done.stdout)
        tokens = answer["prompt_tokens"]
        assert tokens > 512
        use = predict_memory(spec, weights, context=tokens + 4, prompt=tokens, kv="8", gguf=True)
        measured = answer["peak_rss_bytes"] - constant
        if measured / 1.2 < use.peak < 1.35 * measured:
            return
    pytest.fail(f"{use}, {measured} measured")
