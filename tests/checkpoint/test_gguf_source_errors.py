"""GGUF checkpoints that are refused, change while open or are damaged: errors that name what is wrong."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_model_cases import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    MLP,
    VOCAB,
    Edit,
    Model,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kbit.checkpoint.gguf.source import GGUFSource
from kbit.host.errors import CheckpointError, KbitError, UnsupportedError


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
        general(tokenizer__ggml__bos_token_id=25), CheckpointError, "bos_token_id' is 25, outside 0 to 23",
    ),
    "experts": (put(expert_count=8, expert_used_count=2), CheckpointError, "blk.0.ffn_gate_inp.weight' is missing"),
    "unknown key": (put(attn_logit_softcapping=50.0), UnsupportedError, "'llama.attn_logit_softcapping' is unknown"),
    "unknown layout": (put(tensor_data_layout="other"), UnsupportedError, "tensor_data_layout 'other' is not supported"),
    "adapter": (general(general__type="adapter"), UnsupportedError, "holds 'adapter', not a model"),
    "longrope": (put(rope__scaling__type="longrope"), UnsupportedError, "type='longrope' is a RoPE scaling kbit cannot"),
    "rope factor negative": (put(rope__scaling__factor=-2.0), CheckpointError, "factor' is -2.0, expected"),
    "linear with attention factor": (put(rope__scaling__attn_factor=1.5), UnsupportedError, "attn_factor=1.5"),
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
    with pytest.raises(
        UnsupportedError, match=r"architecture 'rwkv7' is not supported .* llama, .*, qwen2, .*, qwen3moe, "
    ):
        GGUFSource(Model("rwkv7").write(tmp_path / "m.gguf"))


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
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
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
