"""GGUF files of T5: what they mean is what transformers makes of the folder they were converted from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import encoder_decoder_cases as cases
import pytest
from gguf_file_cases import matrices_encoded, of_architecture, write_gguf
from piece_cases import save_t5
from safetensors.numpy import load_file

from kbit.checkpoint.gguf.source import GGUFSource
from kbit.engine.text_to_text import TextToText
from kbit.formats.quant_tensor import QuantTensor
from kbit.graph.batch import Batch
from kbit.host.errors import CheckpointError, UnsupportedError
from kbit.models.opening import open_model

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")

# Names of the converter (conversion/t5.py of llama-cpp-python 0.3.36), with which a file of each case was compared.
_OUTSIDE = {
    "shared.weight": "token_embd.weight",
    "lm_head.weight": "output.weight",
    "encoder.final_layer_norm.weight": "enc.output_norm.weight",
    "decoder.final_layer_norm.weight": "dec.output_norm.weight",
}
_MODULES = {
    "SelfAttention.relative_attention_bias": "attn_rel_b",
    "DenseReluDense.wi": "ffn_up",
    "DenseReluDense.wi_0": "ffn_gate",
    "DenseReluDense.wi_1": "ffn_up",
    "DenseReluDense.wo": "ffn_down",
}
CHANGES: dict[str, Any] = {"relative_attention_max_distance": 128, "n_positions": 64}


def tensors_of(folder: Path) -> dict[str, Any]:
    found = {}
    for name, values in load_file(folder / "model.safetensors").items():
        if name in _OUTSIDE:
            found[_OUTSIDE[name]] = values
            continue
        side, _, layer, _, place, *module, _ = name.split(".")
        inside = ".".join(module)
        last = 1 if side == "encoder" else 2
        if module == ["layer_norm"]:
            part = {0: "attn_norm", last: "ffn_norm"}.get(int(place), "cross_attn_norm")
        elif inside in _MODULES:
            part = _MODULES[inside]
        else:
            part = f"{'cross_' if module[0] == 'EncDecAttention' else ''}attn_{module[1]}"
        found[f"{side[:3]}.blk.{layer}.{part}.weight"] = values
    return found


def write(
    folder: Path, path: Path, *, kind: str | None = None, more: dict[str, Any] | None = None, **keys: Any
) -> Path:
    """A folder as a GGUF file, with the pieces of `save_t5`.

    Args:
        folder: written by transformers.
        path: of the file.
        kind: type of matrices whose rows are blocks of it.
        more: further tensors; None: without this one.
        keys: changes of metadata, dots as two underscores.
    """
    config = json.loads((folder / "config.json").read_text())
    numbers: dict[str, Any] = {
        "context_length": config["n_positions"],
        "embedding_length": config["d_model"],
        "feed_forward_length": config["d_ff"],
        "block_count": config["num_layers"],
        "decoder_block_count": config["num_decoder_layers"],
        "attention.head_count": config["num_heads"],
        "attention.key_length": config["d_kv"],
        "attention.value_length": config["d_kv"],
        "attention.layer_norm_epsilon": float(config["layer_norm_epsilon"]),
        "attention.relative_buckets_count": config["relative_attention_num_buckets"],
        "attention.layer_norm_rms_epsilon": float(config["layer_norm_epsilon"]),
        "decoder_start_token_id": config["decoder_start_token_id"],
    }
    flags = {key: keys.pop(key) for key in list(keys) if key.startswith(("add_", "remove_"))}
    changed = {key.replace("__", "."): value for key, value in keys.items()}
    pieces = save_t5(folder)
    unused = [f"[PAD{index}]" for index in range(len(pieces), config["vocab_size"])]
    tokenizer = {
        "model": "t5",
        "pre": "default",
        "tokens": [text for text, _ in pieces] + unused,
        "scores": [score for _, score in pieces] + [-10000.0] * len(unused),
        "token_type": [3, 3, 2] + [1] * (len(pieces) - 3) + [5] * len(unused),
        "add_space_prefix": True,
        "remove_extra_whitespaces": True,
        **flags,
    }
    metadata = {**of_architecture("t5", {**numbers, **changed}), **of_architecture("tokenizer.ggml", tokenizer)}
    tensors = {name: values for name, values in {**tensors_of(folder), **(more or {})}.items() if values is not None}
    return write_gguf(path, "t5", metadata, matrices_encoded(tensors, kind))


@pytest.mark.parametrize("case", ["t5", "flan-t5", "umt5"])
def test_states_and_logits_are_those_of_transformers(tmp_path: Path, case: str) -> None:
    model = cases.model_of(case, **CHANGES)
    folder = cases.saved(model, tmp_path / "folder")
    ours = cases.loaded(write(folder, tmp_path / "m.gguf"))
    (source,), (text,) = cases.ids_of(145), cases.ids_of(17, seed=5)
    states, logits = cases.theirs(model, source, text)
    cases.assert_near(ours.states([source])[0], states)
    cache = ours.encode([source], len(text))
    cases.assert_near(ours.run(Batch.of([text], cache.lengths, "all"), cache), logits)


def test_texts_are_those_of_the_folder(tmp_path: Path) -> None:
    """Ids, what generation begins and ends with; packed matrices stay so."""
    folder = cases.saved(cases.model_of("flan-t5", **CHANGES), tmp_path / "folder")
    save_t5(folder)
    texts = ["the cat sat", " a  mat", "zq cats</s> on"]
    with open_model(str(folder)) as source, open_model(str(write(folder, tmp_path / "m.gguf"))) as file:
        theirs, ours = (TextToText(each, cases.native()) for each in (source, file))
        settings = ours.with_settings(max_tokens=12)
        for text in texts:
            assert ours.encode(text) == theirs.encode(text)
        wanted = theirs.answer(texts, theirs.with_settings(max_tokens=12))
        assert [list(answer.ids) for answer in ours.answer(texts, settings)] == [list(answer.ids) for answer in wanted]
    with open_model(str(write(folder, tmp_path / "q.gguf", kind="Q8_0"))) as file:
        weight = file.read_weight("decoder.block.1.layer.1.EncDecAttention.q.weight")
        assert isinstance(weight, QuantTensor)
        ours = TextToText(file, cases.native())
        assert len(ours.answer(texts, ours.with_settings(max_tokens=3))) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention__value_length": 11}, "'t5.attention.value_length' is not 12, as kbit has T5"),
        ({"block_count": 2}, "has no place in a T5 model that kbit knows"),
        ({"decoder_block_count": 3}, "tensor 'dec.blk.2.attn_q.weight' is missing"),
        ({"attention__relative_buckets_count": 9}, r"attn_rel_b.weight' has the shape \(8, 2\)"),
        ({"attention__sliding": 3}, "metadata key 't5.attention.sliding' is unknown to kbit"),
        ({"more": {"dec.output_norm.weight": None}}, "tensor 'dec.output_norm.weight' is missing"),
    ],
)
def test_what_would_change_the_model_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = cases.saved(cases.model_of("t5", **CHANGES), tmp_path / "folder")
    with pytest.raises((CheckpointError, UnsupportedError), match=message):
        GGUFSource(write(folder, tmp_path / "m.gguf", **changes))


def test_texts_whose_spaces_are_kept(tmp_path: Path) -> None:
    folder = cases.saved(cases.model_of("t5", **CHANGES), tmp_path / "folder")
    with (
        open_model(str(write(folder, tmp_path / "m.gguf", remove_extra_whitespaces=False))) as source,
        pytest.raises(UnsupportedError, match="unigram vocabulary whose remove_extra_whitespaces is false"),
    ):
        source.sidecar_files()
