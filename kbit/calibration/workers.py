"""Threads that each compute with one thread: work whose results do not depend on how many there are."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch


@contextmanager
def workers(threads: int) -> Iterator[ThreadPoolExecutor]:
    """A pool, during whose life torch uses one thread per call (it is told so for the whole process)."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # Each thread is told by itself, too: OpenMP, which oneDNN asks, counts for every thread of ours apart.
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)
