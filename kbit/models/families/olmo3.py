"""OLMo 3: OLMo 2 with a window in three of four layers, whose rotation is not extended."""

from kbit.models.families.llama import DEFAULTS, POST_NORMS
from kbit.models.family import Family
from kbit.models.rope_config import RopeRules

FAMILY = Family(
    model_type="olmo3",
    architectures=("Olmo3ForCausalLM",),
    defaults={**DEFAULTS, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "sliding_window": 4096},
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    mlp_bias=False,
    windows="period",
    window_period=4,
    rope=RopeRules(theta=5e5, by_layer_type=True),
    names=POST_NORMS,
    qk_norm="whole",
)
