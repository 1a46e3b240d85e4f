"""The model families that kbit runs: one file each, and one line each in FAMILIES."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kbit.models.families import llama, mistral, qwen2
from kbit.models.family import Family, read_spec
from kbit.models.spec import ModelSpec

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        llama.FAMILY,
        mistral.FAMILY,
        qwen2.FAMILY,
    )
}


def spec_from_config(config: Mapping[str, Any], where: str = "config.json") -> ModelSpec:
    """The ModelSpec of a Hugging Face configuration.

    Args:
        config: the parsed config.json.
        where: what to call it in errors.

    Raises:
        UnsupportedError: an unknown family, architecture, RoPE scaling or layer type.
        CheckpointError: a missing or senseless value; the line names key and value.
    """
    return read_spec(FAMILIES, config, where)
