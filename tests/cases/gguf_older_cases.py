"""Models of older families as GGUF files: what llama.cpp's converter (0.3.36 of llama-cpp-python) makes of a folder.

Metadata, names and orders of rows were compared with that converter's files of the same tiny models.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from gguf_file_cases import Array, matrices_encoded, of_architecture, write_gguf
from gguf_model_cases import permuted
from safetensors.numpy import load_file

# Files of several architectures do not name the base, which is llama.cpp's then.
_HALF = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
# Case: architecture, and what the tiny case must be changed to for the file to say all of it.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {"n_inner": None, "n_ctx": 64}),
    "gpt_bigcode": ("starcoder", {"n_inner": None}),
    "gpt_neox": ("gptneox", {"rope_parameters": _HALF}),
    "bloom": ("bloom", {}),
    "falcon": ("falcon", {"num_kv_heads": 1, "ffn_hidden_size": 192, "max_position_embeddings": 2048}),
    "falcon-40b": ("falcon", {"ffn_hidden_size": 192, "max_position_embeddings": 2048}),
    "mpt": ("mpt", {}),
    "phi": ("phi2", {"num_key_value_heads": 6, "intermediate_size": 192}),
    "starcoder2": ("starcoder2", {"sliding_window": None}),
    "stablelm": ("stablelm", {"rope_parameters": _HALF}),
    "nemotron": ("nemotron", {"head_dim": 8}),
    "arcee": ("arcee", {"attention_bias": False}),
    "olmo": ("olmo", {"attention_bias": False}),
    "glm": ("chatglm", {"rms_norm_eps": 1e-5, "attention_bias": True, "seq_length": 64}),
    "granitemoe": ("granitemoe", {}),
    "granitemoe-shared": ("granitemoe", {}),
}
_NORMS = {
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "norm_1": "attn_norm",
    "norm_2": "ffn_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "ln_mlp": "attn_norm",
    "ln_attn": "attn_norm_2",
}
_PARTS = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "dense": "attn_output",
    "out_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
    "gate_up_proj": "ffn_up",
    "dense_h_to_4h": "ffn_up",
    "dense_4h_to_h": "ffn_down",
    "c_fc": "ffn_up",
    "fc1": "ffn_up",
    "fc2": "ffn_down",
    "layer": "ffn_gate_inp",
}
_FUSED = ("c_attn", "query_key_value", "Wqkv")
_OUTSIDE = {
    "wte": "token_embd",
    "wpe": "position_embd",
    "word_embeddings": "token_embd",
    "embed_in": "token_embd",
    "embed_tokens": "token_embd",
    "word_embeddings_layernorm": "token_embd_norm",
    "ln_f": "output_norm",
    "norm_f": "output_norm",
    "norm": "output_norm",
    "final_layer_norm": "output_norm",
    "final_layernorm": "output_norm",
    "lm_head": "output",
    "embed_out": "output",
}
# Whose files say nothing else.
_FOURFOLD = ("gpt2", "starcoder", "bloom", "falcon", "mpt", "phi2")
_NUMBERS = {
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}


def tensors_of(arch: str, folder: Path) -> dict[str, Array]:
    """A folder's tensors as a file has them."""
    config = json.loads((folder / "config.json").read_text())
    found: dict[str, Array] = {}
    for name, values in load_file(folder / "model.safetensors").items():
        *_, module, kind = name.split(".")
        layer = next((part for part in name.split(".") if part.isdigit()), None)
        if arch == "nemotron" and module.endswith("norm") and kind == "weight":
            values = values + 1
        if layer is None:
            found[f"{_OUTSIDE[module]}.{kind}"] = values
            continue
        at = f"blk.{layer}."
        if module in _NORMS:
            found[f"{at}{_NORMS[module]}.{kind}"] = values
        elif module in _FUSED:
            rows = values.T if arch == "gpt2" and kind == "weight" else values
            found[f"{at}attn_qkv.{kind}"] = _in_turn(arch, rows, config)
        elif module.endswith("_linear"):  # of experts, or of the MLP for all tokens
            end = "_exps" if "block_sparse_moe" in name else "_shexp"
            parts = np.split(values, 2, axis=-2) if module == "input_linear" else [values]
            names = ("gate", "up") if module == "input_linear" else ("down",)
            found |= {f"{at}ffn_{part}{end}.weight": each for part, each in zip(names, parts, strict=True)}
        else:
            part = "ffn_down" if module == "c_proj" and ".mlp." in name else _PARTS.get(module, "attn_output")
            if arch == "gpt2" and kind == "weight":
                values = values.T
            if arch in ("arcee", "granitemoe", "olmo") and part in ("attn_q", "attn_k"):
                heads = config["num_attention_heads"] if part == "attn_q" else config["num_key_value_heads"]
                values = permuted(values, heads)
            found[f"{at}{part}.{kind}"] = values
    return found


