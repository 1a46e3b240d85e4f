"""The methods there are, by name: `--method` of kbit quantize and `--methods` of kbit scale choose among them."""

from __future__ import annotations

from kbit.host.errors import UsageError
from kbit.quantizers.awq import ActivationAware
from kbit.quantizers.calibrated import Gptq, ScaleSearch, TwoSided
from kbit.quantizers.hqq import HalfQuadratic
from kbit.quantizers.method import Method
from kbit.quantizers.outliers import Outliers
from kbit.quantizers.rtn import RoundToNearest
from kbit.quantizers.trellis import OneSidedTrellis, Trellis
from kbit.quantizers.tuned import TunedTrellis, TunedTwoSided

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        RoundToNearest(),
        HalfQuadratic(),
        ActivationAware(),
        ScaleSearch(),
        Gptq(),
        TwoSided(),
        TunedTwoSided(),
        Trellis(),
        TunedTrellis(),
        OneSidedTrellis(),
        Outliers(),
    )
}


def get_method(name: str, *, to_store: bool = False) -> Method:
    """A method by its name.

    Args:
        name: as users say it.
        to_store: what it makes is to be written to a folder, and not only measured.

    Raises:
        UsageError: there is none of that name, or it is for measuring only.
    """
    usable = {known: method for known, method in METHODS.items() if not (to_store and method.measured_only)}
    if name in usable:
        return usable[name]
    problem = "makes no format that kbit stores (kbit scale measures it)" if name in METHODS else "is unknown"
    raise UsageError(f"method {name!r} {problem}: use one of {', '.join(usable)}")
