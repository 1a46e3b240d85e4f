"""Activation-aware weight quantization (Lin et al., arXiv 2306.00978, "AWQ"): a baseline.

Weights that multiply large inputs matter most. So input features of a matrix are scaled by s before it is rounded,
which gives the large ones finer steps, and what makes the features is divided by s: a norm's weight, or the rows of the
matrix before. The function stays the same. s = (mean |x|)^a, and a is searched for where the outputs are least
off; then, as there, the range of every block is cut where that makes its outputs better (not of queries and keys, whose
products are what matters).

Two things differ from the paper. Calibration keeps the second moment H of the inputs, not mean |x|: the root of H's
diagonal stands for it, and the error of the outputs is tr(E H E'), of the linear outputs only (the paper runs the whole
attention for its queries, keys and values). And where several heads of queries share one of values, its rows are scaled
by what these heads have in common; the paper leaves such models' output projection alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kbit.calibration.request import CalibrationRequest
from kbit.formats.codec import Codec
from kbit.formats.quant_format import QuantFormat
from kbit.host.errors import UnsupportedError
from kbit.models.families import spec_from_config
from kbit.models.params import parameters
from kbit.quantizers.calibrated import CalibratedRounding, CalibratedView
from kbit.quantizers.method import MethodInput, QuantizedSource
from kbit.quantizers.settings import Settings

if TYPE_CHECKING:
    import torch

    from kbit.calibration.factors import Factors
    from kbit.calibration.store import CalibrationFolder
    from kbit.checkpoint.source import CheckpointSource
    from kbit.formats.planes_codec import PlanesTensor
    from kbit.formats.quant_tensor import QuantTensor
    from kbit.models.structure import Seam
    from kbit.quantizers.plan import Plan

# Exponents a that are tried: 0, 1/20, ...; and shares of a block's range, down to half of it.
GRID = 20
CLIPS = tuple(round(1 - i / GRID, 2) for i in range(GRID // 2 + 1))


class ActivationAware(CalibratedRounding):
    """Scaled features, then rounding to nearest under cut ranges.

    Args:
        request: what to calibrate on; gradients are not measured.
        grid: exponents that are tried.
    """

    name = "awq"
    about = "activation-aware scaling of features (AWQ), then rounding to nearest under cut ranges (a baseline)"
    rounding = Settings(feedback=False, two_sided=False, search=False)
    changes_weights = True

    def __init__(self, request: CalibrationRequest | None = None, grid: int = GRID) -> None:
        super().__init__(replace(request or CalibrationRequest(), gradients=False))
        self.grid = grid

    def calibrated_on(self, request: CalibrationRequest) -> CalibratedRounding:
        return type(self)(request, self.grid)

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"grid": self.grid, "clips": list(CLIPS), "calibration": self.request.identity}

    def refuses(self, format: Codec) -> str | None:
        if not isinstance(format, QuantFormat):
            return f"it scales inputs for formats of {QuantFormat.family} only"
        return "it keeps no weights apart (-o): use ldlq2, gptq or rtn" if format.outliers else None

    def apply(self, job: MethodInput) -> QuantizedSource:
        from kbit.calibration.run import calibrate

        spec = spec_from_config(job.source.config, where=f"config of {job.source.path}")
        if spec.encoder is not None:
            raise UnsupportedError(
                f"{job.source.path}: method {self.name} does not know where the features of an encoder-decoder come "
                "from; use --method gptq or search with --inputs-only"
            )
        calibration = calibrate(job.source, self.request, progress=job.progress)
        return ScaledView(job.source, job.plan, calibration, self.grid, job.read)


@dataclass(frozen=True, eq=False)
class _Scaling:
    """What becomes of a tensor: its columns are multiplied, its rows (or, of a vector, its values) divided.

    Attributes:
        columns: float32 (K,), or None.
        rows: float32 (N,), or None.
    """

    columns: torch.Tensor | None = None
    rows: torch.Tensor | None = None

    def applied(self, values: torch.Tensor) -> torch.Tensor:
        if self.rows is not None:
            values = values / (self.rows if values.dim() == 1 else self.rows[:, None])
        return values if self.columns is None else values * self.columns


class ScaledView(CalibratedView):
    """A source whose planned weights come scaled and rounded, and whose norms and biases come divided.

    The scales of a layer are searched for when the first tensor of it is read.

    Args:
        source, plan, read: as for QuantizedView.
        calibration: of the source.
        grid: exponents that are tried.
    """

    def __init__(
        self,
        source: CheckpointSource,
        plan: Plan,
        calibration: CalibrationFolder,
        grid: int,
        read: Callable[[str], torch.Tensor] | None = None,
    ) -> None:
        from kbit.models.structure import recorded

        super().__init__(source, plan, calibration, ActivationAware.rounding, read)
        spec = spec_from_config(source.config, where=f"config of {source.path}")
        self._grid = grid
        self._head_dim = spec.head_dim
        self._heads_per_value = spec.heads // spec.kv_heads
        self._unclipped = {p.name for p in parameters(spec) if p.role == "linear" and p.slot in ("q", "k")}
        self._kept_as = {tensor.source.name: tensor.keep_as for tensor in plan.tensors}
        self._seams: dict[int | None, list[Seam]] = {}
        for seam in recorded(spec).seams():
            matrices = [*seam.consumers, *([] if seam.kind == "norm" else [seam.producer])]
            if all(name in self.formats for name in matrices):  # a matrix that is kept stays as it is
                self._seams.setdefault(self._layers[seam.consumers[0]], []).append(seam)
        self._scaled: dict[int | None, dict[str, _Scaling]] = {}

    def target(self, name: str) -> torch.Tensor:
        values = super().target(name).float()
        return self._scaling(name).applied(values)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        if name not in self.formats and self._scaling(name) is _UNCHANGED:
            return super().read_rows(name, start, stop)
        return self.read(name)[start:stop]

    def _scaling(self, name: str) -> _Scaling:
        layer = self._layers.get(name)
        if layer is None:
            return _UNCHANGED
        if layer not in self._scaled:
            self._scaled = {layer: self._search(layer)}  # of one layer at a time
        return self._scaled[layer].get(name, _UNCHANGED)

    def _search(self, layer: int | None) -> dict[str, _Scaling]:
        """The scales of a layer's tensors, by name."""
        import torch

        from kbit.calibration.workers import workers

        seams = self._seams.get(layer, [])
        factors = self._factors(layer)
        names = {name for seam in seams for name in seam.consumers}
        weights = {name: super(ScaledView, self).target(name).float() for name in names}
        with workers(torch.get_num_threads()) as pool:
            found = list(pool.map(lambda seam: self._scale(seam, weights, factors), seams))
        scaled: dict[str, _Scaling] = {}
        for seam, (scale, made) in zip(seams, found, strict=True):
            for name in seam.consumers:
                scaled[name] = replace(scaled.get(name, _UNCHANGED), columns=scale)
            for name in (seam.producer, *seam.biases):
                scaled[name] = replace(scaled.get(name, _UNCHANGED), rows=made)
        return scaled

    def _scale(
        self, seam: Seam, weights: Mapping[str, torch.Tensor], factors: Mapping[str, Factors]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales (K,) of the consumers' columns, and of what makes them: shorter where heads share values."""
        import torch

        inputs = factors[seam.consumers[0]].inputs
        spread = inputs.diagonal().clamp(min=0)
        if seam.kind == "values":
            spread = spread.view(-1, self._heads_per_value, self._head_dim).mean(dim=1).flatten()
        size = spread.sqrt()
        best, best_error = torch.ones_like(size), torch.inf
        for step in range(self._grid):
            scale = size.pow(step / self._grid).clamp(min=1e-4)
            scale = scale / (scale.max() * scale.min()).sqrt()
            if seam.kind == "norm":
                scale = self._storable(seam.producer, scale)
            error = sum(self._error(name, weights[name], self._spread(seam, scale), inputs) for name in seam.consumers)
            if error < best_error:
                best, best_error = scale, error
        return self._spread(seam, best), best

    def _spread(self, seam: Seam, scale: torch.Tensor) -> torch.Tensor:
        """Scales of the producer's rows as the consumers' columns have them."""
        if seam.kind != "values":
            return scale
        return scale.view(-1, self._head_dim).repeat_interleave(self._heads_per_value, dim=0).flatten()

    def _storable(self, norm: str, scale: torch.Tensor) -> torch.Tensor:
        """The scales nearest to these that leave a norm's weight a number of the type it is stored in.

        So nothing is lost when the norm is written; a weight that is zero, or would be too small, keeps its scale of 1.
        """
        import torch

        from kbit.formats.quant_tensor import SAFETENSORS_TO_TORCH

        weight = super().target(norm).float()
        dtype = SAFETENSORS_TO_TORCH[self._kept_as[norm]]
        stored = (weight / scale).to(dtype).float()
        usable = (stored.abs() >= torch.finfo(dtype).tiny) & torch.isfinite(stored)
        return torch.where(usable, weight / torch.where(usable, stored, 1.0), 1.0)

    def _error(self, name: str, weight: torch.Tensor, scale: torch.Tensor, inputs: torch.Tensor) -> float:
        """tr(E H E') of a matrix that is rounded with its columns scaled."""
        import torch

        format = self.formats[name]
        assert isinstance(format, QuantFormat)
        error = _nearest(weight * scale, format, name=name).dequantize() / scale - weight
        return float(((error @ inputs) * error).sum(dtype=torch.float64))

    def _round(self, name: str, weight: torch.Tensor, factors: Factors | None, threads: int = 1) -> QuantTensor:
        format = self.formats[name]
        assert isinstance(format, QuantFormat)
        if factors is None or name in self._unclipped:
            return _nearest(weight, format, name=name)
        columns = self._scaling(name).columns
        inputs = factors.inputs if columns is None else factors.inputs / columns / columns[:, None]
        return round_clipped(weight, format, inputs, name=name)


_UNCHANGED = _Scaling()


def round_clipped(
    weight: torch.Tensor, format: QuantFormat, inputs: torch.Tensor, *, name: str = "tensor"
) -> QuantTensor:
    """A matrix rounded to nearest, each block's range cut to the share of it whose outputs are least off.

    Args:
        weight: float32 (N, K).
        format: of the planes codec.
        inputs: second moment of the inputs, float32 (K, K); blocks are judged one by one.
        name: for errors.

    Raises:
        KbitError: as `quantize_blockwise`.
    """
    import torch

    from kbit.formats.planes_codec import PlanesTensor
    from kbit.formats.scales import store_scales

    nearest = _nearest(weight, format, name=name)
    rows, columns = nearest.shape
    count = nearest.scales.shape[1]
    block = min(format.block_size or columns, columns)
    missing = count * block - columns
    padded = torch.nn.functional.pad(inputs, (0, missing, 0, missing)).view(count, block, count, block)
    within = torch.stack([padded[i, :, i] for i in range(count)])  # (blocks, block, block)

    def rounded(scales: torch.Tensor) -> PlanesTensor:
        stored = {**nearest.stored, **store_scales(scales, nearest.offsets, format)}
        like = PlanesTensor(format, nearest.shape, stored, nearest.codebook)
        return _nearest(weight, format, like=like, name=name)

    best, best_error = nearest.scales, torch.full((rows, count), torch.inf)
    for share in CLIPS:
        error = weight - rounded(nearest.scales * share).dequantize()
        blocks = torch.nn.functional.pad(error, (0, missing)).view(rows, count, block).transpose(0, 1)
        found = ((blocks @ within) * blocks).sum(dim=2).T  # (N, blocks)
        better = found < best_error
        best = torch.where(better, nearest.scales * share, best)
        best_error = torch.where(better, found, best_error)
    return rounded(best)


def _nearest(weight: torch.Tensor, format: QuantFormat, *, like: QuantTensor | None = None, name: str) -> PlanesTensor:
    from kbit.formats.blockwise import quantize_rows

    rows, columns = weight.shape
    return quantize_rows(lambda start, stop: weight[start:stop], (rows, columns), format, like=like, name=name)
