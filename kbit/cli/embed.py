"""`kbit embed`: texts in, vectors out."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from kbit.cli.encoders import EncoderFlags, FileOption, read_lines
from kbit.cli.flag_groups import flag_groups
from kbit.cli.options import JsonOption
from kbit.host.errors import UsageError

if TYPE_CHECKING:
    from kbit.engine.embed import Embeddings, Long

_LONG = ("truncate", "windows", "refuse")


@flag_groups()
def embed(
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="[TEXT]...", help="Texts; without any, the lines of standard input.")
    ] = None,
    *,
    flags: EncoderFlags,
    file: FileOption = None,
    prompt: Annotated[str | None, typer.Option("--prompt", metavar="TEXT", help="Put TEXT before every text.")] = None,
    prompt_name: Annotated[
        str | None,
        typer.Option("--prompt-name", metavar="NAME", help="Put the model's prompt of this name before every text."),
    ] = None,
    long: Annotated[
        str,
        typer.Option(
            "--long",
            metavar="|".join(_LONG),
            help="What becomes of a text that is too long: its beginning is read, as sentence-transformers does; it is "
            "read in windows, whose vectors are averaged; or the command fails.",
        ),
    ] = "truncate",
    max_length: Annotated[
        int | None,
        typer.Option("--max-length", metavar="N", help="Longest text in tokens. [default: as the model says]"),
    ] = None,
    pooling: Annotated[
        str | None,
        typer.Option(
            "--pooling",
            metavar="KIND,...",
            help="cls, max, mean, mean_sqrt_len, weightedmean or lasttoken. [default: as the model says, or mean]",
        ),
    ] = None,
    normalize: Annotated[
        bool | None,
        typer.Option("--normalize/--no-normalize", help="Vectors of length 1. [default: as the model says]"),
    ] = None,
    npy: Annotated[
        Path | None, typer.Option("--npy", metavar="FILE", help="Write the vectors into FILE, as numpy's float32.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Turn texts into vectors, as sentence-transformers does with the same folder.

    Prints one line of numbers for each text (or --npy, --json). How hidden states become a vector, how long a text may
    be and which prompts there are is read from the folder (modules.json and its like).

    \b
    Examples:
      kbit embed "A man plays the guitar." "The weather is fine." --model all-MiniLM-L6-v2/
      kbit embed --file lines.txt --model out/ --npy vectors.npy
      kbit embed "how to bake bread" --model embeddinggemma/ --prompt-name query --json
      cat lines.txt | kbit embed --model out/ --long windows
    """
    if long not in _LONG:
        raise UsageError(f"--long {long}: use one of {', '.join(_LONG)}")
    if prompt is not None and prompt_name is not None:
        raise UsageError("--prompt and --prompt-name are two ways to say one thing: give one of them")
    lines = read_lines(texts, file, 'kbit embed "Some text." --model MODEL')

    from kbit.engine.embed import Embedder

    kinds = None if pooling is None else [kind.strip() for kind in pooling.split(",")]
    with flags.opened(
        lambda source, backend: Embedder(source, backend, pooling=kinds, normalize=normalize, longest=max_length)
    ) as model:
        before = model.prompt(prompt_name) if prompt is None else prompt
        start = perf_counter()
        found = model.embed(lines, before, cast("Long", long))
        seconds = perf_counter() - start
    if npy is not None:
        _write(npy, found)
    if as_json:
        from kbit.cli.output import print_json

        config = model.config
        print_json(
            {
                "model": flags.model,
                "dimensions": found.vectors.shape[1],
                "embeddings": None if npy is not None else found.vectors.tolist(),
                "npy": None if npy is None else str(npy),
                "tokens": found.tokens,
                "truncated": found.cut,
                "in_windows": found.windows,
                "max_length": model.longest,
                "pooling": config.pooling,
                "pooling_from": "flags" if kinds else "modules.json" if config.published else "default",
                "normalized": config.normalize,
                "prompt": before,
                "seconds": seconds,
                "load_s": model.encoder.load_seconds,
                "backend": model.encoder.backend.name,
                "backend_description": model.encoder.backend.describe(),
            }
        )
        return
    if npy is None:
        for vector in found.vectors:
            typer.echo(" ".join(f"{value:.7g}" for value in vector))
    typer.echo(_statistics(model, found, seconds, assumed=not (kinds or model.config.published)), err=True)


def _write(path: Path, found: Embeddings) -> None:
    import numpy as np

    try:
        with path.open("wb") as file:
            np.save(file, found.vectors)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror}); choose another --npy") from None


def _statistics(model: Any, found: Embeddings, seconds: float, *, assumed: bool) -> str:
    """One line for people."""
    count, tokens = len(found.tokens), sum(found.tokens)
    parts = [f"{count} text{'s' if count != 1 else ''}, {tokens} tokens in {seconds:.2f} s"]
    parts.append(f"{found.vectors.shape[1]} numbers each, {' and '.join(model.config.pooling)} pooling")
    if assumed:
        parts[-1] += " (assumed: there is no modules.json)"
    for at, what in ((found.cut, "cut to"), (found.windows, "read in windows of")):
        if at:
            few = ", ".join(str(index + 1) for index in at[:5]) + (", ..." if len(at) > 5 else "")
            parts.append(f"{len(at)} {what} {model.longest} tokens (text {few})")
    parts.append(model.encoder.backend.describe())
    return " · ".join(parts)
