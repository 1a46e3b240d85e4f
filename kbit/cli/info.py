"""kbit info: what a model is, tensor by tensor, without loading it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kbit.host.errors import UsageError

if TYPE_CHECKING:
    from kbit.checkpoint.source import CheckpointSource

_PICTURE = "Picture"


def info(
    model: Annotated[
        str | None,
        typer.Argument(help="A folder, a .gguf file, a hub id, or a name kbit pull lists; without one: this machine."),
    ] = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            metavar="FILE",
            help="Draw errors, sensitivity and bits of every matrix into FILE (.png, .svg, or .html with a table).",
            rich_help_panel=_PICTURE,
        ),
    ] = None,
    bits: Annotated[
        str | None,
        typer.Option(
            "--bits",
            metavar="K,...",
            help="Widths to try on the weights: a list (3,4), a range (2..8), or formats (nf4-b64,int4-b32). "
            "[default: 4]",
            rich_help_panel=_PICTURE,
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference",
            metavar="MODEL",
            help="What a quantized MODEL was made of: draw the error of what is stored.",
            rich_help_panel=_PICTURE,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="FILE_OR_NAME",
            help="Text to measure sensitivity on, as kbit eval takes it, or none. [default: wikitext2]",
            rich_help_panel=_PICTURE,
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens",
            metavar="N",
            help="Tokens of it to use, in windows of up to 256. [default: 1024]",
            rich_help_panel=_PICTURE,
        ),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare every stored tensor with its checksum again.")
    ] = False,
    forget: Annotated[
        bool, typer.Option("--forget", help="Remove what the CPU engine has kept of MODEL: its prepared weights.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on stdout.")] = False,
) -> None:
    """Show a model's shape, size and bits per weight, without loading it; or what kbit uses of this machine.

    Bits per weight count everything stored: codes, scales, offsets, codebooks, and whatever stayed in 16 bits.

    The first run of a model on the CPU keeps its weights, rearranged for the kernels, in the cache folder
    (KBIT_PREPARED names another, or says "off"), so that later runs only map them. That file is shown here, and
    --forget removes it.

    With --plot, the weights are read after all: rounded to the widths of --bits (or compared with --reference), and
    run on a little text to see how much an error in each matrix would change the predictions (KL divergence). The two
    together predict what quantizing each matrix costs.

    \b
    Examples:
      kbit info
      kbit info smollm2-135m-instruct
      kbit info out/ --tensors
      kbit info out/ --json
      kbit info out/ --verify
      kbit info out/ --forget
      kbit info smollm2-135m-instruct --plot layers.png --bits 3,4
      kbit info out/ --plot layers.html --reference smollm2-135m-instruct
    """
    from kbit.cli.model_summary import machine_summary, print_machine, print_model, summarise
    from kbit.cli.output import print_json
    from kbit.models.opening import open_model

    picture = {"--bits": bits, "--reference": reference, "--data": data, "--max-tokens": max_tokens}
    if plot is None:
        for flag, value in picture.items():
            if value is not None:
                raise UsageError(f"{flag} is for the picture: give --plot FILE as well")
    elif model is None:
        raise UsageError(
            "--plot draws a model: name one, for example kbit info smollm2-135m-instruct --plot layers.png"
        )
    else:
        from kbit.cli.layer_picture import check_request, draw

        request = check_request(plot, bits, reference, data, max_tokens)
    if model is None:
        if verify or forget:
            raise UsageError(f"{'--verify' if verify else '--forget'} is for a model: name one")
        machine = machine_summary()
        if json:
            print_json(machine)
        else:
            print_machine(machine)
        return
    with open_model(model) as source:
        summary = summarise(source)
        if verify:
            summary["verified_tensors"] = _verify(source)
        if forget:
            summary["forgotten_bytes"] = _forget(model)
            summary["prepared_bytes"] = None
        if plot is not None:
            summary["plot"] = draw(source, model, request, quiet=json)
    if json:
        print_json(summary)
        return
    print_model(summary, tensors)
    if plot is not None:
        from kbit.cli.layer_picture import print_costliest

        print_costliest(summary["plot"])


def _forget(model: str) -> int:
    from kbit.checkpoint.prepared_place import forget
    from kbit.checkpoint.resolve import locate

    place = locate(model)
    return 0 if place is None else forget(place)


def _verify(source: CheckpointSource) -> int:
    """How many tensors were compared with their checksums.

    Raises:
        UsageError: the model has none.
        CheckpointError: one differs.
    """
    from kbit.checkpoint.readers.kbit_folder import KbitFolder

    if not isinstance(source, KbitFolder):
        raise UsageError(
            f"{source.path}: --verify compares with the checksums that kbit writes, and this model has none (kbit pull "
            "compares the catalogue's)"
        )
    return source.verify()
