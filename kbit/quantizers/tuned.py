"""Rounding with a calibration, and then the scales of rows and the weights of norms tuned against the original."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from kbit.formats.codec import Codec
from kbit.models.families import spec_from_config
from kbit.models.params import parameters
from kbit.quantizers.calibrated import TwoSided
from kbit.quantizers.method import MethodInput, QuantizedSource
from kbit.quantizers.rtn import QuantizedView
from kbit.quantizers.settings import Tuning
from kbit.quantizers.trellis import Trellis

if TYPE_CHECKING:
    import torch

    from kbit.calibration.store import CalibrationFolder
    from kbit.checkpoint.source import CheckpointSource
    from kbit.formats.quant_tensor import QuantTensor


class TunedTwoSided(TwoSided):
    """Two-sided LDLQ, rows and norms tuned (kbit.quantizers.row_scales)."""

    name = "ldlq2-tuned"
    about = "ldlq2, then row scales and norms tuned against the original, kept if that helps: much slower"
    version = 3
    tuning = Tuning()

    @property
    def settings(self) -> Mapping[str, Any]:
        return {**super().settings, "tuning": asdict(self.tuning)}

    def memory(self, source: CheckpointSource) -> int:
        spec = spec_from_config(source.config, where=f"config of {source.path}")
        weights = sum(p.shape[0] * p.shape[1] for p in parameters(spec) if len(p.shape) == 2)
        return max(super().memory(source), 8 * weights)

    def apply(self, job: MethodInput) -> QuantizedSource:
        from kbit.calibration.run import calibrate

        rounded = super().apply(job)
        assert isinstance(rounded, QuantizedView)
        # In the source's order, which is that of layers: a layer's matrices are rounded together.
        matrices = {name: rounded.read_quantized(name) for name in job.source.tensors if name in rounded.formats}
        return _AtHand(job, matrices, self._factors(job, matrices, calibrate(job.source, self.request)))

    def _factors(
        self, job: MethodInput, matrices: Mapping[str, QuantTensor], calibration: CalibrationFolder
    ) -> Mapping[str, torch.Tensor]:
        """Of rows and norms, by name; none where they do not help. Kept beside the calibration, for a later run."""
        from safetensors.torch import load, save

        from kbit.calibration.held_out import held_out_tokens
        from kbit.host.files import write_durably
        from kbit.quantizers.row_scales import divergence, tune_rows

        kept = calibration.path / f"rows-{job.plan.plan_id[:24]}.safetensors"
        if kept.exists():
            return load(kept.read_bytes())
        text, held_out = calibration.ids(), held_out_tokens(job.source, self.request)
        assert text is not None
        plain = _AtHand(job, matrices, {})
        factors = tune_rows(job.source, plain, matrices, text, self.tuning, progress=job.progress)
        tuned = _AtHand(job, matrices, factors)
        if divergence(job.source, tuned, held_out) >= divergence(job.source, plain, held_out):
            factors = {}
        write_durably(kept, save(factors))
        return factors


class TunedTrellis(TunedTwoSided):
    """Trellis codes, rows and norms tuned."""

    name = "trellis-tuned"
    about = "trellis, then row scales and norms tuned against the original, kept if that helps: much slower"
    version = 2

    def format(self, bits: int, fast: bool) -> Codec:
        return Trellis().format(bits, fast)


class _AtHand(QuantizedView):
    """A source whose planned weights are in memory, with their rows scaled, and whose norms' weights are, too."""

    def __init__(
        self, job: MethodInput, matrices: Mapping[str, QuantTensor], factors: Mapping[str, torch.Tensor]
    ) -> None:
        from kbit.quantizers.row_scales import scale_rows

        super().__init__(job.source, job.plan, job.read)
        self._matrices = {name: scale_rows(matrix, factors.get(name)) for name, matrix in matrices.items()}
        self._norms = {name: factor for name, factor in factors.items() if name not in matrices}
        self._kept_as = {tensor.source.name: tensor.keep_as for tensor in job.plan.tensors}

    def read_quantized(self, name: str) -> QuantTensor:
        return self._matrices[name]

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self.read(name)[start:stop] if name in self._norms else super().read_rows(name, start, stop)

    def target(self, name: str) -> torch.Tensor:
        values = super().target(name)
        if name not in self._norms:
            return values
        from kbit.formats.quant_tensor import SAFETENSORS_TO_TORCH

        dtype = SAFETENSORS_TO_TORCH[self._kept_as[name]]
        return (values.float() * self._norms[name]).to(dtype).float()
