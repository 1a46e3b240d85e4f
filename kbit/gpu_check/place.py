"""Where and how thoroughly a GPU is checked: what the steps are told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Row = dict[str, Any]

# How much: a GPU's first day, `kbit check-gpu`, and a rehearsal without a GPU (small, in Triton's interpreter).
FULL, SHORT, DRY = "full", "short", "dry"


class BrokenDeviceError(Exception):
    """The GPU's context is lost: nothing more runs in this process."""


@dataclass(frozen=True)
class Place:
    """What a step is told.

    Attributes:
        device: "cuda", or "cpu" where Triton interprets.
        scale: FULL, SHORT or DRY.
        seed: of everything random.
        models: folders or files of models to run besides the synthetic ones.
        earlier: rows of the steps before this one, by the step's name.
    """

    device: str
    scale: str
    seed: int = 0
    models: tuple[str, ...] = ()
    earlier: Mapping[str, Sequence[Row]] = field(default_factory=dict)

    @property
    def timed(self) -> bool:
        """Whether times mean anything."""
        return self.device != "cpu"

    def survive(self, error: Exception) -> None:
        """Goes on after an error, unless the GPU's context went with it.

        Raises:
            BrokenDeviceError: every later launch of this process would fail too.
        """
        if self.device == "cpu":
            return
        import torch

        try:
            torch.cuda.synchronize()
        except RuntimeError:
            raise BrokenDeviceError(str(error)) from error
