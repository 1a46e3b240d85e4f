"""`kbit fill`: masked words."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from kbit.cli.encoders import EncoderFlags
from kbit.cli.flag_groups import flag_groups
from kbit.cli.options import JsonOption, read_prompt
from kbit.host.errors import UsageError


@flag_groups()
def fill(
    text: Annotated[
        str | None,
        typer.Argument(metavar="TEXT", help='Text with masked words; "-", or none in a pipe, reads standard input.'),
    ] = None,
    *,
    flags: EncoderFlags,
    top: Annotated[int, typer.Option("--top", metavar="N", help="How many words for each place.")] = 5,
    as_json: JsonOption = False,
) -> None:
    """Say which words a model puts in masked places ([MASK], or <mask> where the model writes it so).

    \b
    Examples:
      kbit fill "The capital of France is [MASK]." --model bert-base-uncased/
      kbit fill "Paris is the <mask> of <mask>." --model roberta-base/ --top 3
      kbit fill - --model out/ --json < text.txt
    """
    if top < 1:
        raise UsageError(f"--top {top}: expected at least 1")
    prompt = read_prompt(text)

    from kbit.engine.fill import MaskFiller

    with flags.opened(MaskFiller) as model:
        found = model.fill(prompt, top)
    if as_json:
        from kbit.cli.output import print_json

        print_json(
            {
                "model": flags.model,
                "mask": model.mask,
                "masked": [[asdict(filling) for filling in row] for row in found],
                "load_s": model.encoder.load_seconds,
                "backend": model.encoder.backend.name,
                "backend_description": model.encoder.backend.describe(),
            }
        )
        return
    from kbit.cli.output import printable

    for number, row in enumerate(found, 1):
        if len(found) > 1:
            typer.echo(f"{model.mask} {number}")
        for filling in row:
            typer.echo(f"{filling.probability:7.4f}  {printable(filling.token)}")
