"""Steps that misbehave, for the tests of what runs them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence

from kbit.gpu_check.place import BrokenDeviceError, Place, Row


def items(place: Place) -> Sequence[str]:
    return ["first", *(name for name in place.models), "last"]


def run(place: Place, item: str) -> list[Row]:
    if item == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    if item == "hang":
        time.sleep(600)
    if item == "lose the GPU":
        raise BrokenDeviceError("an illegal memory access was encountered")
    if item == "raise":
        raise RuntimeError("no such kernel")
    return [{"case": item, "earlier": sorted(place.earlier), "process": os.getpid()}]
