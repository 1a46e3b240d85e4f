"""Which files a model's weights are in: an index, or names that say which part of how many they are."""

from __future__ import annotations

import re
from pathlib import Path

from kbit.host.errors import CheckpointError
from kbit.host.files import read_json_object

_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")


def parts_of_one(names: list[str]) -> list[str] | None:
    """The shards of one model by their common name, if all of them are there and nothing else is."""
    found = [_SHARD.fullmatch(name) for name in names]
    if not all(found):
        return None
    kinds = {(match[1], match[3]) for match in found if match}
    if len(kinds) != 1:
        return None
    stem, count = kinds.pop()
    expected = [f"{stem}-{part:05d}-of-{count}.safetensors" for part in range(1, int(count) + 1)]
    return names if names == expected else None


def read_weight_map(path: Path) -> dict[str, str]:
    """An index: the name of the file of every tensor.

    Raises:
        CheckpointError: it is none.
    """
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: no weight_map object in it; download it again")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(f"{path}: {name} points to {shard!r}, which is not a plain file name")
    return weight_map
