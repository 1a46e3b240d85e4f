"""What a configuration says of a stack of layers that its family leaves open: names of tensors, distances, keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kbit.models.config_values import ConfigValues
from kbit.models.rope_spec import MAX_CONTEXT
from kbit.models.scan_config import with_mixed_layers
from kbit.models.tensor_names import TensorNames

if TYPE_CHECKING:
    from kbit.models.family import Family

_MAX_BUCKETS = 1 << 16
_MAX_WIDTH = 1 << 24
_MAX_DISTANCE = 1 << 20
_MAX_VOCAB = 1 << 28
_MAX_SCALE = 1e9
_GATED = "gated-"


def with_fallbacks(family: Family, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration with what other keys say of those that are absent or null."""
    more = {
        key: config[other]
        for key, other in family.fallbacks.items()
        if config.get(key) is None and config.get(other) is not None
    }
    found = {**config, **more}
    return with_mixed_layers(found) if family.scan == "mixed" else found


def names_of(family: Family, values: ConfigValues) -> TensorNames:
    """The names of the tensors that there are.

    Raises:
        CheckpointError: a senseless value.
    """
    names = family.names
    if family.qk_norms is not None and not values.boolean(family.qk_norms):
        names = replace(names, q_norm=None, k_norm=None)
    if family.plain_up is not None and not str(values.raw(family.activation)).startswith(_GATED):
        names = replace(names, gate=None, up=family.plain_up)
    if family.shared is not None and values.boolean(family.shared[0]):
        names = replace(names, embedding=family.shared[1])
    return names


def distances_of(family: Family, values: ConfigValues) -> tuple[int, int] | None:
    """Buckets and the largest distance of the tables of distances, if there are any.

    Raises:
        CheckpointError: a senseless value: two buckets of a half are the fewest whose logarithms mean something.
    """
    if family.distances is None:
        return None
    buckets, largest = family.distances
    if isinstance(buckets, str):
        buckets = values.integer(buckets, 4, _MAX_BUCKETS)
    if isinstance(largest, str):
        largest = values.integer(largest, buckets, _MAX_DISTANCE)
    return buckets, largest


def embedding_size_of(family: Family, values: ConfigValues, hidden: int) -> int:
    """The width of embeddings where it is not that of the residual stream, else 0.

    Raises:
        CheckpointError: a senseless value.
    """
    if family.embedding_width is None:
        return 0
    width = values.optional_integer(family.embedding_width, 1, _MAX_WIDTH) or hidden
    return 0 if width == hidden else width


def layer_features_of(family: Family, values: ConfigValues, vocabulary: int) -> tuple[int, int]:
    """The features of a second embedding for every layer, and its rows; 0 where there is none.

    Raises:
        CheckpointError: a senseless value.
    """
    if family.layer_features is None:
        return 0, 0
    key, tokens = family.layer_features
    features = values.optional_integer(key, 0, _MAX_WIDTH) or 0
    return features, values.integer(tokens, vocabulary, _MAX_VOCAB) if features else 0


def temperature_of(family: Family, values: ConfigValues) -> tuple[float, int] | None:
    """`ModelSpec.unturned_temperature`.

    Raises:
        CheckpointError: a senseless value.
    """
    if family.temperature is None:
        return None
    switch, scale, period = family.temperature
    # (A whole number in the first files, which transformers takes as Python does.)
    if values.raw(switch) == 0 or (not isinstance(values.raw(switch), int) and not values.boolean(switch)):
        return None
    return values.number(scale, above=-_MAX_SCALE, below=_MAX_SCALE), values.integer(period, 1, MAX_CONTEXT)
