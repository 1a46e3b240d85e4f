"""`kbit classify`: labels of texts, of pairs of texts, or of words."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kbit.cli.encoders import EncoderFlags, FileOption, read_lines
from kbit.cli.flag_groups import flag_groups
from kbit.cli.options import JsonOption, check_text
from kbit.host.errors import UsageError

if TYPE_CHECKING:
    from kbit.engine.classify import Aggregation, Classifier, Labelled


@flag_groups()
def classify(
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="[TEXT]...", help="Texts; without any, the lines of standard input.")
    ] = None,
    *,
    flags: EncoderFlags,
    file: FileOption = None,
    pair: Annotated[
        list[str] | None,
        typer.Option(
            "--pair",
            metavar="TEXT",
            help="What TEXT is read together with, as rerankers do. With one text, any number of pairs; else one each.",
        ),
    ] = None,
    aggregation: Annotated[
        str,
        typer.Option(
            "--aggregation",
            metavar="none|simple|first|average|max",
            help="Labels of words: every token; neighbours of one label together; or words first, by their first "
            "token, the mean, or the surest.",
        ),
    ] = "simple",
    as_json: JsonOption = False,
) -> None:
    """Label texts or their words, as the model's head does (ForSequenceClassification, ForTokenClassification).

    Of a text, labels come with their probabilities, the most probable first; a reranker's one label is the score of a
    pair. Of words, every labelled stretch comes with its place, but for those labelled O.

    \b
    Examples:
      kbit classify "I loved every minute of it." --model sentiment/
      kbit classify "what do pandas eat" --pair "Bamboo, mostly." --pair "Pandas is a library." --model reranker/
      kbit classify "Angela Merkel was born in Hamburg." --model ner/ --aggregation first
      kbit classify --file reviews.txt --model sentiment/ --json
    """
    from kbit.engine.classify import AGGREGATIONS

    if aggregation not in AGGREGATIONS:
        raise UsageError(f"--aggregation {aggregation}: use one of {', '.join(AGGREGATIONS)}")
    lines = read_lines(texts, file, 'kbit classify "Some text." --model MODEL')
    for number, text in enumerate(pair or (), 1):
        check_text(f"--pair {number}", text)
    if pair and len(lines) == 1:
        lines = lines * len(pair)
    if pair and len(pair) != len(lines):
        raise UsageError(f"{len(lines)} texts and {len(pair)} --pair: give one for each text, or a single text")

    from kbit.engine.classify import Classifier

    with flags.opened(Classifier) as model:
        if model.of_tokens:
            if pair:
                raise UsageError(f"--pair: {flags.model} labels words, and reads one text at a time")
            _words(model, lines, aggregation, flags.model, as_json)
        else:
            _texts(model, lines, pair, flags.model, as_json)


def _about(model: Classifier, name: str) -> dict[str, Any]:
    return {
        "model": name,
        "labels": model.labels,
        "load_s": model.encoder.load_seconds,
        "backend": model.encoder.backend.name,
        "backend_description": model.encoder.backend.describe(),
    }


def _words(model: Classifier, lines: list[str], aggregation: Aggregation, name: str, as_json: bool) -> None:
    found = [model.entities(line, aggregation) for line in lines]
    if as_json:
        from kbit.cli.output import print_json

        entities = [[asdict(entity) for entity in row] for row in found]
        print_json({**_about(model, name), "aggregation": aggregation, "entities": entities})
        return
    from kbit.cli.output import printable

    for number, row in enumerate(found, 1):
        for entity in row:
            place = f"{number}:{entity.start}-{entity.stop}" if len(found) > 1 else f"{entity.start}-{entity.stop}"
            typer.echo(f"{entity.score:7.4f}  {printable(entity.label)}  {place}  {printable(entity.text)}")


def _texts(model: Classifier, lines: list[str], pair: list[str] | None, name: str, as_json: bool) -> None:
    found = model.label(lines, pair)
    if as_json:
        from kbit.cli.output import print_json

        results = [
            {
                "label": model.labels[_best(one)],
                "scores": dict(zip(model.labels, one.scores, strict=True)),
                "logits": one.logits,
                "tokens": one.tokens,
                "truncated": one.cut,
            }
            for one in found
        ]
        print_json({**_about(model, name), "results": results})
        return
    from kbit.cli.output import printable

    for number, one in enumerate(found, 1):
        order = sorted(range(len(model.labels)), key=lambda index: -one.scores[index])[:5]
        labels = "  ".join(f"{one.scores[index]:7.4f}  {printable(model.labels[index])}" for index in order)
        typer.echo(f"{number}  {labels}" if len(found) > 1 else labels)
    if cut := sum(one.cut for one in found):
        typer.echo(f"{cut} cut to {model.encoder.spec.context_length} tokens", err=True)


def _best(one: Labelled) -> int:
    return max(range(len(one.scores)), key=lambda index: one.scores[index])
