"""What `kbit info --plot` does: measure a model's matrices, draw them, and name the ones that matter most."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from kbit.cli.output import printable
from kbit.host.errors import KbitError, UsageError

if TYPE_CHECKING:
    from kbit.checkpoint.source import CheckpointSource
    from kbit.evaluate.sensitivity import Sensitivity
    from kbit.formats.codec import Codec
    from kbit.scaling.report.layers import LayerTable, MatrixRow

_DATA = "wikitext2"
_NO_DATA = "none"
_MAX_TOKENS = 1024
# Short windows: sensitivities are means over tokens, and more windows tell more than longer ones.
_CONTEXT = 256
_COSTLIEST = 8


@dataclass(frozen=True)
class PictureRequest:
    """What to draw, checked.

    Attributes:
        path: the file.
        formats: to try on the weights.
        bits: how the user asked for them, or None.
        reference: the model that the weights are compared with instead, or None.
        data: a text, "none", or None for the default text where it can be had.
        max_tokens: of it.
    """

    path: Path
    formats: tuple[Codec, ...]
    bits: str | None
    reference: str | None
    data: str | None
    max_tokens: int


def check_request(
    plot: Path, bits: str | None, reference: str | None, data: str | None, max_tokens: int | None
) -> PictureRequest:
    """The flags of a picture, before anything is opened.

    Raises:
        UsageError: a flag that makes no sense.
    """
    from kbit.scaling.report.layer_plots import check_picture_path

    check_picture_path(plot)
    if bits is not None and reference is not None:
        raise UsageError(
            "--bits tries formats on the weights, --reference shows the error of what is stored: choose one"
        )
    if max_tokens is not None and max_tokens < 2:
        raise UsageError(f"--max-tokens {max_tokens}: expected at least 2")
    formats = () if reference is not None else tuple(parse_formats(bits or "4"))
    return PictureRequest(plot, formats, bits, reference, data, max_tokens or _MAX_TOKENS)


def parse_formats(text: str) -> Iterator[Codec]:
    """ "3,4", "2..8" or "nf4-b64,int3-b32": widths in their default data type and blocks of 64, or formats.

    Raises:
        UsageError: an entry is neither, or there is none.
    """
    from kbit.formats.quant_format import QuantFormat, default_dtype
    from kbit.formats.registry import parse_format

    entries = [entry.strip() for entry in text.split(",")]
    seen: set[str] = set()
    for entry in entries:
        first, dots, last = entry.partition("..")
        if entry.isdecimal():
            formats = [int(entry)]
        elif dots and first.isdecimal() and last.isdecimal() and int(first) <= int(last) < 100:
            formats = list(range(int(first), int(last) + 1))
        elif entry:
            format = parse_format(entry)
            if str(format) not in seen:
                seen.add(str(format))
                yield format
            continue
        else:
            raise UsageError(f"--bits {text!r}: expected widths (3,4 or 2..8) or formats (nf4-b64)")
        for width in formats:
            format = QuantFormat(default_dtype(width), width)
            if str(format) not in seen:
                seen.add(str(format))
                yield format


def draw(source: CheckpointSource, model: str, request: PictureRequest, quiet: bool) -> dict[str, Any]:
    """Measure and draw; with progress on stderr unless `quiet` or stderr is no terminal.

    Returns:
        Plain values: the file, the formats, what was measured on what, and every matrix.
    """
    from kbit.models.opening import open_model
    from kbit.scaling.report.layer_plots import write_layer_picture
    from kbit.scaling.report.layers import LayerTable, linear_rows, measure_errors, with_sensitivity

    rows: Sequence[MatrixRow] = linear_rows(source)
    original, against, formats = source, _stored(rows), tuple(str(format) for format in request.formats)
    notes = []
    text: str | None = None
    found: list[Sensitivity] = []
    with _progress(quiet) as advance, ExitStack() as stack:
        if request.reference is not None:
            original, against, formats = (
                stack.enter_context(open_model(request.reference)),
                request.reference,
                ("stored",),
            )
            rows = measure_errors(source, rows, (), original, progress=advance("comparing"))
        elif (source.config.get("quantization_config") or {}).get("quant_method") != "kbit":
            rows = measure_errors(source, rows, request.formats, progress=advance("rounding"))
        elif request.bits is not None:
            raise UsageError(f"{source.path} is quantized already: try --bits {request.bits} on what it was made of")
        else:
            formats = ()
            notes.append("no errors: give the model that this one was made of to --reference")
        try:
            text, found = _sensitivity(original, request, advance("sensitivity"))
        except KbitError as error:
            if request.data is not None:
                raise
            notes.append(f"no sensitivity: {error}")
        table = LayerTable(_name(model), tuple(with_sensitivity(rows, found)), formats, against, text)
        path = write_layer_picture(table, request.path)
    return _plain(table, path, notes)


def print_costliest(plot: dict[str, Any]) -> None:
    """For people: where the picture is, what the errors cost in all, and the matrices that cost most."""
    from kbit.scaling.report.layer_plots import LARGE_KL

    typer.echo(f"\n{'picture:':<17}{printable(plot['file'])}")
    for note in plot["notes"]:
        typer.echo(f"{'note:':<17}{printable(note)}")
    if plot["text"]:
        typer.echo(f"{'sensitivity on:':<17}{printable(plot['text'])}")
    for format, total in plot["kl_predicted"].items():
        if total is not None:
            large = " (rough: errors so large do not add up)" if total > LARGE_KL else ""
            typer.echo(f"{'predicted KL:':<17}{total:.3g} nats per token for {_spoken(format)}{large}")
    format = next(iter(plot["kl_predicted"]), None)
    if format is None or not plot["kl_predicted"][format]:
        return
    total = plot["kl_predicted"][format]
    typer.echo(f"\n{'costliest with ' + _spoken(format):<52}{'error':>10}{'KL':>12}{'share':>9}")
    for row in sorted(plot["matrices"], key=lambda row: -row["kl_predicted"][format])[:_COSTLIEST]:
        error, kl = row["errors"][format], row["kl_predicted"][format]
        typer.echo(f"{printable(row['name']):<52}{error:>10.3g}{kl:>12.3g}{100 * kl / total:>8.1f}%")


def _sensitivity(
    source: CheckpointSource, request: PictureRequest, progress: Any
) -> tuple[str | None, list[Sensitivity]]:
    """What was measured on, and the sensitivities; nothing with --data none.

    Raises:
        KbitError: the text cannot be had or is too short, or the model cannot run.
    """
    if request.data == _NO_DATA:
        return None, []
    from kbit.evaluate.sensitivity import measure_sensitivity
    from kbit.models.check import check_continues
    from kbit.models.families import spec_from_config
    from kbit.text.datasets import resolve_data
    from kbit.text.tokenizer import Tokenizer
    from kbit.text.windows import make_windows

    spec = spec_from_config(source.config, where=f"config of {source.path}")
    check_continues(spec, str(source.path))
    data = resolve_data(request.data or _DATA)
    context = min(_CONTEXT, spec.context_length, request.max_tokens)
    windows = make_windows(data, Tokenizer.from_source(source), "gptq", context, request.max_tokens)
    found = measure_sensitivity(source, windows, progress=progress)
    return f"{data.name}, {windows.scored:,} tokens in {windows.count} windows", found


@contextmanager
def _progress(quiet: bool) -> Iterator[Any]:
    """Gives a function that makes progress callbacks, each with its own line on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:

        def advance(description: str) -> Any:
            task = bar.add_task(description, total=None)
            return lambda done, total: bar.update(task, completed=done, total=total)

        yield advance


def _stored(rows: Sequence[MatrixRow]) -> str:
    return f"the weights as stored ({', '.join(sorted({row.stored_as for row in rows}))})"


def _plain(table: LayerTable, path: Path, notes: list[str]) -> dict[str, Any]:
    return {
        "file": str(path),
        "formats": list(table.formats),
        "against": table.against,
        "text": table.text,
        "notes": notes,
        "kl_predicted": {format: table.total_damage(format) for format in table.formats},
        "matrices": [row.to_dict() for row in table.rows],
    }


def _name(model: str) -> str:
    return Path(model.rstrip("/\\")).name or model


def _spoken(format: str) -> str:
    return "what is stored" if format == "stored" else printable(format)
