"""AFMoE: Arcee's Trinity. Norms around both blocks, a gate on what attention makes, windows in three of four layers,
which alone rotate; experts behind a few dense layers, chosen by sigmoids with a bias, some for all tokens beside."""

from dataclasses import replace

from kbit.models.expert_config import ExpertRules
from kbit.models.families.llama import DEFAULTS, LAYER, QK_NORMS
from kbit.models.families.qwen3_moe import with_experts
from kbit.models.family import Family

_SHARED = f"{LAYER}.mlp.shared_experts"

FAMILY = Family(
    model_type="afmoe",
    architectures=("AfmoeForCausalLM",),
    defaults={
        **DEFAULTS,
        "global_attn_every_n_layers": 4,
        "head_dim": 128,
        "max_position_embeddings": 16384,
        "moe_intermediate_size": 1408,
        "mup_enabled": False,
        "num_dense_layers": 1,
        "num_experts": 64,
        "num_experts_per_tok": 6,
        "num_shared_experts": 2,
        "rms_norm_eps": 1e-5,
        "route_scale": 1.0,
        "sliding_window": 1024,
    },
    qkv_bias=False,
    output_bias=False,
    mlp_bias=False,
    windows="period",
    window_period="global_attn_every_n_layers",
    rotated="slid",
    scaled_embedding="mup_enabled",
    names=replace(
        with_experts(QK_NORMS, "mlp", "gate_proj", "up_proj", "down_proj", router="router.gate"),
        attention_post_norm=f"{LAYER}.post_attention_layernorm",
        mlp_norm=f"{LAYER}.pre_mlp_layernorm",
        mlp_post_norm=f"{LAYER}.post_mlp_layernorm",
        output_gate=f"{LAYER}.self_attn.gate_proj",
        selection_bias=f"{LAYER}.mlp.expert_bias",
        shared_gate=f"{_SHARED}.gate_proj",
        shared_up=f"{_SHARED}.up_proj",
        shared_down=f"{_SHARED}.down_proj",
    ),
    experts=ExpertRules(
        layers="later",
        first="num_dense_layers",
        score="sigmoid",
        normalise=True,
        scale="route_scale",
        shared="num_shared_experts",
        selection_bias=True,
    ),
    # (What others read of these configurations, and what it says of every published model.)
    fixed={
        "attention_bias": (False,),
        "n_group": (1,),
        "route_norm": (True,),
        "score_func": ("sigmoid",),
        "topk_group": (1,),
    },
)
