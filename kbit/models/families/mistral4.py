"""Mistral Small 4: latent attention, queries that grow with their position, experts and one for all tokens beside."""

from dataclasses import replace

from kbit.models.expert_config import ExpertRules
from kbit.models.families.deepseek_v2 import EXPERT_COUNTS, EXPERT_NAMES, LATENT, LATENT_LAYOUT
from kbit.models.families.llama import DEFAULTS, LAYER
from kbit.models.family import Family
from kbit.models.layout import Stacked
from kbit.models.rope_config import RopeRules

FAMILY = Family(
    model_type="mistral4",
    architectures=("Mistral4ForCausalLM",),
    defaults={
        **DEFAULTS,
        "max_position_embeddings": 1048576,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 128.0,
            "original_max_position_embeddings": 8192,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
        "kv_lora_rank": 256,
        "q_lora_rank": 1024,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 128,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 2048,
        "routed_scaling_factor": 1.0,
        "first_k_dense_replace": 0,
        "norm_topk_prob": True,
    },
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    mlp_bias=False,
    windows="none",
    rope=RopeRules(kinds=("default", "yarn"), share=0.5, dim="qk_rope_head_dim", temperature=True),
    names=EXPERT_NAMES,
    experts=ExpertRules(
        count=EXPERT_COUNTS,
        layers="later",
        normalise="norm_topk_prob",
        scale="routed_scaling_factor",
        shared="n_shared_experts",
    ),
    fixed={"rope_interleave": (True,), "scoring_func": ("softmax",)},
    layout=replace(
        LATENT_LAYOUT,
        stacked={
            f"{LAYER}.mlp.experts.gate_up_proj": Stacked(("gate", "up")),
            f"{LAYER}.mlp.experts.down_proj": Stacked(("down",)),
        },
    ),
    latent=replace(LATENT, whole_share=True),
)
