"""A part of a checkpoint as a checkpoint: what one of several processes holds of a model that is split among them.

A weight is cut along its rows (output features) or its columns (input features). Packed weights are cut as they are,
their codes never decoded. Who gets which part is decided above (`kbit.models.shard`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

from kbit.checkpoint.source import CheckpointSource, TensorInfo
from kbit.formats.quant_format import SUPERBLOCK, QuantFormat, plane_widths
from kbit.host.errors import UnsupportedError, UsageError

if TYPE_CHECKING:
    import torch

    from kbit.formats.quant_tensor import QuantTensor


@dataclass(frozen=True)
class Cut:
    """The part [start, stop) of a tensor along a dimension: 0 for rows, 1 for columns."""

    dim: int
    start: int
    stop: int

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """The part's shape."""
        return tuple(self.stop - self.start if dim == self.dim else size for dim, size in enumerate(whole))

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The part, in memory of its own."""
        return tensor.narrow(self.dim, self.start, self.stop - self.start).clone()


class ShardedSource(CheckpointSource):
    """A part of another source. Reads from it, and does not close it.

    Args:
        source: the whole model.
        config: the configuration that describes the part.
        cuts: by tensor name; what is not there comes whole.
        part: names the part ("1/4"), for the fingerprint.
    """

    def __init__(
        self, source: CheckpointSource, config: Mapping[str, Any], cuts: Mapping[str, Cut], part: str = ""
    ) -> None:
        self.path = source.path
        self.config = dict(config)
        self._source = source
        self._cuts = dict(cuts)
        self._part = part
        self._infos = {name: self._cut_info(info) for name, info in source.tensors.items()}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """As the source's, with the shapes of the parts and their share of the bytes."""
        return self._infos

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        cut = self._cuts.get(name)
        if cut is None:
            return self._source.read_rows(name, start, stop)
        if cut.dim == 0:
            return self._source.read_rows(name, cut.start + start, cut.start + stop)
        return cut.of(self._source.read_rows(name, start, stop))

    def read_weight(self, name: str) -> torch.Tensor | QuantTensor:
        """The part in the form the engine keeps.

        Raises:
            UnsupportedError: the cut of a packed weight goes through a block or a byte.
        """
        cut = self._cuts.get(name)
        if cut is None:
            return self._source.read_weight(name)
        if cut.dim == 0 and stored_format(self._source.tensors[name]) is None:
            return self.read(name)  # only the rows that are wanted
        weight = self._source.read_weight(name)
        import torch

        return cut.of(weight) if isinstance(weight, torch.Tensor) else cut_packed(weight, cut, name)

    def sidecar_files(self) -> Mapping[str, bytes]:
        return self._source.sidecar_files()

    def fingerprint(self) -> str:
        import hashlib

        return hashlib.sha256(f"{self._source.fingerprint()} {self._part}".encode()).hexdigest()

    def _cut_info(self, info: TensorInfo) -> TensorInfo:
        cut = self._cuts.get(info.name)
        if cut is None:
            return info
        shape = cut.shape(info.shape)
        return replace(info, shape=shape, nbytes=-(-info.nbytes * prod(shape) // max(1, info.numel)))


def stored_format(info: TensorInfo) -> QuantFormat | None:
    """The packed format in which `read_weight` gives a tensor, or None where it gives floats."""
    if len(info.shape) != 2:
        return None
    try:
        return QuantFormat.parse(info.stored_as)
    except UsageError:
        pass  # no kbit format: a GGUF type or a safetensors dtype
    from kbit.checkpoint.gguf.blocks import BLOCK_TYPES

    block_type = BLOCK_TYPES.get(info.stored_as)
    return None if block_type is None else block_type.format


def column_unit(format: QuantFormat | None, columns: int) -> int:
    """Columns of a row of `columns` weights are cut at multiples of this: whole blocks and whole bytes."""
    if format is None:
        return 1
    if format.blocks_per_row(columns) == 1:  # its scale is every part's
        return 8 // min(plane_widths(format.bits))
    return format.block_size  # a multiple of 16 codes, so of whole bytes at every width


def cut_packed(weight: QuantTensor, cut: Cut, name: str = "tensor") -> QuantTensor:
    """A part of a packed weight, with the same values and its own memory.

    Double-quantized scales stay as they are where the part begins with a run of 256 blocks of its own; elsewhere, since
    these runs go on from row to row, they become float32 scales of the same values (3 bytes a block more).

    Raises:
        UnsupportedError: the cut goes through a block or a byte.
    """
    from kbit.formats.quant_tensor import QuantTensor

    format, shape = weight.format, weight.shape
    unit = column_unit(format, shape[1])
    if cut.dim == 1 and (cut.start % unit or (cut.stop % unit and cut.stop != shape[1])):
        raise UnsupportedError(
            f"{name}: columns {cut.start} to {cut.stop} of {shape[1]} are no whole blocks of {unit} ({format}): "
            "split it among fewer processes, or convert the model with a smaller block size"
        )
    stored = dict(weight.stored)
    blocks = format.blocks_per_row(shape[1])
    if format.double_quant and (cut.dim == 1 or cut.start * blocks % SUPERBLOCK):
        decoded = {"scales": weight.scales, "offsets": weight.offsets}
        stored.update({kind: values for kind, values in decoded.items() if values is not None})
        format = replace(format, double_quant=False, scale_dtype="fp32")
    part = cut.shape(shape)
    parts = {}
    for suffix in format.parts(*part):
        array = stored[suffix]
        if suffix.startswith("plane") and cut.dim == 1:
            per_byte = 8 // int(suffix.removeprefix("plane"))
            array = array[:, cut.start // per_byte : -(-cut.stop // per_byte)]
        elif suffix.endswith("_super"):  # only where rows are cut between two of them
            array = array[cut.start * blocks // SUPERBLOCK : -(-cut.stop * blocks // SUPERBLOCK)]
        elif cut.dim == 0 and suffix != "codebook":
            array = array[cut.start : cut.stop]
        elif suffix in ("scales", "offsets") and blocks > 1:
            array = array[:, cut.start // format.block_size : -(-cut.stop // format.block_size)]
        parts[suffix] = array.clone()
    return QuantTensor(format, (part[0], part[1]), parts, weight.codebook)
