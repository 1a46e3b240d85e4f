"""kbit calibrate: what a model feels of errors in its weights, measured once for every width and method."""

from __future__ import annotations

from typing import Annotated

import typer

from kbit.cli.options import JsonOption, ThreadsOption


def calibrate(
    model: Annotated[str, typer.Argument(help="A folder, a .gguf file, a hub id, or a name kbit pull lists.")],
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--calibration",
            metavar="TEXT",
            help="A text file or a named text; repeatable, in equal parts.  [default: sampled from the model itself]",
        ),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option("--calibration-tokens", help="How many.  [default: by the model's size]")
    ] = None,
    inputs_only: Annotated[
        bool, typer.Option("--inputs-only", help="No gradients: sooner, and less accurate.")
    ] = False,
    forget: Annotated[bool, typer.Option("--forget", help="Remove what is kept of the model, and stop.")] = False,
    threads: ThreadsOption = None,
    json: JsonOption = False,
) -> None:
    """Measure what errors in each of a model's weights cost it, and keep that in the cache.

    `kbit quantize` does this by itself; do it ahead to see what it takes. The same --calibration flags given to kbit
    quantize find it again, for any number of bits. A killed run continues.

    \b
    Examples:
      kbit calibrate smollm2-135m-instruct
      kbit calibrate path/to/model --calibration prompts.txt --calibration wikitext2
      kbit calibrate path/to/model --forget
    """
    import time

    from kbit.backends.select import set_threads
    from kbit.calibration.request import CalibrationRequest
    from kbit.calibration.run import calibrate as measure
    from kbit.calibration.run import forget as remove
    from kbit.cli.output import print_json, size
    from kbit.cli.progress import progress_bars
    from kbit.models.opening import open_model

    if forget:
        with open_model(model) as source:
            freed = remove(source)
        if json:
            print_json({"model": model, "freed_bytes": freed})
        else:
            typer.echo(f"{model}: {size(freed)} removed")
        return
    request = CalibrationRequest.of(text or [], tokens, not inputs_only)
    set_threads(threads)
    begin = time.perf_counter()
    with open_model(model) as source, progress_bars() as progress:
        folder = measure(source, request, progress=progress)
    seconds = time.perf_counter() - begin
    measured, borrowed = folder.identity["request"], folder.borrowed()
    if json:
        facts = {"model": model, "path": str(folder.path), "bytes": folder.nbytes, "seconds": seconds}
        facts["borrowed"] = borrowed
        print_json({**facts, "calibration": measured})
        return
    typer.echo(
        f"{model}: {measured['tokens']:,} tokens, {request.describe()}\n"
        f"{folder.path}: {size(folder.nbytes)}, {seconds:.1f} s"
    )
    if borrowed:
        typer.echo(
            f"note: too few tokens went to the experts of {len(borrowed)} matrices ({', '.join(borrowed[:3])}"
            f"{', ...' if len(borrowed) > 3 else ''}), which get what their layer's experts have on average; more "
            "--calibration-tokens tell more"
        )
