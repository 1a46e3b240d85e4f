"""Granite MoE: Granite whose layers have experts, all of a layer in one tensor."""

from kbit.models.expert_config import ExpertRules
from kbit.models.families.granite import GRANITE_DEFAULTS
from kbit.models.families.llama import LAYER, NAMES
from kbit.models.families.qwen3_moe import with_experts
from kbit.models.family import Family
from kbit.models.layout import Layout, Stacked

BLOCK = f"{LAYER}.block_sparse_moe"

FAMILY = Family(
    model_type="granitemoe",
    architectures=("GraniteMoeForCausalLM",),
    defaults={**GRANITE_DEFAULTS, "num_experts_per_tok": 2, "num_local_experts": 8},
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    mlp_bias=False,
    windows="none",
    names=with_experts(NAMES, "block_sparse_moe", "gate_proj", "up_proj", "down_proj", router="router.layer"),
    score_scale="attention_multiplier",
    embedding_multiplier="embedding_multiplier",
    residual_multiplier="residual_multiplier",
    logit_divisor="logits_scaling",
    experts=ExpertRules(
        count=("num_local_experts", "num_experts"),
        width="intermediate_size",
        score="softmax_of_chosen",
        normalise=False,
    ),
    layout=Layout(
        stacked={
            f"{BLOCK}.input_linear.weight": Stacked(("gate", "up")),
            f"{BLOCK}.output_linear.weight": Stacked(("down",)),
        }
    ),
)
