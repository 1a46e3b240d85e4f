"""Models of which some layers do not attend, as llama.cpp's converter (0.3.36 of llama-cpp-python) writes them.

Metadata, names and shapes were compared with that converter's files of the same tiny models.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from gguf_file_cases import Array, encoded, of_architecture, write_gguf
from gguf_model_cases import permuted
from safetensors.numpy import load_file

# Case: architecture, and what the tiny case must be changed to for the file to say all of it.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lfm2": ("lfm2", {}),
    "lfm2-moe": ("lfm2moe", {"routed_scaling_factor": 1.0}),
    "granite-hybrid": ("granitehybrid", {}),
    "falcon-h1": ("falcon-h1", {}),
    "falcon-h1-norm": ("falcon-h1", {"mamba_conv_bias": True, "mlp_bias": False, "tie_word_embeddings": False}),
    "nemotron-h": ("nemotron_h", {"mamba_head_dim": 16}),
    "nemotron-h-moe": ("nemotron_h_moe", {"mamba_head_dim": 16}),
    "granite-hybrid-moe": (
        "granitehybrid",
        {"position_embedding_type": "nope", "attention_bias": False, "mamba_conv_bias": True},
    ),
}
_OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.embedding_norm.weight": "token_embd_norm.weight",
    "model.norm.weight": "output_norm.weight",
    "model.final_layernorm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_PARTS = {
    "operator_norm.weight": "attn_norm.weight",
    "ffn_norm.weight": "ffn_norm.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "pre_ff_layernorm.weight": "ffn_norm",
    "feed_forward.gate_proj.weight": "ffn_gate.weight",
    "feed_forward.up_proj.weight": "ffn_up.weight",
    "feed_forward.down_proj.weight": "ffn_down.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.out_proj.weight": "attn_output.weight",
    "self_attn.q_layernorm.weight": "attn_q_norm.weight",
    "self_attn.k_layernorm.weight": "attn_k_norm.weight",
    "feed_forward.w1.weight": "ffn_gate.weight",
    "feed_forward.w3.weight": "ffn_up.weight",
    "feed_forward.w2.weight": "ffn_down.weight",
    "feed_forward.gate.weight": "ffn_gate_inp.weight",
    "feed_forward.expert_bias": "exp_probs_b.bias",
    "conv.in_proj.weight": "shortconv.in_proj.weight",
    "conv.conv.weight": "shortconv.conv.weight",
    "conv.out_proj.weight": "shortconv.out_proj.weight",
    "block_sparse_moe.router.layer.weight": "ffn_gate_inp.weight",
    "block_sparse_moe.output_linear.weight": "ffn_down_exps.weight",
    "mamba.in_proj.weight": "ssm_in.weight",
    "mamba.conv1d.weight": "ssm_conv1d.weight",
    "mamba.conv1d.bias": "ssm_conv1d.bias",
    "mamba.dt_bias": "ssm_dt.bias",
    "mamba.A_log": "ssm_a",
    "mamba.D": "ssm_d",
    "mamba.norm.weight": "ssm_norm.weight",
    "mamba.out_proj.weight": "ssm_out.weight",
}
_EXPERTS = {"w1": "gate", "w3": "up", "w2": "down", "up_proj": "up", "down_proj": "down"}
# Nemotron-H's, whose mixers are all called so.
_OUTSIDE |= {"backbone.embeddings.weight": "token_embd.weight", "backbone.norm_f.weight": "output_norm.weight"}
_PARTS |= {part.replace("mamba.", "mixer."): name for part, name in _PARTS.items() if part.startswith("mamba.")}
_PARTS |= {part.replace("self_attn.", "mixer."): name for part, name in _PARTS.items() if "_proj" in part}
_PARTS |= {
    "norm.weight": "attn_norm.weight",
    "mixer.up_proj.weight": "ffn_up.weight",
    "mixer.down_proj.weight": "ffn_down.weight",
    "mixer.gate.weight": "ffn_gate_inp.weight",
    "mixer.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mixer.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "mixer.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
}


def tensors_of(folder: Path) -> dict[str, Array]:
    """A folder's tensors as a file has them."""
    config = json.loads((folder / "config.json").read_text())
    found: dict[str, Array] = {}
    experts: dict[str, dict[int, Array]] = {}
    for name, values in load_file(folder / "model.safetensors").items():
        if config["model_type"] == "falcon_h1":
            values = _multiplied(name, values, config)
        if name in _OUTSIDE:
            found[_OUTSIDE[name]] = values
            continue
        _, _, layer, part = name.split(".", 3)
        at = f"blk.{layer}."
        expert = re.fullmatch(r"(?:feed_forward|mixer)\.experts\.(\d+)\.(\w+)\.weight", part)
        if expert:
            experts.setdefault(f"{at}ffn_{_EXPERTS[expert[2]]}_exps.weight", {})[int(expert[1])] = values
        elif part.startswith("mixer.experts."):
            found[f"{at}ffn_{_EXPERTS[part.split('.')[-1]]}_exps.weight"] = values
        elif part.endswith("input_linear.weight"):  # of experts, or of the MLP for all tokens
            gate, up = np.split(values, 2, axis=-2)
            end = "_exps" if part.startswith("block") else "_shexp" if config["num_local_experts"] else ""
            found |= {f"{at}ffn_gate{end}.weight": gate, f"{at}ffn_up{end}.weight": up}
        elif part == "shared_mlp.output_linear.weight":
            found[f"{at}ffn_down{'_shexp' if config['num_local_experts'] else ''}.weight"] = values
        else:
            found[at + _PARTS[part]] = _changed(part, values, config)
    return found | {name: np.stack([each[i] for i in range(len(each))]) for name, each in experts.items()}


