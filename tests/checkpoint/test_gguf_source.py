"""GGUF files as checkpoints: names, row order, values of every type, fingerprints, split files, the real file."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf_model_cases import (
    HEAD_DIM,
    HIDDEN,
    LAYERS,
    MLP,
    VOCAB,
    Array,
    Model,
    numpy,
    permuted,
)

from kbit.checkpoint.gguf import reading
from kbit.checkpoint.gguf.source import GGUFSource
from kbit.host.errors import CheckpointError, UnsupportedError


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
        monkeypatch.setattr(reading, "_CHUNK_VALUES", chunk)
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

    monkeypatch.setattr(reading, "_CHUNK_VALUES", 5 * width)
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


def test_opening_and_config_need_neither_torch_nor_numpy(tmp_path: Path) -> None:
    path = Model().write(tmp_path / "m.gguf")
    code = (
        "import sys; from kbit.checkpoint.gguf.source import GGUFSource\n"
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
    numpy's and Python's allocations, the output among them."""
    source = GGUFSource(smollm2_gguf)
    source.read_rows("model.embed_tokens.weight", 0, 1)  # imports
    tracemalloc.start()
    try:
        output = source.read_array("model.embed_tokens.weight").nbytes
        peak = tracemalloc.get_traced_memory()[1] - output
    finally:
        tracemalloc.stop()
    assert peak < 48 << 20
