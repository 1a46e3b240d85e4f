"""`kbit rm`: models off this machine."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import replace
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
    """Remove models from this machine, with the weights that were prepared of them and their calibrations.

    Only what kbit or the hub's library put there goes: a pulled model, a repository of the hub's cache (all its
    revisions), or the files that kbit wrote into a folder; what else is in the folder stays. A model that a running
    process has mapped is refused (on Linux, where that can be known). Of a model that cannot be opened any more the
    calibrations stay.

    \b
    Examples:
      kbit rm out/
      kbit rm smollm2-135m-instruct --yes
      kbit rm HuggingFaceTB/SmolLM2-360M-Instruct
    """
    from kbit.checkpoint.removing import removal
    from kbit.cli.output import print_json
    from kbit.host.errors import UsageError

    found = {name: _with_calibrations(removal(name)) for name in names}
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
                    name: {
                        "bytes": sizes[name],
                        "files": len(each.files) + len(each.prepared),
                        "calibrations": len(each.calibrations),
                        "stays": each.stays,
                    }
                    for name, each in found.items()
                }
            }
        )
        return
    for name, each in found.items():
        typer.echo(f"removed {_line(each, sizes[name])}")


def _with_calibrations(removal: Removal) -> Removal:
    """What is removed, with what was measured of it, where the model can be opened."""
    from kbit.calibration.place import calibrations_of
    from kbit.host.errors import KbitError
    from kbit.models.opening import open_model

    fingerprints = set()
    for name in (removal.name, *(f"{removal.name}:{file.name}" for file in removal.files if file.suffix == ".gguf")):
        with suppress(KbitError), open_model(name) as source:
            fingerprints.add(source.fingerprint())
    return replace(removal, calibrations=calibrations_of(fingerprints))


def _line(removal: Removal, nbytes: int) -> str:
    from kbit.cli.output import printable, size

    count = len(removal.files)
    parts = [f"{count} file{'s' if count != 1 else ''}"]
    if removal.prepared:
        parts.append("its prepared weights")
    if removal.calibrations:
        parts.append(f"{len(removal.calibrations)} calibration{'s' if len(removal.calibrations) != 1 else ''}")
    stays = (
        f"; stays: {', '.join(removal.stays[:5])}{', ...' if len(removal.stays) > 5 else ''}" if removal.stays else ""
    )
    listed = f"{', '.join(parts[:-1])}{' and ' if parts[1:] else ''}{parts[-1]}"
    return printable(f"{removal.name} ({removal.what}): {listed}, {size(nbytes)}{stays}")
