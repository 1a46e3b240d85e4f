"""Models of newer families as GGUF files: what llama.cpp's converter (0.3.36 of llama-cpp-python) makes of a folder.

Metadata, names and orders of rows were compared with that converter's files of the same tiny models.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from decoder_config_parts import LONGROPE
from gguf_delta_cases import ARCHITECTURES as WITH_DELTA_NETS
from gguf_delta_cases import keys as delta_keys
from gguf_delta_cases import tensors as delta_tensors
from gguf_file_cases import Array, Encoded, encoded, of_architecture, write_gguf
from gguf_model_cases import permuted
from safetensors.numpy import load_file

BOTH = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
POST = {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"}
AROUND = {**POST, "input_layernorm": "attn_norm", "pre_feedforward_layernorm": "ffn_norm"}
GEMMA4 = {
    **AROUND,
    "per_layer_input_gate": "inp_gate",
    "per_layer_projection": "proj",
    "post_per_layer_input_norm": "post_norm",
    "pre_feedforward_layernorm_2": "pre_ffw_norm_2",
    "post_feedforward_layernorm_1": "post_ffw_norm_1",
    "post_feedforward_layernorm_2": "post_ffw_norm_2",
    "router.proj": "ffn_gate_inp",
}
# Whose names do not end in "weight" canonically.
WHOLE = {
    "layer_scalar": "layer_output_scale.weight",
    "router.scale": "ffn_gate_inp.scale",
    "router.per_expert_scale": "ffn_down_exps.scale",
    "experts.gate_up_proj": "ffn_gate_up_exps.weight",
    "experts.down_proj": "ffn_down_exps.weight",
}
LINEARS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.query_layernorm": "attn_q_norm",
    "self_attn.key_layernorm": "attn_k_norm",
    "mlp.gate": "ffn_gate_inp",
    "mlp.router": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
}
LINEARS |= {
    f"mlp.{block}.{part}_proj": f"ffn_{part}_shexp"
    for block in ("shared_expert", "shared_experts")
    for part in ("gate", "up", "down")
}
# Of experts: their canonical names, and which of gate, up and down each is.
EXPERT_PARTS = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}
GLOBAL = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "model.embed_tokens_per_layer.weight": "per_layer_token_embd.weight",
    "model.per_layer_model_projection.weight": "per_layer_model_proj.weight",
    "model.per_layer_projection_norm.weight": "per_layer_proj_norm.weight",
}

# llama.cpp takes both factors of YaRN for one.
_DEEPSEEK_YARN = {
    "rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 8, "mscale": 0.7,
    "mscale_all_dim": 0.7,
}  # fmt: skip

# Case: architecture, names of norms, and what the tiny case must be changed to for llama.cpp to mean the same.
CASES: dict[str, tuple[str, dict[str, str], dict[str, Any]]] = {
    "qwen3": ("qwen3", BOTH, {}),
    "gemma": ("gemma", BOTH, {}),
    "gemma2": ("gemma2", AROUND, {"query_pre_attn_scalar": 8}),
    "gemma3": ("gemma3", AROUND, {"query_pre_attn_scalar": 10, "layer_types": None, "num_hidden_layers": 7}),
    "gemma4-e": ("gemma4", GEMMA4, {}),
    # Without a cap llama.cpp takes 30.
    "gemma4-dense": ("gemma4", GEMMA4, {"final_logit_softcapping": 30.0}),
    "gemma4-moe": ("gemma4", GEMMA4, {"final_logit_softcapping": 30.0}),
    "phi3": ("phi3", BOTH, {}),
    "phi3-longrope": ("phi3", BOTH, {}),
    "granite": ("granite", BOTH, {}),
    "smollm3": ("smollm3", BOTH, {"no_rope_layer_interval": 4, "num_hidden_layers": 5}),
    "ministral3": ("mistral3", BOTH, {}),
    "olmo2": ("olmo2", POST, {}),
    "olmo3": ("olmo2", POST, {}),
    "exaone4": ("exaone4", POST, {}),
    "glm4": (
        "glm4",
        {**BOTH, "post_self_attn_layernorm": "post_attention_norm", "post_mlp_layernorm": "post_ffw_norm"},
        {},
    ),
    "seed-oss": ("seed_oss", {**BOTH, "post_attention_layernorm": "post_attention_norm"}, {}),
    "seed-oss-biases": ("seed_oss", {**BOTH, "post_attention_layernorm": "post_attention_norm"}, {}),
    "hunyuan": ("hunyuan-dense", BOTH, {}),
    "ernie4_5": ("ernie4_5", BOTH, {}),
    "mixtral": ("llama", BOTH, {}),
    "qwen3-moe": ("qwen3moe", BOTH, {}),
    "qwen2-moe": ("qwen2moe", BOTH, {"mlp_only_layers": None}),
    "olmoe": ("olmoe", BOTH, {}),
    "glm4-moe": ("glm4moe", {**BOTH, "post_attention_layernorm": "post_attention_norm"}, {}),
    "minimax-m2": ("minimax-m2", BOTH, {}),
    "dots1": ("dots1", BOTH, {"sliding_window": None, "layer_types": None}),
    "cohere": ("command-r", BOTH, {}),
    "cohere2": ("cohere2", BOTH, {"layer_types": None, "num_hidden_layers": 5}),
    "deepseek-v2": ("deepseek2", BOTH, {"attention_bias": False}),
    "deepseek-v2-lite": ("deepseek2", BOTH, {"rope_parameters": _DEEPSEEK_YARN}),
    "deepseek-v3": (
        "deepseek2",
        BOTH,
        {"attention_bias": False, "rope_parameters": _DEEPSEEK_YARN, "scoring_func": "sigmoid"},
    ),
    "youtu": ("deepseek2", BOTH, {"attention_bias": False}),
    "minicpm3": ("minicpm3", BOTH, {"attention_bias": False, "mlp_bias": False, "v_head_dim": 8}),
    "minicpm3-longrope": (
        "minicpm3",
        BOTH,
        {
            "original_max_position_embeddings": 64,
            "v_head_dim": 8,
            "tie_word_embeddings": True,
            "rope_parameters": {**LONGROPE, "rope_theta": 10000.0},
        },
    ),
    "gpt-oss": (
        "gpt-oss",
        {**BOTH, "post_attention_layernorm": "post_attention_norm"},
        {"swiglu_limit": 7.0, "layer_types": None},
    ),
    # A router always normalises; where layers attend is said by an interval.
    "qwen3-next": (
        "qwen3next",
        {**BOTH, "post_attention_layernorm": "post_attention_norm"},
        {"norm_topk_prob": True, "decoder_sparse_step": 1, "layer_types": None, "num_hidden_layers": 4},
    ),
    "qwen3_5": ("qwen35", {**BOTH, "post_attention_layernorm": "post_attention_norm"}, {}),
    "qwen3_5-moe": ("qwen35moe", {**BOTH, "post_attention_layernorm": "post_attention_norm"}, {}),
}
# The converter permutes rows of queries and keys; and adds 1 to norms.
PERMUTED = ("granite", "llama", "mistral3", "smollm3")
FROM_ONE = ("gemma", "gemma2", "gemma3", *WITH_DELTA_NETS)
_NUMBERS = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}


def tensors_of(case: str, folder: Path) -> dict[str, Array]:
    """The tensors of a converted folder, by GGUF name."""
    arch, norms, _ = CASES[case]
    config = json.loads((folder / "config.json").read_text())
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    names = {**LINEARS, **norms}
    found: dict[str, Array] = {}
    stacks: dict[str, dict[int, Array]] = {}
    for name, values in load_file(folder / "model.safetensors").items():
        whole = WHOLE.get(name.split(".", 3)[-1])
        if whole is not None:
            found[f"blk.{name.split('.')[2]}.{whole}"] = values
            continue
        if ".experts." in name:
            _collect_experts(name, values, found, stacks)
            continue
        if name.endswith(("e_score_correction_bias", "sinks")):
            part = "exp_probs_b.bias" if "score" in name else "attn_sinks.weight"
            found[f"blk.{name.split('.')[2]}.{part}"] = values
            continue
        if ".linear_attn." in name:
            found |= delta_tensors(arch, name, values, config)
            continue
        if arch in FROM_ONE and "norm" in name:
            values = values + 1
        if name in GLOBAL:
            found[GLOBAL[name]] = values
            continue
        _, _, layer, *module, kind = name.split(".")
        if module[-1] == "kv_b_proj" and arch == "minicpm3":
            found[f"blk.{layer}.attn_kv_b.weight"] = values
            continue
        if module[-1] == "kv_b_proj":
            # Keys transposed, head by head.
            heads_of = values.reshape(config["num_attention_heads"], -1, config["kv_lora_rank"])
            k, v = np.split(heads_of, [config["qk_nope_head_dim"]], axis=1)
            found[f"blk.{layer}.attn_k_b.weight"] = np.ascontiguousarray(k.swapaxes(1, 2))
            found[f"blk.{layer}.attn_v_b.weight"] = np.ascontiguousarray(v)
            continue
        part = names[".".join(module)]
        if arch in PERMUTED and part in heads:
            values = permuted(values, heads[part])
        found[f"blk.{layer}.{part}.{kind}"] = values
    for name, experts in stacks.items():
        found[name] = np.stack([experts[index] for index in range(len(experts))])
    return found


def _collect_experts(name: str, values: Array, found: dict[str, Array], stacks: dict[str, dict[int, Array]]) -> None:
    """An expert's matrix into the stack of its layer; or gpt-oss's stacks, gates and ups apart and rows before columns."""
    layer, rest = name.split(".")[2], name.partition(".experts.")[2].split(".")
    if rest[0].isdigit():
        part = f"blk.{layer}.ffn_{EXPERT_PARTS[rest[1]]}_exps.{rest[2]}"
        stacks.setdefault(part, {})[int(rest[0])] = values
        return
    kind = "bias" if rest[0].endswith("_bias") else "weight"
    values = values if kind == "bias" else values.swapaxes(1, 2)
    parts = {"gate": values[:, 0::2], "up": values[:, 1::2]} if rest[0].startswith("gate_up") else {"down": values}
    for part, rows in parts.items():
        found[f"blk.{layer}.ffn_{part}_exps.{kind}"] = np.ascontiguousarray(rows)


def keys_of(case: str, folder: Path) -> dict[str, Any]:
    """The metadata of a converted folder, without the architecture's name before each key."""
    arch, _, _ = CASES[case]
    config = json.loads((folder / "config.json").read_text())
    ropes = config["rope_parameters"]
    rope = ropes.get("full_attention", ropes)
    keys: dict[str, Any] = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config.get("intermediate_size"),
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if "layer_norm_eps" in config:
        keys["attention.layer_norm_epsilon"] = float(config["layer_norm_eps"])
        keys["logit_scale"] = float(config["logit_scale"])
    else:
        keys["attention.layer_norm_rms_epsilon"] = float(config["rms_norm_eps"])
    if arch == "deepseek2":
        keys |= _latent_keys(config)
    if arch == "minicpm3":
        del keys["rope.freq_base"]
        keys |= {
            "attention.q_lora_rank": config["q_lora_rank"],
            "attention.kv_lora_rank": config["kv_lora_rank"],
            "attention.key_length": config["qk_nope_head_dim"] + config["qk_rope_head_dim"],
            "rope.dimension_count": config["qk_rope_head_dim"],
        }
    if arch == "qwen35moe":  # the converter finds no width of an MLP
        del keys["feed_forward_length"]
    if arch in WITH_DELTA_NETS:
        keys |= delta_keys(config)
        if arch == "qwen3next":
            keys["full_attention_interval"] = 4
        else:
            keys["attention.recurrent_layers"] = [kind == "linear_attention" for kind in config["layer_types"]]
            keys["rope.dimension_sections"] = [11, 11, 10, 0]
    if config.get("head_dim") and arch not in ("deepseek2", "minicpm3"):
        keys["attention.key_length"] = keys["attention.value_length"] = config["head_dim"]
    if "sliding_attention" in ropes:
        keys["rope.freq_base_swa"] = float(ropes["sliding_attention"]["rope_theta"])
    if config.get("sliding_window"):
        keys["attention.sliding_window"] = config["sliding_window"]
        if arch in ("olmo2", "exaone4"):
            keys["attention.sliding_window_pattern"] = [kind == "sliding_attention" for kind in config["layer_types"]]
    if rope["rope_type"] in ("linear", "yarn"):
        keys["rope.scaling.type"], keys["rope.scaling.factor"] = rope["rope_type"], float(rope["factor"])
    if rope["rope_type"] == "yarn":
        keys["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
        if arch == "deepseek2":
            keys["rope.scaling.yarn_log_multiplier"] = 0.1 * rope["mscale_all_dim"]
    keys |= _gemma4_keys(config) if arch == "gemma4" else _expert_keys(arch, config)
    if arch == "mistral3":
        keys["rope.scaling.yarn_log_multiplier"] = rope["mscale_all_dim"]
        keys["attention.temperature_scale"] = rope["llama_4_scaling_beta"]
    if "partial_rotary_factor" in rope and arch in ("phi3", "glm4", "glm4moe", "minimax-m2"):
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        keys["rope.dimension_count"] = int(head_dim * rope["partial_rotary_factor"])
    if arch == "phi3":
        keys["rope.scaling.original_context_length"] = config["original_max_position_embeddings"]
        keys.setdefault("attention.sliding_window", 0)
        if rope["rope_type"] == "longrope":
            scale = config["max_position_embeddings"] / config["original_max_position_embeddings"]
            factor = np.sqrt(1 + np.log(scale) / np.log(config["original_max_position_embeddings"]))
            keys["rope.scaling.attn_factor"] = float(factor)
    return keys | {key: float(config[name]) for name, key in _NUMBERS.items() if config.get(name) is not None}


def _latent_keys(config: dict[str, Any]) -> dict[str, Any]:
    """What the converter writes of latent attention, which llama.cpp takes for attention with one key for all heads."""
    rank, turned = config["kv_lora_rank"], config["qk_rope_head_dim"]
    keys = {
        "attention.head_count_kv": 1,
        "attention.key_length": rank + turned,
        "attention.value_length": rank,
        "attention.key_length_mla": config["qk_nope_head_dim"] + turned,
        "attention.value_length_mla": config["v_head_dim"],
        "attention.kv_lora_rank": rank,
        "rope.dimension_count": turned,
        "leading_dense_block_count": config.get("first_k_dense_replace", config["num_hidden_layers"]),
        "expert_feed_forward_length": config.get("moe_intermediate_size", config["intermediate_size"]),
        "expert_shared_count": config.get("n_shared_experts", 0),
    }
    if config["q_lora_rank"] is not None:
        keys["attention.q_lora_rank"] = config["q_lora_rank"]
    return keys


def _gemma4_keys(config: dict[str, Any]) -> dict[str, Any]:
    """What the converter writes of layers that differ."""
    slides = [kind == "sliding_attention" for kind in config["layer_types"]]
    full = config["per_layer_config"][str(slides.index(False))]
    dim, kv, shared = full["head_dim"], full.get("num_key_value_heads"), config["num_kv_shared_layers"]
    keys: dict[str, Any] = {
        "attention.shared_kv_layers": shared,
        "embedding_length_per_layer_input": config["hidden_size_per_layer_input"],
        "attention.sliding_window_pattern": slides,
        "attention.key_length": dim,
        "attention.value_length": dim,
        "attention.key_length_swa": config["head_dim"],
        "attention.value_length_swa": config["head_dim"],
        "rope.dimension_count": dim,
        "rope.dimension_count_swa": config["head_dim"],
    }
    if config["use_double_wide_mlp"]:
        first, width = len(slides) - shared, config["intermediate_size"]
        keys["feed_forward_length"] = [width if layer < first else 2 * width for layer in range(len(slides))]
    if kv is not None:
        keys["attention.head_count_kv"] = [config["num_key_value_heads"] if slide else kv for slide in slides]
    if config["enable_moe_block"]:
        keys["expert_count"], keys["expert_used_count"] = config["num_experts"], config["top_k_experts"]
        keys["expert_feed_forward_length"] = config["moe_intermediate_size"]
    return keys


def _expert_keys(arch: str, config: dict[str, Any]) -> dict[str, Any]:
    """What the converter writes of experts."""
    count = next((config[key] for key in ("num_experts", "num_local_experts", "n_routed_experts") if key in config), 0)
    if not count:
        return {}
    keys: dict[str, Any] = {"expert_count": count, "expert_used_count": config["num_experts_per_tok"]}
    width = config.get("moe_intermediate_size", config.get("intermediate_size"))
    if arch not in ("llama", "olmoe"):
        keys["expert_feed_forward_length"] = width
    if arch in ("qwen2moe", *WITH_DELTA_NETS):
        keys["expert_shared_feed_forward_length"] = config["shared_expert_intermediate_size"]
    if arch in ("glm4moe", "minimax-m2", "dots1") or config["model_type"] == "deepseek_v3":
        keys["expert_gating_func"] = 2
    if arch == "deepseek2":
        keys["expert_weights_scale"] = float(config["routed_scaling_factor"])
        keys["expert_group_count"], keys["expert_group_used_count"] = config["n_group"], config["topk_group"]
        if config["norm_topk_prob"]:
            keys["expert_weights_norm"] = True
    if arch in ("glm4moe", "dots1"):
        keys |= {
            "expert_shared_count": config["n_shared_experts"],
            "leading_dense_block_count": config["first_k_dense_replace"],
            "expert_weights_scale": float(config["routed_scaling_factor"]),
            "expert_weights_norm": bool(config["norm_topk_prob"]),
            "expert_group_count": config["n_group"],
            "expert_group_used_count": config["topk_group"],
        }
    return keys


def write(case: str, folder: Path, path: Path, kinds: dict[str, str] | None = None) -> Path:
    """A folder as a GGUF file.

    Args:
        case: one of CASES.
        folder: written by transformers.
        path: of the file.
        kinds: types that tensors are quantized to, by name; others are float32.
    """
    arch = CASES[case][0]
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    tensors: dict[str, Array | Encoded] = {}
    if rope.get("rope_type") == "longrope":
        for length in ("short", "long"):
            tensors[f"rope_factors_{length}.weight"] = np.array(rope[f"{length}_factor"], dtype=np.float32)
    if arch == "gemma4":
        head, turned = keys_of(case, folder)["attention.key_length"] // 2, rope["full_attention"]
        count = int(head * turned["partial_rotary_factor"])
        tensors["rope_freqs.weight"] = np.where(np.arange(head) < count, 1.0, 1e30).astype(np.float32)
    for name, values in tensors_of(case, folder).items():
        tensors[name] = encoded(values, (kinds or {}).get(name))
    return write_gguf(path, arch, of_architecture(arch, keys_of(case, folder)), tensors)
