"""Configurations of families: a model's sizes, and what some families need beside them to be one."""

from __future__ import annotations

from typing import Any

from kbit.models.block_specs import ExpertsSpec
from kbit.models.families import spec_from_config
from kbit.models.spec import ModelSpec

# Of a tiny model; and the same of two other families.
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 37,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
MISTRAL = {**LLAMA, "model_type": "mistral", "architectures": ["MistralForCausalLM"]}
QWEN2 = {**LLAMA, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}

SIZES: dict[str, Any] = {
    "vocab_size": 37,
    "hidden_size": 256,
    "intermediate_size": 20,
    "num_hidden_layers": 7,
    "num_attention_heads": 32,
}
# Those of which transformers' own configuration class leaves out what the model then needs.
HEADS = {"ministral": {"head_dim": 8}, "hunyuan_v1_dense": {"head_dim": 8}}
# Widths whose keys have other names.
HEADS |= {
    "opt": {"ffn_dim": 20, "word_embed_proj_dim": 256},
    "bitnet": {"num_key_value_heads": 8},
    "gpt2": {"n_inner": 20},
    "falcon": {"ffn_hidden_size": 20},
    "gpt_bigcode": {"n_inner": 20},
    "mpt": {"intermediate_size": 1024},
    "gpt_neo": {"attention_types": [[["global", "local"], 3], [["global"], 1]]},
    "gptj": {"n_inner": 20, "rotary_dim": 6},
    "codegen": {"n_inner": 20, "rotary_dim": 6},
}
# With latent attention every head has a key.
LATENT = ("deepseek_v3", "glm4_moe_lite", "mistral4", "minicpm3", "youtu")
HEADS |= {family: {"num_key_value_heads": 32} for family in LATENT}
HEADS |= {"deepseek_v2": {"num_experts_per_tok": 6}}
HEADS |= {
    "helium": {"num_key_value_heads": 32},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
}
# Model types that transformers does not have: DeepSeek-V3 under another name.
UNKNOWN = ("kimi_k2",)
# Key/value heads of models without such a key.
KV_HEADS = {"bloom": 32, "falcon": 1, "gpt2": 32, "gpt_neox": 32, "opt": 32, "gpt_bigcode": 1}
KV_HEADS |= dict.fromkeys(("gpt_neo", "gptj", "codegen", "nemotron", "mpt"), 32)
EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")


def config_of(family: str, **changes: Any) -> dict[str, Any]:
    return {**SIZES, "model_type": family, **changes}


def spec(family: str, **changes: Any) -> ModelSpec:
    return spec_from_config(config_of(family, **{**HEADS.get(family, {}), **changes}))


def mixture(family: str, **changes: Any) -> ExpertsSpec:
    experts = spec(family, **changes).experts
    assert experts is not None
    return experts
