"""Phi-3, 3.5, 4 and 4-mini: q, k, v in one matrix, gate and up in one, and rotations for short and for long texts."""

from kbit.models.families.llama import DEFAULTS, LAYER, NAMES
from kbit.models.family import Family
from kbit.models.layout import Layout
from kbit.models.params import GATE_UP, QKV
from kbit.models.rope_config import RopeRules

FAMILY = Family(
    model_type="phi3",
    architectures=("Phi3ForCausalLM",),
    defaults={
        **DEFAULTS,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
    qkv_bias=False,
    output_bias=False,
    mlp_bias=False,
    windows="all",
    rope=RopeRules(
        kinds=("default", "longrope"),
        aliases={"su": "longrope", "yarn": "longrope"},  # what the first files call it
        share=1.0,
    ),
    names=NAMES,
    layout=Layout(fused={f"{LAYER}.self_attn.qkv_proj": QKV, f"{LAYER}.mlp.gate_up_proj": GATE_UP}),
)
