"""`kbit attention`: which tokens of a text a model's tokens attend to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kbit.cli.options import JsonOption, ModelOption, ThreadsOption, read_prompt
from kbit.host.errors import KbitError, UsageError

if TYPE_CHECKING:
    from kbit.engine.attention import AttentionMap

_KINDS = ("svg", "png", "json")


def attention(
    text: Annotated[
        str | None, typer.Argument(metavar="TEXT", help='A text; "-", or none in a pipe, reads standard input.')
    ] = None,
    *,
    model: ModelOption,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Where to: a .svg or .png picture, or .json numbers."),
    ] = None,
    layer: Annotated[
        list[int] | None,
        typer.Option("--layer", metavar="L", help="A layer, from 0 on; again for several. [default: all, averaged]"),
    ] = None,
    head: Annotated[
        list[int] | None,
        typer.Option("--head", metavar="H", help="A query head, likewise. [default: all, averaged]"),
    ] = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Draw which tokens of a text the tokens of a model attend to, averaged over layers and heads.

    Computed by the reference backend, in float32. Row q, column k is the share that token k has in what token q gets.

    \b
    Examples:
      kbit attention "The cat sat because it was tired." --model smollm2-135m-instruct -o map.svg
      kbit attention "The cat sat because it was tired." --model out/ --layer 9 --head 2 -o head.png
      kbit attention "A man plays the guitar." --model all-MiniLM-L6-v2/ -o map.json
    """
    kind = "" if output is None else output.suffix.lower().removeprefix(".")
    if output is None and not as_json:
        raise UsageError("say where the picture goes, for example -o map.svg; or --json prints the numbers")
    if output is not None and kind not in _KINDS:
        raise UsageError(f"--output {output}: the name has to end in .svg, .png or .json")
    prompt = read_prompt(text)

    from kbit.backends.select import set_threads
    from kbit.cli.output import print_json, printable
    from kbit.engine.attention import attention_map
    from kbit.models.opening import open_model

    set_threads(threads)
    with open_model(model) as source:
        found = attention_map(source, prompt, layers=layer or (), heads=head or ())
    if output is not None:
        _write(found, output, kind, model)
    if as_json:
        print_json({**_values(found, model), "output": None if output is None else str(output)})
    else:
        typer.echo(f"{len(found.tokens)} tokens, {_named(found)}: {printable(str(output))}")


def _values(found: AttentionMap, model: str) -> dict[str, object]:
    return {
        "model": model,
        "tokens": list(found.tokens),
        "layers": list(found.layers),
        "heads": list(found.heads),
        "shares": [[float(share) for share in row] for row in found.shares],
    }


def _write(found: AttentionMap, output: Path, kind: str, model: str) -> None:
    """
    Raises:
        KbitError: the file cannot be written, or matplotlib is missing.
    """
    import json

    from kbit.host.files import write_durably

    if kind == "json":
        content = json.dumps(_values(found, model), ensure_ascii=False).encode()
    else:
        from kbit.scaling.report import plots_style
        from kbit.scaling.report.attention_plot import attention_figure

        title = f"{plots_style.shown(Path(model).name, 40)}\n{_named(found)}"
        content = plots_style.rendered(attention_figure(found.tokens, found.shares, title), kind)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_durably(output, content)
    except OSError as error:
        raise KbitError(f"{output} cannot be written: {error.strerror or error}") from error


def _named(found: AttentionMap) -> str:
    def several(what: str, numbers: tuple[int, ...]) -> str:
        if len(numbers) == 1:
            return f"{what} {numbers[0]}"
        return f"mean of {len(numbers)} {what}s"

    return f"{several('layer', found.layers)}, {several('head', found.heads)}"
