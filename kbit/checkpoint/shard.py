"""A part of a checkpoint as a checkpoint: what one of several processes holds of a model that is split among them.

A weight is cut along its rows (output features) or its columns (input features). Packed weights are cut as they are,
their codes never decoded. Who gets which part is decided above (`kbit.models.shard`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

from kbit.checkpoint.source import CheckpointSource, TensorInfo
from kbit.formats.codec import Codec, Cut
from kbit.formats.registry import parse_format
from kbit.host.errors import UsageError

if TYPE_CHECKING:
    import torch

    from kbit.formats.quant_tensor import QuantTensor


class ShardedSource(CheckpointSource):
    """A part of another source. Reads from it, and does not close it.

    Args:
        source: the whole model.
        config: the configuration that describes the part.
        cuts: by tensor name, runs of rows, or one of columns; what is not there comes whole.
        part: names the part ("1/4"), for the fingerprint.
        zeros: vectors that are another part's, and zeros here.
    """

    def __init__(
        self,
        source: CheckpointSource,
        config: Mapping[str, Any],
        cuts: Mapping[str, tuple[Cut, ...]],
        part: str = "",
        zeros: Iterable[str] = (),
    ) -> None:
        self.path = source.path
        self.config = dict(config)
        self._source = source
        self._cuts = dict(cuts)
        self._part = part
        self._zeros = frozenset(zeros)
        self._infos = {name: self._cut_info(info) for name, info in source.tensors.items()}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """As the source's, with the shapes of the parts and their share of the bytes."""
        return self._infos

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        cuts = self._cuts.get(name)
        if cuts is None:
            rows = self._source.read_rows(name, start, stop)
            return rows.zero_() if name in self._zeros else rows
        if cuts[0].dim == 1:
            return cuts[0].of(self._source.read_rows(name, start, stop))
        import torch

        parts, before = [], 0
        for cut in cuts:
            first, last = (min(max(at - before, 0), cut.stop - cut.start) for at in (start, stop))
            if first < last:
                parts.append(self._source.read_rows(name, cut.start + first, cut.start + last))
            before += cut.stop - cut.start
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def read_weight(self, name: str) -> torch.Tensor | QuantTensor:
        """The part in the form the engine keeps.

        Raises:
            UnsupportedError: the cut of a packed weight goes through a block or a byte.
        """
        cuts = self._cuts.get(name)
        if cuts is None:
            return self._source.read_weight(name)
        if cuts[0].dim == 0 and stored_format(self._source.tensors[name]) is None:
            return self.read(name)  # only the rows that are wanted
        weight = self._source.read_weight(name)
        import torch

        from kbit.formats.quant_tensor import join_rows

        if isinstance(weight, torch.Tensor):
            return torch.cat([cut.of(weight) for cut in cuts], dim=cuts[0].dim)
        return join_rows([weight.cut(cut, name) for cut in cuts])

    def sidecar_files(self) -> Mapping[str, bytes]:
        return self._source.sidecar_files()

    def fingerprint(self) -> str:
        import hashlib

        return hashlib.sha256(f"{self._source.fingerprint()} {self._part}".encode()).hexdigest()

    def _cut_info(self, info: TensorInfo) -> TensorInfo:
        cuts = self._cuts.get(info.name)
        if cuts is None:
            return info
        size = sum(cut.stop - cut.start for cut in cuts)
        shape = tuple(size if dim == cuts[0].dim else old for dim, old in enumerate(info.shape))
        return replace(info, shape=shape, nbytes=-(-info.nbytes * prod(shape) // max(1, info.numel)))


def stored_format(info: TensorInfo) -> Codec | None:
    """The packed format in which `read_weight` gives a tensor, or None where it gives floats."""
    if len(info.shape) != 2:
        return None
    try:
        return parse_format(info.stored_as)
    except UsageError:
        pass  # no kbit format: a GGUF type or a safetensors dtype
    from kbit.checkpoint.gguf.blocks import BLOCK_TYPES

    block_type = BLOCK_TYPES.get(info.stored_as)
    return None if block_type is None else block_type.format


def column_unit(info: TensorInfo) -> int:
    """A matrix's columns are cut at multiples of this."""
    format = stored_format(info)
    return 1 if format is None else format.column_unit(info.shape[1])
