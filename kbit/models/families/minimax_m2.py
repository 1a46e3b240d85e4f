"""MiniMax M2: experts chosen by sigmoids with a bias, and norms of all queries and all keys together."""

from dataclasses import replace

from kbit.models.expert_config import ExpertRules
from kbit.models.families.llama import DEFAULTS, LAYER, QK_NORMS
from kbit.models.families.qwen3_moe import with_experts
from kbit.models.family import Family
from kbit.models.rope_config import RopeRules

FAMILY = Family(
    model_type="minimax_m2",
    architectures=("MiniMaxM2ForCausalLM",),
    defaults={
        **DEFAULTS,
        "max_position_embeddings": 196608,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_experts_per_tok": 8,
        "num_local_experts": 256,
    },
    qkv_bias=False,
    output_bias=False,
    mlp_bias=False,
    windows="none",
    rope=RopeRules(theta=5e6, share=1.0, dim="rotary_dim"),
    names=replace(
        with_experts(QK_NORMS, "block_sparse_moe", "w1", "w3", "w2"),
        selection_bias=f"{LAYER}.block_sparse_moe.e_score_correction_bias",
    ),
    qk_norm="whole",
    experts=ExpertRules(
        count=("num_local_experts", "num_experts"), width="intermediate_size", score="sigmoid", selection_bias=True
    ),
    # What the published configurations say beside what transformers reads.
    fixed={
        "scoring_func": ("sigmoid",),
        "use_qk_norm": (True,),
        "qk_norm_type": ("per_layer",),
        "use_routing_bias": (True,),
        "shared_intermediate_size": (0,),
    },
)
