"""`kbit plan`: which model at how many bits, for a memory and a speed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kbit.cli.flag_groups import flag_groups
from kbit.cli.options import ENGINE, JsonOption, streaming_output
from kbit.host.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kbit.formats.quant_format import QuantFormat
    from kbit.formats.trellis import TrellisFormat
    from kbit.planner.machine import MachineSpeed
    from kbit.planner.shapes import KnownGpu
    from kbit.planner.types import Recommendation, Requirements
    from kbit.scaling.laws.fit import Laws
    from kbit.scaling.points import Point

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)
_BANDWIDTH = re.compile(r"(\d+(?:\.\d+)?)\s*(g|t)b/s", re.IGNORECASE)
# Law fits draw the text again and again; fewer draws than kbit scale takes are enough to order a dozen candidates.
_DRAWS = 1000


@dataclass(frozen=True)
class PlanFlags:
    """Flags of `kbit plan`."""

    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...",
            help="Folders, .gguf files, config.json files, hub ids in the local cache, or names of well-known models "
            "(--list). Default: what is in the caches, and the well-known ones.",
        ),
    ] = None
    memory: Annotated[
        str | None,
        typer.Option("--memory", metavar="SIZE", help="What the process may take, as 6GiB.  [default: what is free]"),
    ] = None
    context: Annotated[
        int, typer.Option("--context", metavar="N", help="Tokens that the cache must hold, prompt and answer.")
    ] = 4096
    min_speed: Annotated[
        float | None, typer.Option("--min-speed", metavar="T", help="Tokens per second at the end of the context.")
    ] = None
    points: Annotated[
        list[Path] | None,
        typer.Option(
            "--points",
            metavar="DIR",
            help="Where kbit scale wrote its points.jsonl; repeatable.  [default: every point this machine measured]",
        ),
    ] = None
    bits: Annotated[str, typer.Option("--bits", metavar="2..8", help="Widths to try: 2..8, or 3,4,8.")] = "2..8"
    kv_bits: Annotated[
        str, typer.Option("--kv-bits", metavar="16,8,4", help="Cache widths to try, of 32, 16, 8, 4, 3, 2.")
    ] = "16,8,4"
    format: Annotated[
        list[str] | None,
        typer.Option(
            "--format", metavar="FORMAT", help="Try this format (nf4-b64, trellis3) and no other; repeatable."
        ),
    ] = None
    embedding_bits: Annotated[
        int | None, typer.Option("--embedding-bits", metavar="N", help="Quantize embeddings and head too, to N bits.")
    ] = None
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads", metavar="N", help="CPU threads.  [default: one per physical core]", rich_help_panel=ENGINE
        ),
    ] = None
    compute: Annotated[
        str,
        typer.Option("--compute", metavar="int8|bf16|fp32", help="How weights are multiplied.", rich_help_panel=ENGINE),
    ] = "int8"
    device: Annotated[
        str,
        typer.Option(
            "--device",
            metavar="cpu|GPU|GB/s",
            help="This CPU; or what if it were a GPU: its name (rtx-4090, h100, ...) or bandwidth (1000GB/s). An "
            "estimate from data sheets.",
            rich_help_panel=ENGINE,
        ),
    ] = "cpu"
    remeasure: Annotated[bool, typer.Option("--remeasure", help="Time this machine's kernels again.")] = False
    no_speed: Annotated[bool, typer.Option("--no-speed", help="Memory and losses only: nothing is timed.")] = False
    everything: Annotated[bool, typer.Option("--all", help="Every candidate, not just the first.")] = False
    list_models: Annotated[bool, typer.Option("--list", help="Print the well-known models and GPUs.")] = False


@flag_groups()
def plan(*, flags: PlanFlags, json: JsonOption = False) -> None:
    """Choose a model, its bits and its cache's bits for a memory and a speed.

    Nothing is downloaded and no weight is read. Memory follows from each model's config.json; speed from short timings
    of this machine's kernels, made once and kept; losses from points that kbit scale measured and the laws fitted to
    them, with intervals. Choices that the measurements cannot tell from the best are marked as tied, and where nothing
    was measured the table says so instead of guessing.

    \b
    Examples:
      kbit plan --memory 6GiB --context 8192
      kbit plan --memory 1GB --min-speed 20 path/to/small path/to/large --points sweep/
      kbit plan path/to/config.json --memory 4GiB --kv-bits 16,8,4,2
      kbit plan llama-3.1-8b qwen2.5-14b --device rtx-4090 --context 32768
      kbit plan out/ --json
    """
    from kbit.cli.output import print_json
    from kbit.cli.plan_view import print_listing, print_recommendation

    if flags.list_models:
        listing = _listing()
        if json:
            print_json(listing)
        else:
            print_listing(listing)
        return
    result = _recommend(flags, quiet=json)
    if json:
        print_json(result.to_dict())
        return
    from rich.console import Console

    with streaming_output():
        print_recommendation(Console(), result, flags.everything)


def parse_size(flag: str, text: str) -> int:
    """Bytes of a size such as 6GiB, 6G (= 6GB) or 800MB.

    Raises:
        UsageError: it is none.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{flag} {text}: expected a size such as 6GiB or 800MB")
    power = "kmgt".index(match[2].lower()) + 1 if match[2] else 0
    if match[3] and not power:
        raise UsageError(f"{flag} {text}: expected a size such as 6GiB or 800MB")
    size = int(float(match[1]) * (1024 if match[3] else 1000) ** power)
    if size < 1:
        raise UsageError(f"{flag} {text}: expected more than nothing")
    return size


