"""What a configuration says of a stack of layers that its family leaves open: names of tensors, distances, keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kbit.models.config_values import ConfigValues
from kbit.models.scan_config import with_mixed_layers
from kbit.models.tensor_names import TensorNames

if TYPE_CHECKING:
    from kbit.models.family import Family

_MAX_BUCKETS = 1 << 16
_MAX_DISTANCE = 1 << 20
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
