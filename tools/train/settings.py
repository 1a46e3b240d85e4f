"""What a training run is: the settings that determine its result."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from kbit.host.errors import UsageError
from train.shapes import Shape

Precision = Literal["fp32", "bf16"]

# Fraction of the steps over which the learning rate rises, and what it falls to, of its peak.
WARMUP = 0.02
FINAL_RATE = 0.1


@dataclass(frozen=True)
class Settings:
    """Everything that determines the weights a run ends with, up to the rounding of the machine.

    Attributes:
        shape: of the model.
        corpus: digest of the tokens, the held-out ones and the tokenizer included.
        context: predictions per window.
        batch: windows per step.
        steps: optimizer steps.
        learning_rate: at its peak; it rises over the first 2 % of the steps and falls to a tenth along a cosine.
        seed: of the initial weights and of the order of windows.
        precision: of the matrix products; parameters and optimizer are float32.
    """

    shape: Shape
    corpus: str
    context: int
    batch: int
    steps: int
    learning_rate: float
    seed: int
    precision: Precision

    def __post_init__(self) -> None:
        for name, least in (("context", 2), ("batch", 1), ("steps", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} {getattr(self, name)}: must be at least {least}")
        if not 0 < self.learning_rate < 1:
            raise UsageError(f"--learning-rate {self.learning_rate}: give a number above 0 and below 1, such as 3e-3")

    @property
    def tokens(self) -> int:
        """Tokens that are predicted in training, repetitions counted."""
        return self.steps * self.batch * self.context

    def rate(self, step: int) -> float:
        """Learning rate of step 0 and on."""
        warmup = max(1, math.ceil(WARMUP * self.steps))
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        done = (step - warmup) / max(1, self.steps - warmup)
        return self.learning_rate * (FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * done)))

    def to_dict(self) -> dict[str, Any]:
        """For JSON and for comparing with another run's."""
        return asdict(self)


def differences(ours: dict[str, Any], theirs: object) -> str:
    """The settings in which two runs differ, as "batch 16 (there: 8), ..."; empty where there are none."""
    if not isinstance(theirs, dict):
        return "it says no settings"
    names = [name for name in ours if ours[name] != theirs.get(name)]
    return ", ".join(f"{name} {ours[name]} (there: {theirs.get(name)})" for name in names)


def default_rate(shape: Shape) -> float:
    """A learning rate for a shape: falls with the width, as the best rate of Adam does (Yang et al. 2022, muP)."""
    return min(6e-3, 6e-3 * 128 / shape.hidden)


def best_precision(device: torch.device) -> Precision:
    """bf16 where the device multiplies it itself, else fp32 (emulated, bf16 is the slower one)."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    # torch has no public name for these; a version without them means float32.
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return "bf16" if any(getattr(torch.cpu, name, lambda: False)() for name in names) else "fp32"