def _request(flags: PlanFlags) -> Requirements:
    """The flags, checked."""
    from kbit.formats.quant_format import MAX_BITS, MIN_BITS
    from kbit.formats.registry import parse_format
    from kbit.host.cpu import default_threads
    from kbit.host.memory import available_memory
    from kbit.planner.types import Requirements
    from kbit.planner.weights import known_format

    gpu = None if flags.device == "cpu" else _gpu(flags.device)
    if flags.compute not in ("int8", "bf16", "fp32"):
        raise UsageError(f"--compute {flags.compute}: use int8, bf16 or fp32")
    if flags.threads is not None and not 1 <= flags.threads <= 1024:
        raise UsageError(f"--threads {flags.threads}: expected at least 1 and at most 1024")
    if (
        flags.embedding_bits is not None
        and flags.embedding_bits != 16
        and not MIN_BITS <= flags.embedding_bits <= MAX_BITS
    ):
        raise UsageError(f"--embedding-bits {flags.embedding_bits}: use {MIN_BITS} to {MAX_BITS}, or 16 to keep them")
    if flags.memory is not None:
        limit: int | None = parse_size("--memory", flags.memory)
    elif gpu is not None:
        limit = gpu.memory or None
    else:
        limit = available_memory()
    if limit is None:
        raise UsageError("--memory is missing: say what the process may take, for example --memory 6GiB")
    parsed: tuple[QuantFormat | TrellisFormat, ...] | None = None
    if flags.format:
        parsed = tuple(dict.fromkeys(known_format(parse_format(text)) for text in flags.format))
    kinds = {32: "fp32", 16: "fp16", 8: "8", 4: "4", 3: "3", 2: "2"}
    widths = sorted(set(_numbers("--kv-bits", flags.kv_bits, 2, 32)), reverse=True)
    unknown = [width for width in widths if width not in kinds]
    if unknown:
        raise UsageError(f"--kv-bits {unknown[0]}: use one of 32, 16, 8, 4, 3, 2")
    return Requirements(
        memory=limit,
        context=flags.context,
        min_speed=flags.min_speed,
        bits=tuple(_numbers("--bits", flags.bits, MIN_BITS, MAX_BITS)),
        kv=tuple(kinds[width] for width in widths),
        embedding_bits=flags.embedding_bits,
        formats=parsed,
        threads=flags.threads or default_threads(),
        compute=flags.compute,
        gpu=gpu,
    )


