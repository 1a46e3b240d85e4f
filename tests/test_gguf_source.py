"""GGUF files as checkpoints: names, row order, values, config, split files, and what is refused."""

from __future__ import annotations

import datetime
import re
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kbit.checkpoint import gguf_source
from kbit.checkpoint.gguf_config import short_float
from kbit.checkpoint.gguf_rope import llama3_divisors, llama3_from_divisors
from kbit.checkpoint.gguf_source import GGUFSource
from kbit.errors import CheckpointError, KbitError, UnsupportedError

Array = npt.NDArray[Any]
Edit = Callable[["Model"], None]

HIDDEN, MLP, HEADS, KV_HEADS, HEAD_DIM, LAYERS, VOCAB = 32, 64, 4, 2, 8, 2, 24


def permuted(weights: Array, heads: int) -> Array:
    """How llama.cpp's converter (convert_hf_to_gguf.py, LlamaModel.permute) reorders Q and K rows."""
    halves: Array = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    result: Array = halves.swapaxes(1, 2).reshape(weights.shape)
    return result


class Model:
    """A small model to be written as GGUF: Hugging Face tensors, and metadata that tests may change first."""

    def __init__(self, arch: str = "llama", *, tied: bool = True, biases: tuple[str, ...] = (), seed: int = 0) -> None:
        self.arch = arch
        self.rng = np.random.default_rng(seed)
        self.keys: dict[str, Any] = {
            "context_length": 128,
            "embedding_length": HIDDEN,
            "block_count": LAYERS,
            "feed_forward_length": MLP,
            "attention.head_count": HEADS,
            "attention.head_count_kv": KV_HEADS,
            "attention.layer_norm_rms_epsilon": 1e-5,
            "rope.freq_base": 10000.0,
            "vocab_size": VOCAB,
        }
        self.general: dict[str, Any] = {}
        self.hf: dict[str, Array] = {}
        self.stored: dict[str, tuple[Array, gguf.GGMLQuantizationType | None]] = {}
        self.add("token_embd.weight", "model.embed_tokens.weight", (VOCAB, HIDDEN))
        shapes = {
            "attn_q": ("self_attn.q_proj", (HEADS * HEAD_DIM, HIDDEN)),
            "attn_k": ("self_attn.k_proj", (KV_HEADS * HEAD_DIM, HIDDEN)),
            "attn_v": ("self_attn.v_proj", (KV_HEADS * HEAD_DIM, HIDDEN)),
            "attn_output": ("self_attn.o_proj", (HIDDEN, HEADS * HEAD_DIM)),
            "ffn_gate": ("mlp.gate_proj", (MLP, HIDDEN)),
            "ffn_up": ("mlp.up_proj", (MLP, HIDDEN)),
            "ffn_down": ("mlp.down_proj", (HIDDEN, MLP)),
        }
        for layer in range(LAYERS):
            prefix = f"model.layers.{layer}."
            self.add(f"blk.{layer}.attn_norm.weight", prefix + "input_layernorm.weight", (HIDDEN,))
            self.add(f"blk.{layer}.ffn_norm.weight", prefix + "post_attention_layernorm.weight", (HIDDEN,))
            for part, (name, shape) in shapes.items():
                self.add(f"blk.{layer}.{part}.weight", f"{prefix}{name}.weight", shape)
                if part in biases:
                    self.add(f"blk.{layer}.{part}.bias", f"{prefix}{name}.bias", shape[:1])
        self.add("output_norm.weight", "model.norm.weight", (HIDDEN,))
        if not tied:
            self.add("output.weight", "lm_head.weight", (VOCAB, HIDDEN))

    def add(self, name: str, hf_name: str, shape: tuple[int, ...]) -> None:
        values = self.rng.standard_normal(shape).astype(np.float32)
        self.hf[hf_name] = values
        part = name.split(".")[-2]
        if self.arch == "llama" and part in ("attn_q", "attn_k"):
            values = permuted(values, HEADS if part == "attn_q" else KV_HEADS)
        self.stored[name] = (values, None)

    def write(self, path: Path, **options: Any) -> Path:
        writer = gguf.GGUFWriter(path, self.arch, **options)
        for name, value in [*self.general.items(), *((f"{self.arch}.{k}", v) for k, v in self.keys.items())]:
            if isinstance(value, bool):
                writer.add_bool(name, value)
            elif isinstance(value, int):
                (writer.add_uint32 if 0 <= value < 1 << 32 else writer.add_int64)(name, value)
            elif isinstance(value, float):
                writer.add_float32(name, value)
            elif isinstance(value, str):
                writer.add_string(name, value)
            else:
                writer.add_array(name, value)
        for name, (values, kind) in self.stored.items():
            writer.add_tensor(name, values, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


def numpy(tensor: torch.Tensor) -> Array:
    result: Array = tensor.numpy()
    return result


@pytest.mark.parametrize(
    ("arch", "tied", "biases"),
    [
        ("llama", True, ()),
        ("llama", False, ()),
        ("llama", False, ("attn_q", "attn_k", "attn_v", "attn_output")),
        ("llama", True, ("ffn_gate", "ffn_up", "ffn_down")),
        ("qwen2", False, ("attn_q", "attn_k", "attn_v")),
    ],
)
def test_tensors_are_the_hugging_face_ones(tmp_path: Path, arch: str, tied: bool, biases: tuple[str, ...]) -> None:
    """Whole tensors and every kind of row range equal the matrices the converter permuted."""
    model = Model(arch, tied=tied, biases=biases)
    with GGUFSource(model.write(tmp_path / "m.gguf")) as source:
        assert set(source.tensors) == set(model.hf)
        assert source.config["tie_word_embeddings"] is tied
        for name, values in model.hf.items():
            info = source.tensors[name]
            assert (info.name, info.shape, info.stored_as, info.nbytes) == (name, values.shape, "F32", values.nbytes)
            np.testing.assert_array_equal(numpy(source.read(name)), values)
            rows = values.shape[0]
            for start, stop in [(0, 1), (1, 2), (3, 13), (7, 9), (rows - 1, rows), (5, 5), (HEAD_DIM, 2 * HEAD_DIM)]:
                result = source.read_rows(name, start, stop)
                assert result.dtype == torch.float32
                np.testing.assert_array_equal(numpy(result), values[start:stop])


def test_unpermuting_is_more_than_the_identity(tmp_path: Path) -> None:
    """Guards the test above: the stored Q rows really differ from the Hugging Face ones, and one row is checked by
    hand: row D/2 (the second half's first) is GGUF row 1 of the head."""
    model = Model()
    stored = model.stored["blk.0.attn_q.weight"][0]
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not np.array_equal(stored, model.hf[name])
    read = numpy(GGUFSource(model.write(tmp_path / "m.gguf")).read(name))
    np.testing.assert_array_equal(read[HEAD_DIM // 2], stored[1])
    np.testing.assert_array_equal(read[HEAD_DIM + 1], stored[HEAD_DIM + 2])


def test_chunks_join_without_seams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(tied=False)
    source = GGUFSource(model.write(tmp_path / "m.gguf"))
    for chunk in (1, 3 * HIDDEN, 11 * HIDDEN):
        monkeypatch.setattr(gguf_source, "_CHUNK_VALUES", chunk)
        for name, values in model.hf.items():
            np.testing.assert_array_equal(numpy(source.read(name)), values)
            np.testing.assert_array_equal(numpy(source.read_rows(name, 2, 15)), values[2:15])


DEQUANTIZABLE = [
    kind
    for kind in gguf.GGMLQuantizationType
    if kind in gguf.quants._type_traits and kind is not gguf.GGMLQuantizationType.BF16
]


def test_many_types_are_compared() -> None:
    assert len(DEQUANTIZABLE) >= 20


@pytest.mark.parametrize("kind", DEQUANTIZABLE, ids=lambda kind: str(kind.name))
def test_block_types_equal_the_gguf_package(
    tmp_path: Path, kind: gguf.GGMLQuantizationType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every type gguf can dequantize, from random blocks, in a permuted matrix (Q) and in a plain one (V), in chunks
    of a few rows. Random scales may be NaN; NaNs must then match too."""
    width, heads, head_dim = 512, 2, 16
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    model = Model()
    rng = np.random.default_rng(int(kind))
    rows = heads * head_dim
    raw = {part: rng.integers(0, 256, (rows, width // block * block_bytes), dtype=np.uint8) for part in ("q", "v")}
    model.keys |= {"embedding_length": width, "attention.head_count": heads, "attention.head_count_kv": heads}
    model.keys |= {"attention.key_length": head_dim, "attention.value_length": head_dim, "block_count": 1}
    model.keys |= {"rope.dimension_count": head_dim}
    shapes: dict[str, tuple[int, ...]] = {
        "attn_norm": (width,),
        "ffn_norm": (width,),
        "attn_k": (rows, width),
        "attn_output": (width, rows),
    }
    shapes |= {"ffn_gate": (MLP, width), "ffn_up": (MLP, width), "ffn_down": (width, MLP)}
    model.stored = {f"blk.0.{part}.weight": (np.ones(shape, np.float32), None) for part, shape in shapes.items()}
    model.stored |= {f"blk.0.attn_{part}.weight": (raw[part], kind) for part in raw}
    model.stored["token_embd.weight"] = (np.ones((VOCAB, width), dtype=np.float32), None)
    model.stored["output_norm.weight"] = (np.ones(width, dtype=np.float32), None)

    monkeypatch.setattr(gguf_source, "_CHUNK_VALUES", 5 * width)
    source = GGUFSource(model.write(tmp_path / "m.gguf"))
    for part in raw:
        name = f"model.layers.0.self_attn.{part}_proj.weight"
        assert source.tensors[name].stored_as == kind.name
        assert source.tensors[name].nbytes == raw[part].nbytes
        with np.errstate(all="ignore"):
            expected = gguf.quants.dequantize(raw[part], kind)
        read = numpy(source.read(name))
        np.testing.assert_array_equal(permuted(read, heads) if part == "q" else read, expected)


PLAIN_TYPES: list[tuple[str, Array]] = [
    ("F16", np.linspace(-3, 3, HIDDEN * MLP).astype(np.float16)),
    ("F64", np.linspace(-3, 3, HIDDEN * MLP)),
    ("I8", np.arange(HIDDEN * MLP).astype(np.int8)),
    ("I16", np.arange(HIDDEN * MLP).astype(np.int16)),
    ("I32", np.arange(HIDDEN * MLP).astype(np.int32)),
    ("I64", np.arange(HIDDEN * MLP).astype(np.int64)),
]


@pytest.mark.parametrize(("kind", "values"), PLAIN_TYPES, ids=[kind for kind, _ in PLAIN_TYPES])
def test_plain_types(tmp_path: Path, kind: str, values: Array) -> None:
    model = Model()
    values = values.reshape(MLP, HIDDEN)
    model.stored["blk.0.ffn_up.weight"] = (values, None)
    source = GGUFSource(model.write(tmp_path / "m.gguf"))
    assert source.tensors["model.layers.0.mlp.up_proj.weight"].stored_as == kind
    np.testing.assert_array_equal(
        numpy(source.read_rows("model.layers.0.mlp.up_proj.weight", 1, MLP)), values[1:].astype(np.float32)
    )


def test_bfloat16(tmp_path: Path) -> None:
    model = Model()
    values = torch.linspace(-3, 3, MLP * HIDDEN).reshape(MLP, HIDDEN).to(torch.bfloat16)
    raw = values.view(torch.int16).numpy().view(np.uint8)
    model.stored["blk.1.ffn_gate.weight"] = (raw, gguf.GGMLQuantizationType.BF16)
    source = GGUFSource(model.write(tmp_path / "m.gguf"))
    assert torch.equal(source.read("model.layers.1.mlp.gate_proj.weight"), values.float())


def test_a_type_without_dequantizer_is_named(tmp_path: Path) -> None:
    model = Model()
    model.keys["feed_forward_length"] = 256
    for layer in range(LAYERS):
        for part, shape in (("ffn_gate", (256, HIDDEN)), ("ffn_up", (256, HIDDEN)), ("ffn_down", (HIDDEN, 256))):
            model.stored[f"blk.{layer}.{part}.weight"] = (np.zeros(shape, dtype=np.float32), None)
    model.stored["blk.0.ffn_down.weight"] = (np.zeros((HIDDEN, 292), np.uint8), gguf.GGMLQuantizationType.Q8_K)
    source = GGUFSource(model.write(tmp_path / "m.gguf"))
    with pytest.raises(UnsupportedError, match=r"m\.gguf: tensor 'blk\.0\.ffn_down\.weight' has type Q8_K"):
        source.read("model.layers.0.mlp.down_proj.weight")


# --- configuration -------------------------------------------------------------------------------------------------


def config_of(tmp_path: Path, arch: str = "llama", edit: Edit | None = None, **options: Any) -> dict[str, Any]:
    model = Model(arch, **options)
    if edit is not None:
        edit(model)
    return GGUFSource(model.write(tmp_path / "m.gguf")).config


def test_llama_config(tmp_path: Path) -> None:
    def edit(model: Model) -> None:
        model.general |= {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}

    assert config_of(tmp_path, edit=edit) == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "max_position_embeddings": 128,
        "vocab_size": VOCAB,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def test_qwen2_config(tmp_path: Path) -> None:
    config = config_of(tmp_path, "qwen2", tied=False, biases=("attn_q", "attn_k", "attn_v"))
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    assert config["model_type"] == "qwen2"
    assert config["attention_bias"] is True
    assert config["tie_word_embeddings"] is False


def test_a_sliding_window_makes_it_mistral(tmp_path: Path) -> None:
    config = config_of(tmp_path, edit=lambda model: model.keys.update({"attention.sliding_window": 64}))
    assert (config["model_type"], config["architectures"]) == ("mistral", ["MistralForCausalLM"])
    assert config["sliding_window"] == 64


def test_optional_keys_have_llama_cpps_defaults(tmp_path: Path) -> None:
    def edit(model: Model) -> None:
        del model.keys["vocab_size"], model.keys["rope.freq_base"]
        model.keys["attention.head_count"] = [HEADS] * LAYERS  # per layer, all equal

    config = config_of(tmp_path, edit=edit)
    assert config["vocab_size"] == VOCAB
    assert config["rope_theta"] == 10000.0
    assert config["num_attention_heads"] == HEADS


@pytest.mark.parametrize("value", [1e-5, 1e-6, 500000.0, 0.1, 1.0, 9.3e-7, 3.4e38])
def test_float32_values_come_back_as_written_in_the_config(value: float) -> None:
    stored = struct.unpack("<f", struct.pack("<f", value))[0]
    assert short_float(stored) == value
    assert short_float(0.1 + 1e-12) == 0.1 + 1e-12  # a float64 is left alone


ROPE_KEYS: list[tuple[dict[str, Any], dict[str, Any] | None]] = [
    ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
    ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    ({"rope.scaling.factor": 2.0}, {"rope_type": "linear", "factor": 2.0}),
    ({"rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
    ({"rope.scaling.type": "linear", "rope.scaling.factor": 1.0}, None),
    (
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    ),
    (
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.yarn_beta_fast": 16.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 16.0},
    ),
    (
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.attn_factor": 0.5},
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 128,
            "attention_factor": 0.5 * (0.1 * np.log(4.0) + 1.0),
        },
    ),
]


@pytest.mark.parametrize(("keys", "expected"), ROPE_KEYS)
def test_rope_scaling_from_keys(tmp_path: Path, keys: dict[str, Any], expected: dict[str, Any] | None) -> None:
    assert config_of(tmp_path, edit=lambda model: model.keys.update(keys))["rope_scaling"] == expected


def converter_rope_freqs(dim: int, theta: float, factor: float, low: float, high: float, original: int) -> Array:
    """rope_freqs.weight as llama.cpp's converter computes it (float32 frequencies, float64 arithmetic after that)."""
    freqs = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    values = []
    for freq in freqs.tolist():
        wavelength = 2 * np.pi / freq
        if wavelength < original / high:
            values.append(1.0)
        elif wavelength > original / low:
            values.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            values.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(values, dtype=np.float32)


@pytest.mark.parametrize(
    ("dim", "theta", "factor", "low", "high", "original"),
    [
        (128, 500000.0, 8.0, 1.0, 4.0, 8192),  # Llama 3.1
        (64, 500000.0, 32.0, 1.0, 4.0, 8192),  # Llama 3.2 1B
        (128, 500000.0, 16.0, 2.0, 6.0, 8192),
        (128, 10000.0, 4.0, 1.5, 9.5, 8192),
    ],
)
def test_llama3_scaling_is_recovered(
    dim: int, theta: float, factor: float, low: float, high: float, original: int
) -> None:
    divisors = converter_rope_freqs(dim, theta, factor, low, high, original)
    found = llama3_from_divisors(divisors.tolist(), dim, theta, original)
    assert found == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def test_llama3_scaling_gives_transformers_frequencies() -> None:
    """Independent: transformers' own llama3 rule, fed the recovered parameters, divides by the stored divisors.
    Tolerance: both sides hold float32 frequencies and divisors, a few eps each, times the factor (see
    llama3_from_divisors)."""
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    transformers = pytest.importorskip("transformers")
    stored = converter_rope_freqs(128, 500000.0, 8.0, 1.0, 4.0, 8192)
    found = llama3_from_divisors(stored.tolist(), 128, 500000.0, 8192)
    config = transformers.LlamaConfig(
        hidden_size=1024, num_attention_heads=8, rope_theta=500000.0, rope_scaling=found, max_position_embeddings=131072
    )
    theirs, attention = rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1.0 / (500000.0 ** (torch.arange(0, 128, 2, dtype=torch.float32) / 128))
    assert attention == 1.0
    np.testing.assert_allclose(plain.numpy() / stored, theirs.numpy(), rtol=64 * 2.0**-23 * 8)


def test_rope_freqs_tensor_becomes_llama3_scaling(tmp_path: Path) -> None:
    """With an unstated original context, 8192 stands in: only ratios to it matter."""

    def edit(model: Model) -> None:
        model.keys |= {"rope.freq_base": 500000.0, "attention.key_length": 32, "attention.value_length": 32}
        for layer in range(LAYERS):
            for part, heads in (("attn_q", HEADS), ("attn_k", KV_HEADS), ("attn_v", KV_HEADS)):
                model.stored[f"blk.{layer}.{part}.weight"] = (np.zeros((heads * 32, HIDDEN), np.float32), None)
            model.stored[f"blk.{layer}.attn_output.weight"] = (np.zeros((HIDDEN, HEADS * 32), np.float32), None)
        freqs = converter_rope_freqs(32, 500000.0, 8.0, 1.0, 4.0, 8192)
        model.stored["rope_freqs.weight"] = (freqs, None)

    model = Model()
    edit(model)
    source = GGUFSource(model.write(tmp_path / "m.gguf"))
    assert source.config["rope_scaling"]["rope_type"] == "llama3"
    expected = converter_rope_freqs(32, 500000.0, 8.0, 1.0, 4.0, 8192)
    scaling = {name: value for name, value in source.config["rope_scaling"].items() if name != "rope_type"}
    again = llama3_divisors(
        32,
        500000.0,
        scaling["factor"],
        scaling["low_freq_factor"],
        scaling["high_freq_factor"],
        scaling["original_max_position_embeddings"],
    )
    np.testing.assert_allclose(again, expected, rtol=64 * 2.0**-23 * 8)
    assert not any("rope" in name for name in source.tensors)


def test_rope_freqs_of_ones_change_nothing(tmp_path: Path) -> None:
    def edit(model: Model) -> None:
        model.stored["rope_freqs.weight"] = (np.ones(HEAD_DIM // 2, np.float32), None)

    assert config_of(tmp_path, edit=edit)["rope_scaling"] is None


# --- what is refused -----------------------------------------------------------------------------------------------


def put(**keys: Any) -> Edit:
    """Set (or with None remove) keys of the architecture; "__" stands for a dot."""

    def edit(model: Model) -> None:
        for name, value in keys.items():
            key = name.replace("__", ".")
            if value is None:
                del model.keys[key]
            else:
                model.keys[key] = value

    return edit


def store(name: str, shape: tuple[int, ...] | None) -> Edit:
    """Replace or add a tensor, or with None remove it."""

    def edit(model: Model) -> None:
        if shape is None:
            del model.stored[name]
        else:
            model.stored[name] = (np.full(shape, 2.0, dtype=np.float32), None)

    return edit


def both(*edits: Edit) -> Edit:
    def edit(model: Model) -> None:
        for one in edits:
            one(model)

    return edit


def general(**keys: Any) -> Edit:
    return lambda model: model.general.update({name.replace("__", "."): value for name, value in keys.items()})


REFUSED: dict[str, tuple[Edit, type[KbitError], str]] = {
    **{
        f"no {name}": (put(**{name.replace(".", "__"): None}), CheckpointError, f"metadata key 'llama.{name}' is missing")
        for name in (
            "context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count",
            "attention.layer_norm_rms_epsilon",
        )
    },
    "zero heads": (put(attention__head_count=0), CheckpointError, "'llama.attention.head_count' is 0, expected 1 to"),
    "zero layers": (put(block_count=0), CheckpointError, "'llama.block_count' is 0"),
    "four billion layers": (put(block_count=2**32 - 1), CheckpointError, "'llama.block_count' is 4294967295"),
    "too many layers": (put(block_count=2**30), CheckpointError, "claims 1073741824 layers, but the file has only 20"),
    "heads not a multiple of kv heads": (put(attention__head_count_kv=3), CheckpointError, "is not a multiple of"),
    "hidden size not a multiple of heads": (put(attention__head_count=5, attention__head_count_kv=1), CheckpointError,
                                            "embedding_length 32 is not a multiple of attention.head_count 5"),
    "odd head size": (put(attention__key_length=7, attention__value_length=7), CheckpointError, "head size 7 is odd"),
    "heads differ by layer": (put(attention__head_count=[4, 2]), UnsupportedError, "differs from layer to layer"),
    "key and value sizes differ": (put(attention__value_length=4), UnsupportedError, "attention.value_length' is 4"),
    "partial rotary": (put(rope__dimension_count=4), UnsupportedError, "'llama.rope.dimension_count' is 4"),
    "negative eps": (put(attention__layer_norm_rms_epsilon=-1.0), CheckpointError, "is -1.0, expected 0 to 1"),
    "eps not a number": (put(attention__layer_norm_rms_epsilon=float("nan")), CheckpointError, "is nan"),
    "eps a string": (put(attention__layer_norm_rms_epsilon="x"), CheckpointError, "should be a number, but is stored as"),
    "rope base zero": (put(rope__freq_base=0.0), CheckpointError, "rope.freq_base' is 0.0, expected"),
    "vocabulary sizes differ": (put(vocab_size=25), CheckpointError, "vocab_size is 25, but tensor 'token_embd.weight'"),
    "more tokens than rows": (
        general(tokenizer__ggml__tokens=[f"t{i}" for i in range(30)]),
        CheckpointError,
        "the tokenizer has 30 tokens, but tensor 'token_embd.weight' has 24 rows",
    ),
    "bos outside the vocabulary": (
        general(tokenizer__ggml__bos_token_id=24), CheckpointError, "bos_token_id' is 24, outside 0 to 23",
    ),
    "experts": (put(expert_count=8, expert_used_count=2), UnsupportedError, "mixture-of-experts models are not supported"),
    "unknown key": (put(attn_logit_softcapping=50.0), UnsupportedError, "'llama.attn_logit_softcapping' is unknown"),
    "unknown layout": (put(tensor_data_layout="other"), UnsupportedError, "tensor_data_layout 'other' is not supported"),
    "adapter": (general(general__type="adapter"), UnsupportedError, "holds 'adapter', not a model"),
    "longrope": (put(rope__scaling__type="longrope"), UnsupportedError, "type='longrope' is a RoPE scaling kbit cannot"),
    "rope factor negative": (put(rope__scaling__factor=-2.0), CheckpointError, "factor' is -2.0, expected"),
    "linear with attention factor": (put(rope__scaling__attn_factor=1.5), UnsupportedError, "attn_factor=1.5"),
    "rope_freqs of another rule": (
        store("rope_freqs.weight", (HEAD_DIM // 2,)), UnsupportedError, "holds RoPE factors that no llama3 scaling gives",
    ),
    "rope_freqs too long": (store("rope_freqs.weight", (HEAD_DIM,)), CheckpointError, "has 8 values, expected 4"),
    "two scalings": (
        both(store("rope_freqs.weight", (HEAD_DIM // 2,)), put(rope__scaling__factor=2.0)),
        UnsupportedError,
        "one scaling at a time",
    ),
    "no embedding": (store("token_embd.weight", None), CheckpointError, "tensor 'token_embd.weight' is missing"),
    "missing tensor": (store("blk.1.ffn_up.weight", None), CheckpointError, "tensor 'blk.1.ffn_up.weight' is missing"),
    "wrong shape": (
        store("blk.1.ffn_up.weight", (HIDDEN, MLP)),
        CheckpointError,
        "'blk.1.ffn_up.weight' has the shape (32, 64), the metadata says (64, 32)",
    ),
    "one layer too many": (
        store("blk.2.attn_norm.weight", (HIDDEN,)), CheckpointError, "belongs to layer 2, but the metadata says 2 layers",
    ),
    "unknown tensor": (
        store("blk.0.attn_q_norm.weight", (HEAD_DIM,)), UnsupportedError, "'blk.0.attn_q_norm.weight' has no place",
    ),
    "bias in one layer only": (
        store("blk.1.attn_q.bias", (HEADS * HEAD_DIM,)), UnsupportedError, "'blk.1.attn_q.bias' has no place",
    ),
    "bias of Q only": (
        store("blk.0.attn_q.bias", (HEADS * HEAD_DIM,)), UnsupportedError, "layer 0 has biases for attn_q only",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_models_are_named(case: str, tmp_path: Path) -> None:
    edit, error, words = REFUSED[case]
    model = Model()
    edit(model)
    with pytest.raises(error, match=re.escape(words)) as caught:
        GGUFSource(model.write(tmp_path / "m.gguf"))
    message = str(caught.value)
    assert "m.gguf" in message
    assert "\n" not in message


def test_other_architectures_are_refused_with_the_list(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"architecture 'gemma2' is not supported .* llama, qwen2"):
        GGUFSource(Model("gemma2").write(tmp_path / "m.gguf"))


def test_qwen2_needs_its_biases(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tensor 'blk\.0\.attn_q\.bias' is missing"):
        GGUFSource(Model("qwen2").write(tmp_path / "m.gguf"))


def test_reading_what_is_not_there(tmp_path: Path) -> None:
    source = GGUFSource(Model().write(tmp_path / "m.gguf"))
    with pytest.raises(CheckpointError, match="there is no tensor 'lm_head.weight'"):
        source.read_rows("lm_head.weight", 0, 1)
    for start, stop in ((-1, 2), (0, VOCAB + 1), (3, 2)):
        with pytest.raises(ValueError, match="outside tensor model.embed_tokens.weight"):
            source.read_rows("model.embed_tokens.weight", start, stop)
    source.close()
    with pytest.raises(ValueError, match="read after close"):
        source.read("model.norm.weight")


def test_a_file_that_changes_while_open_is_an_error(tmp_path: Path) -> None:
    path = Model().write(tmp_path / "m.gguf")
    source = GGUFSource(path)
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 4096)
    with pytest.raises(CheckpointError, match="the file changed while it was in use"):
        source.read("model.embed_tokens.weight")
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot read the file"):
        source.read("model.embed_tokens.weight")


def test_fingerprint_follows_header_and_modification(tmp_path: Path) -> None:
    path = Model().write(tmp_path / "a.gguf")
    first = GGUFSource(path).fingerprint()
    assert first == GGUFSource(path).fingerprint()
    changed = Model()
    changed.keys["context_length"] = 256
    assert GGUFSource(changed.write(tmp_path / "b.gguf")).fingerprint() != first
    with open(path, "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    assert GGUFSource(path).fingerprint() != first


# --- split files ---------------------------------------------------------------------------------------------------


def write_split(folder: Path) -> list[Path]:
    Model().write(folder / "m.gguf", split_max_tensors=8)
    return sorted(folder.glob("m-*.gguf"))


def test_split_files_read_as_one(tmp_path: Path) -> None:
    parts = write_split(tmp_path)
    assert [part.name for part in parts] == [f"m-0000{index}-of-00003.gguf" for index in (1, 2, 3)]
    source = GGUFSource(parts[0])
    model = Model()
    assert {info.file for info in source.tensors.values()} == set(parts)
    for name, values in model.hf.items():
        np.testing.assert_array_equal(numpy(source.read(name)), values)


def test_broken_splits_are_named(tmp_path: Path) -> None:
    parts = write_split(tmp_path)
    with pytest.raises(CheckpointError, match=r"not the first of 3 parts; give m-00001-of-00003\.gguf"):
        GGUFSource(parts[1])
    renamed = tmp_path / "renamed.gguf"
    renamed.write_bytes(parts[0].read_bytes())
    with pytest.raises(CheckpointError, match=r"one of 3 parts, but not named .* llama-gguf-split --merge"):
        GGUFSource(renamed)
    second = parts[1].read_bytes()
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(CheckpointError, match=r"m-00002-of-00003\.gguf: does not say that it is part 2 of 3"):
        GGUFSource(parts[0])
    parts[1].write_bytes(second[:-100])
    with pytest.raises(CheckpointError, match=r"m-00002-of-00003\.gguf: truncated"):
        GGUFSource(parts[0])
    parts[1].unlink()
    with pytest.raises(CheckpointError, match=r"part 2 of 3, m-00002-of-00003\.gguf, is missing"):
        GGUFSource(parts[0])


# --- fuzzing and the real file -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fuzz_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A valid file with a tokenizer, and the length of its header."""
    model = Model()
    tokens = ["<unk>", "<s>", "</s>", *(chr(97 + index) for index in range(VOCAB - 5)), "ab", "▁"]
    model.general |= {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(index) for index in range(VOCAB)],
        "tokenizer.ggml.token_type": [2, 3, 3, *[1] * (VOCAB - 3)],
    }
    path = model.write(tmp_path_factory.mktemp("fuzz") / "m.gguf")
    return path, len(GGUFSource(path).header.raw)


@settings(
    max_examples=300,
    deadline=datetime.timedelta(seconds=10),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_damaged_files_raise_nothing_but_kbit_errors(fuzz_file: tuple[Path, int], data: st.DataObject) -> None:
    """Bytes flipped in the header (or the file cut), then everything a reader does: open, tokenizer, all tensors."""
    path, header = fuzz_file
    raw = bytearray(path.read_bytes())
    for position in data.draw(st.lists(st.integers(0, header - 1), min_size=1, max_size=4), label="positions"):
        raw[position] = data.draw(st.integers(0, 255), label="byte")
    length = data.draw(st.one_of(st.just(len(raw)), st.integers(0, len(raw))), label="length")
    damaged = path.with_name("damaged.gguf")
    damaged.write_bytes(bytes(raw[:length]))
    try:
        with GGUFSource(damaged) as source:
            source.sidecar_files()
            source.fingerprint()
            for name in source.tensors:
                source.read(name)
    except KbitError as error:
        assert "\n" not in str(error)


def test_opening_and_config_need_neither_torch_nor_numpy(tmp_path: Path) -> None:
    path = Model().write(tmp_path / "m.gguf")
    code = (
        "import sys; from kbit.checkpoint.gguf_source import GGUFSource\n"
        f"source = GGUFSource({str(path)!r}); source.config; dict(source.tensors); source.fingerprint()\n"
        "print(sorted({'torch', 'numpy', 'gguf'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_real_file(smollm2_gguf: Path) -> None:
    source = GGUFSource(smollm2_gguf)
    assert source.config["hidden_size"] == 576
    assert source.config["rope_theta"] == 100000.0
    assert source.config["rms_norm_eps"] == 1e-5
    assert source.config["tie_word_embeddings"] is True
    assert len(source.tensors) == 272
    assert sum(info.numel for info in source.tensors.values()) == 134_515_008

    reader_name, name = "blk.3.attn_k.weight", "model.layers.3.self_attn.k_proj.weight"
    stored = source.header.tensors[reader_name]
    with open(smollm2_gguf, "rb") as file:
        file.seek(stored.offset)
        raw = np.frombuffer(file.read(stored.nbytes), dtype=np.uint8).reshape(192, -1)
    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.Q4_1)
    np.testing.assert_array_equal(permuted(numpy(source.read(name)), 3), expected)


def test_reading_uses_little_memory_beside_the_output(smollm2_gguf: Path) -> None:
    """The embedding (49152 x 576, 113 MB as float32) is decoded with less than 48 MB of temporaries; tracemalloc sees
    numpy's and Python's allocations, not torch's output."""
    source = GGUFSource(smollm2_gguf)
    source.read_rows("model.embed_tokens.weight", 0, 1)  # imports
    tracemalloc.start()
    try:
        source.read("model.embed_tokens.weight")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 48 << 20
