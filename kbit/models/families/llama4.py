"""Llama 4's language model: three of four layers rotate and attend within stretches of the text, to queries and keys
under norms without weights; in the others queries grow with their position. Experts, in every layer or every second,
read what a sigmoid has scaled, beside one for all tokens."""

from dataclasses import replace

from kbit.models.expert_config import ExpertRules
from kbit.models.families.llama import DEFAULTS, LAYER, NAMES
from kbit.models.families.qwen3_moe import with_experts
from kbit.models.family import Family
from kbit.models.layout import Layout, Stacked
from kbit.models.rope_config import RopeRules

_BLOCK = f"{LAYER}.feed_forward"

FAMILY = Family(
    model_type="llama4_text",
    architectures=("Llama4ForCausalLM",),
    defaults={
        **DEFAULTS,
        "attention_chunk_size": 8192,
        "attn_scale": 0.1,
        "attn_temperature_tuning": True,
        "floor_scale": 8192,
        "head_dim": 128,
        "interleave_moe_layer_step": 1,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "max_position_embeddings": 131072,
        "no_rope_layer_interval": 4,
        "num_experts_per_tok": 1,
        "num_key_value_heads": 8,
        "num_local_experts": 16,
        "rms_norm_eps": 1e-5,
        "use_qk_norm": True,
    },
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    mlp_bias=False,
    windows="chunks",
    rotated="listed",
    rope=RopeRules(theta=500000.0),
    norm_rotated=True,
    key_norms="use_qk_norm",
    temperature=("attn_temperature_tuning", "attn_scale", "floor_scale"),
    mlp_width="intermediate_size_mlp",
    ignored=("no_rope_layer_interval",),  # which no_rope_layers overrules
    names=replace(
        with_experts(NAMES, "feed_forward", "gate_proj", "up_proj", "down_proj", router="router"),
        gate=f"{_BLOCK}.gate_proj",
        up=f"{_BLOCK}.up_proj",
        down=f"{_BLOCK}.down_proj",
        shared_gate=f"{_BLOCK}.shared_expert.gate_proj",
        shared_up=f"{_BLOCK}.shared_expert.up_proj",
        shared_down=f"{_BLOCK}.shared_expert.down_proj",
    ),
    experts=ExpertRules(
        count=("num_local_experts",),
        width="intermediate_size",
        layers="numbered",
        score="sigmoid",
        normalise=False,
        scales_input=True,
        shared="intermediate_size",
    ),
    layout=Layout(
        interleaved=True,
        stacked={
            f"{_BLOCK}.experts.gate_up_proj": Stacked(("gate", "up"), transposed=True),
            f"{_BLOCK}.experts.down_proj": Stacked(("down",), transposed=True),
        },
    ),
)
