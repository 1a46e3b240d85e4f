"""The report of a sweep: pictures as files, and one page with all of it that opens anywhere."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kbit.host.errors import KbitError
from kbit.host.files import write_durably
from kbit.scaling.claims import check_claims
from kbit.scaling.points import Point
from kbit.scaling.report import plots_style as style
from kbit.scaling.report.html_page import Page
from kbit.scaling.report.plots import draw_pictures
from kbit.scaling.report.plots_data import View, frontier, interval, kl_draws, make_views

if TYPE_CHECKING:
    from kbit.scaling.laws.fit import Laws, Parameter, SuiteLaws

_PACKAGES = ("numpy", "torch", "scipy", "matplotlib")


def write_report(
    points: Sequence[Point],
    out_dir: Path,
    *,
    laws: Laws | None = None,
    conclusion: str | None = None,
    left_out: Iterable[str] = (),
    command: str | None = None,
    machine: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write OUT/report.html, OUT/plots/NAME.png and .svg, and OUT/conclusion.txt where there is a conclusion.

    What too few points do not allow is left out. Points of several texts become several sections (and the files of all
    but the first carry a number). Equal input gives equal files, machine and versions aside.

    Args:
        points: measured rows, in any order.
        laws: fitted to them; without, pictures and tables that need them are left out.
        conclusion: plain text, paragraphs parted by blank lines.
        left_out: what was not measured and why, one line each.
        command: what the user typed, to be shown as the way to do it again.
        machine: facts about it by name; by default this one's.

    Returns:
        Every file written, the page first.

    Raises:
        KbitError: no points, matplotlib missing, or files that cannot be written.
    """
    views = [view for view in make_views(points) if view.points]
    if not views:
        raise KbitError(f"{out_dir}: there are no measured points to report on; run kbit scale with some models first")
    names = [model.label for model in views[0].models]
    several = f" and {len(views) - 1} more" if len(views) > 1 else ""
    page = Page("Accuracy versus bits", f"{', '.join(names)} on {views[0].name}{several}")
    _facts(page, views[0])
    if conclusion:
        page.heading("Conclusion")
        page.box("\n\n".join(conclusion.splitlines()))
    written: list[Path] = []
    for number, view in enumerate(views):
        if len(views) > 1:
            page.heading(f"Text {number + 1}: {view.name}")
        written += _section(page, view, _laws_of(laws, view), out_dir, "" if number == 0 else f"-{number + 1}")
    page.heading("How to reproduce")
    _reproduce(page, views, list(left_out), laws, command, machine)
    written.insert(0, _write(out_dir / "report.html", page.html()))
    if conclusion:
        written.append(_write(out_dir / "conclusion.txt", conclusion.rstrip("\n") + "\n"))
    return written


def _facts(page: Page, view: View) -> None:
    """What was measured, in a few numbers."""
    quantized = view.quantized
    widths = view.widths
    text = view.points[0]
    facts = [
        (str(len(view.models)), "model" if len(view.models) == 1 else "models"),
        (str(len(quantized)), "point measured" if len(quantized) == 1 else "points measured"),
        (f"{widths[0]} to {widths[-1]}" if len(widths) > 1 else ", ".join(map(str, widths)) or "none", "bits"),
        (", ".join(sorted({point.dtype for point in quantized})) or "none", "data types"),
        (f"{text.tokens:,}", "tokens of text each"),
        (str(len(text.cluster_tokens)), "clusters for the intervals"),
    ]
    page.facts(facts)


def _section(page: Page, view: View, laws: SuiteLaws | None, out_dir: Path, suffix: str) -> list[Path]:
    """One text: pictures, then tables."""
    written: list[Path] = []
    page.heading("Pictures")
    for picture in draw_pictures(view, laws):
        name = f"{picture.name}{suffix}"
        files = style.save(picture.figure, out_dir / "plots" / name, ("png", "svg"))
        page.picture(picture.title, picture.caption, style.inline_svg(files[1].read_bytes(), name))
        written += files
    page.heading("The best for a size")
    page.paragraphs(
        "The frontier as a table: each row is the best loss among everything measured that is no larger. Rows whose "
        "losses differ by less than the text can tell are ties, and the smaller one is as good."
    )
    page.table(_POINT_HEADS, _point_rows(view, frontier(view, lambda point: point.total_bits)))
    _claims(page, view)
    if laws is not None:
        _law_tables(page, laws)
    page.heading("All points")
    page.table(_POINT_HEADS, _point_rows(view, view.points), search=True)
    return written


