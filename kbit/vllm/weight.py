"""A layer's matrix inside vLLM: k-bit parts, or plain ones, and the product with them."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch.nn import functional

from kbit.host.errors import CheckpointError
from kbit.modules.linear import KbitLinear

# How a tensor that vLLM carries from the loader to a parameter says which k-bit matrix it is.
_MATRIX = "kbit_matrix"


def carrying(matrix: KbitLinear, dtype: torch.dtype) -> torch.Tensor:
    """The matrix's values, which remember it for as long as nobody makes another tensor of them: models of vLLM rename
    what they load, and some change it. Of those that change it the plain values are right.

    Args:
        matrix: (N, K).
        dtype: of the values.
    """
    values = matrix.dequantize(dtype)
    setattr(values, _MATRIX, matrix)
    return values


class KbitWeight(torch.nn.Parameter):
    """The `weight` of a layer of vLLM. It has no elements of its own: vLLM ties layers by sharing this object.

    Attributes:
        names: of the layers that use it.
        parts: one below the other, by what vLLM calls them: "q", "k" and "v", numbers, or None where there is one.
    """

    names: list[str]
    parts: dict[Hashable, KbitLinear | torch.Tensor]

    def __new__(cls, name: str, dtype: torch.dtype) -> KbitWeight:
        made = super().__new__(cls, torch.empty(0, dtype=dtype), requires_grad=False)
        made.names, made.parts = [name], {}
        return made

    def weight_loader(self, parameter: KbitWeight, values: torch.Tensor, shard: Hashable = None) -> None:
        """What models of vLLM call with each tensor of this layer; the parameter is this one."""
        self.parts[shard] = getattr(values, _MATRIX, None) or values.clone()

    @property
    def plain(self) -> int:
        """How many parts are plain numbers."""
        return sum(isinstance(part, torch.Tensor) for part in self.parts.values())

    def complete(self, rows: list[int], columns: int, device: torch.device) -> None:
        """Puts the parts into their order, and on a device.

        Args:
            rows: of each part that vLLM knows, of which one tensor may be several.
            columns: K.
            device: where the layer computes.

        Raises:
            CheckpointError: parts are missing, or have other shapes.
        """
        self.parts = {shard: self.parts[shard].to(device) for shard in sorted(self.parts, key=_place)}
        shapes = [
            (part.out_features, part.in_features) if isinstance(part, KbitLinear) else tuple(part.shape)
            for part in self.parts.values()
        ]
        whole = bool(shapes) and all(len(shape) == 2 and shape[1] == columns for shape in shapes)
        if not whole or sum(shape[0] for shape in shapes) > sum(rows):
            given = " and ".join(" x ".join(map(str, shape)) for shape in shapes) or "none"
            raise CheckpointError(
                f"{', '.join(self.names)}: vLLM wants a matrix of {sum(rows)} x {columns}, and was given {given}: is "
                "the folder this model's?"
            )

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """x W^T: (..., K) -> (..., N), in x's type."""
        rows = x.reshape(-1, x.shape[-1])
        found = [
            part.products(rows) if isinstance(part, KbitLinear) else functional.linear(rows, part.to(rows.dtype))
            for part in self.parts.values()
        ]
        return (found[0] if len(found) == 1 else torch.cat(found, dim=-1)).view(*x.shape[:-1], -1)

    def rows(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Of a table: ids (...) -> (..., K)."""
        (table,) = self.parts.values()
        if isinstance(table, torch.Tensor):
            return functional.embedding(ids, table).to(dtype)
        (part,) = table.parts
        return part.matrix.dequantize_rows(ids.reshape(-1)).to(dtype).view(*ids.shape, -1)


def _place(shard: Hashable) -> int:
    """Where a part stands among those of a layer."""
    first = shard[0] if isinstance(shard, tuple) else shard
    return first if isinstance(first, int) else {None: 0, "q": 0, "k": 1, "v": 2}[first]  # type: ignore[index]


def kbit_weights(model: Any) -> dict[str, KbitWeight]:
    """By name, each once."""
    return {name: each for name, each in model.named_parameters() if isinstance(each, KbitWeight)}
