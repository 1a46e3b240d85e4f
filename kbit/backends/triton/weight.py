"""TritonMatrix: a matrix in the layout the Triton kernels read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from kbit.graph.ops import Vector, Weight
from kbit.host.errors import UnsupportedError
from kbit.kernels.triton.codecs.joined import joined
from kbit.kernels.triton.codecs.layout import TritonWeight
from kbit.kernels.triton.codecs.nested_planes import NestedScales
from kbit.kernels.triton.product.rounded import with_activations


@dataclass(eq=False)
class TritonMatrix(Weight):
    """A prepared matrix.

    Attributes:
        data: the tensors. They may become views of a larger matrix (`merge`), with the same contents, and be marked so
            that products round their activations (`round_activations`).
        scales: of a nested matrix, what its other widths are made of besides planes; None: no other is expected.
        kept_as: the format that it was prepared from, as `SharedMatrices` calls it.
    """

    data: TritonWeight
    scales: NestedScales | None = None
    kept_as: str = ""

    @property
    def shape(self) -> tuple[int, int]:
        return self.data.shape

    @property
    def nbytes(self) -> int:
        return self.data.nbytes


def triton_weight(weight: Weight) -> TritonWeight:
    """The tensors of a weight.

    Raises:
        TypeError: another backend prepared it.
    """
    return _matrix(weight).data


def triton_vector(vector: Vector) -> torch.Tensor:
    """A norm's weight or a bias (N,).

    Raises:
        TypeError: another backend prepared it.
    """
    if not isinstance(vector, torch.Tensor):
        raise TypeError(f"{type(vector).__name__} was prepared by another backend")
    return vector


def round_activations(weights: Iterable[Weight], kind: str) -> None:
    """Marks weights so that their products with many tokens round these to `kind`, "int8" or "fp8".

    Float weights stay as they are: there is nothing of 8 bits to multiply with.

    Raises:
        UnsupportedError: a format whose products do not, or no weight is quantized.
    """
    matrices = [_matrix(weight) for weight in weights]
    if all(matrix.data.dense is not None for matrix in matrices):
        raise UnsupportedError(
            f"--compute {kind} is for quantized weights, and this model's layers have none: quantize it, or use "
            "--compute fp16"
        )
    for matrix in matrices:
        matrix.data = with_activations(matrix.data, kind)


def merge(weights: tuple[Weight, ...]) -> TritonWeight | None:
    """Matrices that share an input (q, k, v), one below the other, so that one kernel multiplies them all.

    The parts become views of the result: nothing is held twice, and what lies like that already stays where it is. None
    where they do not fit together: formats or tables that differ, rows that are no whole tiles, double-quantized scales
    (whose factors belong to runs of 256 blocks, which would shift).
    """
    matrices = [_matrix(weight) for weight in weights]
    parts = [matrix.data for matrix in matrices]
    first = parts[0]
    if len(parts) == 1 or first.scales_super is not None or first.dense is not None or first.rotation is not None:
        return None
    for part in parts:
        if part.outliers is not None:
            return None
        alike = (part.format, part.kind, part.multiplier, part.shape[1], part.dtype) == (
            first.format, first.kind, first.multiplier, first.shape[1], first.dtype,
        )  # fmt: skip
        if not alike or part.shape[0] != part.padded[0] or not _equal(part.table, first.table):
            return None
    rows = sum(part.shape[0] for part in parts)
    merged = replace(
        first,
        shape=(rows, first.shape[1]),
        padded=(rows, first.padded[1]),
        planes=tuple(joined(planes) for planes in zip(*(part.planes for part in parts), strict=True)),
        scales=_joined([part.scales for part in parts]),
        offsets=_joined([part.offsets for part in parts]),
        lift=min(part.lift for part in parts),
    )
    start = 0
    for matrix, part in zip(matrices, parts, strict=True):
        tiles = slice(start, start + part.planes[0].shape[0])
        matrix.data = replace(
            part,
            planes=tuple(plane[tiles] for plane in merged.planes),
            scales=None if merged.scales is None else merged.scales[tiles],
            offsets=None if merged.offsets is None else merged.offsets[tiles],
        )
        start = tiles.stop
    return merged


def _matrix(weight: Weight) -> TritonMatrix:
    if not isinstance(weight, TritonMatrix):
        raise TypeError(f"{type(weight).__name__} was prepared by another backend")
    return weight


def _equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def _joined(parts: list[torch.Tensor | None]) -> torch.Tensor | None:
    present = [part for part in parts if part is not None]
    return joined(present) if len(present) == len(parts) else None