_POINT_HEADS = (
    "model", "method", "format", "#bits", "#block", "#bits per weight", "#linear layers", "#whole model", "#loss",
    "#perplexity", "#KL", "#KL 95 %, low", "#high", "#same top token", "#weight error",
)  # fmt: skip


def _point_rows(view: View, points: Iterable[Point]) -> Iterable[list[Any]]:
    labels = {point.key: model.label for model in view.models for point in model.points}
    for point in points:
        spread = None if point.is_original else interval(kl_draws([point])[0])
        low, high = spread or (None, None)
        yield [
            labels[point.key],
            point.method,
            point.format,
            (str(point.bits), point.bits),
            None if point.is_original else ("row" if not point.block_size else str(point.block_size), point.block_size),
            _number(point.bits_per_weight, 4),
            (style.size_label(point.linear_bits / 8), point.linear_bits),
            (style.size_label(point.total_bits / 8), point.total_bits),
            _number(view.loss(point), 5),
            _number(point.perplexity, 5),
            None if point.is_original else _number(point.kl, 3),
            _number(low, 3),
            _number(high, 3),
            (f"{100 * point.top1:.2f} %", point.top1),
            None if point.is_original else _number(point.weight_error, 3),
        ]


def _claims(page: Page, view: View) -> None:
    """What the k-bit scaling paper says, and whether it holds here."""
    measured = [claim for claim in check_claims(view.points) if claim.comparisons]
    if not measured:
        return
    page.heading("The paper's claims")
    page.paragraphs(
        "What Dettmers and Zettlemoyer (2023) found, tested format against format on one model at a time, by KL "
        "divergence, paired over clusters of text. A comparison counts where its 95 % interval lies on one side."
    )
    heads = ("claim", "~the paper says", "here", "#holds", "#fails", "#unclear")
    page.table(heads, [[claim.name, claim.statement, claim.verdict, *claim.counts] for claim in measured])
    page.table(
        ("claim", "model", "compared", "holds", "~evidence"),
        [
            [claim.name, c.model, c.what, "unclear" if c.holds is None else "yes" if c.holds else "no", c.evidence]
            for claim in measured
            for c in claim.comparisons
        ],
        search=True,
    )


def _law_tables(page: Page, laws: SuiteLaws) -> None:
    """k* per method and data type, the fitted laws, and their errors on what they had not seen."""
    if laws.best:
        page.heading("The best width")
        page.paragraphs(
            "k* over the sizes at which all contenders are measured. Regret: how much more loss a width has than the "
            "best one, on average over these sizes, in nats per token. Tied: the text cannot tell it from the best."
        )
        rows: list[list[Any]] = []
        for best in laws.best:
            name = [best.axis, best.method, "best of all" if best.dtype == "any" else best.dtype]
            rows += [
                [*name, (str(star.bits), star.bits), _number(star.probability, 3), _number(star.regret, 3),
                 _number(star.regret_low, 3), _number(star.regret_high, 3), "tied" if star.tied else ""]
                for star in best.k_star
            ]  # fmt: skip
            if not best.k_star:
                rows.append([*name, None, None, None, None, None, best.why])
        heads = ("size of", "method", "data type", "#bits", "#probability", "#regret", "#95 %, low", "#high", "~")
        page.table(heads, rows)
    if laws.fits:
        page.heading("Laws")
        page.paragraphs(
            "Fitted to the logarithm of the KL divergence, method by method (and to the loss, for the models as they "
            "are). R squared and the errors here are on the points fitted; the next table has those that count."
        )
        page.table(
            ("law", "method", "~formula", "~parameters (95 % interval)", "#points", "#models", "#R squared",
             "#median error of the loss", "#worst"),
            [
                [fit.title, fit.method, fit.formula, "; ".join(_parameter(p) for p in fit.parameters),
                 (str(fit.points), fit.points), (str(fit.models), fit.models), _number(fit.r_squared, 4),
                 _percent(fit.loss_median), _percent(fit.loss_worst)]
                for fit in laws.fits
            ],
        )  # fmt: skip
    if laws.missing:
        page.paragraphs("Not fitted: " + "; ".join(laws.missing) + ".")
    if laws.heldout:
        page.heading("Held-out predictions")
        page.paragraphs(
            'Errors of the predicted loss, as a share of the loss, on points left out of the fit. The form "nothing" '
            "predicts the loss of the model as it is: what every law has to beat."
        )
        page.table(
            ("form", "method", "left out", "#predicted", "#median error", "#90 % below", "#worst",
             "#worst from 3 bits on", "worst point"),
            [
                [row.form, row.method, row.left_out, (str(row.count), row.count), _percent(row.median),
                 _percent(row.percentile90), _percent(row.worst), _percent(row.near_worst), row.worst_point]
                for row in laws.heldout
            ],
        )  # fmt: skip


