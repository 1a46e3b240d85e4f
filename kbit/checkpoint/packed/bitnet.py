"""Ternary weights of BitNet b1.58, as transformers reads them (integrations/bitnet.py).

Packed: `weight` uint8 (N / 4, K), whose byte (i, k) holds the rows i, i + N / 4, i + N / 2 and i + 3 N / 4 in two bits
each, the lowest first, as value + 1; and `weight_scale` (1,), by which BitLinear divides, and AutoBitLinear multiplies
(of which there are also weights that are not packed, to be multiplied likewise). Online: `weight` as it was trained, of
which round(w / m) cut to -1 .. 1 is used, times m, the mean of |w|.

Both classes round what a linear reads to 8 bits a token. kbit computes with these weights and does not round: results
are those of the same weights in an ordinary linear, and differ from transformers' by that rounding.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kbit.checkpoint.packed.integer_weight import IntegerRows, integer_weight
from kbit.checkpoint.packed.weight import DenseWeight, PackedTensors, PackedWeight, chunks
from kbit.formats.stored import rounded
from kbit.host.errors import CheckpointError

_FLOATS = ("F32", "BF16", "F16")
_CLASSES, _MODES = ("bitlinear", "autobitlinear"), ("offline", "online")
_LEAST_MEAN = np.float32(1e-5)
# Linears that are left as they are where the configuration names none.
_KEPT = ("lm_head",)


def find(tensors: PackedTensors) -> list[PackedWeight]:
    """The packed weights of a folder.

    Raises:
        UnsupportedError: an option that kbit does not read; the line names it.
        CheckpointError: tensors that do not fit each other.
    """
    section = tensors.section
    kind, mode = section.get("linear_class", "bitlinear"), section.get("quantization_mode", "offline")
    if kind not in _CLASSES:
        raise tensors.refuse("linear_class", f"kbit reads {' and '.join(_CLASSES)}")
    if mode not in _MODES:
        raise tensors.refuse("quantization_mode", f"kbit reads {' and '.join(_MODES)}")
    if section.get("use_rms_norm"):
        raise tensors.refuse("use_rms_norm", "kbit has no norm before every linear")
    if kind == "autobitlinear" and mode == "online":
        return _trained(tensors)
    found: list[PackedWeight] = []
    for name in tensors.names:
        scale = f"{name}_scale"
        if not name.endswith(".weight") or scale not in tensors:
            continue
        if tensors.info(name).dtype == "U8":
            found.append(_packed(tensors, name, scale, divides=kind == "bitlinear"))
        elif kind == "autobitlinear":
            found.append(_scaled(tensors, name, scale))
    return found


def _packed(tensors: PackedTensors, name: str, scale: str, *, divides: bool) -> PackedWeight:
    quarter, columns = _matrix(tensors, name, ("U8",))
    tensors.expect(scale, _FLOATS, (1,), ())
    kind = "fp32" if divides else tensors.kind(scale)

    def factor() -> NDArray[Any]:
        stored = tensors.floats(scale).reshape(-1)[:1]
        if divides and not stored.all():
            raise CheckpointError(
                f"{tensors.file(scale)}: {scale} is 0, by which weights are divided; the file is damaged"
            )
        return rounded(np.float32(1) / stored if divides else stored, kind)

    def read(start: int, stop: int) -> IntegerRows:
        codes = np.empty((stop - start, columns), dtype=np.uint8)
        for place in range(start // quarter, (stop - 1) // quarter + 1):
            first, last = max(start, place * quarter), min(stop, (place + 1) * quarter)
            stored = tensors.read(name, first - place * quarter, last - place * quarter)
            codes[first - start : last - start] = stored >> (2 * place) & 3
        if codes.max(initial=0) == 3:
            raise CheckpointError(f"{tensors.file(name)}: {name} holds a code that stands for no ternary value")
        return IntegerRows(codes, np.repeat(factor()[None], stop - start, axis=0), None)

    return integer_weight(
        name, (4 * quarter, columns), (name, scale), "BitNet", bits=2, group=0, kind=kind, zero=1, read=read
    )


def _scaled(tensors: PackedTensors, name: str, scale: str) -> PackedWeight:
    """A ternary weight that is stored in floats."""
    shape = _matrix(tensors, name, _FLOATS)
    tensors.expect(scale, _FLOATS, (1,), ())

    def decode(start: int, stop: int) -> NDArray[np.float32]:
        values: NDArray[np.float32] = tensors.floats(name, start, stop) * tensors.floats(scale).reshape(-1)[0]
        return values

    return DenseWeight(name, shape, (name, scale), "BitNet, unpacked", tensors.kind(scale), decode)


def _trained(tensors: PackedTensors) -> list[PackedWeight]:
    """Every linear of a model that is stored as it was trained."""
    kept = tensors.section.get("modules_to_not_convert") or []
    if not isinstance(kept, list) or not all(isinstance(module, str) for module in kept):
        raise tensors.refuse("modules_to_not_convert", "it should be a list of names")
    if any(re.search(r"[^\w.]", module) for module in kept):
        raise tensors.refuse("modules_to_not_convert", "kbit reads names, not patterns")
    found: list[PackedWeight] = []
    for name in tensors.names:
        module = name.removesuffix(".weight")
        plain = module == name or len(tensors.info(name).shape) != 2 or module.endswith("embed_tokens")
        if not plain and not any(_of(module, other) for other in (*kept, *_KEPT)):
            found.append(_online(tensors, name))
    return found


def _online(tensors: PackedTensors, name: str) -> PackedWeight:
    rows, columns = _matrix(tensors, name, _FLOATS)
    kind = tensors.kind(name)

    def inverse_mean() -> NDArray[np.float32]:
        total = sum(
            float(np.abs(tensors.floats(name, begin, end)).sum(dtype=np.float64))
            for begin, end in chunks(0, rows, columns)
        )
        size = np.maximum(np.array([total / (rows * columns)], dtype=np.float32), _LEAST_MEAN)
        inverse: NDArray[np.float32] = np.float32(1) / size  # which is what weights are multiplied and divided by
        return inverse

    def read(start: int, stop: int) -> IntegerRows:
        inverse = tensors.kept(name, name, inverse_mean)
        codes = np.clip(np.rint(tensors.floats(name, start, stop) * inverse), -1, 1) + 1
        scales = np.repeat(rounded(np.float32(1) / inverse, kind)[None], stop - start, axis=0)
        return IntegerRows(codes.astype(np.uint8), scales, None)

    return integer_weight(
        name, (rows, columns), (name,), "BitNet as trained", bits=2, group=0, kind=kind, zero=1, read=read
    )


def _of(module: str, other: str) -> bool:
    """Whether a name means a module, as transformers takes them: from its start, or to its end."""
    return module == other or module.startswith(f"{other}.") or module.endswith(other)


def _matrix(tensors: PackedTensors, name: str, dtypes: tuple[str, ...]) -> tuple[int, int]:
    shape = tensors.expect(name, dtypes).shape
    if len(shape) != 2 or 0 in shape:
        raise CheckpointError(f"{tensors.file(name)}: {name} of shape {shape}: kbit reads packed matrices only")
    return shape[0], shape[1]
