"""A checkpoint as it would be after conversion, without writing it: for measuring many formats on one model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from kbit.checkpoint.source import CheckpointSource, TensorInfo
from kbit.formats.blockwise import quantize_rows
from kbit.quantizers.plan import Plan

if TYPE_CHECKING:
    import torch

    from kbit.formats.quant_tensor import QuantTensor


class QuantizedView(CheckpointSource):
    """A source whose planned weights come quantized.

    Args:
        source: the original model.
        plan: what to quantize and how (kept tensors come as the source has them, without rounding).
        read: reads a whole weight as float32; `source.read` unless the caller keeps the weights at hand.
    """

    def __init__(self, source: CheckpointSource, plan: Plan, read: Callable[[str], torch.Tensor] | None = None) -> None:
        self.path = source.path
        self.config = source.config
        self._source = source
        self._read = read or source.read
        self._formats = {tensor.source.name: tensor.format for tensor in plan.tensors if tensor.format}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._source.tensors

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self.read(name)[start:stop]

    def read(self, name: str) -> torch.Tensor:
        return self.read_quantized(name).dequantize() if name in self._formats else self._read(name)

    def read_weight(self, name: str) -> torch.Tensor | QuantTensor:
        return self.read_quantized(name) if name in self._formats else self._read(name)

    def read_quantized(self, name: str) -> QuantTensor:
        """A planned weight, rounded to nearest; the same bytes a conversion would write."""
        weight = self._read(name)
        shape = (weight.shape[0], weight.shape[1])
        return quantize_rows(lambda start, stop: weight[start:stop], shape, self._formats[name], name=name)

    def sidecar_files(self) -> Mapping[str, bytes]:
        return self._source.sidecar_files()

    def fingerprint(self) -> str:
        return self._source.fingerprint()
