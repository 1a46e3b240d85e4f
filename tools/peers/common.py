"""What the installers of the peers share: their folder, the record of what is in it, and running commands."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RECORD = "peers.json"
_STEP = re.compile(r"^\[\s*(\d+)(?:/(\d+)|%)\]")  # Ninja writes "[12/340] ...", Make "[  4%] ..."


class PeerError(Exception):
    """A peer that cannot be had, in one line."""


def peers_dir() -> Path:
    """Where the peers live: KBIT_PEERS, else `peers` in kbit's cache folder."""
    from kbit.host.cache_folder import cache_dir

    named = os.environ.get("KBIT_PEERS")
    return Path(named).expanduser().absolute() if named else cache_dir() / "peers"


class Record:
    """peers.json: which peers are finished, in which version, and where. benchmarks/peers.py reads it.

    One object per peer. `key` in it is what the peer was made from: a peer whose key is another one is made anew.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / RECORD
        self._peers: dict[str, dict[str, Any]] = {}
        if self.path.is_file():
            try:
                self._peers = json.loads(self.path.read_text())
            except ValueError as error:
                raise PeerError(f"{self.path}: not JSON ({error}); delete it and run this again") from None

    def finished(self, peer: str, key: str) -> bool:
        """Whether a peer is there, made from `key`, with every path it names."""
        entry = self._peers.get(peer, {})
        return entry.get("key") == key and all(Path(path).exists() for path in entry.get("paths", {}).values())

    def entry(self, peer: str) -> dict[str, Any]:
        return self._peers.get(peer, {})

    def write(self, peer: str, key: str, paths: dict[str, Path], **about: str) -> None:
        """Remember a finished peer; the file is replaced in one step, so an interrupted run leaves the old one."""
        self._peers[peer] = {"key": key, **about, "paths": {name: str(path) for name, path in paths.items()}}
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self._peers, indent=2) + "\n")
        partial.replace(self.path)


def say(text: str) -> None:
    print(text, flush=True)


def run(command: Sequence[object], log: Path, *, cwd: Path | None = None, progress: bool = False) -> None:
    """Run a command, its output going to `log`.

    Args:
        progress: say how far a build is, every tenth of it, from the counters that cmake's generators print.

    Raises:
        PeerError: it cannot be started, or fails; with the end of its output.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    words = [str(word) for word in command]
    told = 0
    with log.open("w") as file:
        file.write(" ".join(words) + "\n")
        file.flush()
        try:
            process = subprocess.Popen(words, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        except OSError as error:
            raise PeerError(f"{words[0]}: cannot be run ({error.strerror})") from None
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            step = _STEP.match(line) if progress else None
            if step is not None:
                percent = int(step[1]) * 100 // int(step[2] or 100)
                if percent >= told + 10:
                    told = percent - percent % 10
                    say(f"  {told} %")
        code = process.wait()
    if code != 0:
        tail = "\n    ".join(log.read_text().splitlines()[-12:])
        raise PeerError(f"{Path(words[0]).name} failed with exit code {code}; the end of {log}:\n    {tail}")


def make_venv(folder: Path, requirements: Sequence[str], log: Path) -> Path:
    """A virtual environment of this Python with the given packages; its interpreter.

    Raises:
        PeerError: pip cannot install one of them (for example, no wheel for this platform).
    """
    python = folder / "bin" / "python"
    if not python.exists():
        run([sys.executable, "-m", "venv", folder], log)
    run([python, "-m", "pip", "install", "--only-binary", ":all:", *requirements], log)
    return python
