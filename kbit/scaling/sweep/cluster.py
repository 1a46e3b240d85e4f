"""Measuring on a Ray cluster: the same tasks, run by its workers.

The machines of a cluster must see the models under the same paths (or names), and the output folder, where the
original's logits are exchanged: a shared file system. Each worker checks that the model it opens is, byte for byte, the
one that was planned for.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from kbit.host.errors import KbitError, UnsupportedError
from kbit.scaling.sweep.measure import Task
from kbit.scaling.sweep.workers import Event, Pool, run_task

LOCAL = "local"


class RayPool(Pool):
    """Tasks on Ray's workers.

    Args:
        address: of a running cluster ("auto", "10.0.0.1:6379", "ray://..."), or LOCAL: one on this machine, for as long
            as the pool lives.
        jobs: tasks at a time; None: as many as the cluster has processors for.
        threads: processors a task takes.
        memory: bytes a task takes, or None where that is not known.

    Raises:
        UnsupportedError: Ray is not installed.
        KbitError: the cluster cannot be reached, or is too small for a single task.
    """

    def __init__(self, address: str, jobs: int | None, threads: int, memory: int | None = None) -> None:
        try:
            import ray
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != "ray":
                raise
            raise UnsupportedError(
                "--cluster needs Ray, which this Python has not: pip install 'kbit[cluster]', or measure without it"
            ) from None
        self._ray = ray
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else it reports to its makers
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if address == LOCAL:
            from kbit.host.cpu import default_threads

            processors = (jobs or max(1, default_threads() // threads)) * threads
            options |= {"address": LOCAL, "num_cpus": processors, "include_dashboard": False}
        else:
            options["address"] = address
        try:
            ray.init(**options)
        except (ConnectionError, RuntimeError, ValueError, OSError, TimeoutError) as error:
            reason = " ".join(str(error).split())[:200]
            raise KbitError(f"--cluster {address}: no Ray cluster can be reached or started ({reason})") from None
        have = int(ray.cluster_resources().get("CPU", 0)) // threads
        if have < 1:
            self.close()
            raise KbitError(f"--cluster {address}: the cluster has no room for a task of {threads} processors")
        self._size = min(jobs or have, have)
        needs: dict[str, Any] = {"num_cpus": threads, "max_retries": 1}
        if memory is not None and address != LOCAL:
            needs["memory"] = memory
        self._run = ray.remote(**needs)(run_task)
        self._under_way: dict[Any, Task] = {}

    @property
    def size(self) -> int:
        return self._size

    def submit(self, task: Task) -> None:
        self._under_way[self._run.remote(task)] = task

    def wait(self, seconds: float) -> list[Event]:
        if not self._under_way:
            return []
        done, _ = self._ray.wait(list(self._under_way), num_returns=1, timeout=seconds)
        return [self._event(reference, self._under_way.pop(reference)) for reference in done]

    def close(self) -> None:
        self._ray.shutdown()

    def _event(self, reference: Any, task: Task) -> Event:
        try:
            event: Event = self._ray.get(reference)
            return event
        except self._ray.exceptions.RayError as error:
            reason = " ".join(str(error).split())[:300]
            return Event(task.key, 1.0, error=f"the cluster could not run it: {reason}")
