"""Safetensors files whose every byte has its place before any tensor is there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kbit.formats.codec import Part

_ORDER = {"I64": 0, "F32": 1, "I32": 1, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class StoredWeight:
    """A weight and the arrays stored for it, by full stored name."""

    name: str
    parts: Mapping[str, Part]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())


class PlannedShard:
    """One safetensors file with its header worked out in advance."""

    def __init__(self, file_name: str, weights: Sequence[StoredWeight]) -> None:
        self.file_name = file_name
        entries = [(name, part) for weight in weights for name, part in weight.parts.items()]
        # Widest elements first: every tensor then starts on a multiple of its element size, which the safetensors
        # library needs to hand out views. The sort is stable, so ties stay in the model's order.
        entries.sort(key=lambda entry: _ORDER.get(entry[1].dtype, 3))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name, part in entries:
            header[name] = {
                "dtype": part.dtype,
                "shape": list(part.shape),
                "data_offsets": [position, position + part.nbytes],
            }
            position += part.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.header = len(text).to_bytes(8, "little") + text
        self.ranges = {
            name: (len(self.header) + entry["data_offsets"][0], len(self.header) + entry["data_offsets"][1])
            for name, entry in header.items()
            if name != "__metadata__"
        }
        self.nbytes = len(self.header) + position


def plan_shards(weights: Sequence[StoredWeight], shard_bytes: int) -> list[PlannedShard]:
    """Weights in their order, in files of at most `shard_bytes`, but for a weight that is larger."""
    groups: list[list[StoredWeight]] = [[]]
    size = 0
    for weight in weights:
        if groups[-1] and size + weight.nbytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(weight)
        size += weight.nbytes
    if len(groups) == 1:
        return [PlannedShard("model.safetensors", groups[0])]
    return [
        PlannedShard(f"model-{number:05d}-of-{len(groups):05d}.safetensors", group)
        for number, group in enumerate(groups, start=1)
    ]
