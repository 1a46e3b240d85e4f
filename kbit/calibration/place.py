"""Where a calibration is kept, and whether it is there. Imports no torch, so that plans can say it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from kbit.calibration.request import CalibrationRequest
from kbit.calibration.sizes import refuse_encoder, text_shape
from kbit.checkpoint.source import CheckpointSource
from kbit.host.cache_folder import cache_dir
from kbit.models.families import spec_from_config
from kbit.models.spec import ModelSpec

MANIFEST = "calibration.json"


def calibration_folder() -> Path:
    """Where calibrations are kept: KBIT_CALIBRATION if set, else in kbit's cache folder.

    Raises:
        KbitError: there is no such folder.
    """
    named = os.environ.get("KBIT_CALIBRATION")
    return Path(named).expanduser() if named else cache_dir() / "calibration"


def identity_of(source: CheckpointSource, spec: ModelSpec, request: CalibrationRequest) -> dict[str, Any]:
    """What is measured on what: plain JSON, equal for equal factors.

    Raises:
        UnsupportedError: an encoder, and what it does not have.
    """
    refuse_encoder(spec, bool(request.texts), request.gradients)
    count, length = text_shape(spec, request.tokens)
    return {
        "model": source.fingerprint(),
        "request": {**request.identity, "tokens": count * length, "sequence": length},
    }


def place_of(identity: dict[str, Any]) -> Path:
    """The folder of a calibration, which need not be there."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]
    return calibration_folder() / digest


def calibrations_of(fingerprints: Collection[str]) -> tuple[Path, ...]:
    """The folders of all calibrations of models with these fingerprints (`CheckpointSource.fingerprint`)."""
    found = []
    for manifest in sorted(calibration_folder().glob(f"*/{MANIFEST}")):
        try:
            said = json.loads(manifest.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # a damaged one is no model's
            continue
        if isinstance(said, dict) and said.get("model") in fingerprints:
            found.append(manifest.parent)
    return tuple(found)


def layers_of(spec: ModelSpec, gradients: bool) -> list[int | None]:
    """What is measured: every layer, and with gradients what stands outside of layers (None)."""
    return [*range(spec.stacked_layers), *([None] if gradients else [])]


def layer_file(folder: Path, layer: int | None) -> Path:
    """Where a layer's factors are kept."""
    return folder / ("outside.safetensors" if layer is None else f"layer-{layer:05d}.safetensors")


def is_kept(source: CheckpointSource, request: CalibrationRequest) -> bool:
    """Whether all that was asked for is measured already.

    Raises:
        CheckpointError, UnsupportedError: a model that cannot be run.
    """
    spec = spec_from_config(source.config, where=f"config of {source.path}")
    folder = place_of(identity_of(source, spec, request))
    files = [folder / MANIFEST, *(layer_file(folder, layer) for layer in layers_of(spec, request.gradients))]
    return all(file.exists() for file in files)
