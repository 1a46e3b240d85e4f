"""config.json and generation_config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fuzzing.target import JsonTarget
from kbit.checkpoint.source import CheckpointSource, TensorInfo
from kbit.engine.generation_settings import read_settings
from kbit.engine.sampling_defaults import sampling_defaults
from kbit.engine.sound_settings import read_sound_settings
from kbit.models.families import spec_from_config

if TYPE_CHECKING:
    import torch


class Described(CheckpointSource):
    """A checkpoint of a configuration and files beside it, without tensors."""

    def __init__(self, config: dict[str, Any], files: Mapping[str, bytes]) -> None:
        self.path = Path("model")
        self.config = config
        self._files = files

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {}

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        raise AssertionError("there are no tensors")

    def sidecar_files(self) -> Mapping[str, bytes]:
        return self._files

    def fingerprint(self) -> str:
        return "none"


class Config(JsonTarget):
    """A configuration: understood, and the tensors of the model listed."""

    longest = 1 << 14
    values = ("llama", "gemma3_text", "deepseek_v3", "sliding_attention", "full_attention", "yarn", "silu", "sigmoid")

    def run(self, data: bytes) -> None:
        config = _object(data)
        spec = spec_from_config(config)
        # Opening a model compares all names; what claims more layers than that has no such file.
        if spec.layers * max(1, getattr(spec.experts, "count", 1) if spec.experts else 1) <= 4096:
            spec.expected_tensors()


class Generation(JsonTarget):
    """{"config": .., "generation": ..}: how texts are generated and tokens are drawn."""

    values = ("never", [[1, 2], [3]], 258)

    def run(self, data: bytes) -> None:
        both = _object(data)
        config = both.get("config")
        files = {"generation_config.json": json.dumps(both.get("generation")).encode()}
        source = Described(config if isinstance(config, dict) else {}, files)
        sampling_defaults(source, "a")
        if isinstance(both.get("generation"), dict):
            read_sound_settings(both["generation"], 260, 1, 2, "generation_config.json")
        read_settings(source, 260)


def _object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
