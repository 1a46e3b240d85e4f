"""A nested model that is rounded once, for all of its widths, and read at one of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from kbit.checkpoint.ladder import Ladder
from kbit.formats.codec import Codec
from kbit.formats.nested import NestedFormat
from kbit.quantizers.method import QuantizedSource
from kbit.scaling.sweep.metered import Delegating

if TYPE_CHECKING:
    import torch

    from kbit.formats.quant_tensor import QuantTensor
    from kbit.quantizers.plan import Plan


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


class AtWidths(Delegating, QuantizedSource):
    """A nested model at one of its rungs: what is stored up to each matrix's width.

    Args:
        whole: the model.
        widths: of its nested matrices, by name.
    """

    def __init__(self, whole: QuantizedSource, widths: Mapping[str, int]) -> None:
        super().__init__(whole)
        self._whole, self._widths = whole, widths

    def read_weight(self, name: str) -> torch.Tensor | QuantTensor:
        from kbit.formats.nested_codec import narrowed
        from kbit.formats.quant_tensor import QuantTensor

        weight = self._whole.read_weight(name)
        if isinstance(weight, QuantTensor) and name in self._widths:
            return narrowed(weight, self._widths[name])
        return weight

    def target(self, name: str) -> torch.Tensor:
        return self._whole.target(name)


def widths_at(plan: Plan, bits: int | None) -> dict[str, int]:
    """The widths of a plan's nested matrices at a number of bits, by name."""
    nested = {t.source.name: t for t in plan.tensors if isinstance(t.format, NestedFormat)}
    if bits is None or not nested:
        return {}
    if plan.nested is None:
        return dict.fromkeys(nested, bits)
    sizes = {name: tensor.source.numel for name, tensor in nested.items()}
    widths = next(iter(nested.values())).format
    assert widths is not None
    return Ladder(tuple(widths.widths), sizes, plan.nested.order).at(bits)
