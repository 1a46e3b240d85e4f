"""Methods that round with a calibration: searched scales, one-sided and two-sided feedback (kbit.quantizers.ldlq).

All of them keep the format as it is: the same files, the same kernels, the same speed as rounding to nearest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from kbit.calibration.request import CalibrationRequest
from kbit.formats.codec import Codec
from kbit.formats.nested import NestedFormat
from kbit.formats.quant_format import QuantFormat
from kbit.formats.trellis import TrellisFormat
from kbit.host.errors import UsageError
from kbit.models.families import spec_from_config
from kbit.models.params import layer_numbers, parameters
from kbit.quantizers.method import Method, MethodInput, QuantizedSource
from kbit.quantizers.rtn import QuantizedView
from kbit.quantizers.settings import SWEEPS, Nesting, Settings

if TYPE_CHECKING:
    import torch

    from kbit.calibration.factors import Factors
    from kbit.calibration.store import CalibrationFolder
    from kbit.checkpoint.source import CheckpointSource
    from kbit.formats.quant_tensor import QuantTensor
    from kbit.quantizers.plan import Plan


class CalibratedRounding(Method):
    """Rounding that knows which errors matter.

    Args:
        request: what to calibrate on.

    Attributes:
        rounding: how; a class's own settings, or with options (`with_options`).
        nesting: what the widths of nested formats weigh against each other.
        mixes: whether every matrix gets a width of its own unless the user wants one for all.
        nests: whether it rounds to nested formats.
    """

    version = 1
    mixes: ClassVar[bool] = True
    nests: ClassVar[bool] = True
    rounding: Settings
    nesting: Nesting | None = None

    def __init__(self, request: CalibrationRequest | None = None) -> None:
        self.request = request or CalibrationRequest()

    def calibrated_on(self, request: CalibrationRequest) -> CalibratedRounding:
        made = copy(self)
        made.request = request
        return made if made.nesting is None else made.nested(made.nesting)

    def with_options(self, *, act_order: bool = False, static_scales: bool = False) -> CalibratedRounding:
        """The method with options of `Settings`; act_order implies static_scales.

        Raises:
            UsageError: a method that passes no errors on has no use for them.
        """
        if not (act_order or static_scales):
            return self
        if not self.rounding.feedback:
            flag = "--act-order" if act_order else "--static-scales"
            raise UsageError(f"{flag}: method {self.name} passes no errors on; use --method ldlq2 or gptq")
        made = copy(self)
        made.rounding = replace(self.rounding, static_scales=True, act_order=act_order)
        return made

    def nested(self, nesting: Nesting) -> CalibratedRounding:
        """The method for nested formats; with gradients it can mix their widths."""
        made = copy(self)
        made.nesting = replace(nesting, mixed=nesting.mixed and self.request.gradients)
        return made

    @property
    def mixes_nested(self) -> bool:
        """Whether a plan's nested matrices get an order (`kbit.quantizers.nested_order.ordered`)."""
        return self.nesting is not None and self.nesting.mixed

    @property
    def settings(self) -> Mapping[str, Any]:
        nesting = {} if self.nesting is None else {"nesting": self.nesting.identity}
        return {**self.rounding.identity, **nesting, "calibration": self.request.identity}

    def refuses(self, format: Codec) -> str | None:
        if isinstance(format, NestedFormat):
            if not self.rounding.feedback:
                return "it passes no errors on, as nested widths need; use ldlq2 or rtn"
            return None if self.nests else "it rounds for one width at a time; use ldlq2, gptq or rtn"
        if isinstance(format, TrellisFormat):
            if self.rounding.static_scales:
                return "scales of trellis codes are chosen first in any case: drop --static-scales and --act-order"
            return None
        known = f"{QuantFormat.family} and {TrellisFormat.family}"
        return None if isinstance(format, QuantFormat) else f"it finds codes for formats of {known} only"

    def format(self, bits: float, fast: bool) -> Codec | None:
        """The format of linear weights of so many bits where none is named; None: that of all methods.

        Args:
            bits: 2 to 8; a half more where the method's formats have such widths.
            fast: one that takes less time to round to, where the method has such.
        """
        return None

    def memory(self, source: CheckpointSource) -> int:
        from kbit.calibration.sizes import calibration_memory

        spec = spec_from_config(source.config, where=f"config of {source.path}")
        return calibration_memory(spec, self.request.tokens, self.request.gradients)

    def is_calibrated(self, source: CheckpointSource) -> bool:
        """Whether the cache holds what the method measures of a model."""
        from kbit.calibration.place import is_kept

        return is_kept(source, self.request)

    def apply(self, job: MethodInput) -> QuantizedSource:
        from kbit.calibration.run import calibrate

        calibration = calibrate(job.source, self.request, progress=job.progress)
        return CalibratedView(job.source, job.plan, calibration, self.rounding, job.read, self.nesting)


