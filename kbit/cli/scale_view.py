"""How a sweep looks to people: a live table while it runs, lines where there is no terminal, and its results."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from kbit.cli.output import printable, size
from kbit.scaling.points import Point

if TYPE_CHECKING:
    from kbit.scaling.sweep.plan import SweepPlan
    from kbit.scaling.sweep.run import Failure, Running, Status, SweepResult


class View(Protocol):
    """Something that shows how far a sweep is."""

    def update(self, status: Status, news: Point | Failure | None) -> None:
        """Takes what run_sweep tells."""

    def __enter__(self) -> View: ...

    def __exit__(self, *exc: object) -> None: ...


class Silent:
    """Shows nothing."""

    def update(self, status: Status, news: Point | Failure | None) -> None:
        pass

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


class Lines(Silent):
    """A line on stderr for each point."""

    def update(self, status: Status, news: Point | Failure | None) -> None:
        if news is None:
            return
        done = status.reused + status.measured + status.failed
        text = describe(news) if isinstance(news, Point) else f"{news.model} {news.label}: failed: {news.why}"
        left = "" if status.left is None else f"; {duration(status.left)} left"
        sys.stderr.write(printable(f"[{done}/{status.total}] {text}{left}") + "\n")
        sys.stderr.flush()


class LiveTable(Silent):
    """A live table on a terminal."""

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, transient=True, refresh_per_second=4)

    def update(self, status: Status, news: Point | Failure | None) -> None:
        from kbit.scaling.sweep.run import Failure

        if isinstance(news, Failure):
            self._live.console.print(Text(printable(f"{news.model} {news.label}: failed: {news.why}"), style="red"))
        self._live.update(live_view(status))

    def __enter__(self) -> LiveTable:
        self._live.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._live.__exit__(None, None, None)


def progress_view(plan: SweepPlan) -> Silent:
    """The live table where stderr is a terminal, else lines."""
    console = Console(stderr=True)
    return LiveTable(console) if console.is_terminal else Lines()


def live_view(status: Status) -> RenderableType:
    """What a terminal shows while a sweep runs: models, what is under way, the last figures, the time left."""
    models = Table(box=None, padding=(0, 1), show_header=False)
    models.add_column(no_wrap=True, overflow="ellipsis", max_width=40)
    models.add_column(width=24)
    models.add_column(justify="right", no_wrap=True)
    running: dict[str, list[Running]] = {}
    for item in status.running:
        running.setdefault(item.model, []).append(item)
    models.add_column(no_wrap=True, overflow="ellipsis")
    for name, done, total in status.by_model:
        now = ", ".join(f"{item.label} {100 * item.fraction:.0f} %" for item in running.get(name, []))
        bar = ProgressBar(total=total, completed=done, width=24)
        models.add_row(Text(printable(name)), bar, f"{done}/{total}", Text(now, style="dim"))
    done = status.reused + status.measured + status.failed
    parts = [f"{done} of {status.total} points", f"{duration(status.elapsed)} so far"]
    parts.append("time left unknown yet" if status.left is None else f"{duration(status.left)} left")
    if status.reused:
        parts.append(f"{status.reused} were known")
    if status.failed:
        parts.append(f"{status.failed} failed")
    view: list[RenderableType] = [models]
    if status.last:
        view.append(_points_table(status.last))
    view.append(Text(", ".join(parts)))
    return Group(*view)


def plan_table(plan: SweepPlan) -> Table:
    """The points of a plan: a row for each format, a column for each model."""
    table = Table(title=Text(f"{len(plan.points)} points"), title_justify="left")
    table.add_column("format")
    for subject in plan.subjects:
        table.add_column(Text(printable(subject.name)), justify="right")
    rows: dict[str, list[Text]] = {}
    for point in plan.points:
        known = point.known is not None
        text = f"{size(point.total_bits / 8)}{' known' if known else ''}"
        rows.setdefault(point.cell.label, []).append(Text(text, style="green" if known else ""))
    for label, cells in rows.items():
        table.add_row(Text(label), *cells)
    return table


def plan_lines(plan: SweepPlan) -> list[str]:
    """What else there is to say about a plan."""
    windows = plan.subjects[0].windows
    seconds, measured = plan.seconds()
    missing = len(plan.missing)
    cut = f"{windows.count} windows of {windows.context} tokens ({windows.convention})"
    lines = [
        f"text: {printable(plan.text.name)}, {cut}",
        f"known: {len(plan.points) - missing}, to measure: {missing}, {plan.jobs.count} side by side",
    ]
    if missing:
        basis = "from what was measured here" if measured else "a guess: not all models have been measured here yet"
        lines.append(f"time: about {duration(seconds)} ({basis})")
    return lines + [f"left out: {item}" for item in plan.left_out]


def result_table(points: Iterable[Point]) -> Table:
    """The best data type and block size of each model at each width, by KL divergence."""
    best: dict[tuple[str, int, bool], Point] = {}
    for point in points:
        key = (point.model, point.bits, point.is_original)
        if key not in best or point.kl < best[key].kl:
            best[key] = point
    order = {name: index for index, name in enumerate(dict.fromkeys(point.model for point in best.values()))}
    rows = sorted(best.values(), key=lambda p: (order[p.model], not p.is_original, -p.bits))
    return _points_table(rows, title="best format at each width, by KL divergence from the original")


def result_lines(result: SweepResult) -> list[str]:
    """What else there is to say about a result."""
    reused = len(result.points) - result.measured
    line = f"{result.measured} points measured in {duration(result.seconds)}"
    lines = [line + (f", {reused} were known" if reused else "")]
    lines += [f"left out: {item}" for item in result.plan.left_out]
    return [*lines, f"table: {printable(result.plan.request.out / 'points.jsonl')}"]


def describe(point: Point) -> str:
    """A point in one line."""
    label = point.format if point.method in ("rtn", point.format) else f"{point.format} {point.method}"
    return (
        f"{point.model} {label}: perplexity {point.perplexity:.3f}, KL {point.kl:.5f}, "
        f"{point.quantize_seconds + point.evaluate_seconds:.1f} s"
    )


def duration(seconds: float) -> str:
    """Seconds for people: "42 s", "3 min 20 s", "2 h 5 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _points_table(points: Iterable[Point], title: str | None = None) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("model", overflow="fold")
    table.add_column("format", no_wrap=True)
    for name in ("bits", "size", "perplexity", "KL", "top-1 %"):
        table.add_column(name, justify="right", no_wrap=True)
    for point in points:
        label = point.format if point.method in ("rtn", point.format) else f"{point.format} {point.method}"
        figures = (
            f"{point.bits_per_weight:.2f}",
            size(point.total_bits / 8),
            f"{point.perplexity:.3f}",
            "" if point.is_original else f"{point.kl:.5f}",
            "" if point.is_original else f"{100 * point.top1:.1f}",
        )
        table.add_row(Text(printable(point.model)), Text(label), *figures)
    return table
