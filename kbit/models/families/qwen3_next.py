"""Qwen3-Next: three layers with a gated delta rule to one whose attention is gated; experts, and one more for all."""

from dataclasses import replace

from kbit.models.delta_config import DEFAULTS as DELTA_DEFAULTS
from kbit.models.expert_config import ExpertRules
from kbit.models.families.llama import DEFAULTS, LAYER, QK_NORMS
from kbit.models.families.qwen3_moe import with_experts
from kbit.models.family import Family
from kbit.models.layout import Grouped, Layout
from kbit.models.rope_config import RopeRules
from kbit.models.tensor_names import TensorNames

_DELTA = f"{LAYER}.linear_attn"

GATED = replace(
    QK_NORMS,
    output_gate=f"{LAYER}.self_attn.gate_proj",
    delta_qkv=f"{_DELTA}.in_proj_qkv",
    delta_z=f"{_DELTA}.in_proj_z",
    delta_decay=f"{_DELTA}.in_proj_a",
    delta_write=f"{_DELTA}.in_proj_b",
    delta_rates=f"{_DELTA}.A_log",
    delta_bias=f"{_DELTA}.dt_bias",
    delta_taps=f"{_DELTA}.conv1d",
    delta_norm=f"{_DELTA}.norm",
    delta_out=f"{_DELTA}.out_proj",
)
# Every head's queries, then its gates; all norms less 1 but for that inside of delta nets.
GATED_LAYOUT = Layout(
    fused={f"{LAYER}.self_attn.q_proj": ("q", "output_gate")},
    by_head=True,
    norm_offset=1.0,
    whole_norms=("delta_norm",),
)


def gated_experts(names: TensorNames) -> TensorNames:
    """The names of experts, and of the one that all tokens go through behind a gate."""
    return replace(
        with_experts(names, "mlp", "gate_proj", "up_proj", "down_proj"),
        shared_gate=f"{LAYER}.mlp.shared_expert.gate_proj",
        shared_up=f"{LAYER}.mlp.shared_expert.up_proj",
        shared_down=f"{LAYER}.mlp.shared_expert.down_proj",
        shared_switch=f"{LAYER}.mlp.shared_expert_gate",
    )


FAMILY = Family(
    model_type="qwen3_next",
    architectures=("Qwen3NextForCausalLM",),
    defaults={
        **DEFAULTS,
        **DELTA_DEFAULTS,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "num_experts_per_tok": 10,
        "num_experts": 512,
        "norm_topk_prob": True,
    },
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    mlp_bias=False,
    windows="none",
    delta=True,
    rope=RopeRules(share=0.25),
    names=gated_experts(GATED),
    fixed={"attn_output_gate": (True,)},
    experts=ExpertRules(layers="stepped", normalise="norm_topk_prob", shared="shared_expert_intermediate_size"),
    layout=replace(
        GATED_LAYOUT,
        grouped={
            f"{_DELTA}.in_proj_qkvz": Grouped(("delta_qkv", "delta_z"), "key heads"),
            f"{_DELTA}.in_proj_ba": Grouped(("delta_write", "delta_decay"), "key heads"),
        },
    ),
)
