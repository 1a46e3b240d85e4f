"""Encoders and T5 as GGUF files: the same model and tokenizer read back. (llama.cpp: `tools/judges/gguf_encoders.py`.)"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import encoder_cases
import encoder_decoder_cases
import gguf_encoder_cases as cases
import numpy as np
import pytest
from encoder_cases import assert_near
from gguf_export_cases import export, opened, stored
from safetensors.numpy import load, save_file

from kbit.backends.cpu.backend import NativeBackend
from kbit.checkpoint.gguf.header import read_header
from kbit.engine.encoder import Encoder, TokenizedText
from kbit.graph.batch import Batch
from kbit.host.errors import UnsupportedError
from kbit.host.notes import KbitNote
from kbit.models.opening import open_model
from kbit.text.sentence_config import read_sentence_config
from kbit.text.tokenizer import library_tokenizer

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = ("the cat sat on a mat", " zq  cats</s> on", "The CAT, where?", "[MASK] ran far.", "héllo 漢字")


@pytest.mark.parametrize("case", cases.CASES)
def test_it_is_the_same_model_read_back(tmp_path: Path, case: str) -> None:
    """Tensors, tokens of texts, and what is computed; a head that is the embedding is one of its own, scaled."""
    model = cases.saved(case, tmp_path / "m")
    done = export(tmp_path / "m", tmp_path / "m.gguf")
    assert done.error == 0.0
    with opened(tmp_path / "m") as folder, opened(tmp_path / "m.gguf") as file:
        assert file.tensors.keys() - folder.tensors.keys() == ({"lm_head.weight"} if case in ("t5", "umt5") else set())
        for name in folder.tensors:
            assert np.array_equal(file.read_array(name), folder.read_array(name)), name
        for text in TEXTS if case != "embedding-gemma" else ():  # (which has no tokenizer here)
            ours, theirs = (
                library_tokenizer(each.sidecar_files(), case, each.config["model_type"]) for each in (file, folder)
            )
            assert ours.encode(text).ids == theirs.encode(text).ids
    _check_states(tmp_path, case, model)


def _check_states(folder: Path, case: str, model: Any) -> None:
    texts, written = cases.texts_of(case)
    computed, expected = _computed(folder / "m.gguf", texts, written), cases.values_of(model, texts, written)
    for found, wanted in zip(computed, expected, strict=True):
        assert_near(found, wanted)


def _computed(file: Path, texts: list[list[int]], written: list[list[int]]) -> list[Any]:
    if not written:
        with open_model(str(file)) as source:
            return list(
                Encoder(source, NativeBackend(1, compute="fp32", kv="fp32")).hidden([*map(TokenizedText, texts)])
            )
    model, found = encoder_decoder_cases.loaded(file), []
    for ids, after in zip(texts, written, strict=True):
        cache = model.encode([ids], len(after))
        found.append(model.run(Batch.of([after], cache.lengths, "all"), cache)[-1])
    return found


def test_keys_and_types(tmp_path: Path) -> None:
    """As llama.cpp's converter writes them (`test_gguf_t5`, `test_gguf_encoders`); tables stay float32."""
    cases.saved("flan-t5", tmp_path / "m", d_kv=16, d_ff=64)
    done = export(tmp_path / "m", tmp_path / "m.gguf", requantize="Q8_0", dtype="bf16")
    header = read_header(tmp_path / "m.gguf")
    wanted = {"block_count": 3, "decoder_block_count": 2, "attention.relative_buckets_count": 8, "context_length": 64}
    wanted |= {"attention.key_length": 16, "decoder_start_token_id": 0, "embedding_length": 32}
    assert {key: header.value(f"t5.{key}") for key in wanted} == wanted
    assert header.value("tokenizer.ggml.model") == "t5"
    assert (header.integers("tokenizer.ggml.token_type") or [])[:4] == [3, 3, 2, 1]
    types = {name: kind for name, (kind, _) in stored(tmp_path / "m.gguf").items()}
    assert types["enc.blk.0.attn_rel_b.weight"] == types["dec.blk.0.attn_rel_b.weight"] == "F32"
    assert (types["enc.blk.0.attn_q.weight"], types["token_embd.weight"]) == ("Q8_0", "BF16")
    assert done.rounded == sum(kind == "Q8_0" for kind in types.values())


def test_how_vectors_are_made(tmp_path: Path) -> None:
    """Pooling stays; what there is no key for is said, or refused."""
    cases.saved("bert", tmp_path / "m")
    modules = [{"idx": i, "name": str(i), "path": p, "type": f"sentence_transformers.models.{t}"} for i, (p, t) in
               enumerate([("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")])]  # fmt: skip
    (tmp_path / "m" / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "m" / "1_Pooling").mkdir()
    pooling = tmp_path / "m" / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps({"word_embedding_dimension": 32, "pooling_mode_cls_token": True}))
    about = {"prompts": {"query": "search_query: "}, "default_prompt_name": None}
    (tmp_path / "m" / "config_sentence_transformers.json").write_text(json.dumps(about))
    with pytest.warns(KbitNote, match="no key for prompts: query left out; put them before texts"):
        export(tmp_path / "m", tmp_path / "m.gguf")
    assert read_header(tmp_path / "m.gguf").value("bert.pooling_type") == 2
    with opened(tmp_path / "m.gguf") as file:
        assert read_sentence_config(file.sidecar_files(), "m").pooling == ("cls",)
    pooling.write_text(json.dumps({"word_embedding_dimension": 32, "pooling_mode_max_tokens": True}))
    with pytest.raises(UnsupportedError, match="kbit writes no pooling by max as GGUF; .*--to safetensors"):
        export(tmp_path / "m", tmp_path / "n.gguf")


