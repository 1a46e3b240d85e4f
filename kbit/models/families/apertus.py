"""Apertus: norms of queries and keys, and plain MLPs with xIELU (arXiv 2411.13010), its factors learned by layer."""

from dataclasses import replace

from kbit.models.families.llama import DEFAULTS, LAYER, QK_NORMS
from kbit.models.family import Family
from kbit.models.rope_config import RopeRules

_ACTIVATION = f"{LAYER}.mlp.act_fn"

FAMILY = Family(
    model_type="apertus",
    architectures=("ApertusForCausalLM",),
    defaults={
        **DEFAULTS,
        "hidden_act": "xielu",
        "max_position_embeddings": 65536,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 12e6,
            "factor": 8.0,
            "original_max_position_embeddings": 8192,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
    },
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    mlp_bias=False,
    windows="none",
    rope=RopeRules(theta=12e6),
    activations={"xielu": "xielu"},
    names=replace(
        QK_NORMS,
        attention_norm=f"{LAYER}.attention_layernorm",
        mlp_norm=f"{LAYER}.feedforward_layernorm",
        gate=None,
        xielu_positive=f"{_ACTIVATION}.alpha_p",
        xielu_negative=f"{_ACTIVATION}.alpha_n",
        xielu_linear=f"{_ACTIVATION}.beta",
        xielu_eps=f"{_ACTIVATION}.eps",
    ),
    # (What the first configurations say besides.)
    fixed={"mlp_bias": (False,), "post_norm": (False,), "qk_norm": (True,)},
)
