"""StableLM: LayerNorms, a quarter of a head turns. StableLM 2 12B, with attention and MLP side by side, is another."""

from kbit.models.families.llama import DEFAULTS, NAMES
from kbit.models.family import Family
from kbit.models.rope_config import RopeRules

FAMILY = Family(
    model_type="stablelm",
    architectures=("StableLmForCausalLM",),
    defaults={
        **DEFAULTS,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "num_key_value_heads": 32,
        "use_qkv_bias": False,
    },
    qkv_bias="use_qkv_bias",
    output_bias=False,
    mlp_bias=False,
    windows="none",
    rope=RopeRules(share=0.25),
    names=NAMES,
    norm="layer",
    norm_bias=True,
    norm_eps="layer_norm_eps",
)
