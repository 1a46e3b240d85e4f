"""Rounding in turn, with a calibration: what is not rounded yet, rows and norms are tuned against the original."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ClassVar

from kbit.formats.codec import Codec
from kbit.models.families import spec_from_config
from kbit.models.params import parameters
from kbit.quantizers.calibrated import CalibratedView, TwoSided
from kbit.quantizers.method import MethodInput, QuantizedSource
from kbit.quantizers.rtn import QuantizedView
from kbit.quantizers.settings import Tuning
from kbit.quantizers.trellis import Trellis

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from kbit.checkpoint.source import CheckpointSource
    from kbit.formats.quant_tensor import QuantTensor
    from kbit.quantizers.in_turn import Tuned

# What a weight takes while it is tuned: as the original has it (2 bytes), itself, its place in the model, its gradient
# and one for each of two threads (4 each), and the two moments of Adam (8).
_BYTES = 32
_CODEBOOK = "="  # of a matrix's codebook, in a file of tuned matrices


class TunedTwoSided(TwoSided):
    """Two-sided LDLQ in turn (kbit.quantizers.in_turn)."""

    name = "ldlq2-tuned"
    about = "ldlq2 matrix after matrix, the rest tuned against the original in between, kept if that helps: much slower"
    version = 4
    nests: ClassVar[bool] = False
    tuning = Tuning()

    @property
    def settings(self) -> Mapping[str, Any]:
        return {**super().settings, "tuning": asdict(self.tuning)}

    def memory(self, source: CheckpointSource) -> int:
        spec = spec_from_config(source.config, where=f"config of {source.path}")
        weights = sum(p.shape[0] * p.shape[1] for p in parameters(spec) if len(p.shape) == 2)
        return max(super().memory(source), _BYTES * weights)

    def apply(self, job: MethodInput) -> QuantizedSource:
        from kbit.calibration.held_out import held_out_tokens
        from kbit.calibration.run import calibrate
        from kbit.quantizers.distillation import divergence
        from kbit.quantizers.in_turn import Tuned, round_in_turn

        view = super().apply(job)
        assert isinstance(view, CalibratedView)
        calibration = calibrate(job.source, self.request)
        kept = calibration.path / f"tuned-{job.plan.plan_id[:24]}.safetensors"
        found = _read(kept, view)
        if found is None:
            # In the source's order, which is that of layers: a layer's matrices are rounded together.
            plain = {name: view.read_quantized(name) for name in job.source.tensors if name in view.formats}
            at_once = _AtHand(job, plain, {})
            text, held_out = calibration.ids(), held_out_tokens(job.source, self.request)
            assert text is not None
            spec = spec_from_config(job.source.config, where=f"config of {job.source.path}")
            inside = [p.name for p in parameters(spec) if p.role == "linear" and p.layer is not None]
            targets = {name: view.target(name).float().clone() for name in inside if name in plain}
            found = round_in_turn(
                job.source, at_once, targets, view.rounded, text, self.tuning, progress=job.progress
            )  # fmt: skip
            found = Tuned({**plain, **found.matrices}, found.norms)
            in_turn = _AtHand(job, found.matrices, found.norms)
            if divergence(job.source, in_turn, held_out) >= divergence(job.source, at_once, held_out):
                found = Tuned(plain, {})
            _write(kept, found)
        made = _AtHand(job, found.matrices, found.norms)
        made.notes = view.notes
        return made


class TunedTrellis(TunedTwoSided):
    """Trellis codes in turn."""

    name = "trellis-tuned"
    about = (
        "trellis matrix after matrix, the rest tuned against the original in between, kept if that helps: much slower"
    )
    version = 5  # single large weights are kept apart
    keeps_outliers: ClassVar[bool] = True
    rounding = Trellis.rounding

    def format(self, bits: float, fast: bool) -> Codec:
        return Trellis().format(bits, fast)


class _AtHand(QuantizedView):
    """A source whose planned weights are in memory, and the weights of whose norms have factors."""

    def __init__(
        self, job: MethodInput, matrices: Mapping[str, QuantTensor], norms: Mapping[str, torch.Tensor]
    ) -> None:
        super().__init__(job.source, job.plan, job.read)
        self._matrices, self._norms = matrices, norms
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


def _write(path: Path, tuned: Tuned) -> None:
    """Keep what was made, for a later run."""
    from safetensors.torch import save

    from kbit.host.files import write_durably

    arrays = dict(tuned.norms)
    for name, matrix in tuned.matrices.items():
        arrays |= {f"{name}:{part}": array.contiguous() for part, array in matrix.stored.items()}
        arrays[f"{name}:{_CODEBOOK}"] = matrix.codebook.contiguous()
    write_durably(path, save(arrays))


def _read(path: Path, view: QuantizedView) -> Tuned | None:
    """What an earlier run has kept; None where there is nothing.

    Raises:
        CheckpointError: the file is damaged.
    """
    if not path.exists():
        return None
    from safetensors.torch import load

    from kbit.formats.quant_tensor import QuantTensor
    from kbit.quantizers.in_turn import Tuned

    arrays = load(path.read_bytes())
    matrices = {}
    for name, format in view.formats.items():
        shape = view.tensors[name].shape
        stored = {part: arrays[key] for part in format.parts(*shape) if (key := f"{name}:{part}") in arrays}
        codebook = arrays[f"{name}:{_CODEBOOK}"]
        matrices[name] = QuantTensor.checked(name, format, (shape[0], shape[1]), stored, codebook)
    return Tuned(matrices, {name: array for name, array in arrays.items() if ":" not in name})