def _multiplied(name: str, values: Array, config: dict[str, Any]) -> Array:
    """A tensor of Falcon-H1 with the factors on what it makes."""
    into = config["attention_in_multiplier"]
    factors = {
        "embed_tokens": config["embedding_multiplier"],
        "lm_head": config["lm_head_multiplier"],
        "gate_proj": config["mlp_multipliers"][0],
        "down_proj": config["mlp_multipliers"][1],
        "q_proj": into,
        "k_proj": into * config["key_multiplier"],
        "v_proj": into,
        "o_proj": config["attention_out_multiplier"],
        "out_proj": config["ssm_out_multiplier"],
    }
    module = name.split(".")[-2]
    if module != "in_proj":
        return values * np.float32(factors.get(module, 1.0))
    keys = config["mamba_n_groups"] * config["mamba_d_state"]
    widths = [config["mamba_d_ssm"]] * 2 + [keys] * 2 + [config["mamba_n_heads"]]
    parts = np.repeat(config["ssm_multipliers"], widths) * config["ssm_in_multiplier"]
    return values * parts.astype(np.float32)[:, None]


def _changed(part: str, values: Array, config: dict[str, Any]) -> Array:
    if part.endswith(("conv.weight", "conv1d.weight")):
        return values.squeeze(1)
    if part.endswith(".A_log"):
        return -np.exp(values)[:, None]
    if part.endswith(".D"):
        return values[:, None]
    if part in ("mamba.norm.weight", "mixer.norm.weight"):
        return values.reshape(config.get("mamba_n_groups") or config["n_groups"], -1)
    if config["model_type"] == "granitemoehybrid" and part.endswith(("q_proj.weight", "k_proj.weight")):
        heads = config["num_attention_heads"] if "q_proj" in part else config["num_key_value_heads"]
        return permuted(values, heads)
    return values


