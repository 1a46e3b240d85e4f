"""What matrices were measured to cost, kept beside their calibration, a file for each layer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from kbit.host.errors import KbitError
from kbit.host.files import read_json_object, write_durably
from kbit.models.families import spec_from_config
from kbit.models.params import parameters

if TYPE_CHECKING:
    from kbit.calibration.store import CalibrationFolder
    from kbit.checkpoint.source import CheckpointSource

T = TypeVar("T")


def by_layer(source: CheckpointSource, wanted: Mapping[str, T]) -> dict[int | None, dict[str, T]]:
    """What is wanted of each layer's matrices, by name; what stands outside of layers first."""
    spec = spec_from_config(source.config, where=f"config of {source.path}")
    layer_of = {p.name: p.layer for p in parameters(spec)}
    layers = sorted({layer_of[name] for name in wanted}, key=lambda layer: -1 if layer is None else layer)
    return {layer: {name: what for name, what in wanted.items() if layer_of[name] == layer} for layer in layers}


def costs_file(calibration: CalibrationFolder, layer: int | None, identity: Mapping[str, Any]) -> Path:
    """Where the costs of a layer's matrices are kept.

    Args:
        calibration: of the model.
        layer: its number; None: what stands outside of layers.
        identity: all that they depend on besides the calibration, as JSON has it.
    """
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    return calibration.path / f"costs-{'outside' if layer is None else layer}-{digest}.json"


def write_costs(path: Path, costs: Mapping[str, Sequence[float]]) -> None:
    """Keeps costs, a list for each matrix."""
    write_durably(path, json.dumps(costs).encode())


def read_costs(path: Path, wanted: Mapping[str, Sized]) -> dict[str, list[float]] | None:
    """The costs that are kept; None where none are, or they are damaged.

    Args:
        path: of the file.
        wanted: as many costs as these hold of each matrix, by name.
    """
    if not path.exists():
        return None
    try:
        found = read_json_object(path)
        costs = {name: [float(cost) for cost in found[name]] for name in wanted}
    except (KeyError, TypeError, ValueError, KbitError):
        return None  # damaged: measured again
    return costs if all(len(costs[name]) == len(each) for name, each in wanted.items()) else None
