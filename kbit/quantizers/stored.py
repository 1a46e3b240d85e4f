"""Matrices that a source holds quantized already (a GGUF file's, another quantizer's), kept as they are.

Such a matrix is codes, scales and levels already: written down with its own levels it costs no divergence at all, which
no rounding of its values to other codes at about the same bits comes near.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from kbit.checkpoint.shard import stored_format
from kbit.checkpoint.source import CheckpointSource, TensorInfo
from kbit.formats.quant_format import LEVELS, QuantFormat
from kbit.host.errors import UnsupportedError

if TYPE_CHECKING:
    from kbit.formats.quant_tensor import QuantTensor

# What a plan says of a tensor that stays as its source holds it.
STORED = "stored"


def format_as_stored(info: TensorInfo) -> QuantFormat | None:
    """The format that holds a tensor exactly as its source does; None where that is not quantized."""
    found = stored_format(info)
    return _with_levels(found) if isinstance(found, QuantFormat) else None


def read_as_stored(source: CheckpointSource, name: str, format: QuantFormat) -> QuantTensor:
    """A tensor in the format that `format_as_stored` said.

    Raises:
        CheckpointError: it cannot be read.
        UnsupportedError: the source gives its values only, or in another format than its header said.
    """
    from kbit.formats.quant_tensor import QuantTensor

    weight = source.read_weight(name)
    if not isinstance(weight, QuantTensor) or not isinstance(weight.format, QuantFormat):
        raise UnsupportedError(f"{source.path}: {name} cannot be kept as it is stored: choose a format for it, or keep")
    if _with_levels(weight.format) != format:
        raise UnsupportedError(f"{source.path}: {name} is {weight.format}, not {format}: choose a format for it")
    parts = {**weight.stored, "codebook": weight.codebook}
    return QuantTensor.checked(name, format, weight.shape, parts, weight.codebook)


def _with_levels(format: QuantFormat) -> QuantFormat:
    return replace(format, dtype=LEVELS, exponent_bits=None, grid=None)