def keys_of(arch: str, folder: Path) -> dict[str, Any]:
    """Metadata, without the architecture's name before each key."""
    config = json.loads((folder / "config.json").read_text())
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    attends = [kind in ("full_attention", "attention") for kind in config.get("layer_types", ())]
    if arch.startswith("nemotron"):
        return _nemotron_keys(arch, config)
    keys: dict[str, Any] = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": hidden,
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": [config["num_key_value_heads"] if one else 0 for one in attends],
        "attention.layer_norm_rms_epsilon": float(config.get("norm_eps", config.get("rms_norm_eps"))),
        "rope.freq_base": float((config.get("rope_parameters") or {}).get("rope_theta", 10000.0)),
        "vocab_size": config["vocab_size"],
    }
    if arch == "lfm2moe":
        keys |= {
            "expert_count": config["num_experts"],
            "expert_used_count": config["num_experts_per_tok"],
            "expert_feed_forward_length": config["moe_intermediate_size"],
            "leading_dense_block_count": config["num_dense_layers"],
            "expert_gating_func": 2,
        }
    if arch == "lfm2":  # whose configuration may say that MLPs are narrower
        keys["feed_forward_length"] = len(tensors_of(folder)["blk.0.ffn_gate.weight"])
    if arch == "falcon-h1":
        return {**keys, "attention.head_count_kv": config["num_key_value_heads"], **_scan_keys(config)}
    if arch != "granitehybrid":
        return {**keys, "shortconv.l_cache": config["conv_L_cache"]}
    return {
        **keys,
        "expert_count": config["num_local_experts"],
        "expert_used_count": config["num_experts_per_tok"],
        "expert_shared_feed_forward_length": config["shared_intermediate_size"],
        "attention.scale": float(config["attention_multiplier"]),
        "embedding_scale": float(config["embedding_multiplier"]),
        "residual_scale": float(config["residual_multiplier"]),
        "logit_scale": float(config["logits_scaling"]),
        **_scan_keys(config),
        "rope.scaling.finetuned": False,
    }


def _nemotron_keys(arch: str, config: dict[str, Any]) -> dict[str, Any]:
    kinds = config.get("layers_block_type") or config["layer_types"]
    keys: dict[str, Any] = {
        "block_count": len(kinds),
        "context_length": 1 << 20,
        "embedding_length": config["hidden_size"],
        "feed_forward_length": [config["intermediate_size"] if kind == "mlp" else 0 for kind in kinds],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": [config["num_key_value_heads"] if "full" in kind else 0 for kind in kinds],
        "attention.layer_norm_epsilon": float(config["layer_norm_epsilon"]),
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "rope.scaling.finetuned": False,
        "ssm.conv_kernel": config["conv_kernel"],
        "ssm.state_size": config["ssm_state_size"],
        "ssm.group_count": config["n_groups"],
        "ssm.inner_size": config["mamba_num_heads"] * config["mamba_head_dim"],
        "ssm.time_step_rank": config["mamba_num_heads"],
    }
    if arch == "nemotron_h":
        return keys
    keys["feed_forward_length"] = [config["moe_intermediate_size"] if kind == "moe" else 0 for kind in kinds]
    return keys | {
        "expert_count": config["n_routed_experts"],
        "expert_used_count": config["num_experts_per_tok"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_shared_feed_forward_length": config["moe_shared_expert_intermediate_size"],
        "expert_shared_count": config["n_shared_experts"],
        "expert_weights_norm": config["norm_topk_prob"],
        "expert_weights_scale": float(config["routed_scaling_factor"]),
        "expert_group_count": config["n_group"],
        "expert_group_used_count": config["topk_group"],
    }


def _scan_keys(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "ssm.conv_kernel": config["mamba_d_conv"],
        "ssm.state_size": config["mamba_d_state"],
        "ssm.group_count": config["mamba_n_groups"],
        "ssm.inner_size": config.get("mamba_d_ssm") or config["mamba_expand"] * config["hidden_size"],
        "ssm.time_step_rank": config["mamba_n_heads"],
    }


def write(case: str, folder: Path, path: Path, kinds: dict[str, str] | None = None, **changes: Any) -> Path:
    """A folder as a GGUF file.

    Args:
        case: one of CASES.
        folder: written by transformers.
        path: of the file.
        kinds: types that tensors are quantized to, by name; others are float32.
        changes: of metadata, dots as two underscores.
    """
    arch = CASES[case][0]
    more = {key.replace("__", "."): value for key, value in changes.items()}
    tensors = {name: encoded(values, (kinds or {}).get(name)) for name, values in tensors_of(folder).items()}
    return write_gguf(path, arch, of_architecture(arch, {**keys_of(arch, folder), **more}), tensors)
