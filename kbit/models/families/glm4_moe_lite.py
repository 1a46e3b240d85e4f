"""GLM-4.7-Flash: DeepSeek-V3's latent attention and experts, with a list of the layers that have these."""

from dataclasses import replace

from kbit.models.families.deepseek_v2 import LATENT, LATENT_LAYOUT, LATENT_ROPE
from kbit.models.families.deepseek_v3 import MORE_LAYERS, SIGMOID_EXPERTS, SIGMOID_FIXED, SIGMOID_NAMES
from kbit.models.families.llama import DEFAULTS
from kbit.models.family import Family

FAMILY = Family(
    model_type="glm4_moe_lite",
    architectures=("Glm4MoeLiteForCausalLM",),
    defaults={
        **DEFAULTS,
        "max_position_embeddings": 202752,
        "rms_norm_eps": 1e-5,
        "kv_lora_rank": 512,
        "q_lora_rank": 768,
        "qk_nope_head_dim": 192,
        "qk_rope_head_dim": 64,
        "v_head_dim": 256,
        "n_routed_experts": 64,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1536,
        "routed_scaling_factor": 1.8,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
    },
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    mlp_bias=False,
    windows="none",
    rope=LATENT_ROPE,
    names=SIGMOID_NAMES,
    experts=replace(SIGMOID_EXPERTS, layers="listed"),
    fixed=SIGMOID_FIXED,
    layout=replace(LATENT_LAYOUT, more_layers=MORE_LAYERS),
    latent=LATENT,
)
