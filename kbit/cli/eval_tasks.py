"""`kbit eval --tasks`: zero-shot tasks of models that continue texts, and pairs of texts of those that embed them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kbit.cli.eval import refuse
from kbit.cli.options import streaming_output
from kbit.cli.output import print_json
from kbit.host.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from kbit.cli.eval import EvalFlags
    from kbit.evaluate.similarity import Estimate, SimilarityEvaluation
    from kbit.evaluate.tasks.evaluation import TaskEvaluation, TaskRequest


def run_tasks(flags: EvalFlags, *, as_json: bool) -> None:
    """Scores tasks, and prints what came out.

    Raises:
        UsageError: tasks that do not go together, or flags that do not go with them.
        CheckpointError, UnsupportedError: a model cannot be read or run.
    """
    from kbit.evaluate.similarity import TASK

    assert flags.tasks is not None
    names = [name.strip() for name in flags.tasks.split(",")]
    if TASK in names:
        if len(set(names)) > 1:
            raise UsageError(
                f"--tasks {flags.tasks}: {TASK} is of embedding models, the others are not: ask for it alone"
            )
        _run_similarity(flags, as_json=as_json)
        return
    evaluation = _run_tasks(_task_request(flags, flags.tasks), quiet=as_json)
    if as_json:
        print_json(evaluation.to_dict())
        return
    from rich.console import Console

    from kbit.cli.task_tables import task_tables

    with streaming_output():
        Console().print(*task_tables(evaluation), sep="\n")


def _run_tasks(request: TaskRequest, quiet: bool) -> TaskEvaluation:
    """The tasks, with a progress bar on stderr unless `quiet` or stderr is no terminal."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    from kbit.evaluate.tasks.evaluation import evaluate_tasks

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        line = bar.add_task("opening", total=None)

        def on_request(task: str, done: int, total: int, accuracy: float) -> None:
            bar.update(line, completed=done, total=total, description=f"{task}: acc {accuracy:.3f}")

        def on_status(text: str) -> None:
            bar.reset(line, total=None, description=escape(text))

        return evaluate_tasks(request, on_request, on_status)


def _task_request(flags: EvalFlags, tasks: str) -> TaskRequest:
    """What to ask of --tasks.

    Raises:
        UsageError: a flag was given that belongs to perplexity.
    """
    from kbit.evaluate import similarity
    from kbit.evaluate.tasks.evaluation import TaskRequest

    refuse({"--prompt-name": flags.prompt_name}, f"goes with --tasks {similarity.TASK}")
    refuse(flags.of_pairs, "goes with an encoder-decoder and --data PAIRS.tsv")
    given = {"--data": flags.data, "--convention": flags.convention, "--max-tokens": flags.max_tokens}
    refuse(given, f"goes with perplexity, not with --tasks {tasks}: use --task-data, --limit or another command")
    return TaskRequest(
        flags.model,
        tasks,
        limit=flags.limit,
        data=flags.task_data,
        reference=flags.reference,
        items=flags.items,
        against=tuple(flags.against or ()),
        context=flags.context,
        reference_backend=flags.reference_backend,
        device=flags.device,
        threads=flags.threads,
        backend=flags.backend,
        compute=flags.compute,
        kv_bits=flags.kv_bits,
        bits=flags.bits,
    )


def _run_similarity(flags: EvalFlags, *, as_json: bool) -> None:
    """Measures an embedding model, and prints.

    Raises:
        UsageError, CheckpointError, UnsupportedError: see `kbit.evaluate.similarity`.
    """
    from rich.console import Console

    from kbit.evaluate.similarity import TASK, SimilarityRequest, evaluate_similarity

    others = {
        "--data": flags.data,
        "--convention": flags.convention,
        "--max-tokens": flags.max_tokens,
        "--context": flags.context,
        "--items": flags.items,
        "--against": flags.against,
        "--kv-bits": flags.kv_bits,
    }
    refuse({**others, **flags.of_pairs}, f"does not go with --tasks {TASK}")
    on_gpu = flags.device == "cuda" or flags.backend == "triton"
    request = SimilarityRequest(
        flags.model,
        flags.reference,
        flags.task_data,
        flags.limit,
        flags.prompt_name,
        device=flags.device,
        threads=flags.threads,
        backend=flags.backend,
        compute=flags.compute,
        # As `kbit embed` computes (`kbit.cli.encoders`).
        kv_bits=None if on_gpu or flags.backend == "reference" else 32,
        bits=flags.bits,
        reference_backend=flags.reference_backend,
    )
    console = Console(stderr=True)
    with console.status("opening") as status:
        if as_json or not console.is_terminal:
            status.stop()
        found = evaluate_similarity(request, status.update)
    if as_json:
        print_json(found.to_dict())
        return
    with streaming_output():
        Console().print(_table(found))


def _table(found: SimilarityEvaluation) -> Table:
    """The result for people."""
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, title=Text(found.request.model), title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")

    def row(name: str, value: str) -> None:
        table.add_row(name, Text(value))

    row("pairs", f"{found.pairs:,} of {found.data}")
    row("Spearman x 100", _said(found.spearman))
    if found.reference is not None and found.difference is not None and found.request.reference is not None:
        row("reference", found.request.reference)
        row("reference Spearman", _said(found.reference))
        row("difference", _said(found.difference))
        if found.alike is not None:
            row("cosine with reference", f"{found.alike:.4f}")
    if found.cut:
        row("too long", f"of {found.cut} texts only the beginning was read")
    row("backend", found.backend)
    if found.reference_backend is not None:
        row("reference backend", found.reference_backend)
    row("time", f"{found.seconds:.1f} s")
    return table


def _said(estimate: Estimate) -> str:
    low, high = (100 * value for value in estimate.interval)
    return f"{100 * estimate.value:.2f} +/- {100 * estimate.stderr:.2f} (95 % {low:.2f} to {high:.2f})"
