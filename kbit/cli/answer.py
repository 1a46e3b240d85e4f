"""`kbit answer`: the stretch of a text that answers a question."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from kbit.cli.encoders import EncoderFlags, read_text
from kbit.cli.flag_groups import flag_groups
from kbit.cli.options import JsonOption, check_text
from kbit.host.errors import UsageError


@flag_groups()
def answer(
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What to ask.")],
    *,
    flags: EncoderFlags,
    context: Annotated[
        str, typer.Option("--context", "-c", metavar="FILE|TEXT", help='Where the answer is ("-": standard input).')
    ],
    top: Annotated[int, typer.Option("--top", metavar="N", help="How many answers.")] = 1,
    longest: Annotated[int, typer.Option("--max-answer", metavar="N", help="Longest answer in tokens.")] = 30,
    window: Annotated[int, typer.Option("--window", metavar="N", help="Tokens that are read at once.")] = 384,
    overlap: Annotated[int, typer.Option("--overlap", metavar="N", help="Tokens that windows share.")] = 128,
    may_be_absent: Annotated[
        bool, typer.Option("--may-be-absent", help="The context may have no answer (models trained on SQuAD 2).")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Find the answer to a question in a text, word for word (ForQuestionAnswering).

    A long context is read in windows that overlap. What is named by --context is a file where there is one, else the
    text itself.

    \b
    Examples:
      kbit answer "Who wrote it?" --context "Middlemarch is a novel by George Eliot." --model squad/
      kbit answer "When was the treaty signed?" --context article.txt --model squad/ --top 3 --json
    """
    for flag, value, least in (("--top", top, 1), ("--max-answer", longest, 1), ("--overlap", overlap, 0)):
        if value < least:
            raise UsageError(f"{flag} {value}: expected at least {least}")
    if window < 8:
        raise UsageError(f"--window {window}: expected at least 8")
    check_text("the question", question)
    if not question.strip():
        raise UsageError('the question is empty: give one, for example kbit answer "Who wrote it?" --context book.txt')
    text = _context(context)

    from kbit.engine.answer import Answerer

    with flags.opened(Answerer) as model:
        found, windows = model.answer(
            question,
            text,
            top=top,
            longest_answer=longest,
            window=window,
            overlap=overlap,
            may_be_absent=may_be_absent,
        )
    if as_json:
        from kbit.cli.output import print_json

        print_json(
            {
                "model": flags.model,
                "answers": [asdict(one) for one in found],
                "windows": windows,
                "load_s": model.encoder.load_seconds,
                "backend": model.encoder.backend.name,
                "backend_description": model.encoder.backend.describe(),
            }
        )
        return
    from kbit.cli.output import printable

    for one in found:
        shown = printable(" ".join(one.text.split())) if one.stop else "(no answer)"
        typer.echo(f"{one.score:7.4f}  {one.start}-{one.stop}  {shown}")
    if windows > 1:
        typer.echo(f"read in {windows} windows", err=True)


def _context(context: str) -> str:
    """The text to read.

    Raises:
        UsageError: it is empty, or a file that cannot be read.
    """
    try:
        is_file = context == "-" or Path(context).is_file()
    except (OSError, ValueError):  # too long a name for a file
        is_file = False
    text = read_text(Path(context)) if is_file else context
    check_text("the context", text)
    if not text.strip():
        raise UsageError("the context is empty: give a file or some text with --context")
    return text
