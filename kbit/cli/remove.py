"""`kbit rm`: models off this machine."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from kbit.cli.options import JsonOption

if TYPE_CHECKING:
    from kbit.checkpoint.removing import Removal


def remove(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Models, as kbit list shows them.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove models from this machine, with the weights that were prepared of them.

    Only what kbit or the hub's library put there goes: a pulled model, a repository of the hub's cache (all its
    revisions), or the files that kbit wrote into a folder; what else is in the folder stays. A model that a running
    process has mapped is refused (on Linux, where that can be known). Calibrations stay.

    \b
    Examples:
      kbit rm out/
      kbit rm smollm2-135m-instruct --yes
      kbit rm HuggingFaceTB/SmolLM2-360M-Instruct
    """
    from kbit.checkpoint.removing import removal
    from kbit.cli.output import print_json
    from kbit.host.errors import UsageError

    found = {name: removal(name) for name in names}
    for each in found.values():
        each.refuse_used()
    sizes = {name: each.nbytes for name, each in found.items()}
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError("kbit rm asks before it removes, and nobody is at a terminal to answer: give --yes")
        for name, each in found.items():
            typer.echo(_line(each, sizes[name]), err=True)
        if not typer.confirm("Remove?", err=True):
            raise typer.Exit(1)
    for each in found.values():
        each.remove()
    if as_json:
        print_json(
            {
                "removed": {
                    name: {"bytes": sizes[name], "files": len(each.files) + len(each.prepared), "stays": each.stays}
                    for name, each in found.items()
                }
            }
        )
        return
    for name, each in found.items():
        typer.echo(f"removed {_line(each, sizes[name])}")


def _line(removal: Removal, nbytes: int) -> str:
    from kbit.cli.output import printable, size

    count = len(removal.files)
    parts = [f"{count} file{'s' if count != 1 else ''}"]
    if removal.prepared:
        parts.append("its prepared weights")
    stays = (
        f"; stays: {', '.join(removal.stays[:5])}{', ...' if len(removal.stays) > 5 else ''}" if removal.stays else ""
    )
    return printable(f"{removal.name} ({removal.what}): {' and '.join(parts)}, {size(nbytes)}{stays}")
