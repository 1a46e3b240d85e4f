"""The reference's operations, which also hand out what every query takes of every key: what maps of attention show."""

from __future__ import annotations

import torch

from kbit.backends.reference.gradients import GradientOps
from kbit.graph.ops import Attention, Vector, Weight


class SharesOps(GradientOps):
    """Operations for one text of T tokens from its start, which hand out the shares of every attention (`keep`)."""

    def keep(self, shares: torch.Tensor) -> None:
        """Take the shares of a layer, as they come.

        Args:
            shares: (H, T, T): row q, column k is the share that the value of token k has in what token q gets. Rows add
                up to 1; with attention sinks to less.
        """
        raise NotImplementedError

    def self_attention(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        attention: Attention,
        key_bias: Vector | None = None,
        sinks: Vector | None = None,
        by_distance: Vector | None = None,
    ) -> torch.Tensor:
        out = super().self_attention(q, k, v, attention, key_bias, sinks, by_distance)
        keys, _ = self.written[attention.layer]
        self.keep(self.shares(self._turned(q, attention), keys, attention, sinks, by_distance)[0])
        return out

    def collect(self, weight: Weight, x: torch.Tensor, gradient: torch.Tensor) -> None:
        """Nothing: there are no gradients here."""
