"""Qwen3.5, 3.6 and 3.8: Qwen3-Next's layers with a plain MLP, or with experts of which each layer's are one tensor.

The released models take pictures, too: of these the language model is used (`kbit.models.wrapped`).
"""

from dataclasses import replace

from kbit.models.delta_config import DEFAULTS as DELTA_DEFAULTS
from kbit.models.expert_config import ExpertRules
from kbit.models.families.llama import DEFAULTS, LAYER
from kbit.models.families.qwen3_next import GATED, GATED_LAYOUT, gated_experts
from kbit.models.family import Family
from kbit.models.layout import Stacked
from kbit.models.rope_config import RopeRules

# Positions in texts are the same in all sections of the rotary embedding.
_ROPE = RopeRules(share=0.25, sections=True)

FAMILY = Family(
    model_type="qwen3_5_text",
    architectures=("Qwen3_5ForCausalLM",),
    defaults={
        **DEFAULTS,
        **DELTA_DEFAULTS,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "head_dim": 256,
    },
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    mlp_bias=False,
    windows="none",
    delta=True,
    rope=_ROPE,
    names=GATED,
    fixed={"attn_output_gate": (True,)},
    layout=replace(
        GATED_LAYOUT, prefix="model.", renamed=(("model.language_model.", "model."),), unused=(r"visual\..*",)
    ),
)

MOE = replace(
    FAMILY,
    model_type="qwen3_5_moe_text",
    architectures=("Qwen3_5MoeForCausalLM",),
    defaults={
        **FAMILY.defaults,
        "num_key_value_heads": 2,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "num_experts_per_tok": 8,
        "num_experts": 256,
    },
    names=gated_experts(GATED),
    experts=ExpertRules(shared="shared_expert_intermediate_size"),
    fixed={**FAMILY.fixed, "norm_topk_prob": (True,)},
    layout=replace(
        FAMILY.layout,
        stacked={
            f"{LAYER}.mlp.experts.gate_up_proj": Stacked(("gate", "up")),
            f"{LAYER}.mlp.experts.down_proj": Stacked(("down",)),
        },
    ),
)
