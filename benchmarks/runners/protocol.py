"""How a benchmark talks to an engine in a process of its own: one JSON object per line, each way.

A runner first writes what its engine has to say once it is ready, then answers requests until its input ends. A request
names an action in `do` and holds its arguments; the answer is the action's result, or {"error": "..."}.

Imports the standard library only: runners of peers live in environments without kbit.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any, TextIO

_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>
FIRST_PROMPT = "The capital of France is"


class Startup:
    """The clock of an engine's start: made before the engine is imported.

    Attributes:
        seconds: as a runner announces them: of the import; and from its end until the model is loaded, and until the
            first token is there.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._begin = perf_counter()

    def imported(self) -> None:
        self._note("import_seconds")
        self._begin = perf_counter()

    def loaded(self) -> None:
        self._note("load_seconds")

    def first_token(self) -> None:
        self._note("first_token_seconds")

    def _note(self, name: str) -> None:
        self.seconds[name] = perf_counter() - self._begin


def claim_stdout() -> TextIO:
    """The real standard output; whatever libraries print from now on goes to standard error instead.

    Also has Linux end this process with the one that started it: it may be stopped then, and would stay so.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    sys.stdout.flush()
    real = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return real


def serve(out: TextIO, ready: Mapping[str, Any], actions: Mapping[str, Callable[..., Mapping[str, Any]]]) -> None:
    """Announce, then answer until end of input. An action that fails is reported, and the next one may work."""
    print(json.dumps({"ready": True, **ready}), file=out, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = actions[request.pop("do")](**request)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=out, flush=True)


def resident_bytes() -> dict[str, int]:
    """Memory of this process: now, and at its peak (Linux)."""
    fields = {}
    with open("/proc/self/status") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name in ("VmRSS", "VmHWM"):
                fields[name] = int(value.split()[0]) * 1024
    return {"resident": fields["VmRSS"], "peak": fields["VmHWM"]}
