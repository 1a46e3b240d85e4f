"""`kbit tune`: finds the fastest configurations of the GPU kernels for a model on this machine's GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from kbit.cli.options import (
    DEFAULT_MODEL,
    ENGINE,
    BitsOption,
    ComputeOption,
    JsonOption,
    KvBitsOption,
    streaming_output,
)
from kbit.cli.output import print_json
from kbit.cli.run import INTERRUPTED

if TYPE_CHECKING:
    from rich.table import Table

    from kbit.tuning.run import TuneResult


def tune(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A folder, a .gguf file, a hub id, or a name kbit pull lists.")
    ] = DEFAULT_MODEL,
    device: Annotated[
        str,
        typer.Option("--device", metavar="cuda", help="The GPU: cuda, or cuda:1 and so on.", rich_help_panel=ENGINE),
    ] = "cuda",
    compute: ComputeOption = None,
    kv_bits: KvBitsOption = None,
    bits: BitsOption = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Only one and 256 tokens, and one context: a fraction of the time.")
    ] = False,
    again: Annotated[bool, typer.Option("--again", help="Also what was tuned before.")] = False,
    json: JsonOption = False,
) -> None:
    """Time the GPU kernels' configurations on a model's shapes, and keep the fastest for later runs.

    Without this, configurations come from a model of the GPU made from the kernels' machine code. What is found is kept
    in the cache (KBIT_CACHE), for this GPU, this version of Triton and these kernels, and every command that runs on
    the GPU uses it. Results are checked before they are timed: a configuration that computes something else is not
    taken.

    Ctrl-C ends it and keeps what is done; the next time it goes on from there.

    \b
    Examples:
      kbit tune out/
      kbit tune out/ --quick
      kbit tune out/ --kv-bits 4 --json
      kbit tune all/ --bits 3
    """
    result = _run(model, device, compute, kv_bits, bits, quick=quick, again=again, quiet=json)
    if json:
        print_json(result.to_dict())
    else:
        from rich.console import Console

        with streaming_output():
            console = Console()
            if result.outcomes:
                console.print(_table(result))
            console.print(_summary(result), highlight=False, markup=False, soft_wrap=True)
    if result.interrupted:
        raise typer.Exit(INTERRUPTED)


def _run(
    model: str,
    device: str,
    compute: str | None,
    kv_bits: int | str | None,
    bits: float | None,
    *,
    quick: bool,
    again: bool,
    quiet: bool,
) -> TuneResult:
    """The tuning, with a progress bar on stderr unless `quiet` or stderr is no terminal."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from kbit.tuning.run import tune_model

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task("opening", total=None)

        def on_step(done: int, total: int, label: str) -> None:
            bar.update(task, completed=done, total=total, description=escape(label))

        return tune_model(
            model, device, compute=compute, kv_bits=kv_bits, bits=bits, quick=quick, again=again, on_step=on_step
        )


def _table(result: TuneResult) -> Table:
    """What was found, for people."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(f"{result.gpu}, Triton {result.triton}"), title_justify="left")
    for name in ("kernel", "problem"):
        table.add_column(name, overflow="fold")
    for name in ("default", "tuned", "times as fast"):
        table.add_column(name, justify="right", no_wrap=True)
    for outcome in result.outcomes:
        entry = outcome.entry
        figures = ("", "none ran and was right", "")
        if entry is not None:
            default = "does not run" if entry.default_seconds is None else _time(entry.default_seconds)
            gain = "" if outcome.speedup is None else f"{outcome.speedup:.2f}"
            figures = (default, _time(entry.seconds), gain)
        table.add_row(outcome.job.kernel, *(Text(text) for text in (outcome.job.label, *figures)))
    return table


def _summary(result: TuneResult) -> str:
    parts = []
    gain: Any = result.gain
    if gain is not None:
        parts.append(f"{gain:.2f} times as fast as by default (geometric mean over {len(result.outcomes)} problems)")
    if result.known:
        parts.append(f"{result.known} problems were tuned before (--again repeats them)")
    wrong = sum(outcome.wrong for outcome in result.outcomes)
    if wrong:
        parts.append(f"{wrong} configurations computed something else and were not taken: please report this")
    if result.interrupted:
        parts.append("interrupted: run it again to go on")
    if result.outcomes or result.known:
        parts.append(f"kept in {result.path}")
    else:
        parts.append("there was nothing to tune")
    return "\n".join(parts)


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:,.1f} µs" if seconds < 1e-3 else f"{seconds * 1e3:,.2f} ms"
