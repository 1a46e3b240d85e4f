"""Granite 4: Mamba-2 in most layers and attention, mostly without positions, in the others; experts, or none, beside an
MLP for all tokens."""

from dataclasses import replace

from kbit.models.expert_config import ExpertRules
from kbit.models.families.granite import GRANITE_DEFAULTS
from kbit.models.families.granitemoe import BLOCK
from kbit.models.families.llama import LAYER, NAMES
from kbit.models.families.qwen3_moe import with_experts
from kbit.models.family import Family
from kbit.models.layout import Layout, Stacked
from kbit.models.params import GATE_UP, SHARED
from kbit.models.params_recurrent import SCAN
from kbit.models.scan_config import DEFAULTS as SCAN_DEFAULTS
from kbit.models.tensor_names import TensorNames

SHARED_MLP = f"{LAYER}.shared_mlp"


def with_scans(names: TensorNames) -> TensorNames:
    """The names of Mamba-2's layers. What is published as in_proj is taken apart."""
    mamba = f"{LAYER}.mamba"
    return replace(
        names,
        scan_z=f"{mamba}.z_proj",
        scan_x=f"{mamba}.xbc_proj",
        scan_steps=f"{mamba}.dt_proj",
        scan_bias=f"{mamba}.dt_bias",
        scan_rates=f"{mamba}.A_log",
        scan_skips=f"{mamba}.D",
        scan_taps=f"{mamba}.conv1d",
        scan_norm=f"{mamba}.norm",
        scan_out=f"{mamba}.out_proj",
    )


SCAN_FUSED = {f"{LAYER}.mamba.in_proj": (*SCAN, "scan_steps")}

FAMILY = Family(
    model_type="granitemoehybrid",
    architectures=("GraniteMoeHybridForCausalLM",),
    defaults={
        **GRANITE_DEFAULTS,
        **SCAN_DEFAULTS,
        "intermediate_size": 11008,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 1024,
    },
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    mlp_bias=False,
    windows="none",
    rotated="typed",
    scan="listed",
    mlp_width="shared_intermediate_size",
    names=replace(
        with_experts(with_scans(NAMES), "block_sparse_moe", "gate_proj", "up_proj", "down_proj", router="router.layer"),
        gate=f"{SHARED_MLP}.gate_proj",
        up=f"{SHARED_MLP}.up_proj",
        down=f"{SHARED_MLP}.output_linear",
        shared_gate=f"{SHARED_MLP}.gate_proj",
        shared_up=f"{SHARED_MLP}.up_proj",
        shared_down=f"{SHARED_MLP}.output_linear",
    ),
    score_scale="attention_multiplier",
    embedding_multiplier="embedding_multiplier",
    residual_multiplier="residual_multiplier",
    logit_divisor="logits_scaling",
    experts=ExpertRules(
        count=("num_local_experts", "num_experts"),
        width="intermediate_size",
        score="softmax_of_chosen",
        normalise=False,
        shared="shared_intermediate_size",
        optional=True,
    ),
    layout=Layout(
        # (Of the shared MLP a model has the slots of one kind alone.)
        fused={**SCAN_FUSED, f"{SHARED_MLP}.input_linear": (*GATE_UP, *SHARED)},
        stacked={
            f"{BLOCK}.input_linear.weight": Stacked(("gate", "up")),
            f"{BLOCK}.output_linear.weight": Stacked(("down",)),
        },
    ),
)
