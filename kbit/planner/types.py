"""What a plan is asked, what it tries and what comes out: the vocabulary of planner.choose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kbit.formats.quant_format import QuantFormat
from kbit.formats.trellis import TrellisFormat
from kbit.host.errors import UsageError
from kbit.planner.memory import MemoryUse
from kbit.planner.models import PlanModel
from kbit.planner.quality import Quality, Standing
from kbit.planner.weights import Weight, stored_bits
from kbit.scaling.points import ORIGINAL

if TYPE_CHECKING:
    from kbit.planner.machine import MachineSpeed
    from kbit.planner.shapes import KnownGpu
    from kbit.planner.speed import SpeedEstimate

# How far predicted memory was from measured (benchmarks/test_plan.py): within this of the limit is called tight.
MEMORY_ERROR = 0.03
_NOWHERE = Standing(None, False)


@dataclass(frozen=True)
class Requirements:
    """What is asked for.

    Attributes:
        memory: bytes that the process may take.
        context: tokens in the cache, prompt and answer.
        min_speed: tokens per second at the end of the context, or None.
        bits: widths to try where nothing was measured.
        kv: cache kinds, widest first.
        embedding_bits: bits of embeddings and head; None keeps them as they are.
        formats: formats to try, or None for one per width and all that were measured.
        threads, compute: of the native backend.
        gpu: what to plan for instead of this machine.
    """

    memory: int
    context: int
    min_speed: float | None = None
    bits: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    kv: tuple[str, ...] = ("fp16", "8", "4")
    embedding_bits: int | None = None
    formats: tuple[QuantFormat | TrellisFormat, ...] | None = None
    threads: int = 1
    compute: str = "int8"
    gpu: KnownGpu | None = None

    def __post_init__(self) -> None:
        if self.memory < 1:
            raise UsageError(f"--memory {self.memory}: expected a size such as 6GiB")
        if self.context < 1:
            raise UsageError(f"--context {self.context}: expected at least 1 token")
        if self.min_speed is not None and not 0 < self.min_speed < 1e9:
            raise UsageError(f"--min-speed {self.min_speed:g}: expected tokens per second, above 0")
        if not self.kv:
            raise UsageError("--kv-bits is empty: name at least one width")

    @property
    def backend(self) -> str:
        """Whose layouts are counted."""
        return "native" if self.gpu is None else "triton"


@dataclass(frozen=True, eq=False)
class Candidate:
    """A model in a format with a cache.

    Attributes:
        model: which.
        format: of its linear layers; None: as it is.
        method: how codes are found; ORIGINAL for a model as it is.
        kv: cache kind.
        weights: its tensors.
        memory: what it takes; the process's constant comes on top.
        speed: what it makes; None where that is not known.
        quality: what it loses, or why that cannot be told.
        standing: among the candidates that remain.
    """

    model: PlanModel
    format: QuantFormat | TrellisFormat | None
    method: str
    kv: str
    weights: tuple[Weight, ...]
    memory: MemoryUse
    speed: SpeedEstimate | None = None
    quality: Quality | str = ""
    standing: Standing = _NOWHERE

    @property
    def label(self) -> str:
        """The format's name; the method too, unless it rounds to nearest."""
        if self.format is None:
            return ORIGINAL
        return str(self.format) if self.method == "rtn" else f"{self.format} {self.method}"

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight of the whole model."""
        return stored_bits(self.weights) / self.model.total_parameters

    @property
    def linear_bits(self) -> float:
        """Stored bits per weight of the linear layers."""
        return stored_bits(self.weights, "linear") / self.model.linear_parameters

    @property
    def rule_bits(self) -> float:
        """Bits of a linear weight, as the rule counts them: what is no narrower than its model loses nothing, 16."""
        if self.format is not None:
            return self.format.bits
        if self.model.bits is not None:  # a rung of a nested file
            return self.model.bits
        return int(self.linear_bits) if self.model.fixed else 16

    @property
    def known_quality(self) -> Quality | None:
        """`quality` where there is one."""
        return self.quality if isinstance(self.quality, Quality) else None


@dataclass(frozen=True, eq=False)
class Recommendation:
    """The outcome of a plan.

    Attributes:
        request: what was asked.
        candidates: what fits and is fast enough, best first: those with a comparable loss by loss, then the others by
            the rule.
        rejected: (model, why), for models of which nothing remains.
        constant: bytes of a process without a model, in every total; None where it is not known.
        machine: the rates that speeds come from; None where nothing was timed.
        notes: what to know before relying on this.
    """

    request: Requirements
    candidates: tuple[Candidate, ...]
    rejected: tuple[tuple[str, str], ...]
    constant: int | None
    machine: MachineSpeed | None
    notes: tuple[str, ...]

    @property
    def best(self) -> Candidate | None:
        """What to take; None if nothing fits."""
        return self.candidates[0] if self.candidates else None

    @property
    def by_rule(self) -> bool:
        """Whether the best is so by the rule alone."""
        return self.best is not None and not self.best.standing.compares

    def total(self, candidate: Candidate) -> int:
        """Bytes of the whole process."""
        return candidate.memory.peak + (self.constant or 0)

    def tight(self, candidate: Candidate) -> bool:
        """Whether it fits only if the prediction is right to within its usual error."""
        return self.total(candidate) + MEMORY_ERROR * candidate.memory.peak > self.request.memory

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        request = self.request
        return {
            "memory_bytes": request.memory,
            "context": request.context,
            "min_speed": request.min_speed,
            "device": "cpu" if request.gpu is None else request.gpu.name,
            "threads": request.threads if request.gpu is None else None,
            "compute": request.compute,
            "constant_bytes": self.constant,
            "ordered_by": None if self.best is None else "rule" if self.by_rule else "loss",
            "choices": [self._row(candidate) for candidate in self.candidates],
            "rejected": [{"model": model, "why": why} for model, why in self.rejected],
            "machine": None if self.machine is None else self.machine.machine,
            "measured": None if self.machine is None else self.machine.created,
            "notes": list(self.notes),
        }

    def _row(self, candidate: Candidate) -> dict[str, Any]:
        speed, quality = candidate.speed, candidate.known_quality
        return {
            "model": candidate.model.name,
            "parameters": candidate.model.total_parameters,
            "active_parameters": candidate.model.active_parameters,
            "format": candidate.label,
            "kv": candidate.kv,
            "bits_per_weight": candidate.bits_per_weight,
            "bits_per_weight_linear": candidate.linear_bits,
            "memory": {**candidate.memory.to_dict(), "total": self.total(candidate)},
            "tight": self.tight(candidate),
            "tokens_per_second": None if speed is None else speed.decode,
            "tokens_per_second_interval": None if speed is None else [speed.low, speed.high],
            "tokens_per_second_empty_context": None if speed is None else speed.decode_empty,
            "prompt_tokens_per_second": None if speed is None else speed.prefill,
            "bytes_per_token": None if speed is None else speed.bytes_per_token,
            "speed_basis": None if speed is None else speed.basis,
            "loss": None if quality is None else quality.to_dict(),
            "why_no_loss": candidate.quality if quality is None else None,
            "probability_best": candidate.standing.probability,
            "tied_with_best": candidate.standing.tied,
        }
