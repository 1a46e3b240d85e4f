"""OLMo 2: norms of what blocks add, and of all queries and all keys together."""

from kbit.models.families.llama import DEFAULTS, POST_NORMS
from kbit.models.family import Family

FAMILY = Family(
    model_type="olmo2",
    architectures=("Olmo2ForCausalLM",),
    defaults={**DEFAULTS, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    mlp_bias=False,
    windows="none",
    names=POST_NORMS,
    qk_norm="whole",
)
