"""Which processes have files mapped into their memory, as far as the system tells."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


def processes_that_map(files: Iterable[Path], proc: Path = Path("/proc")) -> dict[int, str]:
    """Other processes that have one of some files mapped: their numbers and command lines.

    Linux tells it of this user's processes (of everybody's to root); elsewhere nothing is known and nothing is found.

    Args:
        files: paths, with links resolved.
        proc: where processes are described (for tests).
    """
    wanted = {os.fsencode(file) for file in files}
    found = {}
    for folder in proc.iterdir() if wanted and proc.is_dir() else ():
        if not folder.name.isdecimal() or int(folder.name) == os.getpid():
            continue
        with suppress(OSError):  # it has ended, or is another user's
            for line in (folder / "maps").read_bytes().splitlines():
                # address, rights, offset, device, inode, path
                fields = line.split(None, 5)
                if len(fields) == 6 and fields[5] in wanted:
                    words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
                    found[int(folder.name)] = words.strip()
                    break
    return found
