"""GLM-4.5 and 4.6: experts behind a few dense layers, chosen by sigmoids with a bias, and one for all tokens beside."""

from dataclasses import replace

from kbit.models.expert_config import ExpertRules
from kbit.models.families.llama import DEFAULTS, LAYER, QK_NORMS
from kbit.models.families.qwen3_moe import with_experts
from kbit.models.family import Family
from kbit.models.layout import Layout
from kbit.models.rope_config import RopeRules

FAMILY = Family(
    model_type="glm4_moe",
    architectures=("Glm4MoeForCausalLM",),
    defaults={
        **DEFAULTS,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "moe_intermediate_size": 1408,
        "num_experts_per_tok": 8,
        "n_routed_experts": 128,
        "n_shared_experts": 1,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "use_qk_norm": False,
    },
    qkv_bias="attention_bias",
    output_bias=False,
    mlp_bias=False,
    windows="none",
    rope=RopeRules(share=0.5),
    names=replace(
        with_experts(QK_NORMS, "mlp", "gate_proj", "up_proj", "down_proj"),
        selection_bias=f"{LAYER}.mlp.gate.e_score_correction_bias",
        shared_gate=f"{LAYER}.mlp.shared_experts.gate_proj",
        shared_up=f"{LAYER}.mlp.shared_experts.up_proj",
        shared_down=f"{LAYER}.mlp.shared_experts.down_proj",
    ),
    qk_norms="use_qk_norm",
    experts=ExpertRules(
        count=("n_routed_experts", "num_experts", "num_local_experts"),
        layers="later",
        score="sigmoid",
        normalise="norm_topk_prob",
        scale="routed_scaling_factor",
        grouped=True,
        shared="n_shared_experts",
        selection_bias=True,
    ),
    fixed={"scoring_func": ("sigmoid",)},
    layout=Layout(more_layers="num_nextn_predict_layers"),
)