def test_modern_berts_own_tokenizer(tmp_path: Path) -> None:
    """Byte-level, with what begins and ends a text as its configuration names it."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    ids = {"cls_token_id": 257, "bos_token_id": 257, "sep_token_id": 258, "eos_token_id": 258}
    cases.saved("modern-bert", tmp_path / "m", vocab_size=270, **ids)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({text: index for index, text in enumerate(letters)}, []))
    made.add_special_tokens(["[PAD]", "[CLS]", "[SEP]", "[MASK]"])
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    ends = [("[CLS]", 257), ("[SEP]", 258)]
    made.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    made.save(str(tmp_path / "m" / "tokenizer.json"))
    named = {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]", "pad_token": "[PAD]"}
    (tmp_path / "m" / "tokenizer_config.json").write_text(json.dumps(named))
    export(tmp_path / "m", tmp_path / "m.gguf")
    assert read_header(tmp_path / "m.gguf").value("tokenizer.ggml.pre") == "modern-bert"
    with opened(tmp_path / "m.gguf") as file:
        read = library_tokenizer(file.sidecar_files(), "m")
    for text in TEXTS:
        assert read.encode(text).ids == made.encode(text).ids


def test_layers_after_pooling(tmp_path: Path) -> None:
    """EmbeddingGemma's are in its file; those of BERT have no place in one, and neither has a bias."""
    cases.saved("embedding-gemma", tmp_path / "m")
    shapes, rng = ((48, 32), (32, 48)), np.random.default_rng(0)
    layers = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    _save_modules(tmp_path / "m", layers)
    done = export(tmp_path / "m", tmp_path / "m.gguf")
    assert done.error == 0.0
    header = read_header(tmp_path / "m.gguf")
    names = [f"dense_{at}_feat_{end}" for at in (2, 3) for end in ("in", "out")]
    assert [header.value(f"gemma-embedding.{name}") for name in names] == [32, 48, 48, 32]
    assert header.value("gemma-embedding.attention.sliding_window") == 10
    with opened(tmp_path / "m.gguf") as file:
        files = file.sidecar_files()
        assert "dense_2.weight" not in file.tensors
    config = read_sentence_config(files, "m")
    assert (config.pooling, [layer.out_features for layer in config.dense]) == (("mean",), [48, 32])
    for layer, values in zip(config.dense, layers, strict=True):
        assert np.array_equal(load(files[f"{layer.folder}/model.safetensors"])["linear.weight"], values)
    _save_modules(tmp_path / "m", layers[:1])
    with pytest.raises(
        UnsupportedError, match="llama.cpp has two linear layers after pooling.*these are 1 of widths 32, 48"
    ):
        export(tmp_path / "m", tmp_path / "n.gguf")
    cases.saved("bert", tmp_path / "b")
    _save_modules(tmp_path / "b", layers)
    with pytest.raises(UnsupportedError, match="kbit writes no layers after pooling as GGUF"):
        export(tmp_path / "b", tmp_path / "b.gguf")


def _save_modules(folder: Path, layers: list[Any]) -> None:
    kinds = [
        ("", "Transformer"),
        ("1_Pooling", "Pooling"),
        *((f"{at}_Dense", "Dense") for at in range(2, 2 + len(layers))),
    ]
    modules = [
        {"idx": at, "name": str(at), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for at, (path, kind) in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    files = {"1_Pooling": {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}}
    for at, values in enumerate(layers, start=2):
        rows, columns = values.shape
        identity = "torch.nn.modules.linear.Identity"
        files[f"{at}_Dense"] = {
            "in_features": columns, "out_features": rows, "bias": False, "activation_function": identity,
        }  # fmt: skip
    for name, about in files.items():
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps(about))
    for at, values in enumerate(layers, start=2):
        save_file({"linear.weight": values}, folder / f"{at}_Dense" / "model.safetensors")


@pytest.mark.parametrize(
    ("family", "head", "changes", "message"),
    [
        ("Bert", "ForMaskedLM", {}, "bert architecture have hidden states for a result, and this model has a head .mask."),
        ("Bert", "Model", {"hidden_act": "relu"}, "bert architecture cannot say that activation is relu"),
        ("Roberta", "Model", {}, "kbit writes no GGUF file of a roberta model, but of bert, nomic_bert, modernbert"),
    ],
)  # fmt: skip
def test_encoders_that_it_cannot_say(
    tmp_path: Path, family: str, head: str, changes: dict[str, Any], message: str
) -> None:
    encoder_cases.saved(encoder_cases.model_of(family, head, **changes), tmp_path / "m")
    with pytest.raises(UnsupportedError, match=message + ".*--to safetensors"):
        export(tmp_path / "m", tmp_path / "m.gguf")
    assert not list(tmp_path.glob("*.gguf*"))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("t5", {"relative_attention_max_distance": 20}, "t5 architecture cannot say that .*distances is"),
        ("t5", {"feed_forward_proj": "gated-silu"}, "t5 architecture cannot say that .*activation is silu"),
        ("bart", {}, "kbit writes no GGUF file of a bart model, but of t5, mt5, umt5"),
    ],
)
def test_encoder_decoders_that_it_cannot_say(tmp_path: Path, name: str, changes: dict[str, Any], message: str) -> None:
    encoder_decoder_cases.saved(encoder_decoder_cases.model_of(name, **changes), tmp_path / "m")
    with pytest.raises(UnsupportedError, match=message + ".*--to safetensors"):
        export(tmp_path / "m", tmp_path / "m.gguf")