def _in_turn(arch: str, rows: Array, config: dict[str, Any]) -> Array:
    """Queries, keys and values, all rows of one after all of the other."""
    heads = next(config[name] for name in ("num_attention_heads", "n_head", "n_heads") if name in config)
    if arch in ("gptneox", "bloom"):
        parts = rows.reshape(heads, 3, -1, *rows.shape[1:]).swapaxes(0, 1)
        return np.ascontiguousarray(parts.reshape(rows.shape))
    if arch == "falcon":
        shared = config["num_kv_heads"]
        groups = rows.reshape(shared, heads // shared + 2, -1, rows.shape[1])
        each = groups[:, :-2], groups[:, -2], groups[:, -1]
        return np.concatenate([part.reshape(-1, rows.shape[1]) for part in each])
    return rows


def keys_of(arch: str, folder: Path) -> dict[str, Any]:
    """The metadata of a folder as a file has it, without the architecture's name before each key."""
    config = json.loads((folder / "config.json").read_text())

    def first(*names: str) -> Any:
        return next(config[name] for name in names if config.get(name) is not None)

    hidden, heads = first("hidden_size", "n_embd", "d_model"), first("num_attention_heads", "n_head", "n_heads")
    keys: dict[str, Any] = {
        "block_count": first("num_hidden_layers", "n_layer", "n_layers"),
        "context_length": first("seq_length", "max_seq_len", "max_position_embeddings", "n_positions"),
        "embedding_length": hidden,
        "feed_forward_length": 4 * hidden if arch in _FOURFOLD else config["intermediate_size"],
        "attention.head_count": heads,
    }
    if arch not in ("gpt2", "gptneox", "mpt"):
        shared = {"starcoder": 1, "bloom": heads, "phi2": heads, "falcon": config.get("num_kv_heads")}
        keys["attention.head_count_kv"] = shared.get(arch, config.get("num_key_value_heads"))
    rms = arch in ("arcee", "chatglm", "granitemoe")
    names = ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")
    eps = 1e-5 if arch == "olmo" else first("rms_norm_eps") if rms else first(*names)
    keys[f"attention.layer_norm_{'rms_' if rms else ''}epsilon"] = float(eps)
    rope = config.get("rope_parameters") or {}
    turned = rope.get("partial_rotary_factor")
    if arch in ("gptneox", "phi2", "stablelm", "nemotron", "chatglm"):
        keys["rope.dimension_count"] = int(turned * (hidden // heads))
    if "rope_theta" in rope and arch not in ("gptneox", "phi2", "falcon", "stablelm"):
        keys["rope.freq_base"] = float(rope["rope_theta"])
    if rope.get("rope_type") == "yarn":
        keys |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(rope["factor"]),
            "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
        }
    if arch == "nemotron":
        keys["rope.scaling.type"] = "none"
    if arch in ("gptneox", "stablelm"):
        keys["use_parallel_residual"] = config.get("use_parallel_residual", True)
    if arch == "falcon":
        keys["tensor_data_layout"] = "jploski"
    if arch == "mpt":
        keys["attention.max_alibi_bias"] = float(config["attn_config"]["alibi_bias_max"])
    if arch == "granitemoe":
        keys |= {"expert_count": config["num_local_experts"], "expert_used_count": config["num_experts_per_tok"]}
        keys |= {key: float(config[name]) for name, key in _NUMBERS.items()}
        if config.get("shared_intermediate_size"):
            keys["expert_shared_feed_forward_length"] = config["shared_intermediate_size"]
    return keys


def write(
    case: str, folder: Path, path: Path, tensors: dict[str, Array] | None = None, kind: str | None = None, **keys: Any
) -> Path:
    """A folder as a GGUF file.

    Args:
        case: one of CASES.
        folder: written by transformers.
        path: of the file.
        tensors: in place of the folder's.
        kind: type of matrices whose rows are blocks of it.
        keys: changes of metadata, dots as two underscores.
    """
    arch = CASES[case][0]
    metadata = {**keys_of(arch, folder), **{key.replace("__", "."): value for key, value in keys.items()}}
    stored = matrices_encoded(tensors or tensors_of(arch, folder), kind)
    return write_gguf(path, arch, of_architecture(arch, metadata), stored)
