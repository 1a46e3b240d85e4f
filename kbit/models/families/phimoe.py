"""Phi-3.5-MoE: LayerNorms, biases, and of 16 experts two, chosen one after the other (SparseMixer, arXiv 2409.12136).

Texts beyond the original length have the long factors, as the model was published; transformers' class keeps the short
ones there.
"""

from kbit.models.expert_config import ExpertRules
from kbit.models.families.llama import DEFAULTS, NAMES
from kbit.models.families.qwen3_moe import with_experts
from kbit.models.family import Family
from kbit.models.rope_config import RopeRules

FAMILY = Family(
    model_type="phimoe",
    architectures=("PhimoeForCausalLM", "PhiMoEForCausalLM"),
    defaults={
        **DEFAULTS,
        "lm_head_bias": False,
        "max_position_embeddings": 131072,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 8,
        "num_local_experts": 16,
        "rms_norm_eps": 1e-5,
        "router_jitter_noise": 0.01,
    },
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    mlp_bias=False,
    head_bias="lm_head_bias",
    windows="all",
    norm="layer",
    norm_bias=True,
    rope=RopeRules(theta=1e6, mscales=True),
    names=with_experts(NAMES, "block_sparse_moe", "w1", "w3", "w2"),
    experts=ExpertRules(
        count=("num_local_experts",),
        width="intermediate_size",
        score="sparsemixer",
        normalise=False,
        jitter="router_jitter_noise",
    ),
)
