"""A method that kbit does not have, as an author of one would write it: it changes weights and kept tensors.

The weight of each attention norm is divided by a factor, and what reads the norm's output (q, k, v) multiplied by it:
the model computes the same. (Methods that scale per channel, so that outliers round better, do just this.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kbit.quantizers.method import Method, MethodInput, QuantizedSource
from kbit.quantizers.rtn import QuantizedView

if TYPE_CHECKING:
    import torch

READERS = ("q_proj.weight", "k_proj.weight", "v_proj.weight")
NORM = "input_layernorm.weight"


class Shifted(Method):
    """Rounding to nearest after a factor has moved from norms into the matrices behind them."""

    name = "shifted"
    about = "a factor moved from norms into the matrices behind them"
    version = 1

    def __init__(self, factor: float = 2.0) -> None:
        self.factor = factor

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"factor": self.factor}

    def apply(self, job: MethodInput) -> QuantizedSource:
        return ShiftedView(job, self.factor)


class ShiftedView(QuantizedView):
    """The model as the method makes it, tensor by tensor."""

    def __init__(self, job: MethodInput, factor: float) -> None:
        read = job.read or job.source.read

        def shifted(name: str) -> torch.Tensor:
            values = read(name)
            if name.endswith(NORM):
                return values / factor
            return values * factor if name.endswith(READERS) else values

        super().__init__(job.source, job.plan, shifted)
