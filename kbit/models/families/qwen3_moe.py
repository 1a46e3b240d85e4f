"""Qwen3 MoE: Qwen3 whose layers have experts, 8 of 128 for each token in the released models."""

from dataclasses import replace

from kbit.models.expert_config import ExpertRules
from kbit.models.families.llama import DEFAULTS, LAYER, QK_NORMS
from kbit.models.family import Family
from kbit.models.tensor_names import TensorNames


def with_experts(names: TensorNames, block: str, gate: str, up: str, down: str, router: str = "gate") -> TensorNames:
    """The names of a family's experts: `block`.experts.N.`gate`, and so on, and of their router."""
    expert = f"{LAYER}.{block}.experts.{{expert}}"
    return replace(
        names,
        router=f"{LAYER}.{block}.{router}",
        expert_gate=f"{expert}.{gate}",
        expert_up=f"{expert}.{up}",
        expert_down=f"{expert}.{down}",
    )


FAMILY = Family(
    model_type="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    defaults={
        **DEFAULTS,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "num_experts": 128,
        "norm_topk_prob": False,
    },
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    mlp_bias=False,
    windows="switched",
    names=with_experts(QK_NORMS, "mlp", "gate_proj", "up_proj", "down_proj"),
    experts=ExpertRules(layers="stepped", normalise="norm_topk_prob"),
)
