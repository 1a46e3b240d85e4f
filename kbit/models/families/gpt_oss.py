"""gpt-oss: experts with a clamped gate, all of a layer in one tensor; sinks; a window in every other layer.

The released files hold experts as MXFP4 blocks (`kbit.checkpoint.readers.mxfp4`).
"""

from dataclasses import replace

from kbit.models.expert_config import ExpertRules
from kbit.models.families.llama import DEFAULTS, LAYER, NAMES
from kbit.models.families.qwen3_moe import with_experts
from kbit.models.family import Family
from kbit.models.layout import Layout, Stacked
from kbit.models.rope_config import RopeRules

EXPERTS = f"{LAYER}.mlp.experts"

FAMILY = Family(
    model_type="gpt_oss",
    architectures=("GptOssForCausalLM",),
    defaults={
        **DEFAULTS,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
        "sliding_window": 128,
        "attention_bias": True,
        "num_experts_per_tok": 4,
        "num_local_experts": 128,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    },
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    mlp_bias=False,
    windows="period",
    window_period=2,
    rope=RopeRules(theta=150000.0),
    names=replace(
        with_experts(NAMES, "mlp", "gate_proj", "up_proj", "down_proj", router="router"),
        sinks=f"{LAYER}.self_attn.sinks",
    ),
    experts=ExpertRules(
        count=("num_local_experts", "num_experts"),
        width="intermediate_size",
        score="softmax_of_chosen",
        normalise=False,
        router_bias=True,
        bias=True,
        clamped=True,
    ),
    layout=Layout(
        stacked={
            f"{EXPERTS}.gate_up_proj": Stacked(("gate", "up"), alternating=True, transposed=True),
            f"{EXPERTS}.gate_up_proj_bias": Stacked(("gate", "up"), kind="bias", alternating=True),
            f"{EXPERTS}.down_proj": Stacked(("down",), transposed=True),
            f"{EXPERTS}.down_proj_bias": Stacked(("down",), kind="bias"),
        }
    ),
)
