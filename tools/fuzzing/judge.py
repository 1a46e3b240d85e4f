"""What is a finding: an error that kbit did not mean to raise, more than ten seconds of work, too much memory."""

from __future__ import annotations

import hashlib
import os
import resource
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from fuzzing.target import Target

SECONDS = 10.0
MEMORY_BYTES = 200 << 20  # beside twice the input


@dataclass(frozen=True)
class Finding:
    """An input that was answered wrongly.

    Attributes:
        kind: what is wrong, and where; of two findings with the same one is enough.
        text: for people.
        data: the input.
    """

    kind: str
    text: str
    data: bytes

    def save(self, folder: Path, target: str) -> Path:
        """Writes the input and the text beside it; the path of the input."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{target}-{hashlib.sha256(self.data).hexdigest()[:12]}"
        path.write_bytes(self.data)
        path.with_suffix(".txt").write_text(
            f"{self.text}\nAgain: python tools/fuzz.py --target {target} --reproduce {path}\n"
        )
        return path


def judge(target: Target, data: bytes) -> Finding | None:
    """Runs one input; None where kbit did what it should."""
    peak, start = _peak_bytes(), time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # notes, and numpy's about numbers that are none
            target.run(data)
    except target.allowed as error:
        if not str(error):
            return Finding(f"{type(error).__name__} without a word", traceback.format_exc(), data)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # MemoryError, RecursionError and panics of Rust code among them
        return Finding(_place_of(error), traceback.format_exc(), data)
    seconds, grown = time.process_time() - start, _peak_bytes() - peak
    if seconds > SECONDS:
        return Finding("slow", f"{seconds:.1f} seconds", data)
    if target.frugal and grown > MEMORY_BYTES + 2 * len(data):
        return Finding("memory", f"{grown >> 20} MB for {len(data)} bytes", data)
    return None


@contextmanager
def bounded_memory(more: int = 2 << 30) -> Iterator[None]:
    """Nothing may ask for much: what does gets a MemoryError, which is a finding, and not the machine's memory."""
    if not sys.platform.startswith("linux"):
        yield
        return
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _peak_bytes() -> int:
    """The most memory that this process has had. (On Linux getrusage counts what its parent had, too.)"""
    if not sys.platform.startswith("linux"):
        scale = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    status = os.pread(_status_file(os.getpid()), 4096, 0)
    return int(status.partition(b"VmHWM:")[2].split(None, 1)[0]) << 10


@lru_cache(maxsize=1)
def _status_file(process: int) -> int:
    return os.open(f"/proc/{process}/status", os.O_RDONLY)


def _place_of(error: BaseException) -> str:
    """The type of an error and the last lines of kbit's that it came through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames if "kbit" in frame.filename]
    return f"{type(error).__name__} at {' < '.join(own[:-3:-1]) or 'the target itself'}"
