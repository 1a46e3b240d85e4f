"""`kbit transcribe`: speech in, text out."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kbit.cli.encoders import EncoderFlags
from kbit.cli.flag_groups import flag_groups
from kbit.cli.options import JsonOption, show, streaming_output
from kbit.host.errors import UsageError

if TYPE_CHECKING:
    from kbit.engine.transcribe import Transcription

_TASKS = ("transcribe", "translate")


@flag_groups()
def transcribe(
    files: Annotated[list[Path], typer.Argument(metavar="FILE.wav...", help="WAV files of any rate and length.")],
    *,
    flags: EncoderFlags,
    language: Annotated[
        str | None,
        typer.Option("--language", metavar="CODE", help="What is spoken: en, de, ... [default: the model is asked]"),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            "--task",
            metavar="|".join(_TASKS),
            help="Write what is said, or what it means in English. [default: as the model says, or transcribe]",
        ),
    ] = None,
    timestamps: Annotated[
        bool | None,
        typer.Option("--timestamps/--no-timestamps", help="A line for each segment. [default: as the model says]"),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens", metavar="N", help="Most tokens of the text of 30 seconds. [default: as the model says]"
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write down what is said in sound files, with Whisper.

    Prints a line for each file, or with --timestamps one for each segment. Other formats than WAV are converted with
    ffmpeg first. The features of sound are transformers' (pip install 'kbit[audio]').

    \b
    Examples:
      kbit transcribe speech.wav --model whisper-base.en/
      kbit transcribe interview.wav --model out/ --language de --timestamps
      kbit transcribe *.wav --model whisper-small/ --task translate --json
    """
    if task is not None and task not in _TASKS:
        raise UsageError(f"--task {task}: use one of {', '.join(_TASKS)}")
    if max_tokens is not None and max_tokens < 1:
        raise UsageError(f"--max-tokens {max_tokens}: expected at least 1")
    from kbit.audio.wav import RATE, read_wav

    sounds = [read_wav(file) for file in files]

    from kbit.engine.transcribe import Transcriber

    found: list[Transcription] = []
    with flags.opened(Transcriber) as model:
        start = perf_counter()
        with streaming_output():
            for sound in sounds:
                made = model.transcribe(
                    sound, language=language, task=task, timestamps=timestamps, max_tokens=max_tokens
                )
                found.append(made)
                if not as_json:
                    show(_printed(made, timestamps=bool(timestamps)))
        seconds = perf_counter() - start
    heard = sum(len(sound) for sound in sounds) / RATE
    if as_json:
        from kbit.cli.output import print_json

        print_json(
            {
                "model": flags.model,
                "texts": [_described(str(file), made) for file, made in zip(files, found, strict=True)],
                "seconds_of_sound": heard,
                "seconds": seconds,
                "load_s": model.load_seconds,
                "backend": model.model.backend.name,
                "backend_description": model.model.backend.describe(),
            }
        )
        return
    written, unfinished = sum(made.tokens for made in found), sum(made.unfinished for made in found)
    parts = [f"{heard:.1f} s of sound, {written} tokens in {seconds:.2f} s"]
    parts += [f"{unfinished} cut off by --max-tokens"] if unfinished else []
    typer.echo(" · ".join([*parts, model.model.backend.describe()]), err=True)


def _printed(made: Transcription, *, timestamps: bool) -> str:
    if not timestamps:
        return f"{' '.join(made.text.split())}\n"
    return "".join(f"[{part.start:.2f} -> {part.end:.2f}] {' '.join(part.text.split())}\n" for part in made.segments)


def _described(file: str, made: Transcription) -> dict[str, Any]:
    return {
        "file": file,
        "text": made.text.strip(),
        "language": made.language,
        "segments": [{"start": s.start, "end": s.end, "text": s.text.strip()} for s in made.segments],
        "tokens": made.tokens,
        "windows": made.windows,
        "cut_off": made.unfinished,
    }
