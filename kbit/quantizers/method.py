"""Method: how codes and scales are found for a format. `kbit quantize` and `kbit scale` take the same ones, by name.

A format says what a code means; a method decides which codes a model gets. Rounding every weight to the nearest value
("rtn") is the plainest one. Others look at more than one weight at a time (all weights of a group, the inputs a layer
sees on calibration text), or change the weights first (rotations, scalings folded into neighbours). What they have in
common is all that this interface asks for: a whole model and a plan in, a model with quantized weights out.

A new method is a file with a class, and a line in `kbit.quantizers.methods`. Name, version and settings are part of a
plan's identity, of the manifest of what is written, and of every measured point. Imports no torch: `--dry-run` answers
at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from kbit.checkpoint.source import CheckpointSource
from kbit.formats.codec import Codec
from kbit.host.progress import Progress

if TYPE_CHECKING:
    import torch

    from kbit.formats.quant_tensor import QuantTensor
    from kbit.quantizers.plan import Plan

# Who rounds a matrix of a source, by name, to the nearest values of a format: this CPU, or a GPU with the same result.
Encode: TypeAlias = "Callable[[CheckpointSource, str, Codec], QuantTensor]"


@dataclass(frozen=True)
class MethodInput:
    """What a method works on.

    Attributes:
        source: the original model.
        plan: which tensor gets which format; what has no format is kept.
        read: a whole tensor by name, float32 (N, K), where the caller keeps the weights in memory; None: read rows from
            the source, so that no matrix need be there whole.
        encode: rounds to nearest; None: `Codec.encode`, on the CPU.
        progress: told of long work before the first tensor (calibration): what, steps done, steps in all.
    """

    source: CheckpointSource
    plan: Plan
    read: Callable[[str], torch.Tensor] | None = None
    encode: Encode | None = None
    progress: Progress | None = None


class QuantizedSource(CheckpointSource):
    """A model some of whose weights are quantized: what a method makes.

    `read_weight` gives a planned weight as a QuantTensor of the planned format; or, where kbit's formats cannot hold
    what the method makes of it (`Method.measured_only`), as the float values it stands for. Kept tensors come from
    `read_rows`, changed where the method changes them (a scaling folded into a norm).

    A conversion reads tensors layer by layer, each once. Work for a layer is best done when the first tensor of it is
    read: a conversion that goes on after an interruption reads only what is missing.

    Attributes:
        notes: what a user should know of how it was made, a line each.
    """

    notes: tuple[str, ...] = ()

    @abstractmethod
    def target(self, name: str) -> torch.Tensor:
        """The weight (N, K), float32, that a quantized one stands for: what its error is measured against.

        The original weight, or what a method that changes weights first (a rotation) has made of it.
        """

    def extra_bits(self, name: str) -> int:
        """Bits that a planned weight takes beyond those of its format."""
        return 0


class Method(ABC):
    """A way to find codes and scales.

    Attributes:
        name: how users and tables call it.
        about: one line for people.
        version: raised whenever the same model, format and settings get other codes: points measured before are then
            measured again, and an interrupted conversion is not continued.
        measured_only: what it makes can be evaluated, and is no format that kbit stores and runs.
        changes_weights: it scales or rotates weights before it rounds them, and others to make that good.
        keeps_outliers: its trellises keep single large weights apart (`kbit.quantizers.outlier_counts`).
    """

    name: ClassVar[str]
    about: ClassVar[str]
    version: ClassVar[int]
    measured_only: ClassVar[bool] = False
    changes_weights: ClassVar[bool] = False
    keeps_outliers: ClassVar[bool] = False

    @property
    def settings(self) -> Mapping[str, Any]:
        """What else determines the codes: plain values, as JSON has them."""
        return {}

    @property
    def identity(self) -> dict[str, Any]:
        """Name, version and settings: what a plan and a manifest say of the method."""
        return {"name": self.name, "version": self.version, "settings": dict(self.settings)}

    def refuses(self, format: Codec) -> str | None:
        """Why the method has no use for a format, or None if it can do it."""
        return None

    def memory(self, source: CheckpointSource) -> int:
        """About how many bytes the method works in, beyond those of a conversion by rounding to nearest."""
        return 0

    @abstractmethod
    def apply(self, job: MethodInput) -> QuantizedSource:
        """The model with its planned weights quantized.

        May do all its work here or weight by weight as they are read, and must come to the same codes either way.

        Raises:
            KbitError: weights that cannot be quantized (NaN, scales outside the range of their type).
        """
