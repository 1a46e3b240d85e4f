"""A quantized model that keeps count, as its weights are read, of their errors."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from kbit.checkpoint.source import CheckpointSource, TensorInfo

if TYPE_CHECKING:
    import torch

    from kbit.evaluate.fisher import Diagonal
    from kbit.formats.quant_tensor import QuantTensor
    from kbit.quantizers.method import QuantizedSource


class Delegating(CheckpointSource):
    """A source that is another one, but for what a subclass changes."""

    def __init__(self, source: CheckpointSource) -> None:
        self.path, self.config = source.path, source.config
        self.source = source

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self.source.tensors

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self.source.read_rows(name, start, stop)

    def read(self, name: str) -> torch.Tensor:
        return self.source.read(name)

    def read_weight(self, name: str) -> torch.Tensor | QuantTensor:
        return self.source.read_weight(name)

    def sidecar_files(self) -> Mapping[str, bytes]:
        return self.source.sidecar_files()

    def fingerprint(self) -> str:
        return self.source.fingerprint()

    def close(self) -> None:
        self.source.close()


class MeteredSource(Delegating):
    """A quantized model that keeps count, as its weights are read, of their error and of the time quantizing takes.

    Args:
        source: what a method returned.
        formats: the planned weights' formats, which are what these weights are stored as.
        counted: names of the weights whose error counts.
        seconds: time the method has taken so far.
        diagonal: what gradients say of the counted weights; empty if they were not taken.
    """

    def __init__(
        self,
        source: QuantizedSource,
        formats: Mapping[str, str],
        counted: frozenset[str],
        seconds: float,
        diagonal: Mapping[str, Diagonal],
    ) -> None:
        super().__init__(source)
        # Not what the original is stored as: values that come as floats would be rounded to its 16 bits.
        self._tensors = {
            name: replace(info, stored_as=formats.get(name, info.stored_as)) for name, info in source.tensors.items()
        }
        self._quantized, self._counted = source, counted
        self._squares = self._errors = self._products = self._expected = 0.0
        self._diagonal = diagonal
        self.seconds = seconds

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    @property
    def error(self) -> float:
        """Squared error of the counted weights read so far over their square; 0 where all of them are zero."""
        return self._errors / self._squares if self._squares else 0.0

    @property
    def gain(self) -> float | None:
        """How much of the counted weights w is in what stands for them, q: <w, q> / <w, w>; None if all are zero."""
        return self._products / self._squares if self._squares else None

    @property
    def expected_kl(self) -> float | None:
        """The divergence that the errors of the counted weights make to second order; None if that is not known.

        Errors are looked at in the places of the original's weights, which they are in as long as no method changes
        weights before it quantizes them (a rotation).
        """
        known = self._counted <= self._diagonal.keys()
        return self._expected if known and self._counted else None

    def read_weight(self, name: str) -> torch.Tensor | QuantTensor:
        from kbit.formats.quant_tensor import QuantTensor

        started = time.perf_counter()
        weight = self._quantized.read_weight(name)
        self.seconds += time.perf_counter() - started
        if name in self._counted:
            target = self._quantized.target(name).reshape(-1)
            values = weight.dequantize() if isinstance(weight, QuantTensor) else weight.float()
            difference = values.reshape(-1) - target
            self._errors += float(difference.dot(difference))
            self._squares += float(target.dot(target))
            self._products += float(target.dot(values.reshape(-1)))
            if name in self._diagonal:
                self._expected += self._diagonal[name].expected_kl(difference.reshape(values.shape))
        return weight
