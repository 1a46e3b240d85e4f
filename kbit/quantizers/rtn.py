"""Rounding to nearest: scales from each block's largest weight, the nearest code for each weight (`Codec.encode`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from kbit.checkpoint.source import CheckpointSource, TensorInfo
from kbit.quantizers.method import Encode, Method, MethodInput, QuantizedSource

if TYPE_CHECKING:
    import torch

    from kbit.formats.quant_tensor import QuantTensor
    from kbit.quantizers.plan import Plan


class RoundToNearest(Method):
    """Every weight by itself; no calibration."""

    name = "rtn"
    about = "rounding to nearest, no calibration"
    version = 1

    def apply(self, job: MethodInput) -> QuantizedSource:
        return QuantizedView(job.source, job.plan, job.read, job.encode)


class QuantizedView(QuantizedSource):
    """A source whose planned weights come quantized, rounded to nearest. Kept tensors come as the source has them.

    Attributes:
        formats: the format of each weight that is rounded, by name.

    Args:
        source: the original model.
        plan, read, encode: as for MethodInput.
    """

    def __init__(
        self,
        source: CheckpointSource,
        plan: Plan,
        read: Callable[[str], torch.Tensor] | None = None,
        encode: Encode | None = None,
    ) -> None:
        self.path = source.path
        self.config = source.config
        self._source = source
        self._kept_at_hand = read
        self._encode = encode
        self.formats = {t.source.name: t.format for t in plan.tensors if t.format and not t.as_stored}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._source.tensors

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        if name not in self.formats and self._kept_at_hand is None:
            return self._source.read_rows(name, start, stop)
        return self.read(name)[start:stop]

    def read(self, name: str) -> torch.Tensor:
        return self.read_quantized(name).dequantize() if name in self.formats else self.target(name)

    def read_weight(self, name: str) -> torch.Tensor | QuantTensor:
        return self.read_quantized(name) if name in self.formats else self.target(name)

    def target(self, name: str) -> torch.Tensor:
        return (self._kept_at_hand or self._source.read)(name)

    def read_quantized(self, name: str) -> QuantTensor:
        """A planned weight, rounded to nearest."""
        format = self.formats[name]
        if self._encode is not None:
            return self._encode(self._source, name, format)
        rows, columns = self._source.tensors[name].shape
        if self._kept_at_hand is None:
            return format.encode(
                lambda start, stop: self._source.read_rows(name, start, stop), (rows, columns), name=name
            )
        weight = self._kept_at_hand(name)
        return format.encode(lambda start, stop: weight[start:stop], (rows, columns), name=name)

    def sidecar_files(self) -> Mapping[str, bytes]:
        return self._source.sidecar_files()

    def fingerprint(self) -> str:
        return self._source.fingerprint()
