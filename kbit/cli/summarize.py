"""`kbit summarize`: long texts in, short ones out."""

from __future__ import annotations

from typing import Annotated

import typer

from kbit.cli.encoders import FileOption, read_lines
from kbit.cli.flag_groups import flag_groups
from kbit.cli.options import JsonOption
from kbit.cli.text_to_text import TextToTextFlags, answer_all


@flag_groups()
def summarize(
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="[TEXT]...", help="Texts; without any, the lines of standard input.")
    ] = None,
    *,
    flags: TextToTextFlags,
    file: FileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Summarize texts with an encoder-decoder: BART, Pegasus or T5.

    Prints a line for each text. What config.json says of summarizing (task_specific_params: beams, lengths, the words
    before a text) counts, and else generation_config.json, as in transformers.

    \b
    Examples:
      kbit summarize --file article.txt --model bart-large-cnn/ --long truncate
      kbit summarize "A long text ..." --model pegasus-xsum/ --beams 8
      cat articles.txt | kbit summarize --model t5-small/ --max-tokens 60 --json
    """
    flags.check()
    lines = read_lines(texts, file, 'kbit summarize "A long text ..." --model MODEL')

    from kbit.engine.text_to_text import TextToText

    answer_all(
        flags, lines, lambda checkpoint, backend: TextToText(checkpoint, backend, task="summarization"), as_json=as_json
    )
