"""`kbit translate`: texts of one language in, texts of another out."""

from __future__ import annotations

from typing import Annotated

import typer

from kbit.cli.encoders import FileOption, read_lines
from kbit.cli.flag_groups import flag_groups
from kbit.cli.options import JsonOption
from kbit.cli.text_to_text import TextToTextFlags, answer_all


@flag_groups()
def translate(
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="[TEXT]...", help="Texts; without any, the lines of standard input.")
    ] = None,
    *,
    flags: TextToTextFlags,
    file: FileOption = None,
    source: Annotated[
        str | None,
        typer.Option("--from", metavar="LANGUAGE", help="Of the texts, as the model writes it: en, en_XX, eng_Latn."),
    ] = None,
    target: Annotated[
        str | None, typer.Option("--to", metavar="LANGUAGE", help="Of the translations, where the model has several.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Translate texts with an encoder-decoder: Marian (OPUS-MT), NLLB, M2M-100, mBART or T5.

    Prints a line for each text. How many beams are kept, how long a text may be and the rest of generation_config.json
    count as in transformers.

    \b
    Examples:
      kbit translate "How are you?" --model opus-mt-en-de/
      kbit translate "How are you?" --model nllb-200-distilled-600M/ --from eng_Latn --to deu_Latn --beams 4
      kbit translate --file lines.txt --model out/ --from en --to ro > translated.txt
      cat lines.txt | kbit translate --model t5-small/ --from en --to de --json
    """
    flags.check()
    lines = read_lines(texts, file, 'kbit translate "How are you?" --model MODEL')

    from kbit.engine.text_to_text import TextToText

    answer_all(
        flags,
        lines,
        lambda checkpoint, backend: TextToText(checkpoint, backend, task="translation", languages=(source, target)),
        as_json=as_json,
    )
