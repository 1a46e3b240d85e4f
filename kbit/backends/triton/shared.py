"""SharedMatrices: a nested model's matrices on a device, once for all widths that are in use."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from threading import Lock
from weakref import WeakSet

import torch

from kbit.backends.triton.weight import TritonMatrix
from kbit.formats.nested import NestedFormat
from kbit.formats.quant_tensor import QuantTensor
from kbit.kernels.triton.codecs.nested_planes import NestedScales, pack_planes


class SharedMatrices:
    """What was prepared of one model at any of its widths (a `kbit.graph.backend.SharedWeights`).

    Only users keep memory: a matrix that no width has any more is forgotten, and so are the planes that only wider ones
    had.

    Args:
        prepare: of the backend, for all other formats.
        device, dtype: the backend's.
    """

    def __init__(
        self, prepare: Callable[[torch.Tensor | QuantTensor], TritonMatrix], device: torch.device, dtype: torch.dtype
    ) -> None:
        self._prepare, self._device, self._dtype = prepare, device, dtype
        self._lock = Lock()
        self._matrices: dict[str, WeakSet[TritonMatrix]] = defaultdict(WeakSet)

    def weight(self, name: str, format: str, read: Callable[[], torch.Tensor | QuantTensor]) -> TritonMatrix:
        with self._lock:
            matrices = list(self._matrices[name])
            found = next((matrix for matrix in matrices if matrix.kept_as == format), None)
            if found is None:
                if NestedFormat.claims(format):
                    found = self._nested(NestedFormat.parse(format).bits, matrices, read)
                else:
                    found = self._prepare(read())
                found.kept_as = format
                self._matrices[name].add(found)
            return found

    def _nested(
        self, width: int, matrices: list[TritonMatrix], read: Callable[[], torch.Tensor | QuantTensor]
    ) -> TritonMatrix:
        """A width: on planes that other widths have, as far as these go, and on planes that are read."""
        widest = max((matrix for matrix in matrices if matrix.scales), key=lambda found: found.data.bits, default=None)
        planes = () if widest is None else widest.data.planes
        scales = None if widest is None else widest.scales
        if scales is None or scales.format.bits < width or len(planes) < width - 1:
            matrix = read()
            assert isinstance(matrix, QuantTensor)
            scales, planes = NestedScales.of(matrix), pack_planes(matrix, self._device, planes)
        return TritonMatrix(scales.at_width(width, planes, self._dtype), scales)
