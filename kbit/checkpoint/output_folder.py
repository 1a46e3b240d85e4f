"""What may be written where: an output folder never destroys anything, and what is in the way is said early."""

from __future__ import annotations

from pathlib import Path

from kbit.checkpoint.readers.kbit_folder import MANIFEST_NAME
from kbit.host.errors import CheckpointError, KbitError, UsageError
from kbit.host.files import read_json_object


def check_output_folder(out: Path, *, overwrite: bool) -> None:
    """Refuse an output folder that would destroy something.

    Raises:
        UsageError: `out` is a file, or a folder with other things in it, or a finished model and not `overwrite`.
        KbitError: `out` is below a file.
    """
    if out.is_symlink():
        raise UsageError(f"{out}: is a symbolic link; name the folder itself")
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: is a file; name a folder to create")
    above = next((folder for folder in out.absolute().parents if folder.exists()), None)
    if above is not None and not above.is_dir():
        raise KbitError(f"{above}: cannot be written (it is a file); choose another --output")
    if not out.is_dir() or not names_in(out):
        return
    if not (out / MANIFEST_NAME).is_file():
        raise UsageError(f"{out}: exists and holds other files; name a new folder")
    if not overwrite:
        raise UsageError(f"{out}: already holds a finished model; name another folder, or replace it with --force")


def finished_plan(out: Path) -> str | None:
    """The plan id of a finished folder, or None."""
    try:
        plan = read_json_object(out / MANIFEST_NAME).get("plan")
    except CheckpointError:
        return None
    return plan if isinstance(plan, str) else None


def names_in(folder: Path) -> set[str]:
    """Names of what a folder holds."""
    return {path.name for path in folder.iterdir()}