class ScaleSearch(CalibratedRounding):
    """Every weight to the nearest value, under scales that make the least weighted error."""

    keeps_outliers: ClassVar[bool] = True
    name = "search"
    about = "rounding to nearest under searched scales, inputs weighted by what the model feels of them"
    rounding = Settings(feedback=False)


class Gptq(CalibratedRounding):
    """One-sided LDLQ."""

    keeps_outliers: ClassVar[bool] = True
    name = "gptq"
    about = "searched scales, and each column's error made good by the columns after it (GPTQ, one-sided LDLQ)"
    rounding = Settings(two_sided=False)


class TwoSided(CalibratedRounding):
    """Two-sided LDLQ."""

    keeps_outliers: ClassVar[bool] = True
    name = "ldlq2"
    version = 4  # single large weights are kept apart where the format is not named
    about = "errors made good along columns and rows (two-sided LDLQ), then coordinate descent: the most accurate"
    rounding = Settings(sweeps=SWEEPS)


class CalibratedView(QuantizedView):
    """A source whose planned weights come rounded with a calibration.

    All planned matrices of a layer are rounded when the first of them is read, side by side, each by one thread. Tables
    that tokens are looked up in beside the embedding are rounded to nearest, piece by piece: nothing was measured of
    them, and they may be larger than all the rest.

    Args:
        source, plan, read: as for QuantizedView.
        calibration: of the source.
        rounding: how.
        nesting: of nested formats.
    """

    def __init__(
        self,
        source: CheckpointSource,
        plan: Plan,
        calibration: CalibrationFolder,
        rounding: Settings,
        read: Callable[[str], torch.Tensor] | None = None,
        nesting: Nesting | None = None,
    ) -> None:
        from kbit.calibration.collected import LEAST_TOKENS

        super().__init__(source, plan, read)
        self._calibration, self._rounding, self._nesting = calibration, rounding, nesting or Nesting()
        self._order = plan.nested
        spec = spec_from_config(source.config, where=f"config of {source.path}")
        self._layers = layer_numbers(spec)
        self._tables = {p.name for p in parameters(spec) if p.role == "table"}
        self._ready: dict[str, QuantTensor] = {}
        self._served: set[str] = set()
        borrowed = [name for name in calibration.borrowed() if name in self.formats]
        if borrowed:
            named = ", ".join(borrowed[:3]) + (", ..." if len(borrowed) > 3 else "")
            self.notes = (
                f"{len(borrowed)} matrices of experts ({named}) saw fewer than {LEAST_TOKENS} tokens of calibration "
                "and were rounded with what their layer's experts have on average; more --calibration-tokens tell more",
            )

    def read_quantized(self, name: str) -> QuantTensor:
        if name in self._tables:
            return super().read_quantized(name)
        if name not in self._ready:
            if name in self._served:  # asked for again: alone
                return self._round(name, self.target(name), self._factors(self._layers[name]).get(name))
            self._round_layer(self._layers[name])
        self._served.add(name)
        return self._ready.pop(name)

    def rounded(self, name: str, weight: torch.Tensor) -> QuantTensor:
        """Another weight, float32 (N, K), in the place of a planned one, rounded as that is."""
        return self._round(name, weight, self._factors(self._layers[name]).get(name))

    def _round_layer(self, layer: int | None) -> None:
        import torch

        from kbit.calibration.workers import workers

        done = self._served | self._tables
        names = [name for name in self.formats if self._layers[name] == layer and name not in done]
        self._ready.clear()  # of a layer that was not read to its end
        factors = self._factors(layer)
        weights = {name: self.target(name) for name in names}  # by this thread: a source has one place in its file
        threads = torch.get_num_threads()
        with workers(threads) as pool:
            # The largest first, so that the last one to end is small.
            by_size = sorted(names, key=lambda name: -self._source.tensors[name].numel)
            each = max(1, threads // len(names))
            rounded = pool.map(lambda name: self._round(name, weights[name], factors.get(name), each), by_size)
            self._ready.update(zip(by_size, rounded, strict=True))

    def _factors(self, layer: int | None) -> dict[str, Factors]:
        if layer is None and not self._calibration.has(None):
            return {}  # without gradients nothing is known of embedding and head
        return self._calibration.read(layer)

    def _round(self, name: str, weight: torch.Tensor, factors: Factors | None, threads: int = 1) -> QuantTensor:
        from kbit.quantizers.rounding import Rounder

        format = self.formats[name]
        if isinstance(format, NestedFormat):
            from kbit.quantizers.ldlq import Feedback
            from kbit.quantizers.nested import round_nested

            settings = replace(self._rounding, sweeps=self._rounding.sweeps or SWEEPS)
            feedback = Feedback.of(factors, settings, weight.shape[1])
            nesting = self._nesting if self._order is None else self._nesting.of_matrix(self._order.emphasis[name])
            return round_nested(weight.float(), format, feedback, nesting, name=name)
        rounder = Rounder(factors, self._rounding, weight.shape[1])
        return rounder.round(weight.float(), format, threads=threads, name=name)
