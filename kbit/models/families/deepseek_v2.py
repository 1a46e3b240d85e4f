"""DeepSeek-V2 and V2-Lite: latent attention; experts, in groups with the best ones, and some beside for all tokens."""

from dataclasses import replace

from kbit.models.expert_config import ExpertRules
from kbit.models.families.llama import DEFAULTS, LAYER, NAMES
from kbit.models.families.qwen3_moe import with_experts
from kbit.models.family import Family
from kbit.models.latent_config import LatentRules
from kbit.models.layout import Layout
from kbit.models.params import KEYS_VALUES
from kbit.models.rope_config import RopeRules

# Latent attention, here and in the families that followed. What is published as kv_a_proj_with_mqa and kv_b_proj is
# taken apart.
LATENT_NAMES = replace(
    NAMES,
    q_a=f"{LAYER}.self_attn.q_a_proj",
    q_a_norm=f"{LAYER}.self_attn.q_a_layernorm",
    q=f"{LAYER}.self_attn.q_b_proj",
    kv_a=f"{LAYER}.self_attn.kv_a_proj",
    kv_a_norm=f"{LAYER}.self_attn.kv_a_layernorm",
    k_shared=f"{LAYER}.self_attn.k_shared_proj",
    k=f"{LAYER}.self_attn.k_b_proj",
    v=f"{LAYER}.self_attn.v_b_proj",
)
LATENT = LatentRules(plain_q=f"{LAYER}.self_attn.q_proj")
LATENT_LAYOUT = Layout(
    fused={
        f"{LAYER}.self_attn.kv_a_proj_with_mqa": ("kv_a", "k_shared"),
        f"{LAYER}.self_attn.kv_b_proj": KEYS_VALUES,
    },
    by_head=True,
    not_by_head=(f"{LAYER}.self_attn.kv_a_proj_with_mqa",),
    interleaved=True,
    turned_last=True,
)
LATENT_ROPE = RopeRules(kinds=("default", "yarn"))
EXPERT_NAMES = replace(
    with_experts(LATENT_NAMES, "mlp", "gate_proj", "up_proj", "down_proj"),
    shared_gate=f"{LAYER}.mlp.shared_experts.gate_proj",
    shared_up=f"{LAYER}.mlp.shared_experts.up_proj",
    shared_down=f"{LAYER}.mlp.shared_experts.down_proj",
)
EXPERT_COUNTS = ("n_routed_experts", "num_experts", "num_local_experts")

FAMILY = Family(
    model_type="deepseek_v2",
    architectures=("DeepseekV2ForCausalLM",),
    defaults={
        **DEFAULTS,
        "max_position_embeddings": 2048,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "moe_intermediate_size": 1407,
        "routed_scaling_factor": 1.0,
        "topk_method": "greedy",
        "first_k_dense_replace": 0,
    },
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    mlp_bias=False,
    windows="none",
    rope=LATENT_ROPE,
    names=EXPERT_NAMES,
    experts=ExpertRules(
        count=EXPERT_COUNTS,
        layers="later",
        normalise=False,
        scale="routed_scaling_factor",
        grouped=True,
        group_score="topk_method",
        shared="n_shared_experts",
    ),
    # transformers does not read norm_topk_prob and scoring_func, which DeepSeek's own code does.
    fixed={
        "mlp_bias": (False,),
        "moe_layer_freq": (1,),
        "norm_topk_prob": (False,),
        "scoring_func": ("softmax",),
    },
    layout=LATENT_LAYOUT,
    latent=LATENT,
)
