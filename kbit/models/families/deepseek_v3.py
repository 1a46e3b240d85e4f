"""DeepSeek-V3, R1 and Kimi K2: as V2, but experts are chosen by sigmoids with a bias, in groups with the best pairs."""

from dataclasses import replace

from kbit.models.expert_config import ExpertRules
from kbit.models.families.deepseek_v2 import EXPERT_COUNTS, EXPERT_NAMES, LATENT, LATENT_LAYOUT, LATENT_ROPE
from kbit.models.families.llama import DEFAULTS, LAYER
from kbit.models.family import Family

SIGMOID_NAMES = replace(EXPERT_NAMES, selection_bias=f"{LAYER}.mlp.gate.e_score_correction_bias")
SIGMOID_EXPERTS = ExpertRules(
    count=EXPERT_COUNTS,
    layers="later",
    score="sigmoid",
    normalise="norm_topk_prob",
    scale="routed_scaling_factor",
    grouped=True,
    shared="n_shared_experts",
    selection_bias=True,
)
# What other implementations read, and what these models do.
SIGMOID_FIXED: dict[str, tuple[object, ...]] = {
    "moe_layer_freq": (1,),
    "rope_interleave": (True,),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
}
MORE_LAYERS = "num_nextn_predict_layers"

FAMILY = Family(
    model_type="deepseek_v3",
    architectures=("DeepseekV3ForCausalLM",),
    defaults={
        **DEFAULTS,
        "max_position_embeddings": 4096,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 2048,
        "routed_scaling_factor": 2.5,
        "n_group": 8,
        "topk_group": 4,
        "first_k_dense_replace": 3,
        "norm_topk_prob": True,
    },
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    mlp_bias=False,
    windows="none",
    rope=LATENT_ROPE,
    names=SIGMOID_NAMES,
    experts=SIGMOID_EXPERTS,
    fixed=SIGMOID_FIXED,
    layout=replace(LATENT_LAYOUT, more_layers=MORE_LAYERS),
    latent=LATENT,
)

# What Kimi K2's configurations call themselves; their model is DeepSeek-V3's.
KIMI_K2 = replace(FAMILY, model_type="kimi_k2")
