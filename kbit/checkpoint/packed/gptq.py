"""Weights packed by GPTQ's tools: AutoGPTQ, GPTQModel, and AutoRound where it writes their layout.

`qweight` int32 (K * bits / 32, N): a column is a stream of codes along the inputs, the first in the lowest bits (2, 3,
4 and 8 bits; 5, 6 and 7 are in planes). `qzeros` int32 (G, N * bits / 32): the same along the outputs. `scales` (G, N).
`g_idx` int32 (K): the group of every input. value = (code - zero) * scale, rounded to the type of the scales
(GPTQModel, nn_modules/qlinear/__init__.py, dequantize_weight).

The first layout ("gptq") stores zero - 1, "gptq_v2" the zero itself. GPTQModel adds the 1 to whole words, so that a
carry runs into the next code; so does this reader, but for 3, 5, 6 and 7 bits, where both add to every code by itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kbit.checkpoint.packed import bits as unpack
from kbit.checkpoint.packed.integer_weight import IntegerRows, integer_weight
from kbit.checkpoint.packed.weight import PackedTensors, PackedWeight
from kbit.host.errors import CheckpointError

WIDTHS = (2, 3, 4, 5, 6, 7, 8)
_LAYOUTS = {"gptq": 1, "gptq_v2": 0}
# 1 in every code of a word.
_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
_PLANAR = (5, 6, 7)
# What a rule of `dynamic` may change: both show in the shapes of the tensors.
_DYNAMIC = frozenset(("bits", "group_size"))


def find(tensors: PackedTensors) -> list[PackedWeight]:
    """The packed weights of a folder.

    Raises:
        UnsupportedError: an option that kbit does not read; the line names it.
        CheckpointError: tensors that do not fit each other or the configuration.
    """
    section = tensors.section
    layout = section.get("checkpoint_format", section.get("format", "gptq"))
    if not isinstance(layout, str) or layout not in _LAYOUTS:
        key = "checkpoint_format" if "checkpoint_format" in section else "format"
        raise tensors.refuse(key, f"of GPTQ's layouts kbit reads {' and '.join(_LAYOUTS)}")
    for key in ("is_marlin_format", "use_exllama_layout"):
        if section.get(key):
            raise tensors.refuse(key, "weights rearranged for one kernel")
    if section.get("pack_dtype", "int32") != "int32":
        raise tensors.refuse("pack_dtype", "kbit reads words of int32")
    rules = section.get("dynamic") or {}
    for rule in rules.values() if isinstance(rules, dict) else [rules]:
        if rule is not False and not (isinstance(rule, dict) and rule.keys() <= _DYNAMIC):
            raise tensors.refuse("dynamic", "a rule for some modules that changes more than bits and group_size")
    return [
        _Matrix(tensors, name.removesuffix(".qweight"), _LAYOUTS[layout], bool(rules)).weight()
        for name in tensors.names
        if name.endswith(".qweight")
    ]


class _Matrix:
    """One packed matrix.

    Args:
        tensors: of the folder.
        module: the name of the layer.
        less: what is to be added to stored zeros.
        mixed: whether widths differ between layers.
    """

    def __init__(self, tensors: PackedTensors, module: str, less: int, mixed: bool) -> None:
        self._tensors, self._module, self._less = tensors, module, less
        self._codes, self._zeros, self._scales = (f"{module}.{end}" for end in ("qweight", "qzeros", "scales"))
        self._order = f"{module}.g_idx"
        words = tensors.expect(self._codes, ("I32",))
        self._kind = tensors.kind(self._scales)
        scales = tensors.info(self._scales)
        if len(words.shape) != 2 or len(scales.shape) != 2 or words.shape[1] != scales.shape[1] or 0 in scales.shape:
            raise CheckpointError(
                f"{tensors.file(self._codes)}: {self._codes} {words.shape} and {self._scales} {scales.shape} do not "
                "fit each other; download the model again"
            )
        self._bits = tensors.integer("bits", allowed=WIDTHS)
        self._has_order = self._order in tensors
        columns = words.shape[0] * 32 // self._bits
        if self._has_order:
            columns = tensors.expect(self._order, ("I32", "I64")).numel
            found = words.shape[0] * 32 // max(1, columns)
            if found in WIDTHS and mixed:
                self._bits = found
        self._groups, outputs = scales.shape
        if columns * self._bits != words.shape[0] * 32 or outputs * self._bits % 32:
            raise CheckpointError(
                f"{tensors.file(self._codes)}: {self._codes} {words.shape} does not hold {columns} x {outputs} codes "
                f"of {self._bits} bits: bits in config.json is wrong, or the file is damaged"
            )
        tensors.expect(self._zeros, ("I32",), (self._groups, outputs * self._bits // 32))
        self._shape = (outputs, columns)
        self._group = self._group_size(mixed)

    def _group_size(self, mixed: bool) -> int:
        """Columns of a group, from the shapes, which must be what the configuration says."""
        columns, named = self._shape[1], self._tensors.integer("group_size", -1)
        if mixed:
            named = -(-columns // self._groups) if self._groups > 1 else columns
        group = columns if named in (-1, 0) else named
        if group < 1 or -(-columns // group) != self._groups:
            raise CheckpointError(
                f"{self._tensors.file(self._scales)}: {self._scales} has {self._groups} groups of {columns} columns, "
                f"but group_size in config.json is {named}: it is another model's, or the file is damaged"
            )
        return group

    def weight(self) -> PackedWeight:
        section = self._tensors.section
        symmetric, ordered = section.get("sym", True) is True, section.get("desc_act") is True and self._has_order
        parts = (self._codes, self._zeros, self._scales, *((self._order,) if self._has_order else ()))
        return integer_weight(
            f"{self._module}.weight",
            self._shape,
            parts,
            f"GPTQ {self._bits}-bit",
            bits=self._bits,
            group=self._group,
            kind=self._kind,
            zero=2 ** (self._bits - 1) if symmetric else None,
            read=self._read,
            group_of=self._kept_order if ordered and self._groups > 1 else None,
        )

    def _read(self, start: int, stop: int) -> IntegerRows:
        words = self._tensors.whole(self._module, self._codes)[:, start:stop].T
        unpacked = unpack.planar if self._bits in _PLANAR else unpack.stream
        codes = unpacked(np.ascontiguousarray(words), self._bits)
        scales = np.ascontiguousarray(self._tensors.whole(self._module, self._scales)[:, start:stop].T)
        if self._has_order and self._tensors.section.get("desc_act") is not True:
            self._tensors.kept(self._module, "checked order", self._check_order)
        zeros = self._tensors.kept(self._module, "zeros", self._all_zeros)[start:stop]
        middle = 2 ** (self._bits - 1)
        if self._tensors.section.get("sym", True) is not True:
            return IntegerRows(codes, scales, zeros)
        if not bool((zeros == middle).all()):
            shifted = bool((zeros == middle + 1).all()) and self._less
            remedy = "checkpoint_format to gptq_v2" if shifted else "sym to false"
            raise CheckpointError(
                f"{self._tensors.file(self._zeros)}: {self._zeros} holds other zeros than {middle}, though sym is "
                f"true: set {remedy} in quantization_config of {self._tensors.path}/config.json"
            )
        return IntegerRows(codes, scales, None)

    def _all_zeros(self) -> NDArray[Any]:
        """Of every row and group: (N, G)."""
        words = self._tensors.whole(self._module, self._zeros)
        if self._less and self._bits in _ONES:
            words = words.view(np.uint32) + np.uint32(_ONES[self._bits])
        zeros = unpack.planar(words, self._bits) if self._bits in _PLANAR else unpack.stream(words, self._bits)
        if self._less and self._bits not in _ONES:
            zeros = (zeros + np.uint8(1)) & np.uint8(2**self._bits - 1)
        return np.ascontiguousarray(zeros.T)

    def _group_of(self) -> NDArray[np.intp]:
        order = self._tensors.whole(self._module, self._order).astype(np.intp)
        if order.size and not 0 <= order.min() <= order.max() < self._groups:
            raise CheckpointError(
                f"{self._tensors.file(self._order)}: {self._order} names groups from {order.min()} to {order.max()}, "
                f"but there are {self._groups}; download the model again"
            )
        return order

    def _kept_order(self) -> NDArray[np.intp]:
        return self._tensors.kept(self._module, "order", self._group_of)

    def _check_order(self) -> NDArray[np.intp]:
        """The order, which is that of the columns.

        Raises:
            CheckpointError: it is not.
        """
        order = self._group_of()
        if not np.array_equal(order, np.arange(self._shape[1]) // self._group):
            raise CheckpointError(
                f"{self._tensors.file(self._order)}: {self._order} is not the order of the columns, though desc_act is "
                f"false: set desc_act to true in quantization_config of {self._tensors.path}/config.json"
            )
        return order