def _numbers(flag: str, text: str, least: int, most: int) -> list[int]:
    """Whole numbers: "2..8" or "2,3,4"."""
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,4})(?:\s*\.\.\s*(\d{1,4}))?\s*", part)
        if match is None:
            raise UsageError(f"{flag} {text}: write it as in {least}..{most} or {least},{most}")
        first, last = int(match[1]), int(match[2] or match[1])
        if not least <= first <= last <= most:
            raise UsageError(f"{flag} {text}: use {least} to {most}")
        found.update(range(first, last + 1))
    return sorted(found)


def _gpu(text: str) -> KnownGpu:
    from kbit.planner.shapes import KNOWN_GPUS, KnownGpu

    name = text.strip().lower().replace(" ", "-").replace("_", "-")
    if name in KNOWN_GPUS:
        return KNOWN_GPUS[name]
    match = _BANDWIDTH.fullmatch(text.strip())
    if match is None or float(match[1]) <= 0:
        raise UsageError(f"--device {text}: use cpu, a bandwidth such as 1000GB/s, or one of {', '.join(KNOWN_GPUS)}")
    bandwidth = float(match[1]) * (1e9 if match[2].lower() == "g" else 1e12)
    return KnownGpu(f"a GPU of {text.strip()}", bandwidth, 0)


def _recommend(flags: PlanFlags, *, quiet: bool) -> Recommendation:
    """Everything behind the table, with a line on stderr about what is going on where that is a terminal."""
    from rich.console import Console

    from kbit.planner.choose import make_recommendation
    from kbit.planner.machine import machine_speed
    from kbit.planner.models import find_models

    request = _request(flags)
    console = Console(stderr=True)
    with console.status("reading models") as status:
        if quiet or not console.is_terminal:
            status.stop()
        rows, notes = _points(flags.points)
        models, more = find_models(flags.models or [], rows)
        laws: Laws | None = None
        if any(model.measured is not None or model.tokenizer is not None for model in models) and rows:
            from kbit.scaling.laws.fit import fit_laws

            status.update("fitting laws")
            laws = fit_laws(rows, draws=_DRAWS)
        first = True

        def rates(kernels: Iterable[str], shapes: Iterable[tuple[str, int, int]]) -> MachineSpeed:
            nonlocal first
            again, first = flags.remeasure and first, False
            return machine_speed(
                kernels,
                shapes,
                threads=request.threads,
                compute=request.compute,
                remeasure=again,
                progress=lambda line: status.update(f"timing this machine (once): {line}"),
            )

        constant = None
        if request.gpu is None and not flags.no_speed:
            constant = rates((), ()).constant_bytes
        elif request.gpu is None:
            notes.append("the process itself (Python, torch: some 250 MB) is not counted: --no-speed measures nothing")
        return make_recommendation(
            request,
            models,
            points=rows,
            laws=laws,
            rates=None if flags.no_speed or request.gpu is not None else rates,
            constant=constant,
            notes=[*notes, *more, *(laws.notes if laws is not None else ())],
        )


def _points(folders: list[Path] | None) -> tuple[list[Point], list[str]]:
    """Measured rows, of some folders or of this machine, and notes about them."""
    from kbit.host.errors import KbitError
    from kbit.scaling.points import read_points

    if folders:
        rows: list[Point] = []
        for folder in folders:
            path = folder / "points.jsonl" if folder.is_dir() else folder
            if not path.is_file():
                raise UsageError(f"--points {folder}: no points.jsonl there; kbit scale ... --out {folder} writes one")
            rows += read_points(path)
        return rows, []
    from kbit.scaling.sweep.store import PointStore

    try:
        return PointStore().all(), []
    except KbitError as error:
        return [], [f"measured points are left aside ({error})"]


def _listing() -> dict[str, Any]:
    from kbit.planner.shapes import KNOWN_GPUS, KNOWN_MODELS

    return {
        "models": [
            {"name": model.name, "repository": model.repository, "parameters": model.parameters}
            for model in sorted(KNOWN_MODELS.values(), key=lambda model: model.parameters)
        ],
        "gpus": [
            {"name": gpu.name, "bandwidth_bytes_per_second": gpu.bandwidth, "memory_bytes": gpu.memory}
            for gpu in KNOWN_GPUS.values()
        ],
    }
