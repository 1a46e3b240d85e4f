"""A family that no file of kbit knows: LayerNorms, also of what attention adds, and queries that see the whole text.

`install` is the line in the registry.
"""

from __future__ import annotations

from typing import Any

from decoder_cases import TINY

from kbit.models.families import FAMILIES
from kbit.models.family import Family
from kbit.models.tensor_names import TensorNames

FAMILY = Family(
    model_type="toy",
    architectures=("ToyModel",),
    defaults={
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "max_position_embeddings": 64,
    },
    qkv_bias=True,
    output_bias=True,
    mlp_bias=False,
    windows="none",
    names=TensorNames(
        embedding="words",
        final_norm="norm",
        head="head",
        attention_norm="blocks.{layer}.norm_in",
        attention_post_norm="blocks.{layer}.norm_seen",
        q="blocks.{layer}.q",
        k="blocks.{layer}.k",
        v="blocks.{layer}.v",
        o="blocks.{layer}.o",
        mlp_norm="blocks.{layer}.norm_mlp",
        gate="blocks.{layer}.gate",
        up="blocks.{layer}.up",
        down="blocks.{layer}.down",
    ),
    norm="layer",
    norm_bias=True,
    norm_eps="layer_norm_eps",
    mask="bidirectional",
)


def install() -> None:
    """Make it one of kbit's families."""
    FAMILIES[FAMILY.model_type] = FAMILY


def toy_config(**changes: Any) -> dict[str, Any]:
    """A tiny model of it, as a config.json."""
    return {**TINY, "model_type": "toy", "architectures": ["ToyModel"], **changes}
