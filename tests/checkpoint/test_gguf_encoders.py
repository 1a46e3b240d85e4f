"""GGUF files of encoders: hidden states are transformers', texts become llama.cpp's ids, and poolings are read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import encoder_cases as cases
import numpy as np
import pytest
from encoder_cases import assert_near
from gguf_file_cases import write_gguf
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from kbit.backends.cpu.backend import NativeBackend
from kbit.checkpoint.gguf.header import read_header
from kbit.checkpoint.gguf.source import GGUFSource
from kbit.checkpoint.gguf.tokenizer import sidecars_from_header
from kbit.engine.encoder import Encoder, TokenizedText
from kbit.host.errors import CheckpointError, KbitError, UnsupportedError
from kbit.models.opening import open_model
from kbit.text.sentence_config import read_sentence_config

pytestmark = pytest.mark.usefixtures("one_thread")

# Names as llama.cpp's converter gives them (conversion/bert.py and gguf-py's tensor_mapping).
OUTSIDE = {
    "embeddings.word_embeddings": "token_embd",
    "embeddings.position_embeddings": "position_embd",
    "embeddings.token_type_embeddings": "token_types",
    "embeddings.LayerNorm": "token_embd_norm",
    "emb_ln": "token_embd_norm",
}
INSIDE = {
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
    "attn.Wqkv": "attn_qkv",
    "attn.out_proj": "attn_output",
    "norm1": "attn_output_norm",
    "norm2": "layer_output_norm",
    "mlp.fc11": "ffn_up",
    "mlp.fc12": "ffn_gate",
    "mlp.fc2": "ffn_down",
}


def gguf_name(name: str) -> str | None:
    module, _, kind = name.removeprefix("bert.").rpartition(".")
    if module.startswith("pooler"):
        return None
    if module in OUTSIDE:
        return f"{OUTSIDE[module]}.{kind}"
    _, _, layer, *rest = module.split(".")
    return f"blk.{layer}.{INSIDE['.'.join(rest)]}.{kind}"


def write(family: str, folder: Path, path: Path, *, without: str = "", **changes: Any) -> Any:
    """An encoder of `encoder_cases` as a GGUF file; `changes` to keys after the architecture's name, or whole ones."""
    model = cases.model_of(family)
    cases.saved(model, folder)
    arch = {"Bert": "bert", "NomicBert": "nomic-bert"}[family]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokens = [tokenizer.id_to_token(index) for index in range(99)]
    control = list(tokenizer.get_added_tokens_decoder())
    keys: dict[str, Any] = {
        "block_count": 2,
        "context_length": 310,
        "embedding_length": 32,
        "feed_forward_length": 37,
        "attention.head_count": 2,
        "attention.layer_norm_epsilon": 1e-12,
        "attention.causal": False,
        "pooling_type": 1,
    }
    if family == "NomicBert":
        keys["rope.freq_base"] = 1000.0
    words = [
        text if i in control else text[2:] if text.startswith("##") else f"\u2581{text}"
        for i, text in enumerate(tokens)
    ]
    whole: dict[str, Any] = {
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.token_type": [3 if index in control else 1 for index in range(99)],
        "tokenizer.ggml.token_type_count": 2,
        "tokenizer.ggml.unknown_token_id": 1,
        "tokenizer.ggml.cls_token_id": 2,
        "tokenizer.ggml.seperator_token_id": 3,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.mask_token_id": 4,
    }
    whole |= {f"{arch}.{key}": value for key, value in keys.items()}
    whole |= {key if key.startswith("tokenizer.") else f"{arch}.{key}": value for key, value in changes.items()}
    metadata = {key: value for key, value in whole.items() if key not in (without, f"{arch}.{without}")}
    named = {gguf_name(name): values for name, values in load_file(folder / "model.safetensors").items()}
    tensors = {name: values for name, values in named.items() if name is not None and name != without}
    if "extra" in without:
        tensors["cls.weight"] = np.ones((32, 32), dtype=np.float32)
    write_gguf(path, arch, metadata, tensors)
    return model


@pytest.mark.parametrize("family", ["Bert", "NomicBert"])
def test_hidden_states_and_ids(tmp_path: Path, family: str) -> None:
    model = write(family, tmp_path / "folder", tmp_path / "m.gguf")
    texts = cases.ids_of(7, 1, 300)
    with open_model(str(tmp_path / "m.gguf")) as source:
        ours = Encoder(source, NativeBackend(2, compute="fp32", kv="fp32"))
        files = source.sidecar_files()
    for found, ids in zip(ours.hidden([TokenizedText(ids) for ids in texts]), texts, strict=True):
        assert_near(found, cases.states_of(model, ids))
    before = Tokenizer.from_file(str(tmp_path / "folder" / "tokenizer.json"))
    after = Tokenizer.from_buffer(files["tokenizer.json"])
    assert before.get_vocab() == after.get_vocab()
    for text in ("The cat sat on the mats.", "who? WHERE\u0301 zebra [MASK] x", ""):
        assert before.encode(text).ids == after.encode(text).ids
    pair = before.encode("the cat", "a dog"), after.encode("the cat", "a dog")
    assert (pair[0].ids, pair[0].type_ids) == (pair[1].ids, pair[1].type_ids)


