"""InternLM3: Llama, whose switches of biases have other names."""

from kbit.models.families.llama import DEFAULTS, NAMES
from kbit.models.family import Family

FAMILY = Family(
    model_type="internlm3",
    architectures=("InternLM3ForCausalLM", "LlamaForCausalLM"),
    defaults={
        **DEFAULTS,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
    },
    fallbacks={"attention_bias": "qkv_bias", "mlp_bias": "bias"},
    # (One switch says for all linears of attention, and the other has to say the same.)
    equal=(("mlp_bias", "attention_bias"),),
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    mlp_bias="mlp_bias",
    windows="none",
    names=NAMES,
)
