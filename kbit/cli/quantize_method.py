"""Which method `kbit quantize` uses where its first choice is more than the machine can do."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import typer

from kbit.cli.output import size
from kbit.cli.quantize_flags import QuantizeFlags
from kbit.host.errors import UsageError

if TYPE_CHECKING:
    from kbit.checkpoint.source import CheckpointSource
    from kbit.quantizers.calibrated import CalibratedRounding
    from kbit.quantizers.method import Method

# Fewer tokens than these are not suggested: the factors of a small sample fit nothing else.
_FEWEST_TOKENS = 2048


def within_memory(source: CheckpointSource, method: Method, flags: QuantizeFlags) -> Method:
    """The method, or what stands in for `auto`'s where there is no memory for gradients, which stderr is told.

    What is calibrated already takes no such memory.

    Raises:
        UsageError: the user asked for what does not fit; the message says what does.
    """
    from kbit.calibration.request import CalibrationRequest
    from kbit.host.memory import available_memory
    from kbit.quantizers.calibrated import CalibratedRounding, Gptq

    if not isinstance(method, CalibratedRounding) or method.is_calibrated(source):
        return method
    needed, available = _memory(source, method), available_memory()
    if available is None or needed <= available:
        return method
    request = CalibrationRequest(method.request.texts, method.request.tokens, gradients=False)
    less = Gptq(request) if flags.method == "auto" else method.calibrated_on(request)
    fits = less.is_calibrated(source) or _memory(source, less) <= available
    short = f"calibrating needs about {size(needed)} of memory, and {size(available)} is available"
    if flags.method == "auto" and method.request.gradients and fits and flags.mixes is None:
        typer.echo(
            f"note: with gradients, {short}: measuring inputs only, for method gptq and one width, which needs about "
            f"{size(_memory(source, less))}",
            err=True,
        )
        return less
    remedies = []
    tokens = _tokens_that_fit(source, method, available)
    if tokens is not None:
        remedies.append(f"--calibration-tokens {tokens}")
    if fits and method.request.gradients and flags.mixes is None:
        remedies.append("--method gptq --inputs-only")
    remedies.append("--method rtn" + ("" if flags.mixes is None else f" (without {flags.mixes})"))
    raise UsageError(f"method {method.name}: {short}; use {', or '.join(remedies)}")


def _memory(source: CheckpointSource, method: CalibratedRounding) -> int:
    from kbit.quantizers.plan import BASE_BYTES

    return BASE_BYTES + method.memory(source)


def _tokens_that_fit(source: CheckpointSource, method: CalibratedRounding, available: int) -> int | None:
    """The most tokens, in powers of two, that there is memory for; None: too few to be of use."""
    tokens = 65536
    while tokens >= _FEWEST_TOKENS:
        if _memory(source, method.calibrated_on(replace(method.request, tokens=tokens))) <= available:
            return tokens
        tokens //= 2
    return None
