"""A nested model that is rounded once, for all of its widths, and read at one of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kbit.formats.codec import Codec
from kbit.formats.nested import NestedFormat
from kbit.quantizers.method import QuantizedSource
from kbit.scaling.sweep.metered import Delegating

if TYPE_CHECKING:
    import torch

    from kbit.formats.quant_tensor import QuantTensor


def stored_as(format: Codec | None, width: int | None) -> str:
    """What a tensor of a planned format is stored as up to a width."""
    return str(format.narrowed(width) if isinstance(format, NestedFormat) and width is not None else format)


class AtHand(Delegating, QuantizedSource):
    """What a method makes of a model, every weight made once and kept."""

    def __init__(self, made: QuantizedSource) -> None:
        super().__init__(made)
        self._made = made
        self._kept: dict[str, torch.Tensor | QuantTensor] = {}

    def read_weight(self, name: str) -> torch.Tensor | QuantTensor:
        if name not in self._kept:
            self._kept[name] = self._made.read_weight(name)
        return self._kept[name]

    def target(self, name: str) -> torch.Tensor:
        return self._made.target(name)


class AtWidth(Delegating, QuantizedSource):
    """A nested model at a width: what is stored up to it."""

    def __init__(self, whole: QuantizedSource, width: int) -> None:
        super().__init__(whole)
        self._whole, self._width = whole, width

    def read_weight(self, name: str) -> torch.Tensor | QuantTensor:
        from kbit.formats.nested_codec import narrowed
        from kbit.formats.quant_tensor import QuantTensor

        weight = self._whole.read_weight(name)
        if isinstance(weight, QuantTensor) and isinstance(weight.format, NestedFormat):
            return narrowed(weight, self._width)
        return weight

    def target(self, name: str) -> torch.Tensor:
        return self._whole.target(name)
