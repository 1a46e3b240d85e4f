"""Granite MoE with an MLP for all tokens beside its experts, as Granite 4's without state spaces."""

from dataclasses import replace

from kbit.models.families.granitemoe import FAMILY as GRANITE_MOE
from kbit.models.families.granitemoehybrid import SHARED_MLP
from kbit.models.layout import Layout
from kbit.models.params import SHARED

assert GRANITE_MOE.experts is not None

# Where the configuration gives that MLP no features.
_ALONE = replace(GRANITE_MOE, model_type="granitemoeshared", architectures=("GraniteMoeSharedForCausalLM",))

FAMILY = replace(
    _ALONE,
    variants=(("shared_intermediate_size", 0, _ALONE), ("shared_intermediate_size", None, _ALONE)),
    names=replace(
        GRANITE_MOE.names,
        shared_gate=f"{SHARED_MLP}.gate_proj",
        shared_up=f"{SHARED_MLP}.up_proj",
        shared_down=f"{SHARED_MLP}.output_linear",
    ),
    experts=replace(GRANITE_MOE.experts, shared="shared_intermediate_size"),
    layout=Layout(fused={f"{SHARED_MLP}.input_linear": SHARED}, stacked=GRANITE_MOE.layout.stacked),
)
