"""What a model is calibrated on: a plain description that is part of a plan's identity. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kbit.host.errors import UsageError
from kbit.text.datasets import TextData, resolve_data

# Tokens of a sequence.
SEQUENCE = 256
# How texts written by the model itself are asked for.
SAMPLED = "sampled"
# Raised whenever the same request gets other factors.
VERSION = 2


@dataclass(frozen=True)
class CalibrationRequest:
    """What is measured, and on what.

    Attributes:
        texts: in equal parts; none: text sampled from the model itself.
        tokens: of all texts together, a multiple of the sequence; None: by the model's size (`kbit.calibration.run`).
        gradients: both factors; False: only what goes in to the layers.
    """

    texts: tuple[TextData, ...] = ()
    tokens: int | None = None
    gradients: bool = True

    @classmethod
    def of(cls, names: Sequence[str], tokens: int | None = None, gradients: bool = True) -> CalibrationRequest:
        """A request as users state it.

        Args:
            names: files and names of texts (`kbit.text.datasets`), or "sampled".
            tokens: rounded up to whole sequences; None: by the model's size.
            gradients: see CalibrationRequest.

        Raises:
            UsageError: too few tokens, or sampled text mixed with others.
            KbitError: a text that cannot be had.
        """
        if tokens is not None and tokens < SEQUENCE:
            raise UsageError(f"--calibration-tokens {tokens}: use at least {SEQUENCE}")
        chosen = [name for name in names if name != SAMPLED]
        if chosen and len(chosen) != len(names):
            raise UsageError("text sampled from the model cannot be mixed with others: name one or the other")
        rounded = None if tokens is None else -(-tokens // SEQUENCE) * SEQUENCE
        return cls(tuple(resolve_data(name) for name in chosen), rounded, gradients)

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that determines the result, but for the model."""
        texts = [{"name": text.name, "sha256": text.sha256} for text in self.texts]
        return {
            "version": VERSION,
            "text": texts or SAMPLED,
            "tokens": self.tokens,
            "sequence": SEQUENCE,
            "gradients": self.gradients,
        }

    def describe(self) -> str:
        """One line for people."""
        where = ", ".join(text.name for text in self.texts) or "text sampled from the model itself"
        what = "" if self.gradients else " (inputs only, no gradients)"
        return f"{where}{what}"
