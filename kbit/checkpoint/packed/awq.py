"""Weights packed by AWQ's tools (AutoAWQ, llm-awq, GPTQModel) in the "gemm" layout.

`qweight` int32 (K, N / 8): eight outputs a word, of which nibble i is output (0, 2, 4, 6, 1, 3, 5, 7)[i]; `qzeros`
int32 (G, N / 8) the same; `scales` (G, N). value = (code - zero) * scale, rounded to the type of the scales (AutoAWQ,
awq/utils/packing_utils.py, dequantize_gemm).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kbit.checkpoint.packed import bits as unpack
from kbit.checkpoint.packed.integer_weight import IntegerRows, integer_weight
from kbit.checkpoint.packed.weight import PackedTensors, PackedWeight
from kbit.host.errors import CheckpointError

# The nibble of each of eight outputs.
_NIBBLE_OF = (0, 4, 1, 5, 2, 6, 3, 7)


def find(tensors: PackedTensors) -> list[PackedWeight]:
    """The packed weights of a folder.

    Raises:
        UnsupportedError: an option that kbit does not read; the line names it.
        CheckpointError: tensors that do not fit each other or the configuration.
    """
    section = tensors.section
    for key in ("version", "checkpoint_format", "format"):
        if str(section.get(key, "gemm")).lower() != "gemm":
            raise tensors.refuse(key, "of AWQ's layouts kbit reads gemm")
    if section.get("zero_point", True) is not True:
        raise tensors.refuse("zero_point", "kbit reads weights with zero points")
    tensors.integer("bits" if "bits" in section else "w_bit", 4, allowed=(4,))
    return [
        _Matrix(tensors, name.removesuffix(".qweight")).weight() for name in tensors.names if name.endswith(".qweight")
    ]


class _Matrix:
    """One packed matrix."""

    def __init__(self, tensors: PackedTensors, module: str) -> None:
        self._tensors, self._module = tensors, module
        self._codes, self._zeros, self._scales = (f"{module}.{end}" for end in ("qweight", "qzeros", "scales"))
        words = tensors.expect(self._codes, ("I32",))
        if len(words.shape) != 2 or 0 in words.shape:
            raise CheckpointError(
                f"{tensors.file(self._codes)}: {self._codes} has the shape {words.shape}, not a matrix's"
            )
        columns, outputs = words.shape[0], words.shape[1] * 8
        section = tensors.section
        named = tensors.integer("q_group_size" if "q_group_size" in section else "group_size", 128)
        self._group = columns if named in (-1, 0) else named
        if self._group < 1 or columns % self._group:
            raise CheckpointError(
                f"{tensors.path}/config.json: group_size {named} does not divide the {columns} columns of {self._codes}"
            )
        groups = columns // self._group
        tensors.expect(self._zeros, ("I32",), (groups, outputs // 8))
        tensors.expect(self._scales, ("F16", "BF16", "F32"), (groups, outputs))
        self._shape = (outputs, columns)

    def weight(self) -> PackedWeight:
        return integer_weight(
            f"{self._module}.weight",
            self._shape,
            (self._codes, self._zeros, self._scales),
            "AWQ 4-bit",
            bits=4,
            group=self._group,
            kind=self._tensors.kind(self._scales),
            zero=None,
            read=self._read,
        )

    def _read(self, start: int, stop: int) -> IntegerRows:
        scales = self._tensors.whole(self._module, self._scales)[:, start:stop].T
        return IntegerRows(
            self._outputs(self._codes, start, stop),
            np.ascontiguousarray(scales),
            self._outputs(self._zeros, start, stop),
        )

    def _outputs(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Codes of some outputs, one row each."""
        first, last = start // 8, -(-stop // 8)
        words = self._tensors.whole(self._module, name)[:, first:last]
        codes = unpack.stream(words, 4).reshape(len(words), -1, 8)[..., _NIBBLE_OF].reshape(len(words), -1)
        return np.ascontiguousarray(codes[:, start - 8 * first : stop - 8 * first].T)
