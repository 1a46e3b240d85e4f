"""`kbit.quantize`: what `kbit quantize` does, from Python."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from kbit.checkpoint.output_folder import check_output_folder, finished_plan
from kbit.evaluate.measured import Measured
from kbit.evaluate.measured import measure as measure_loss
from kbit.host.progress import Progress
from kbit.models.families import spec_from_config
from kbit.models.opening import open_model
from kbit.quantizers.calibrated import CalibratedRounding
from kbit.quantizers.check import check_runnable
from kbit.quantizers.choose import for_encoder, within_memory, within_time
from kbit.quantizers.nested_order import ordered
from kbit.quantizers.plan import check_disk
from kbit.quantizers.request import QuantizeRequest

if TYPE_CHECKING:
    from kbit.checkpoint.source import CheckpointSource
    from kbit.formats.codec import Codec
    from kbit.quantizers.method import Method
    from kbit.quantizers.plan import Plan


@dataclass(frozen=True)
class Quantized:
    """A model that was quantized.

    Attributes:
        path: its folder, for `load` and the command line.
        method: that found the codes.
        formats: of every quantized matrix, by name.
        bits_per_weight: stored bits of linear layers per weight, scales and codebooks included.
        nbytes: of the weight files.
        already_complete: the folder was there, made by the same plan; nothing was done.
        seconds: that it took.
        measured: how far it is from the original, where that was asked for.
    """

    path: Path
    method: str
    formats: Mapping[str, str]
    bits_per_weight: float
    nbytes: int
    already_complete: bool
    seconds: float
    measured: Measured | None = None


def quantize(
    model: str | PathLike[str],
    out: str | PathLike[str],
    *,
    bits: float | None = None,
    size: str | None = None,
    max_kl: float | None = None,
    format: str | None = None,
    nested: str | None = None,
    method: str = "auto",
    uniform: bool = False,
    calibration: Sequence[str] = (),
    calibration_tokens: int | None = None,
    embedding_bits: int | None = None,
    override: Mapping[str, str] | None = None,
    time_budget: str | None = None,
    measure: bool = False,
    force: bool = False,
    resume: bool = True,
    threads: int | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Quantized:
    """Converts a model to k-bit weights, as accurate as its bytes allow: the same bytes that `kbit quantize` writes.

    A killed run continues where it stopped when the same is called again; the folder appears once it is complete.

    Args:
        model: as `load` takes it.
        out: folder to create.
        bits: per weight, 2 to 8; 3.25, say, is a mean over the linear layers. 4 unless anything else is said.
        size, max_kl, format, nested, method, uniform, calibration, calibration_tokens, embedding_bits, time_budget,
            force, resume, threads, device: as the flags of `kbit quantize` of these names.
        override: formats by patterns of tensor names.
        measure: say how far the result is from the original, after a calibrated method.
        progress: called as (what is being done, steps done, steps in all).

    Raises:
        UsageError: values that do not exist, or do not fit each other; a folder that is in the way.
        CheckpointError, UnsupportedError: the model cannot be read or run.
        KbitError: no room, values that are no numbers; what was written stays for another run.
    """
    begin = time.perf_counter()
    request = QuantizeRequest(
        str(model), bits, size, max_kl, uniform, format=format, nested=nested, method=method, time_budget=time_budget,
        calibration=list(calibration) or None, calibration_tokens=calibration_tokens, embedding_bits=embedding_bits,
        override=[f"{pattern}={what}" for pattern, what in (override or {}).items()] or None,
        output=Path(out), measure=measure, resume=resume, force=force, threads=threads, device=device,
    )  # fmt: skip
    codec = request.codec()
    request.check()
    chosen = request.chosen_method(codec)
    request.mixes_widths(chosen)  # mistakes are said before the model is opened
    with open_model(request.model) as source:
        check_runnable(source)
        continues = spec_from_config(source.config).continues_text
        if (plainer := for_encoder(source, request)) is not request:
            request = plainer
            chosen = request.chosen_method(codec)
            request.mixes_widths(chosen)
        chosen, mixed, _ = within_time(source, within_memory(source, chosen, request), codec, request)
        plan = request.plan(source, codec, chosen, progress=progress)
        check_disk(plan, Path(out))
        check_output_folder(Path(out), overwrite=force or finished_plan(Path(out)) is not None)
        if mixed:
            plan = request.plan(source, codec, chosen, _mixed(source, plan, chosen, request, progress))
        elif isinstance(chosen, CalibratedRounding) and chosen.mixes_nested:
            from kbit.backends.select import set_threads

            set_threads(threads)
            plan = ordered(source, plan, chosen, progress=progress)
        done = _converted(source, plan, request, progress)
    result = replace(done, seconds=time.perf_counter() - begin)
    if measure and continues and isinstance(chosen, CalibratedRounding) and not done.already_complete:
        return replace(result, measured=measure_loss(request, chosen, Path(out), progress))
    return result


def _mixed(
    source: CheckpointSource, plan: Plan, method: Method, request: QuantizeRequest, progress: Progress | None
) -> Mapping[str, Codec | str]:
    """A format for every matrix that the request leaves open, by name."""
    from kbit.backends.select import set_threads
    from kbit.quantizers.mixed import mixed_formats

    assert isinstance(method, CalibratedRounding)
    set_threads(request.threads)
    found = mixed_formats(source, plan, method, request.budget, request.fixed(plan), progress=progress)
    return {name: choice.format for name, choice in found.chosen.items()}


def _converted(source: CheckpointSource, plan: Plan, request: QuantizeRequest, progress: Progress | None) -> Quantized:
    from kbit.backends.select import set_threads
    from kbit.quantizers.convert import convert, on_gpu

    out = request.output
    assert out is not None
    check_disk(plan, out)
    if finished_plan(out) != plan.plan_id:
        check_output_folder(out, overwrite=request.force)
    set_threads(request.threads)
    written = 0

    def on_tensor(_: object) -> None:
        nonlocal written
        written += 1
        if progress is not None:
            progress("quantizing", written, len(plan.tensors))

    done = convert(
        source, plan, out, resume=request.resume, overwrite=request.force, on_tensor=on_tensor,
        encode=on_gpu() if request.device == "cuda" else None, progress=progress,
    )  # fmt: skip
    formats = {each.source.name: str(each.format) for each in plan.tensors if each.format}
    bits = plan.bits_per_weight("linear") or 0.0
    return Quantized(out, plan.method.name, formats, bits, done.nbytes, done.already_complete, 0.0)
