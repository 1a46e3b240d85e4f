"""Weights that torchao has quantized, as its safetensors files hold them (torchao/prototype/safetensors).

A weight `x.weight` is `x._weight_qdata`, `x._weight_scale` and perhaps `x._weight_zero_point`; what they mean is JSON
in the file's metadata, under the weight's name: the class of the tensor and its settings. Read are

    Int8Tensor, IntxUnpackedToInt8Tensor    qdata int8 (N, K), of 1 to 8 bits; value = (q - zero) * scale
    Float8Tensor                            qdata e4m3 (N, K), scale float32

with scales for the matrix, a row, or a run of columns (`block_size`). Other classes are packed for a kernel of theirs,
and refused by name. How activations are quantized (`act_quant_kwargs`) says nothing of weights.
"""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kbit.checkpoint.packed import small_floats
from kbit.checkpoint.packed.integer_weight import IntegerRows, integer_weight
from kbit.checkpoint.packed.weight import PackedTensors, PackedWeight
from kbit.host.errors import CheckpointError, UnsupportedError

_QDATA = re.compile(r"(?P<module>.+)\._(?P<attribute>\w+?)_qdata")
_INTEGERS = ("Int8Tensor", "IntxUnpackedToInt8Tensor")
_FLOATS = ("F32", "F16", "BF16")


def find(tensors: PackedTensors) -> list[PackedWeight]:
    """The packed weights of a folder.

    Raises:
        UnsupportedError: a class that kbit does not read; the line names it.
        CheckpointError: tensors that do not fit each other, or that the metadata does not describe.
    """
    return [
        _weight(tensors, name, f"{match['module']}.{match['attribute']}", name.removesuffix("qdata"))
        for name in tensors.names
        if (match := _QDATA.fullmatch(name))
    ]


def _weight(tensors: PackedTensors, qdata: str, name: str, prefix: str) -> PackedWeight:
    kind, settings = _described(tensors, qdata, name)
    if kind not in (*_INTEGERS, "Float8Tensor"):
        raise UnsupportedError(
            f"{tensors.file(qdata)}: {name} is torchao's {kind[:40]}: of its classes kbit reads "
            f"{', '.join(_INTEGERS)} and Float8Tensor; use the original 16-bit checkpoint"
        )
    shape = tensors.info(qdata).shape
    if len(shape) != 2:
        raise UnsupportedError(f"{tensors.file(qdata)}: {qdata} of shape {shape}: kbit reads packed matrices only")
    rows, columns = shape
    scale, zero = f"{prefix}scale", f"{prefix}zero_point"
    count = tensors.expect(scale, _FLOATS).numel
    single = count == 1
    if not single and (count % rows or columns % (count // rows)):
        raise CheckpointError(
            f"{tensors.file(scale)}: {scale} of shape {tensors.info(scale).shape} does not fit a matrix of {shape}; "
            "download the model again"
        )
    group = 0 if single or count == rows else columns // (count // rows)
    groups = 1 if group == 0 else columns // group
    if settings.get("block_size") not in (None, [1, group or columns], [rows, columns]):
        raise UnsupportedError(
            f"{tensors.file(qdata)}: block_size {str(settings.get('block_size'))[:40]} of {name}: kbit reads scales "
            "for a run of columns, a row or the matrix; use the original 16-bit checkpoint"
        )

    def per_group(of: str, start: int, stop: int) -> NDArray[Any]:
        """Of rows: (R, G), as stored."""
        every = tensors.whole(name, of).reshape(1 if single else rows, groups)
        return every.repeat(stop - start, axis=0) if single else np.ascontiguousarray(every[start:stop])

    if kind == "Float8Tensor":
        return small_floats.eight_bits(
            tensors, name, (qdata, scale), "torchao fp8", block=group, scale_kind=tensors.kind(scale),
            scales=lambda start, stop: per_group(scale, start, stop), codes_in=qdata,
        )  # fmt: skip
    bits, parts = _bits(tensors, qdata, name, settings), (qdata, scale)
    tensors.expect(qdata, ("I8",))
    middle, zeros = 2 ** (bits - 1), None
    if zero in tensors:
        parts = (*parts, zero)  # type: ignore[assignment]
        tensors.expect(zero, ("I8", "I16", "I32", "I64"))
        if tensors.info(zero).numel != count:
            raise CheckpointError(f"{tensors.file(zero)}: {zero} does not fit {scale}; download the model again")
        zeros = zero if tensors.read(zero).any() else None

    def read(start: int, stop: int) -> IntegerRows:
        stored = tensors.read(qdata, start, stop).astype(np.int16) + middle
        if stored.min(initial=0) < 0 or stored.max(initial=0) >= 2**bits:
            raise CheckpointError(f"{tensors.file(qdata)}: {qdata} holds codes outside of {bits} bits; get it again")
        own = None if zeros is None else per_group(zeros, start, stop).astype(np.int16) + middle
        return IntegerRows(stored.astype(np.uint8), per_group(scale, start, stop), own)

    return integer_weight(
        name,
        (rows, columns),
        parts,
        f"torchao int{bits}",
        bits=bits,
        group=group,
        kind=tensors.kind(scale),
        zero=None if zeros is not None else middle,
        read=read,
    )


def _described(tensors: PackedTensors, qdata: str, name: str) -> tuple[str, dict[str, Any]]:
    """The class of a tensor and its settings.

    Raises:
        CheckpointError: the metadata says nothing of it, or nothing that makes sense.
    """
    text = tensors.metadata(qdata).get(name, "")
    try:
        found = json.loads(text)
        kind, settings = found["_type"], found["_data"]
    except (ValueError, KeyError, TypeError, RecursionError):
        kind = settings = None
    if not isinstance(kind, str) or not isinstance(settings, dict):
        raise CheckpointError(
            f"{tensors.file(qdata)}: the file's metadata does not say what {name} is, as torchao's does; download the "
            "model again"
        )
    return kind, settings


def _bits(tensors: PackedTensors, qdata: str, name: str, settings: dict[str, Any]) -> int:
    target = settings.get("target_dtype")
    named = target.get("_data") if isinstance(target, dict) else "int8"
    match = re.fullmatch(r"int([1-8])", str(named))
    if match is None:
        raise UnsupportedError(
            f"{tensors.file(qdata)}: target_dtype {str(named)[:40]!r} of {name}: kbit reads int1 to int8; use the "
            "original 16-bit checkpoint"
        )
    return int(match[1])