def _reproduce(
    page: Page,
    views: Sequence[View],
    left_out: Sequence[str],
    laws: Laws | None,
    command: str | None,
    machine: Mapping[str, Any] | None,
) -> None:
    """Everything that determines the figures."""
    if command:
        page.code(command)
    page.paragraphs(
        "The rows are in points.jsonl beside this page, one JSON object a line; the pictures are in plots/. Rows "
        "that exist are not measured again: to measure afresh, give kbit scale --no-cache and another --out."
    )
    entries: list[tuple[str, str]] = []
    for view in views:
        first = view.points[0]
        entries.append(("text", f"{first.data}, sha256 {first.data_sha256}"))
        for family in view.families:
            row = family[0].points[0]
            names = ", ".join(model.label for model in family)
            entries.append(
                ("windows", f"{row.convention} convention, {row.context} tokens each, {row.tokens:,} scored: {names}")
            )
        entries += [("arithmetic", backend) for backend in sorted({point.backend for point in view.points})]
    dates = sorted(point.created for view in views for point in view.points)
    entries.append(("measured", dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"))
    seconds = sum(point.quantize_seconds + point.evaluate_seconds for view in views for point in view.points)
    entries.append(("time", f"{seconds / 60:.1f} minutes of quantizing and evaluating in all"))
    entries += [(str(name), _fact(value)) for name, value in (machine or _this_machine()).items()]
    entries.append(("versions", versions()))
    page.definitions(entries)
    notes = [*left_out, *(laws.notes if laws is not None else ())]
    if notes:
        page.heading("Left out")
        for line in notes:
            page.paragraphs(line)


def _this_machine() -> dict[str, str]:
    """Where the page was made, which is where a sweep measures unless it runs on a cluster."""
    from kbit.planner.machine import describe_machine

    facts = describe_machine()
    memory = style.size_label(float(facts["memory_bytes"])) if facts.get("memory_bytes") else "unknown"
    return {
        "machine": f"{facts['cpu']}, {facts['instruction_set']} kernels, {facts['cores']} cores, {memory} of memory",
        "system": str(facts["system"]),
    }


def versions() -> str:
    """kbit, Python and the packages that the figures depend on, without importing them."""
    from kbit import __version__

    found = [f"kbit {__version__}", f"Python {platform.python_version()}"]
    for name in _PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def _laws_of(laws: Laws | None, view: View) -> SuiteLaws | None:
    """The laws of the largest suite on this text."""
    if laws is None:
        return None
    text = view.points[0].data_sha256
    return next((suite for suite in laws.suites if suite.suite.points[0].data_sha256 == text), None)


def _write(path: Path, text: str) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, text.encode("utf-8", "replace"))
    except OSError as error:
        raise KbitError(f"{path} cannot be written: {error.strerror or error}") from error
    return path


def _number(value: float | None, digits: int) -> tuple[str, float] | None:
    """A number for people with so many digits, sorted by its full value."""
    if value is None or value != value:
        return None
    if value in (float("inf"), float("-inf")):
        return "infinite", value
    return f"{value:.{digits}g}", value


def _percent(share: float | None) -> tuple[str, float] | None:
    return None if share is None or share != share else (f"{100 * share:.3g} %", share)


def _parameter(parameter: Parameter) -> str:
    """A fitted number with its interval."""
    low, high = parameter.low, parameter.high
    spread = f" ({low:.3g} to {high:.3g})" if math.isfinite(low) and math.isfinite(high) else " (too few models to say)"
    return f"{parameter.name} = {parameter.value:.4g}{spread}"


def _fact(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_fact(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_fact, value))
    return "unknown" if value is None else str(value)
