"""kbit quantize: a checkpoint in, a k-bit folder out."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from kbit.cli.flag_groups import flag_groups
from kbit.cli.options import JsonOption
from kbit.cli.progress import progress_bars
from kbit.cli.quantize_flags import QuantizeFlags

if TYPE_CHECKING:
    from kbit.checkpoint.source import CheckpointSource
    from kbit.quantizers.allocate import Allocation
    from kbit.quantizers.method import Method
    from kbit.quantizers.plan import Plan


@flag_groups()
def quantize(*, flags: QuantizeFlags, json: JsonOption = False) -> None:
    """Convert a model to k-bit weights, as accurate as its bytes allow.

    Unless told otherwise the model is calibrated on text it writes itself, every matrix gets the width that serves the
    model best within the budget, and weights are rounded so that later ones make good the errors of earlier ones. What
    calibration finds is kept in the cache and serves every width. --method rtn rounds to nearest instead: seconds.

    A killed run continues where it stopped when the same command is given again, and OUTPUT appears only once it is
    complete.

    \b
    Examples:
      kbit quantize smollm2-135m-instruct
      kbit quantize smollm2-135m-instruct --bits 3.25 -o out/
      kbit quantize smollm2-135m-instruct --size 80MB
      kbit quantize path/to/model --max-kl 0.05
      kbit quantize path/to/model --bits 3.25 --save-plan plan.json
      kbit quantize path/to/model --plan plan.json
      kbit quantize path/to/model --format nf4-b64 --calibration my-prompts.txt
      kbit quantize path/to/model --bits 4 --method rtn
      kbit quantize path/to/model --nested 2..8
      kbit quantize path/to/model --time-budget 10m
      kbit quantize path/to/model --bits 3 --override '*.down_proj.weight=nf4-b32' --dry-run
      kbit quantize model.gguf --method rtn --override '*=stored'
    """
    from kbit.checkpoint.output_folder import check_output_folder, finished_plan
    from kbit.cli.output import print_json
    from kbit.cli.quantize_view import facts_of, note_plan, note_quantized_source, print_plan, print_result
    from kbit.evaluate.measured import measure
    from kbit.models.families import spec_from_config
    from kbit.models.opening import open_model
    from kbit.quantizers.calibrated import CalibratedRounding
    from kbit.quantizers.check import check_runnable
    from kbit.quantizers.choose import following, for_encoder, within_memory, within_time
    from kbit.quantizers.plan import check_disk
    from kbit.quantizers.plan_file import read_plan_file, write_plan_file

    asked = None if flags.plan_file is None else read_plan_file(flags.plan_file)
    if asked is not None:
        flags = following(flags, asked)
    codec = flags.codec() if asked is None else asked.format
    flags.check()
    method = flags.chosen_method(codec)
    flags.mixes_widths(method)  # mistakes are said before the model is opened
    with open_model(flags.model) as source, _searcher(flags.device):
        check_runnable(source)
        # (An encoder predicts no tokens that could be compared.)
        measures = flags.measures(method) and spec_from_config(source.config).continues_text
        if (plainer := for_encoder(source, flags)) is not flags:
            flags = plainer
            method = flags.chosen_method(codec)
            flags.mixes_widths(method)
        if asked is not None:
            asked.check_model(source)
        method, mixed, note = within_time(source, within_memory(source, method, flags), codec, flags)
        with progress_bars() as progress:
            plan = flags.plan(source, codec, method, None if asked is None else asked.targets, progress)
        if asked is not None:
            asked.check_complete(plan)
        out = flags.output or Path(f"{_short_name(flags.model)}-{flags.label(codec, mixed)}")
        disk = check_disk(plan, out)
        # What is in the way is said before hours of calibration; a finished model may turn out to be this one.
        if flags.save_plan is None:
            check_output_folder(out, overwrite=flags.force or finished_plan(out) is not None)
        if note:
            typer.echo(note, err=True)  # now that nothing more is to be refused before the work begins
        allocation = _allocate(source, plan, method, flags) if mixed else None
        if allocation is not None:
            plan = flags.plan(source, codec, method, {n: c.format for n, c in allocation.chosen.items()})
            disk = check_disk(plan, out)
        elif not flags.stops:
            plan = _ordered(source, plan, method, flags)
        finished = finished_plan(out) == plan.plan_id
        if not finished and not (mixed and flags.dry_run) and flags.save_plan is None:
            check_output_folder(out, overwrite=flags.force)
        costs = {name: choice.cost for name, choice in allocation.chosen.items()} if allocation else {}
        if flags.save_plan is not None:
            costs = _all_costs(source, plan, method, allocation, flags)
            write_plan_file(flags.save_plan, source, plan, method, costs)
        facts = facts_of(source, plan, out, disk, allocation, costs)
        note_quantized_source(plan)
        if flags.stops:
            if json:
                print_json({**facts, "mixed": mixed, "dry_run": True})
            else:
                print_plan(facts, plan, unknown=mixed and allocation is None, saved=flags.save_plan)
            return
        if allocation is not None and not finished:
            note_plan(plan, costs)
        facts.update(_convert(source, plan, out, flags))
    if measures and isinstance(method, CalibratedRounding) and not facts["already_complete"]:
        with progress_bars() as progress:
            facts["measured"] = asdict(measure(flags, method, out, progress))
    if json:
        print_json(facts)
    else:
        print_result(facts, out)


def _searcher(device: str) -> AbstractContextManager[None]:
    """Where trellis codes are searched for, within the block."""
    if device != "cuda":
        return nullcontext()
    from kbit.quantizers.convert import trellises_on_gpu

    return trellises_on_gpu()


def _allocate(source: CheckpointSource, plan: Plan, method: Method, flags: QuantizeFlags) -> Allocation | None:
    """A format for every matrix that the flags leave open; None: a dry run would have to measure something for it."""
    from kbit.quantizers.calibrated import CalibratedRounding

    assert isinstance(method, CalibratedRounding)
    dry = flags.dry_run and flags.save_plan is None
    if dry and not method.is_calibrated(source):
        return None
    from kbit.backends.select import set_threads
    from kbit.quantizers.mixed import known_formats, mixed_formats

    if dry:
        return known_formats(source, plan, method, flags.budget, flags.fixed(plan))
    set_threads(flags.threads)
    with progress_bars() as progress:
        return mixed_formats(source, plan, method, flags.budget, flags.fixed(plan), progress=progress)


def _ordered(source: CheckpointSource, plan: Plan, method: Method, flags: QuantizeFlags) -> Plan:
    """A plan of nested matrices with the order of their widths; another as it is."""
    from kbit.quantizers.calibrated import CalibratedRounding

    if not isinstance(method, CalibratedRounding) or method.nesting is None:
        return plan
    from kbit.backends.select import set_threads
    from kbit.quantizers.nested_order import ordered, why_uniform

    reason = why_uniform(plan, method)
    if reason is not None and not flags.uniform:
        typer.echo(f"nested widths are not mixed: {reason}", err=True)
    if not method.mixes_nested:
        return plan
    set_threads(flags.threads)
    with progress_bars() as progress:
        return ordered(source, plan, method, progress=progress)


def _all_costs(
    source: CheckpointSource, plan: Plan, method: Method, allocation: Allocation | None, flags: QuantizeFlags
) -> dict[str, float]:
    """What every quantized matrix is predicted to cost, by name; nothing where gradients are not measured, or of nested
    widths, which cost something else each."""
    from kbit.formats.nested import NestedFormat
    from kbit.quantizers.calibrated import CalibratedRounding

    if not (isinstance(method, CalibratedRounding) and method.request.gradients):
        return {}
    if any(isinstance(tensor.format, NestedFormat) for tensor in plan.tensors):
        return {}
    from kbit.backends.select import set_threads
    from kbit.quantizers.mixed import predicted_costs

    set_threads(flags.threads)
    known = allocation.chosen if allocation is not None else {}
    with progress_bars() as progress:
        return predicted_costs(source, plan, method, known, progress=progress)


def _convert(source: CheckpointSource, plan: Plan, out: Path, flags: QuantizeFlags) -> dict[str, Any]:
    import time

    from kbit.backends.select import set_threads
    from kbit.quantizers.convert import convert, on_gpu
    from kbit.quantizers.plan import TensorPlan

    set_threads(flags.threads)
    begin = time.perf_counter()
    with progress_bars() as progress:
        written = 0

        def on_tensor(tensor: TensorPlan) -> None:
            nonlocal written
            written += 1
            progress("quantizing", written, len(plan.tensors))

        done = convert(
            source,
            plan,
            out,
            resume=flags.resume,
            overwrite=flags.force,
            on_tensor=on_tensor,
            encode=on_gpu() if flags.device == "cuda" else None,
            progress=progress,
        )
    return {
        "seconds": time.perf_counter() - begin,
        "written_tensors": done.written,
        "resumed_tensors": done.resumed,
        "notes": list(done.notes),
        "already_complete": done.already_complete,
    }


def _short_name(model: str) -> str:
    name = Path(model).name or Path(model).resolve().name
    return name.removesuffix(".gguf")
