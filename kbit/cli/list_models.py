"""`kbit list`: the models on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kbit.cli.options import JsonOption

if TYPE_CHECKING:
    from kbit.checkpoint.local_models import LocalModel


def list_models(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[FOLDER]...", help="Folders to look in, one level deep. [default: the current one]"),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the models on this machine: in the current folder, in kbit's cache and in the hub's.

    Bits count everything stored, embeddings included. A model was used when the CPU engine last loaded it; of models
    whose prepared weights are not kept (hub ids, encoder-decoders on other engines) that is not known.

    \b
    Examples:
      kbit list
      kbit list ~/models
      kbit list --json
    """
    from kbit.checkpoint.local_models import local_models
    from kbit.cli.output import print_json

    models = [_described(model) for model in local_models(folders or [Path()])]
    models.sort(key=lambda model: -(model["last_used"] or 0))
    if as_json:
        print_json({"models": models})
    elif models:
        _print(models)
    else:
        where = ", ".join(map(str, folders)) if folders else "the current folder"
        typer.echo(f"no models in {where}, in kbit's cache or in the hub's; kbit pull fetches one")


def _described(model: LocalModel) -> dict[str, Any]:
    from kbit.checkpoint.resolve import open_model
    from kbit.checkpoint.surplus import harmless
    from kbit.host.errors import KbitError

    prepared = model.prepared
    found: dict[str, Any] = {
        "name": model.name,
        "path": str(model.path.resolve()),
        "place": model.place,
        "family": None,
        "parameters": None,
        "bits_per_weight": None,
        "bytes": model.nbytes,
        "prepared_bytes": None if prepared is None else prepared.stat().st_size,
        "last_used": model.last_used,
        "error": None,
    }
    try:
        with open_model(str(model.path)) as source:
            infos = [info for info in source.tensors.values() if not harmless(info)]
            found["family"] = source.config.get("model_type")
            found["parameters"] = sum(info.numel for info in infos)
            if found["parameters"]:
                found["bits_per_weight"] = 8 * sum(info.nbytes for info in infos) / found["parameters"]
    except KbitError as error:
        found["error"] = str(error)
    return found


def _print(models: list[dict[str, Any]]) -> None:
    from time import time

    from kbit.cli.output import printable, size
    from kbit.host.quantities import ago

    rows = [("model", "family", "parameters", "bits", "size", "prepared", "last used", "where")]
    for model in models:
        known = model["error"] is None and model["parameters"]
        used = model["last_used"]
        rows.append(
            (
                printable(model["name"]),
                printable(model["family"] or "-")[:24],
                f"{model['parameters'] / 1e6:,.1f} M" if known else "-",
                f"{model['bits_per_weight']:.2f}" if known else "-",
                size(model["bytes"]),
                "-" if model["prepared_bytes"] is None else size(model["prepared_bytes"]),
                "-" if used is None else ago(time() - used),
                {"folder": "folder", "cache": "kbit's cache", "hub": "hub's cache"}[model["place"]],
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [
            text.rjust(width) if 2 <= i <= 5 else text.ljust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        typer.echo("  ".join(cells).rstrip())
    for model in models:
        if model["error"] is not None:
            typer.echo(f"{printable(model['name'])}: cannot be read: {printable(model['error'])}", err=True)
