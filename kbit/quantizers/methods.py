"""Methods by name: how codes and scales are found for a format. `--methods` of kbit scale chooses among them.

A format says what a code means; a method decides which codes a model gets. Rounding every weight to the nearest value
("rtn") is the plainest one. Others look at more than one weight at a time (all weights of a group, the inputs a layer
sees on calibration text), or change the weights first (rotations, scalings folded into neighbours). What they have in
common is all that this interface asks for: a whole model and a plan in, a model with quantized weights out.

A new method is a class here and a line in METHODS. Its name is part of every measured point, and so is its `version`.
Imports no torch: `kbit scale --dry-run` answers at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kbit.checkpoint.source import CheckpointSource
from kbit.formats.codec import Codec
from kbit.host.errors import UsageError
from kbit.quantizers.plan import Plan

if TYPE_CHECKING:
    import torch

    from kbit.quantizers.view import QuantizedSource


@dataclass(frozen=True)
class MethodInput:
    """What a method works on.

    Attributes:
        source: the original model.
        plan: which tensor gets which format; what has no format is kept.
        read: a whole tensor by name, float32 (N, K); from memory where the caller keeps the weights there.
    """

    source: CheckpointSource
    plan: Plan
    read: Callable[[str], torch.Tensor]


class Method(ABC):
    """A way to find codes and scales.

    Attributes:
        name: how users and tables call it.
        about: one line for people.
        version: raised whenever the same model and format get other codes: points measured before are then measured
            again.
        measured_only: what it makes can be evaluated, and is no format that kbit stores and runs.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    version: ClassVar[int]
    measured_only: ClassVar[bool] = False

    def refuses(self, format: Codec) -> str | None:
        """Why the method has no use for a format, or None if it can do it."""
        return None

    @abstractmethod
    def apply(self, job: MethodInput) -> QuantizedSource:
        """The model with its planned weights quantized.

        May do all its work here or weight by weight as they are read.

        Raises:
            KbitError: weights that cannot be quantized (NaN, scales outside the range of their type).
        """


class RoundToNearest(Method):
    """Scales from each block's largest weight, and the nearest code for each weight (kbit.formats.blockwise)."""

    name = "rtn"
    about = "rounding to nearest, no calibration"
    version = 1

    def apply(self, job: MethodInput) -> QuantizedSource:
        from kbit.quantizers.view import QuantizedView

        return QuantizedView(job.source, job.plan, job.read)


class Outliers(Method):
    """Rounding to nearest, 2 % of each matrix's input features kept in 16 bits (kbit.quantizers.outliers)."""

    name = "outliers"
    about = "rounding to nearest, 2 % of the input features in 16 bits: the paper's proxy quantization"
    version = 1
    measured_only = True

    def apply(self, job: MethodInput) -> QuantizedSource:
        from kbit.quantizers.outliers import OutlierView

        return OutlierView(job.source, job.plan, job.read)


METHODS: dict[str, Method] = {method.name: method for method in (RoundToNearest(), Outliers())}


def get_method(name: str) -> Method:
    """A method by its name.

    Raises:
        UsageError: there is none of that name.
    """
    try:
        return METHODS[name]
    except KeyError:
        raise UsageError(f"method {name!r} is unknown: use one of {', '.join(METHODS)}") from None
