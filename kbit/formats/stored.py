"""Matrices as they are stored, without torch: what checkpoint readers yield and the CPU engine takes.

numpy has no bfloat16, so 16-bit floats are kept as their bit patterns, in uint16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from kbit.formats.codec import Codec
from kbit.host.errors import CheckpointError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kbit.formats.quant_tensor import QuantTensor

# numpy's type for every safetensors dtype a stored part has.
NUMPY_DTYPES = {"U8": np.uint8, "I8": np.int8, "I32": np.int32, "F16": np.uint16, "BF16": np.uint16, "F32": np.float32}

# Number types by safetensors name, as the kernels call them.
KINDS = {"F16": "fp16", "BF16": "bf16", "F32": "fp32"}


@dataclass(frozen=True, eq=False)
class DenseMatrix:
    """A matrix that is not quantized.

    Attributes:
        values: (N, K): float32, or uint16 patterns.
        kind: "fp32", "fp16" or "bf16".
    """

    values: NDArray[Any]
    kind: str

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return (self.values.shape[0], self.values.shape[1])


@dataclass(frozen=True, eq=False)
class StoredMatrix:
    """A quantized matrix: a `QuantTensor` whose arrays are numpy's.

    Attributes:
        format: what the arrays mean.
        shape: (N, K).
        parts: the stored arrays by part name, as `format.parts` lists them.
        codebook: float32 (format.codebook_size,).
    """

    format: Codec
    shape: tuple[int, int]
    parts: Mapping[str, NDArray[Any]]
    codebook: NDArray[np.float32]

    @classmethod
    def checked(
        cls,
        name: str,
        format: Codec,
        shape: tuple[int, int],
        parts: Mapping[str, NDArray[Any]],
        codebook: NDArray[np.float32],
    ) -> StoredMatrix:
        """A StoredMatrix from data that cannot be trusted (a file).

        Raises:
            CheckpointError: an array is missing, has the wrong type or shape, or holds NaN or infinity.
        """
        for suffix, part in format.parts(*shape).items():
            array = parts.get(suffix)
            if array is None:
                raise CheckpointError(f"{name}.{suffix} is missing: the format {format} stores it; convert again")
            if array.dtype != NUMPY_DTYPES[part.dtype] or array.shape != part.shape:
                raise CheckpointError(
                    f"{name}.{suffix} is {array.dtype} {array.shape}, but {format} at {shape} stores {part.dtype} "
                    f"{part.shape}; convert again"
                )
            if part.dtype in KINDS and not is_finite(array, KINDS[part.dtype]):
                raise CheckpointError(f"{name}.{suffix} holds NaN or infinity: the file is damaged; convert again")
        format.check_stored(name, parts, shape)
        return cls(format, shape, dict(parts), codebook)

    def tensor(self) -> QuantTensor:
        """The same in torch, on the same memory."""
        from kbit.formats.quant_tensor import QuantTensor, from_numpy

        parts = self.format.parts(*self.shape)
        stored = {suffix: from_numpy(array, parts[suffix].dtype) for suffix, array in self.parts.items()}
        return QuantTensor(self.format, self.shape, stored, from_numpy(self.codebook, "F32"))


AnyStored: TypeAlias = "StoredMatrix | DenseMatrix"


def is_finite(values: NDArray[Any], kind: str) -> bool:
    """Whether no number is NaN or infinite; 16-bit ones come as patterns."""
    if kind == "fp32":
        # A sum is finite only if every term is; it may overflow without a bad term, so look at each before answering.
        with np.errstate(all="ignore"):
            return bool(np.isfinite(values.sum())) or bool(np.isfinite(values).all())
    exponent = np.uint16(0x7C00 if kind == "fp16" else 0x7F80)
    return not bool(((values & exponent) == exponent).any())


def widened(values: NDArray[Any], kind: str) -> NDArray[np.float32]:
    """Numbers of a kind as float32; exact."""
    if kind == "fp16":
        return values.view(np.float16).astype(np.float32)
    if kind == "bf16":
        wide: NDArray[np.float32] = (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return wide
    return values.astype(np.float32, copy=False)


def narrowed(values: NDArray[np.float32], kind: str) -> NDArray[Any]:
    """float32 numbers that a kind holds exactly, in that kind; 16-bit ones as patterns."""
    if kind == "fp16":
        return values.astype(np.float16).view(np.uint16)
    if kind == "bf16":
        patterns: NDArray[Any] = (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
        return patterns
    return values


def rounded(values: NDArray[np.float32], kind: str) -> NDArray[Any]:
    """float32 numbers rounded to the nearest of a kind, ties to even; 16-bit ones as patterns."""
    if kind == "fp16":
        with np.errstate(over="ignore"):  # what fp16 cannot hold becomes infinite, which those who load refuse
            return values.astype(np.float16).view(np.uint16)
    if kind == "bf16":
        bits = values.view(np.uint32)
        up = bits >> np.uint32(16)
        up &= np.uint32(1)
        up += np.uint32(0x7FFF)
        up += bits
        if not is_finite(values, "fp32"):
            # The sum would turn a NaN with few bits set into an infinity.
            up = np.where(np.isnan(values), bits | np.uint32(0x400000), up)
        up >>= np.uint32(16)
        patterns: NDArray[Any] = up.astype(np.uint16)
        return patterns
    return values


def rounded_values(values: NDArray[np.float32], kind: str) -> NDArray[np.float32]:
    """The same, as float32: what `widened(rounded(values, kind), kind)` is, without conversions where none are needed.

    numpy converts to and from float16 one number at a time; numbers in its normal range are rounded in their bits.
    """
    if kind == "fp16":
        bits = values.view(np.uint32)
        size = bits & np.uint32(0x7FFFFFFF)
        # From 2^-14 up to what would round to infinity; and zero.
        if bool((((size >= 0x38800000) & (size < 0x477FF000)) | (size == 0)).all()):
            up = bits >> np.uint32(13)
            up &= np.uint32(1)
            up += np.uint32(0xFFF)
            up += bits
            up &= np.uint32(0xFFFFE000)
            found: NDArray[np.float32] = up.view(np.float32)
            return found
    return widened(rounded(values, kind), kind)
