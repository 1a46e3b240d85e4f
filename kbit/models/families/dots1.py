"""dots.llm1: DeepSeek-V3's experts behind attention with norms of queries and keys; some layers may slide."""

from dataclasses import replace

from kbit.models.families.glm4_moe import FAMILY as GLM
from kbit.models.families.llama import DEFAULTS

assert GLM.experts is not None

FAMILY = replace(
    GLM,
    model_type="dots1",
    architectures=("Dots1ForCausalLM",),
    defaults={
        **DEFAULTS,
        "first_k_dense_replace": 0,
        "max_position_embeddings": 2048,
        "max_window_layers": 62,
        "moe_intermediate_size": 1408,
        "n_shared_experts": 0,
        "n_group": 1,
        "norm_topk_prob": False,
        "num_key_value_heads": 32,
        "routed_scaling_factor": 1.0,
        "sliding_window": 4096,
        "topk_group": 1,
        "use_sliding_window": True,  # no key of these configurations
    },
    output_bias="attention_bias",
    qk_norms=None,
    rope=replace(GLM.rope, share=None),
    windows="chosen",
    experts=replace(GLM.experts, count=("n_routed_experts", "num_local_experts")),
)
