"""A checkpoint as it would be after conversion, without writing it: for measuring many formats on one model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from kbit.checkpoint.source import CheckpointSource, TensorInfo
from kbit.quantizers.plan import Plan

if TYPE_CHECKING:
    import torch

    from kbit.formats.quant_tensor import QuantTensor


class QuantizedSource(CheckpointSource):
    """A model some of whose weights are quantized: what a method returns (kbit.quantizers.methods).

    `read_weight` gives a planned weight as a QuantTensor; or, where kbit's formats cannot hold what the method makes of
    it, as the float values it stands for.
    """

    @abstractmethod
    def target(self, name: str) -> torch.Tensor:
        """The weight (N, K), float32, that a quantized one stands for: what its error is measured against.

        The original weight, or what a method that changes weights first (a rotation) has made of it.
        """

    def extra_bits(self, name: str) -> int:
        """Bits that a planned weight takes beyond those of its format."""
        return 0


class QuantizedView(QuantizedSource):
    """A source whose planned weights come quantized, rounded to nearest.

    Attributes:
        formats: the format of each planned weight, by name.

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
        self.formats = {tensor.source.name: tensor.format for tensor in plan.tensors if tensor.format}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._source.tensors

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self.read(name)[start:stop]

    def read(self, name: str) -> torch.Tensor:
        return self.read_quantized(name).dequantize() if name in self.formats else self._read(name)

    def read_weight(self, name: str) -> torch.Tensor | QuantTensor:
        return self.read_quantized(name) if name in self.formats else self._read(name)

    def target(self, name: str) -> torch.Tensor:
        return self._read(name)

    def read_quantized(self, name: str) -> QuantTensor:
        """A planned weight, rounded to nearest; the same bytes a conversion would write."""
        weight = self._read(name)
        shape = (weight.shape[0], weight.shape[1])
        return self.formats[name].encode(lambda start, stop: weight[start:stop], shape, name=name)

    def sidecar_files(self) -> Mapping[str, bytes]:
        return self._source.sidecar_files()

    def fingerprint(self) -> str:
        return self._source.fingerprint()