@pytest.mark.parametrize(("kind", "poolings"), [(1, ("mean",)), (2, ("cls",)), (3, ("lasttoken",)), (0, None)])
def test_pooling(tmp_path: Path, kind: int, poolings: tuple[str, ...] | None) -> None:
    write("Bert", tmp_path / "folder", tmp_path / "m.gguf", pooling_type=kind)
    with GGUFSource(tmp_path / "m.gguf") as source:
        found = read_sentence_config(source.sidecar_files(), "m")
    assert (found.pooling, found.published) == ((poolings, True) if poolings else (("mean",), False))


@pytest.mark.parametrize(
    ("family", "without", "changes", "kind", "message"),
    [
        ("Bert", "attention.causal", {}, UnsupportedError, "'bert.attention.causal' is missing; kbit runs bert models"),
        ("Bert", "", {"attention.causal": True}, UnsupportedError, "'bert.attention.causal' is true"),
        ("Bert", "", {"pooling_type": 4}, UnsupportedError, r"'bert.pooling_type' 4 is not supported \(a reranker\)"),
        ("Bert", "", {"attention.sliding_window": 5}, UnsupportedError, "sliding_window' is not supported for this"),
        ("Bert", "", {"attention.scale": 2.0}, UnsupportedError, "'bert.attention.scale' is unknown to kbit"),
        ("NomicBert", "", {"rope.scaling.factor": 2.0}, UnsupportedError, "'nomic-bert.rope.scaling.factor' is not"),
        ("NomicBert", "", {"attention.key_length": 8}, UnsupportedError, "key_length' is not 16, the size of a head"),
        ("Bert", "extra", {}, UnsupportedError, "'cls.weight' has no place in a bert model"),
        ("Bert", "blk.1.attn_q.bias", {}, CheckpointError, "tensor 'blk.1.attn_q.bias' is missing"),
        ("Bert", "position_embd.weight", {}, CheckpointError, "tensor 'position_embd.weight' is missing"),
        ("Bert", "", {"context_length": 77}, CheckpointError, r"has the shape \(310, 32\), the metadata says \(77, 32\)"),
        ("Bert", "", {"block_count": 2**30}, CheckpointError, "claims 1073741824 layers, but the file has only 37"),
        ("Bert", "", {"attention.head_count": 3}, CheckpointError, "32 is no multiple of attention.head_count 3"),
    ],
)  # fmt: skip
def test_what_would_change_the_model_is_refused(
    tmp_path: Path, family: str, without: str, changes: dict[str, Any], kind: type[KbitError], message: str
) -> None:
    write(family, tmp_path / "folder", tmp_path / "m.gguf", without=without, **changes)
    with pytest.raises(kind, match=message):
        GGUFSource(tmp_path / "m.gguf")


def test_vocabularies_that_contradict_themselves(tmp_path: Path) -> None:
    for number, (changes, message) in enumerate(
        [
            ({"tokenizer.ggml.token_type": [1, 2]}, "token_type has 2 entries for 99 tokens"),
            ({"tokenizer.ggml.tokens": ["a"] * 99}, "appears twice in the vocabulary"),
            ({"tokenizer.ggml.cls_token_id": 300}, "cls_token_id' is 300, outside 0 to 98"),
        ]
    ):
        path = tmp_path / f"{number}.gguf"
        write("Bert", tmp_path / f"folder{number}", path, **changes)
        with GGUFSource(path) as source, pytest.raises(CheckpointError, match=message):
            source.sidecar_files()


def test_a_real_vocabulary() -> None:
    """BGE's, with the ids that llama.cpp tests its own tokenizer with."""
    path = Path(os.environ.get("KBIT_DATA", "no-such-folder")) / "tokenizers" / "ggml-vocab-bert-bge.gguf"
    if not path.is_file():
        pytest.skip(f"{path} is not there (KBIT_DATA)")
    made = Tokenizer.from_buffer(sidecars_from_header(read_header(path), 512)["tokenizer.json"])
    texts = Path(f"{path}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    wanted = [[int(each) for each in line.split()] for line in Path(f"{path}.out").read_text().splitlines()]
    found = [made.encode(text, add_special_tokens=False).ids for text in texts[: len(wanted)]]
    assert len(wanted) > 40
    assert found == wanted
    assert made.encode("Paris").ids == [101, 3000, 102]
