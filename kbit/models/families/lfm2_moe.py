"""LFM2 with experts behind a few dense layers, chosen by sigmoids with a bias."""

from dataclasses import replace

from kbit.models.expert_config import ExpertRules
from kbit.models.families.lfm2 import LFM2_DEFAULTS, LFM2_NAMES
from kbit.models.families.llama import LAYER
from kbit.models.families.qwen3_moe import with_experts
from kbit.models.family import Family
from kbit.models.layout import Layout
from kbit.models.params_recurrent import CONV
from kbit.models.rope_config import RopeRules

FAMILY = Family(
    model_type="lfm2_moe",
    architectures=("Lfm2MoeForCausalLM",),
    defaults={
        **LFM2_DEFAULTS,
        "intermediate_size": 7168,
        "moe_intermediate_size": 1792,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "num_dense_layers": 2,
        "norm_topk_prob": True,
        "use_expert_bias": True,
        "routed_scaling_factor": 1.0,
    },
    qkv_bias=False,
    output_bias=False,
    mlp_bias=False,
    windows="none",
    conv=True,
    rope=RopeRules(theta=1000000.0),
    names=replace(
        with_experts(LFM2_NAMES, "feed_forward", "w1", "w3", "w2"),
        selection_bias=f"{LAYER}.feed_forward.expert_bias",
    ),
    norm_eps="norm_eps",
    keys={"tie_word_embeddings": "tie_embedding"},
    # (transformers adds 1e-6 to the sum of chosen scores, which no score that is not rounded away comes near.)
    experts=ExpertRules(
        layers="later",
        first="num_dense_layers",
        score="sigmoid",
        normalise="norm_topk_prob",
        scale="routed_scaling_factor",
        selection_bias="use_expert_bias",
    ),
    layout=Layout(fused={f"{LAYER}.conv.in_proj": CONV}),
)
