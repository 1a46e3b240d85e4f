"""What the commands of encoder-decoders share: flags, opening a model, and what is printed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from kbit.cli.options import (
    BackendOption,
    BitsOption,
    ComputeOption,
    DeviceOption,
    KvBitsOption,
    ModelOption,
    ThreadsOption,
    show,
    streaming_output,
)
from kbit.host.errors import UsageError

if TYPE_CHECKING:
    from kbit.checkpoint.source import CheckpointSource
    from kbit.engine.text_to_text import Answer, Long, TextToText
    from kbit.graph.backend import Backend

_LONG = ("refuse", "truncate")
# Texts that are answered before the first of them is printed: enough that those of about one length go together.
_AT_ONCE = 256


@dataclass(frozen=True)
class TextToTextFlags:
    """Flags of a command that runs an encoder-decoder."""

    model: ModelOption
    beams: Annotated[
        int | None,
        typer.Option("--beams", metavar="N", help="Keep the N best texts while writing. [default: as the model says]"),
    ] = None
    length_penalty: Annotated[
        float | None,
        typer.Option(
            "--length-penalty",
            metavar="P",
            help="Beams are compared by their log probability over length^P: above 0 favours long texts. [default: as "
            "the model says]",
        ),
    ] = None
    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", metavar="N", help="Most tokens of a text. [default: as the model says, or 256]"),
    ] = None
    long: Annotated[
        str,
        typer.Option(
            "--long",
            metavar="|".join(_LONG),
            help="What becomes of a text that is too long for the model: the command fails, or its end is left out.",
        ),
    ] = "refuse"
    device: DeviceOption = "auto"
    backend: BackendOption = "auto"
    threads: ThreadsOption = None
    compute: ComputeOption = None
    kv_bits: KvBitsOption = None
    bits: BitsOption = None

    def check(self) -> None:
        """Look for mistakes that show before a model is opened.

        Raises:
            UsageError: a flag is out of range.
        """
        from kbit.engine.generation_settings import MAX_BEAMS

        if self.long not in _LONG:
            raise UsageError(f"--long {self.long}: use one of {', '.join(_LONG)}")
        if self.beams is not None and not 1 <= self.beams <= MAX_BEAMS:
            raise UsageError(f"--beams {self.beams}: expected at least 1 and at most {MAX_BEAMS}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UsageError(f"--max-tokens {self.max_tokens}: expected at least 1")
        if self.length_penalty is not None and not abs(self.length_penalty) < 1000:
            raise UsageError(f"--length-penalty {self.length_penalty}: expected a number between -1000 and 1000")

    @contextmanager
    def opened(self, make: Callable[[CheckpointSource, Backend], TextToText]) -> Iterator[TextToText]:
        """A model, as `make` makes it of its checkpoint and of who computes."""
        from kbit.backends.select import select_backend, set_threads
        from kbit.engine.loader import open_prepared

        backend = select_backend(
            self.device, backend=self.backend, threads=self.threads, compute=self.compute, kv_bits=self.kv_bits
        )
        if backend.name == "reference":
            set_threads(self.threads)
        with open_prepared(self.model, backend, bits=self.bits) as source:
            made = make(source, backend)
        yield made


def answer_all(
    flags: TextToTextFlags,
    texts: list[str],
    make: Callable[[CheckpointSource, Backend], TextToText],
    *,
    as_json: bool,
) -> None:
    """Reads texts, writes one for each, and prints them: a line each, as they come, or one JSON object.

    Raises:
        UsageError, CheckpointError, UnsupportedError: see `kbit.engine.text_to_text.TextToText`.
    """
    with flags.opened(make) as model:
        settings = model.with_settings(flags.beams, flags.max_tokens, flags.length_penalty)
        answers: list[Answer] = []
        start = perf_counter()
        with streaming_output():
            for begin in range(0, len(texts), _AT_ONCE):
                part = texts[begin : begin + _AT_ONCE]
                found = model.answer(part, settings, cast("Long", flags.long), begin + 1)
                answers += found
                for answer in () if as_json else found:
                    show(" ".join(answer.text.splitlines()) if len(texts) > 1 else answer.text)
                    show("\n")
        seconds = perf_counter() - start
    if as_json:
        from kbit.cli.output import print_json

        print_json(
            {
                "model": flags.model,
                "texts": [_described(answer) for answer in answers],
                "beams": settings.beams,
                "max_tokens": settings.longest - 1,
                "seconds": seconds,
                "load_s": model.load_seconds,
                "backend": model.model.backend.name,
                "backend_description": model.model.backend.describe(),
            }
        )
        return
    typer.echo(_statistics(model, answers, settings.beams, seconds), err=True)


def _described(answer: Answer) -> dict[str, Any]:
    return {
        "text": answer.text,
        "score": answer.score,
        "finish_reason": "stop" if answer.finished else "length",
        "source_tokens": answer.source_tokens,
        "tokens": len(answer.ids) - 1,
        "left_out": answer.cut,
    }


def _statistics(model: TextToText, answers: list[Answer], beams: int, seconds: float) -> str:
    """One line for people."""
    read, written = (sum(counts) for counts in zip(*((a.source_tokens, len(a.ids) - 1) for a in answers), strict=True))
    parts = [f"{read} tokens read, {written} written in {seconds:.2f} s"]
    if beams > 1:
        parts.append(f"{beams} beams")
    if cut := [number for number, answer in enumerate(answers, 1) if answer.cut]:
        parts.append(f"the end of {len(cut)} left out (text {cut[0]}{', ...' if len(cut) > 1 else ''})")
    if unfinished := sum(not answer.finished for answer in answers):
        parts.append(f"{unfinished} cut off by --max-tokens")
    parts.append(model.model.backend.describe())
    return " · ".join(parts)
