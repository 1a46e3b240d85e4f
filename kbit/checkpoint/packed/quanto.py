"""Weights that optimum-quanto has quantized, as its state_dict holds them (optimum/quanto/tensor).

A weight `x.weight` of 8 bits is

    x.weight._data     int8 or float8 (N, K)
    x.weight._scale    a float a row (N, 1), or one

and value = scale * data, rounded to the scale's type. One of 2 or 4 bits is

    x.weight._data._data   uint8 (ceil(T / c), width): a table of T rows of codes, in c = 8 / bits slices one upon
                           another, the first in the lowest bits
    x.weight._scale        a float a row of the table (T, 1)
    x.weight._shift        the same: a float, value = scale * code - shift, rounded after the product and after the
                           difference; or an integer, value = scale * (code - shift)

The table is the matrix, or the matrix cut into groups of columns; no file says which, nor what shape the matrix had:
the group follows from the number of columns (nn/qmodule.py), and that from the layer (`_columns`). Beside these are
`x.input_scale` and `x.output_scale`, of activations, which say nothing of weights.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kbit.checkpoint.packed import small_floats
from kbit.checkpoint.packed.bits import sliced
from kbit.checkpoint.packed.integer_weight import IntegerRows, integer_weight
from kbit.checkpoint.packed.levels import Levels, LevelWeight
from kbit.checkpoint.packed.weight import DenseWeight, PackedTensors, PackedWeight
from kbit.formats.stored import rounded_values, widened
from kbit.host.errors import CheckpointError, UnsupportedError

_DATA = re.compile(r"(?P<name>.+\.weight)\._data(?P<packed>\._data)?")
_FLOATS = ("F16", "BF16", "F32")
_HIDDEN = ("hidden_size", "d_model", "n_embd", "dim")
# Layers by their names: what reads the model's hidden states, and what adds to them.
_INTO = re.compile(
    r"(q|k|v|qkv|gate|up|gate_up)_proj|lm_head|embed_out|query|key|value|query_key_value|[qkv]|[qkv]_lin|fc1|wi(_\d)?|w1|w3"
    r"|dense_h_to_4h|lin1|gate|router|score|classifier|Wi|Wqkv"
)
_BACK = re.compile(r"(o|out|down)_proj|fc2|o|wo|w2|dense_4h_to_h|out_lin|lin2|Wo")
_WHOLE_GROUP, _GROUP_STEP = 128, 32


def find(tensors: PackedTensors) -> list[PackedWeight]:
    """The packed weights of a folder.

    Raises:
        UnsupportedError: a type that kbit does not read, or a matrix whose shape cannot be told; the line names it.
        CheckpointError: tensors that do not fit each other.
    """
    return [
        _codes(tensors, match["name"], name) if match["packed"] else _bytes(tensors, match["name"], name)
        for name in tensors.names
        if (match := _DATA.fullmatch(name))
    ]


def _bytes(tensors: PackedTensors, name: str, data: str) -> PackedWeight:
    """A weight of 8 bits."""
    info = tensors.info(data)
    if len(info.shape) != 2:
        raise UnsupportedError(f"{tensors.file(data)}: {data} of shape {info.shape}: kbit reads packed matrices only")
    rows, columns = info.shape
    scale = f"{name}._scale"
    tensors.expect(scale, _FLOATS, (rows, 1), (rows,), (), (1,), (1, 1))
    kind, parts = tensors.kind(scale), (data, scale)

    def scales(start: int, stop: int) -> NDArray[Any]:
        """Of rows: (R, 1), as stored."""
        every: NDArray[Any] = tensors.whole(name, scale).reshape(-1, 1)
        return every.repeat(stop - start, axis=0) if len(every) == 1 else np.ascontiguousarray(every[start:stop])

    if info.dtype == "F8_E4M3":
        return small_floats.eight_bits(
            tensors, name, parts, "quanto qfloat8_e4m3fn", block=columns, scale_kind=kind, scales=scales, codes_in=data
        )
    if info.dtype == "F8_E5M2":

        def decode(start: int, stop: int) -> NDArray[np.float32]:
            # The upper half of an fp16 number.
            values = widened(tensors.read(data, start, stop).astype(np.uint16) << np.uint16(8), "fp16")
            if not np.isfinite(values).all():
                raise CheckpointError(f"{tensors.file(data)}: {data} holds values that are not finite; get it again")
            return rounded_values(values, kind) * widened(scales(start, stop), kind)

        return DenseWeight(name, (rows, columns), parts, "quanto qfloat8_e5m2", kind, decode)
    if info.dtype != "I8":
        raise UnsupportedError(
            f"{tensors.file(data)}: {data} is {info.dtype}; of quanto's 8-bit types kbit reads qint8, qfloat8_e4m3fn "
            "and qfloat8_e5m2; use the original 16-bit checkpoint"
        )

    def read(start: int, stop: int) -> IntegerRows:
        codes = (tensors.read(data, start, stop).astype(np.int16) + 128).astype(np.uint8)
        return IntegerRows(codes, scales(start, stop), None)

    return integer_weight(
        name, (rows, columns), parts, "quanto qint8", bits=8, group=0, kind=kind, zero=128, read=read
    )  # fmt: skip


def _codes(tensors: PackedTensors, name: str, data: str) -> PackedWeight:
    """A weight of 2 or 4 bits."""
    info = tensors.expect(data, ("U8",))
    scale, shift = f"{name}._scale", f"{name}._shift"
    count = tensors.expect(scale, _FLOATS).numel
    tensors.expect(shift, (*_FLOATS, "U8", "I8"), tensors.info(scale).shape)
    slices = next((n for n in (2, 4) if len(info.shape) == 2 and info.shape[0] == -(-count // n)), None)
    if slices is None or min(info.shape) < 1 or tensors.info(scale).shape not in ((count, 1), (count,)):
        raise CheckpointError(
            f"{tensors.file(data)}: {data} of shape {info.shape} does not fit {scale} of shape "
            f"{tensors.info(scale).shape}; download the model again"
        )
    bits, width = 8 // slices, info.shape[1]
    columns = _columns(tensors, name, count, width)
    rows, groups = count * width // columns, columns // width
    kind, parts, label = tensors.kind(scale), (data, scale, shift), f"quanto qint{bits}"

    def codes_of(start: int, stop: int) -> NDArray[np.uint8]:
        table = tensors.whole(name, data)
        found = sliced(table, bits, slices, start * groups, stop * groups, highest_first=False)
        return found.reshape(stop - start, columns)

    def stored(of: str, start: int, stop: int) -> NDArray[Any]:
        """Of rows: (R, G)."""
        found: NDArray[Any] = tensors.whole(name, of).reshape(rows, groups)[start:stop]
        return np.ascontiguousarray(found)

    if tensors.info(shift).dtype not in _FLOATS:

        def read(start: int, stop: int) -> IntegerRows:
            zeros = stored(shift, start, stop).view(np.int8)
            return IntegerRows(codes_of(start, stop), stored(scale, start, stop), zeros)

        return integer_weight(
            name, (rows, columns), parts, label, bits=bits, group=width, kind=kind, zero=None, read=read
        )  # fmt: skip
    shifts_kind, steps = tensors.kind(shift), np.arange(1 << bits, dtype=np.float32)

    def levels(start: int, stop: int) -> Levels:
        products = rounded_values(widened(stored(scale, start, stop), kind)[..., None] * steps, kind)
        shifts = widened(stored(shift, start, stop), shifts_kind)[..., None]
        return Levels(codes_of(start, stop), products - shifts)

    return LevelWeight(name, (rows, columns), parts, label, kind, levels)


def _columns(tensors: PackedTensors, name: str, count: int, width: int) -> int:
    """The columns of the matrix that a table of `count` rows is made of.

    Raises:
        UnsupportedError: neither the layer's name nor its bias says that.
        CheckpointError: the table is none of such a matrix.
    """
    if width not in range(_GROUP_STEP, _WHOLE_GROUP + 1, _GROUP_STEP):
        return width  # no group
    layer = name.removesuffix(".weight")
    last = layer.rpartition(".")[2]
    config = tensors.config if any(key in tensors.config for key in _HIDDEN) else tensors.config.get("text_config")
    hidden = next((config[key] for key in _HIDDEN if key in config), None) if isinstance(config, dict) else None
    bias = f"{layer}.bias"
    if bias in tensors:
        columns = count * width // max(1, tensors.info(bias).numel)
    elif type(hidden) is int and hidden > 0 and (_INTO.fullmatch(last) or _BACK.fullmatch(last)):
        columns = hidden if _INTO.fullmatch(last) else count * width // hidden
    else:
        raise UnsupportedError(
            f"{tensors.path}: quanto does not say how many columns {name} has, and kbit cannot tell it from the layer's"
            " name; use the original 16-bit checkpoint"
        )
    if columns < 1 or count * width % columns or _group(columns) != width:
        raise CheckpointError(
            f"{tensors.file(f'{name}._scale')}: {name}: {count} groups of {width} make no matrix of {columns} columns, "
            "as the layer should have; config.json is another model's, or the file is damaged"
        )
    return columns


def _group(columns: int) -> int:
    """The columns that share a scale (QModuleMixin.__init__)."""
    group = _WHOLE_GROUP
    while group > _GROUP_STEP and columns % group:
        group -= _GROUP_STEP
    return group if columns > _WHOLE_GROUP and columns % group == 0 else columns
