"""Mixtral: Mistral whose layers have experts, 2 of 8 for each token in the released models."""

from kbit.models.expert_config import ExpertRules
from kbit.models.families.llama import DEFAULTS, NAMES
from kbit.models.families.qwen3_moe import with_experts
from kbit.models.family import Family
from kbit.models.rope_config import RopeRules

FAMILY = Family(
    model_type="mixtral",
    architectures=("MixtralForCausalLM",),
    defaults={
        **DEFAULTS,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
    },
    qkv_bias=False,
    output_bias=False,
    mlp_bias=False,
    windows="all",
    rope=RopeRules(theta=1e6),
    names=with_experts(NAMES, "block_sparse_moe", "w1", "w3", "w2"),
    experts=ExpertRules(count=("num_local_experts", "num_experts"), width="intermediate_size"),
)
