"""ERNIE 4.5, mixtures: experts in a range of layers, chosen by a softmax and a bias, and some for all tokens beside."""

from dataclasses import replace

from kbit.models.expert_config import ExpertRules
from kbit.models.families.ernie4_5 import FAMILY as DENSE
from kbit.models.families.llama import LAYER, NAMES
from kbit.models.families.qwen3_moe import with_experts
from kbit.models.layout import Layout

_SHARED = f"{LAYER}.mlp.shared_experts"

FAMILY = replace(
    DENSE,
    model_type="ernie4_5_moe",
    architectures=("Ernie4_5_MoeForCausalLM",),
    defaults={
        **{key: value for key, value in DENSE.defaults.items() if key != "head_dim"},
        "num_key_value_heads": 4,
        "moe_intermediate_size": 1536,
        "moe_k": 6,
        "moe_layer_end_index": -1,
        "moe_layer_interval": 1,
        "moe_layer_start_index": 1,
        "moe_num_experts": 64,
        "moe_num_shared_experts": 2,
        "moe_norm_min": 1e-12,
    },
    names=replace(
        with_experts(NAMES, "mlp", "gate_proj", "up_proj", "down_proj"),
        selection_bias=f"{LAYER}.mlp.moe_statics.e_score_correction_bias",
        shared_gate=f"{_SHARED}.gate_proj",
        shared_up=f"{_SHARED}.up_proj",
        shared_down=f"{_SHARED}.down_proj",
    ),
    experts=ExpertRules(
        count=("moe_num_experts",),
        chosen="moe_k",
        layers="spaced",
        normalise=True,
        shared="moe_num_shared_experts",
        selection_bias=True,
    ),
    head_bias="use_bias",
    # (A sum of scores that is smaller has no meaning in float32.)
    fixed={"moe_norm_min": (1e-12,)},
    layout=Layout(interleaved=True, flattened=("selection_bias",), unused=(r"model\.mtp_.*",)),
)
