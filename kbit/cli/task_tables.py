"""What `kbit eval --tasks` prints for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kbit.cli.output import printable

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from kbit.evaluate.tasks.evaluation import TaskComparison, TaskEvaluation
    from kbit.evaluate.tasks.records import Estimate

# What the sentence under the comparisons calls a difference.
_LEVEL = 0.05


def task_tables(evaluation: TaskEvaluation) -> list[RenderableType]:
    """Scores, comparisons where there are any, and what they were made of."""
    from rich.text import Text

    parts: list[RenderableType] = [_scores(evaluation)]
    others = dict.fromkeys(each.other for each in evaluation.comparisons)
    parts += [
        _comparisons(evaluation, [each for each in evaluation.comparisons if each.other == other]) for other in others
    ]
    if evaluation.comparisons:
        parts.append(Text(conclusion(evaluation.comparisons) + "\n"))
    parts.append(Text("\n".join(_notes(evaluation)), style="dim"))
    return parts


def conclusion(comparisons: tuple[TaskComparison, ...]) -> str:
    """Which differences in accuracy are more than chance, in a sentence."""
    real = [each for each in comparisons if each.adjusted_p <= _LEVEL]
    tested = f"{len(comparisons)} comparison{'s' if len(comparisons) > 1 else ''}"
    if not real:
        return f"No difference in accuracy holds at {_LEVEL:.0%} ({tested}, corrected by Holm)."
    found = "; ".join(
        f"{each.task} {'above' if each.accuracy.difference > 0 else 'below'} {printable(each.other)} "
        f"by {abs(100 * each.accuracy.difference):.1f} points"
        for each in real
    )
    return f"Differences in accuracy that hold at {_LEVEL:.0%} ({tested}, corrected by Holm): {found}."


def _notes(evaluation: TaskEvaluation) -> list[str]:
    """What the figures were made of, line by line."""
    lines = [f"backend: {evaluation.backend}"]
    if evaluation.reference_backend is not None:
        lines.append(f"reference backend: {evaluation.reference_backend}")
    if evaluation.resumed:
        lines.append(f"{evaluation.resumed} items were in {printable(evaluation.request.items)} already")
    for name, result in evaluation.results.items():
        data = result.data
        lines.append(f"{name}: {printable(data.origin)}" + (f" ({data.note})" if data.note else ""))
        if result.truncated:
            lines.append(f"{name}: {result.truncated} contexts were too long for the model and cut off in front")
        if result.left_out:
            lines.append(f"{name}: {len(result.left_out)} items left out: an answer alone is too long for the model")
    for each in evaluation.comparisons:
        scored = len(evaluation.results[each.task].records)
        if each.accuracy.items < scored:
            lines.append(f"{each.task}: {printable(each.other)} has {each.accuracy.items} of these {scored} items")
    lines.append(f"time: {evaluation.seconds:.1f} s")
    return lines


def _scores(evaluation: TaskEvaluation) -> RenderableType:
    table = _table(printable(evaluation.request.model), ["task", "items", "metric", "value"])
    if evaluation.reference:
        table.add_column("reference", justify="right", no_wrap=True)
    for name, result in evaluation.results.items():
        scored, available = len(result.records), result.data.available
        heading = (name, f"{scored:,}" if scored == available else f"{scored:,} of {available:,}")
        for metric, estimate in result.metrics.items():
            cells = [*heading, metric, _estimate(metric, estimate)]
            if evaluation.reference:
                cells.append(_estimate(metric, evaluation.reference[name].metrics[metric]))
            table.add_row(*cells)
            heading = ("", "")
    return table


def _comparisons(evaluation: TaskEvaluation, comparisons: list[TaskComparison]) -> RenderableType:
    first = comparisons[0]
    model = "" if first.other_model == first.other else f" ({printable(first.other_model)})"
    table = _table(
        f"{printable(evaluation.request.model)} less {printable(first.other)}{model}, item by item",
        ["task", "acc, points", "lost", "gained", "p (Holm)", "right answer, nats"],
    )
    for each in comparisons:
        accuracy, gold = each.accuracy, each.gold
        table.add_row(
            each.task,
            _with_interval(100 * accuracy.difference, _scaled(accuracy.interval, 100), 1),
            str(accuracy.lost),
            str(accuracy.gained),
            f"{each.adjusted_p:.2g}",
            _with_interval(gold.mean, gold.interval, 2),
        )
    return table


def _table(title: str, columns: list[str]) -> Table:
    """A table that fits 80 columns: the first column at the left, numbers at the right."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", box=SIMPLE_HEAD, padding=0)
    for name in columns:
        table.add_column(name, justify="left" if name in ("task", "metric") else "right", no_wrap=True)
    return table


def _estimate(metric: str, estimate: Estimate) -> str:
    factor, digits, unit = (1, 2, "") if metric == "perplexity" else (100, 1, " %")
    value = f"{factor * estimate.value:.{digits}f}" if estimate.value < 1e4 else f"{estimate.value:.2e}"
    if estimate.stderr is None:
        return value + unit
    error = f"{factor * estimate.stderr:.{digits}f}" if estimate.stderr < 1e4 else f"{estimate.stderr:.0e}"
    return f"{value} +/- {error}{unit}"


def _with_interval(value: float, interval: tuple[float, float] | None, digits: int) -> str:
    text = f"{value:+.{digits}f}"
    return text if interval is None else f"{text} [{interval[0]:+.{digits}f}, {interval[1]:+.{digits}f}]"


def _scaled(interval: tuple[float, float] | None, factor: float) -> tuple[float, float] | None:
    return None if interval is None else (factor * interval[0], factor * interval[1])
