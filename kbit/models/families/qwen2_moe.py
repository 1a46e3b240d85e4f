"""Qwen1.5 and Qwen2 MoE: Qwen2 whose layers have experts, and one more behind a gate that all tokens go through."""

from dataclasses import replace

from kbit.models.expert_config import ExpertRules
from kbit.models.families.llama import DEFAULTS, LAYER, NAMES
from kbit.models.families.qwen3_moe import with_experts
from kbit.models.family import Family

FAMILY = Family(
    model_type="qwen2_moe",
    architectures=("Qwen2MoeForCausalLM",),
    defaults={
        **DEFAULTS,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 16,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "qkv_bias": True,
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_experts_per_tok": 4,
        "num_experts": 60,
        "norm_topk_prob": False,
    },
    qkv_bias="qkv_bias",
    output_bias=False,
    mlp_bias=False,
    windows="listed",
    names=replace(
        with_experts(NAMES, "mlp", "gate_proj", "up_proj", "down_proj"),
        shared_gate=f"{LAYER}.mlp.shared_expert.gate_proj",
        shared_up=f"{LAYER}.mlp.shared_expert.up_proj",
        shared_down=f"{LAYER}.mlp.shared_expert.down_proj",
        shared_switch=f"{LAYER}.mlp.shared_expert_gate",
    ),
    experts=ExpertRules(
        layers="stepped",
        normalise="norm_topk_prob",
        shared="shared_expert_intermediate_size",
    ),
)
