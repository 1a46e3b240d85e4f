"""A Hugging Face Llama with a byte-level BPE tokenizer as a float32 GGUF file, for llama.cpp's tools.

llama.cpp's own converter refuses tokenizers it does not know by their hash. What this writes is read back by kbit and
compared with the original before anything is measured on it.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kbit.checkpoint.source import CheckpointSource
from kbit.host.errors import UnsupportedError
from kbit.models.opening import open_model

_OUTER = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
_INNER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(folder: str, out: Path) -> None:
    """
    Raises:
        UnsupportedError: another architecture, or another tokenizer.
    """
    import gguf

    with open_model(folder) as source:
        config = source.config
        if config.get("model_type") != "llama":
            raise UnsupportedError(f"{folder}: only Llama models can be written as GGUF here")
        partial = out.with_suffix(".partial")
        writer = gguf.GGUFWriter(partial, "llama")
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(config["hidden_size"])
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count(config["num_attention_heads"])
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_rope_dimension_count(config["head_dim"])
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_rope_freq_base(config["rope_theta"])
        writer.add_vocab_size(config["vocab_size"])
        writer.add_file_type(0)  # all float32
        _add_tokenizer(writer, source, folder)
        for name in source.tensors:
            writer.add_tensor(_gguf_name(name), _values(source, name))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        partial.replace(out)


def _add_tokenizer(writer: object, source: CheckpointSource, folder: str) -> None:
    import gguf

    assert isinstance(writer, gguf.GGUFWriter)
    tokenizer = json.loads(source.sidecar_files()["tokenizer.json"])
    if tokenizer["model"]["type"] != "BPE" or tokenizer["pre_tokenizer"]["type"] != "ByteLevel":
        raise UnsupportedError(f"{folder}: only byte-level BPE tokenizers can be written as GGUF here")
    vocabulary = tokenizer["model"]["vocab"]
    special = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    tokens = {index: token for token, index in {**vocabulary, **special}.items()}
    count = int(source.config["vocab_size"])
    normal, control, unused = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL, gguf.TokenType.UNUSED
    kinds = [control if index in special.values() else normal if index in tokens else unused for index in range(count)]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([tokens.get(index, f"[UNUSED{index}]") for index in range(count)])
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(source.config["bos_token_id"])
    writer.add_eos_token_id(source.config["eos_token_id"])
    writer.add_add_bos_token(False)


def _gguf_name(name: str) -> str:
    if name in _OUTER:
        return _OUTER[name]
    _, _, layer, *inner, last = name.split(".")
    return f"blk.{layer}.{_INNER['.'.join(inner)]}.{last}"


def _values(source: CheckpointSource, name: str) -> NDArray[np.float32]:
    values: NDArray[np.float32] = source.read(name).numpy()
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
    if heads is None:
        return values
    # Rows of each head for interleaved RoPE, as llama.cpp keeps them.
    rows, columns = values.shape
    return np.ascontiguousarray(
        values.reshape(source.config[heads], 2, -1, columns).swapaxes(1, 2).reshape(rows, columns)
    )
