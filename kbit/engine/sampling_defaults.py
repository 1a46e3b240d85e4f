"""How tokens are chosen where nobody says: what a model's authors recommend, else what most programs do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kbit.checkpoint.source import CheckpointSource
from kbit.engine.sampler import SamplingParams
from kbit.host.errors import UsageError
from kbit.host.notes import note
from kbit.text.added_tokens import read_json

# llama.cpp's, which people know, but for its temperature of 0.8.
USUAL = SamplingParams(temperature=0.7, top_k=40, top_p=0.95, min_p=0.05)
# What the authors of a model say on its page, by a part of its name.
# SmolLM2: https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct, "temperature=0.2, top_p=0.9".
_RECOMMENDED = {"smollm2": SamplingParams(temperature=0.2, top_p=0.9)}


@dataclass(frozen=True)
class SamplingDefaults:
    """Settings, and where they come from, in words."""

    params: SamplingParams
    origin: str

    def __str__(self) -> str:
        p = self.params
        if p.temperature == 0:
            return f"greedy ({self.origin})"
        parts = [f"temperature {p.temperature:g}"]
        parts += [f"top-k {p.top_k}"] * (p.top_k > 0) + [f"top-p {p.top_p:g}"] * (p.top_p < 1)
        parts += [f"min-p {p.min_p:g}"] * (p.min_p > 0)
        parts += [f"repetition penalty {p.repetition_penalty:g}"] * (p.repetition_penalty != 1)
        return f"{', '.join(parts)} ({self.origin})"


def sampling_defaults(source: CheckpointSource, name: str) -> SamplingDefaults:
    """The settings for a model: its generation_config.json's, else its authors', else the usual ones.

    Args:
        source: the checkpoint.
        name: what the user calls it.

    Raises:
        CheckpointError: generation_config.json is not one.
    """
    where = str(source.path)
    given = read_json(source.sidecar_files(), "generation_config.json", where)
    if given.get("do_sample") is True or any(given.get(key) is not None for key in ("temperature", "top_p", "top_k")):
        try:
            return SamplingDefaults(_from_config(given), "generation_config.json")
        except (UsageError, TypeError, ValueError, OverflowError) as error:
            note(f"{where}: generation_config.json says how to sample, but {error}; it is left out")
    words = f"{name} {source.path.name}".lower()
    for part, params in _RECOMMENDED.items():
        if part in words:
            return SamplingDefaults(params, "recommended by the model's authors")
    return SamplingDefaults(USUAL, "the usual ones")


def _from_config(given: Mapping[str, Any]) -> SamplingParams:
    """As transformers reads it: what is not there is temperature 1, top-k 50, top-p 1."""
    if given.get("do_sample") is False:
        return SamplingParams()

    def number(key: str, default: float) -> float:
        value = given.get(key)
        return default if value is None else float(value)

    return SamplingParams(
        temperature=number("temperature", 1.0),
        top_k=int(number("top_k", 50)),
        top_p=number("top_p", 1.0),
        min_p=number("min_p", 0.0),
        repetition_penalty=number("repetition_penalty", 1.0),
    )
