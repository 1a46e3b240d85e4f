"""Gemma 4, text: two shapes of layers, keys that several share, embeddings for every layer, experts beside an MLP."""

from dataclasses import replace

from kbit.models.expert_config import ExpertRules
from kbit.models.families.gemma import GEMMA_DEFAULTS
from kbit.models.families.gemma2 import NORMS_AROUND
from kbit.models.families.llama import LAYER, QK_NORMS
from kbit.models.family import ROOT_OF_WIDTH, Family
from kbit.models.layer_shapes import ShapeRules
from kbit.models.layout import Layout, Stacked
from kbit.models.rope_config import KINDS, RopeRules

_EXPERT = f"{LAYER}.experts.{{expert}}"

NAMES = replace(
    NORMS_AROUND,
    q_norm=QK_NORMS.q_norm,
    k_norm=QK_NORMS.k_norm,
    layer_scale=f"{LAYER}.layer_scalar",
    layer_embedding="model.embed_tokens_per_layer",
    layer_features="model.per_layer_model_projection",
    layer_features_norm="model.per_layer_projection_norm",
    layer_gate=f"{LAYER}.per_layer_input_gate",
    layer_up=f"{LAYER}.per_layer_projection",
    layer_post_norm=f"{LAYER}.post_per_layer_input_norm",
    mlp_own_norm=f"{LAYER}.post_feedforward_layernorm_1",
    experts_norm=f"{LAYER}.pre_feedforward_layernorm_2",
    experts_post_norm=f"{LAYER}.post_feedforward_layernorm_2",
    router=f"{LAYER}.router.proj",
    router_scale=f"{LAYER}.router.scale",
    expert_scales=f"{LAYER}.router.per_expert_scale",
    expert_gate=f"{_EXPERT}.gate_proj",
    expert_up=f"{_EXPERT}.up_proj",
    expert_down=f"{_EXPERT}.down_proj",
)

FAMILY = Family(
    model_type="gemma4_text",
    architectures=("Gemma4ForCausalLM",),
    defaults={
        **GEMMA_DEFAULTS,
        "vocab_size": 262144,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 131072,
        "num_key_value_heads": 4,
        "sliding_window": 512,
        "global_head_dim": 512,
        "attention_k_eq_v": False,
        "num_kv_shared_layers": 0,
        "use_double_wide_mlp": False,
        "vocab_size_per_layer_input": 262144,
        "hidden_size_per_layer_input": 256,
        "enable_moe_block": False,
    },
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    mlp_bias=False,
    windows="period, full at the end",
    window_period=6,
    rope=RopeRules(
        theta=1e6,
        kinds=(*KINDS, "proportional"),
        by_layer_type=True,
        window_theta=(None, 1e4),
        full_settings={"rope_type": "proportional", "partial_rotary_factor": 0.25},
    ),
    names=NAMES,
    activation="hidden_activation",
    score_scale=1.0,
    logit_cap="final_logit_softcapping",
    embedding_multiplier=ROOT_OF_WIDTH,
    experts=ExpertRules(
        count=("num_experts",),
        chosen="top_k_experts",
        switch="enable_moe_block",
        beside=True,
    ),
    shapes=ShapeRules(),
    value_norm=True,
    layer_features=("hidden_size_per_layer_input", "vocab_size_per_layer_input"),
    # Of pictures alone; "all" would be another model.
    fixed={"use_bidirectional_attention": ("vision",)},
    layout=Layout(
        stacked={
            f"{LAYER}.experts.gate_up_proj": Stacked(("gate", "up")),
            f"{LAYER}.experts.down_proj": Stacked(("down",)),
        },
    ),
)
