"""Step: the tokens one forward pass adds to a batch, and everything about their positions.

It is computed once per forward pass and handed to every layer, so that no layer asks the device for a length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Step:
    """T new tokens for each of B rows, right-padded: row b has lengths[b] real ones.

    Attributes:
        starts: int64 (B,), tokens each row had before this step.
        lengths: int64 (B,), real new tokens of each row, 0 to T.
        positions: int64 (B, T), starts[b] + t. Also the cache slot of token t, for the real ones.
        cos: float32 (B, T, R/2), rotary cosines, R = rotated features of a head.
        sin: float32 (B, T, R/2).
        shared_start: the common start if all rows start there and have T real tokens, else None.
        real: (row, column, slot) of every real token, each int64 (sum of lengths,), where shared_start is None.
    """

    starts: torch.Tensor
    lengths: torch.Tensor
    positions: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    shared_start: int | None
    real: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None

    @property
    def kv_lengths(self) -> torch.Tensor:
        """int64 (B,): tokens each row has once this step is in the cache."""
        return self.starts + self.lengths


def positions_of(starts: torch.Tensor, width: int) -> torch.Tensor:
    """int64 (B, T): positions of `width` tokens after the first starts[b]."""
    return starts[:, None] + torch.arange(width, device=starts.device)


def plan_step(starts: torch.Tensor, lengths: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Step:
    """A Step from the rows' lengths and rotary tables.

    Args:
        starts: int64 (B,), tokens already in the cache.
        lengths: int64 (B,), real new tokens.
        cos: float32 (B, T, R/2).
        sin: float32 (B, T, R/2).
    """
    width = cos.shape[1]
    positions = positions_of(starts, width)
    if bool((starts == starts[0]).all()) and bool((lengths == width).all()):
        return Step(starts, lengths, positions, cos, sin, int(starts[0]), None)
    rows, columns = (torch.arange(width, device=starts.device) < lengths[:, None]).nonzero(as_tuple=True)
    return Step(starts, lengths, positions, cos, sin, None, (rows, columns, positions[rows, columns]))
