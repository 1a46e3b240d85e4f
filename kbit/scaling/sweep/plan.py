"""What a sweep is to measure, found before anything is measured: which points there are, and which are known already.

Known is what an earlier run has left in the same folder, and what this machine has measured for any folder (the store).
Imports no torch and reads no weights (but for their digest, once): `kbit scale --dry-run` answers at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kbit.evaluate.sampled_data import evaluation_text
from kbit.formats.quant_format import MAX_BITS, MIN_BITS
from kbit.host.errors import UsageError
from kbit.host.files import read_json_object
from kbit.models.opening import open_model
from kbit.scaling.points import Point, read_points
from kbit.scaling.sweep.grid import BASELINE, Cell, LeftOut, expand
from kbit.scaling.sweep.measure import MEASURE_VERSION, Arithmetic, plan_cell, planned_bits, point_key
from kbit.scaling.sweep.resources import Jobs, Rates, choose_jobs, guess_seconds
from kbit.scaling.sweep.store import PointStore
from kbit.scaling.sweep.subject import Subject, find_subjects, text_name
from kbit.text.datasets import TextData
from kbit.text.windows import CONVENTIONS, Convention

# Enough for paired differences of 1 % of a loss to show on small models, at seconds a point.
DEFAULT_MAX_TOKENS = 8192
COMPUTE = ("fp32", "bf16", "int8")
_SETTINGS_SCHEMA = 1


@dataclass(frozen=True)
class SweepRequest:
    """What to measure.

    Attributes:
        models: folders, .gguf files, hub ids or names `kbit pull` lists.
        out: folder of the table.
        bits, dtypes, block_sizes, methods: the formats (sweep.grid.expand).
        data: a text file, the name of a text, or "sampled": by the first of the models.
        context: tokens per window (default: the convention's, or what the shortest model can take).
        max_tokens: tokens of the text that are used at most.
        convention: "gptq" or "llamacpp" (kbit.text.windows).
        embedding_bits: quantize embeddings and head too, to this width in its default data type.
        compute: arithmetic of all models, the originals included: "fp32", "bf16" or "int8".
        jobs: points measured side by side; None: as many as cores and memory allow.
        threads: of each.
        cluster: address of a Ray cluster, "local" for one on this machine, or None for no Ray.
        cache: use and fill the store of everything this machine has measured.
    """

    models: tuple[str, ...]
    out: Path
    bits: tuple[int, ...] = tuple(range(MIN_BITS, MAX_BITS + 1))
    dtypes: tuple[str, ...] = ("nf", "int", "float")
    block_sizes: tuple[int, ...] = (64,)
    methods: tuple[str, ...] = ("rtn",)
    data: str = "wikitext2"
    context: int | None = None
    max_tokens: int | None = DEFAULT_MAX_TOKENS
    convention: Convention = "gptq"
    embedding_bits: int | None = None
    compute: str = "fp32"
    jobs: int | None = None
    threads: int = 1
    cluster: str | None = None
    cache: bool = True


@dataclass(frozen=True, eq=False)
class Planned:
    """A point that was asked for.

    Attributes:
        key: its key.
        subject, cell: what it is.
        total_bits: what the whole model takes in this format.
        known: the point, where it has been measured already.
    """

    key: str
    subject: Subject
    cell: Cell
    total_bits: int
    known: Point | None


@dataclass(frozen=True, eq=False)
class SweepPlan:
    """Everything about a sweep but its results.

    Attributes:
        request: what was asked for.
        text: the text.
        subjects: the models.
        points: all points, model by model, the original of each first.
        left_out: combinations that do not exist.
        jobs: how many run side by side.
    """

    request: SweepRequest
    text: TextData
    subjects: tuple[Subject, ...]
    points: tuple[Planned, ...]
    left_out: tuple[LeftOut, ...]
    jobs: Jobs

    @property
    def missing(self) -> list[Planned]:
        """Points to measure."""
        return [point for point in self.points if point.known is None]

    @property
    def arithmetic(self) -> Arithmetic:
        return Arithmetic(self.request.compute, self.request.embedding_bits)

    def seconds(self) -> tuple[float, bool]:
        """Seconds the missing points will take, and whether that rests on points measured before (else: a guess)."""
        rates = Rates.of(point.known for point in self.points if point.known is not None)
        total, measured = 0.0, True
        for point in self.missing:
            known = rates.of_point(point.subject, self.subjects)
            measured = measured and known is not None
            total += guess_seconds(point.subject) if known is None else known
        return total / self.jobs.count, measured


def plan_sweep(request: SweepRequest, status: Callable[[str], None] = lambda _: None) -> SweepPlan:
    """Find out what there is to measure. Reads no weights (but for their digest, once) and imports no torch.

    Args:
        status: told what is being done.

    Raises:
        UsageError: an impossible request, or a folder that holds a sweep on another text or with other arithmetic.
        KbitError and its kinds: models, text or table cannot be read.
    """
    _check(request)
    cells, left_out = expand(request.bits, request.dtypes, request.block_sizes, request.methods)
    text = evaluation_text(request.data, next(iter(request.models), ""), request.max_tokens, status)
    subjects = find_subjects(
        request.models,
        text,
        request.convention,
        request.context,
        request.max_tokens,
        remember=request.cache,
        status=status,
    )
    check_settings(request.out, settings_of(request, text, subjects))
    table = read_table(request.out)
    store = PointStore() if request.cache else None
    arithmetic = Arithmetic(request.compute, request.embedding_bits)
    points: list[Planned] = []
    for subject in subjects:
        with open_model(subject.location) as source:
            for cell in (BASELINE, *cells):
                plan = plan_cell(source, cell, arithmetic)
                key = point_key(subject, cell, arithmetic, plan)
                known = table.get(key) or (store.get(key) if store else None)
                if known is not None:  # the same content may have had another name then
                    known = replace(known, model=subject.name, data=text_name(text))
                bits = subject.total_bits if plan is None else planned_bits(plan, cell)
                points.append(Planned(key, subject, cell, bits, known))
    missing = sum(point.known is None for point in points)
    jobs = choose_jobs(subjects, missing, request.jobs, request.threads)
    return SweepPlan(request, text, tuple(subjects), tuple(points), tuple(left_out), jobs)


def _check(request: SweepRequest) -> None:
    """What is wrong with a request, before anything is opened."""
    if request.compute not in COMPUTE:
        raise UsageError(f"--compute {request.compute}: use one of {', '.join(COMPUTE)}")
    if request.convention not in CONVENTIONS:
        raise UsageError(f"--convention {request.convention}: choose one of {', '.join(CONVENTIONS)}")
    for flag, value in (("--max-tokens", request.max_tokens), ("--jobs", request.jobs), ("--threads", request.threads)):
        if value is not None and value < 1:
            raise UsageError(f"{flag} {value}: expected at least 1")
    bits = request.embedding_bits
    if bits is not None and bits != 16 and not MIN_BITS <= bits <= MAX_BITS:
        raise UsageError(f"--embedding-bits {bits}: use {MIN_BITS} to {MAX_BITS}, or 16 to keep them")
    if request.out.exists() and not request.out.is_dir():
        raise UsageError(f"--out {request.out}: is a file; name a folder")


def settings_of(request: SweepRequest, text: TextData, subjects: Sequence[Subject]) -> dict[str, Any]:
    """What all rows of a folder share."""
    bits = request.embedding_bits
    return {
        "schema": _SETTINGS_SCHEMA,
        "measure version": MEASURE_VERSION,
        "data": text_name(text),
        "data_sha256": text.sha256,
        "convention": request.convention,
        "context": subjects[0].windows.context,
        "max_tokens": request.max_tokens,
        "compute": request.compute,
        "embedding_bits": bits or 16,
    }


def check_settings(out: Path, settings: dict[str, Any]) -> None:
    """Raises UsageError where the folder holds rows that do not compare with those to come."""
    path = out / "sweep.json"
    if not path.is_file():
        if (out / "points.jsonl").is_file():
            raise UsageError(f"{out}: holds a points.jsonl without its sweep.json: use another --out")
        return
    have = read_json_object(path)
    for name, value in settings.items():
        if name != "data" and have.get(name) != value:
            was, now = (have.get("data"), settings["data"]) if name == "data_sha256" else (have.get(name), value)
            more = " (its content changed)" if was == now else ""
            raise UsageError(
                f"{out}: holds points measured with {name.removesuffix('_sha256').replace('_', ' ')} {was}, not "
                f"{now}{more}: such rows do not compare; use another --out"
            )


def read_table(out: Path) -> dict[str, Point]:
    """The rows of a folder by key.

    Raises:
        KbitError: a row is damaged, or of another version.
    """
    return {point.key: point for point in read_points(out / "points.jsonl")}


def comparable_rows(plan: SweepPlan) -> tuple[list[Point], list[Point]]:
    """The rows of a plan's folder that belong in one report, and those that do not.

    Left aside are rows that a later one replaces (a method that finds other codes now), and rows of a model that bore
    the name of one of the plan's and was another.

    Raises:
        KbitError: a row is damaged, or of another version.
    """
    contents = {subject.name: subject.content for subject in plan.subjects}
    table = read_table(plan.request.out).values()
    rows = {
        (row.model, row.method, row.format): row
        for row in table
        if contents.get(row.model, row.model_id) == row.model_id
    }
    kept = {row.key for row in rows.values()}
    return list(rows.values()), [row for row in table if row.key not in kept]
