"""Several processes that run one model together, each with its share of the weights (`kbit.models.shard`).

torchrun starts the processes and tells each its number; `join` finds the others. All of them run the same program on
the same tokens, and meet where a product must be added up and where logits come out. What decides what happens next
(logits, a seed, a prompt, a failure) is therefore always the same everywhere; else they would wait for each other
forever.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed

from kbit.graph.backend import Backend, SplitBackend
from kbit.host.errors import KbitError, UnsupportedError, UsageError, one_line

T = TypeVar("T")

# What torchrun tells every process; MASTER_ADDR and MASTER_PORT are where they meet.
_RANK, _WORLD, _LOCAL, _MEETING = "RANK", "WORLD_SIZE", "LOCAL_RANK", ("MASTER_ADDR", "MASTER_PORT")

# How long a process waits for the others. One that died ends them all through torchrun; what takes long is downloading
# a model, which the first does while the others wait.
_PATIENCE = timedelta(hours=6)


class PeerError(KbitError):
    """Another process failed, or is gone. The first process tells why; the others have nothing to add."""


class Group:
    """The processes that run a model together: a `kbit.graph.backend.Group`, and what the program around it needs.

    Args:
        processes: the torch.distributed group; None for the default one.
    """

    def __init__(self, processes: distributed.ProcessGroup | None = None) -> None:
        self._processes = processes
        self.rank = distributed.get_rank(processes)
        self.size = distributed.get_world_size(processes)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        with _contact():
            distributed.all_reduce(x, group=self._processes)
        return x

    def from_first(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        with _contact():
            distributed.broadcast(x, group=self._processes, group_src=0)
        return x

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that fails everywhere if it fails anywhere. It must not use the group.

        Raises:
            Exception: what the block raised here, if this is the first process or it is a bug.
            PeerError: it failed in some process; with the message of the first that it failed in.
        """
        failed: Exception | None = None
        try:
            yield
        except Exception as error:
            failed = error
        told = self._tell("" if failed is None else one_line(failed) or "failed")
        if failed is not None and (self.rank == 0 or not isinstance(failed, KbitError)):
            raise failed
        for rank, message in enumerate(told):
            if message:
                raise PeerError(f"process {rank} of {self.size}: {message}")

    def decided_by_first(self, work: Callable[[], T]) -> T:
        """What `work` gives in the first process; the others do not call it. The result must be fit for JSON.

        Raises:
            Exception: in the first process, what `work` raised.
            PeerError: in the others, if it raised.
        """
        with self.together():
            result = json.dumps(work()) if self.rank == 0 else ""
        value: T = json.loads(self._tell(result)[0])
        return value

    def close(self) -> None:
        """Leave the group. Only if all do can the next group be made."""
        distributed.destroy_process_group(self._processes)

    def _tell(self, text: str) -> list[str]:
        """Every process's text, in every process. Plain bytes: torch's way to send objects unpickles what comes."""
        data = text.encode("utf-8", "surrogatepass")
        sizes = [torch.empty(1, dtype=torch.int64) for _ in range(self.size)]
        with _contact():
            distributed.all_gather(sizes, torch.tensor([len(data)]), group=self._processes)
            longest = max(1, *(int(size) for size in sizes))
            parts = [torch.empty(longest, dtype=torch.uint8) for _ in sizes]
            padded = torch.frombuffer(bytearray(data.ljust(longest, b"\0")), dtype=torch.uint8)
            distributed.all_gather(parts, padded, group=self._processes)
        return [
            bytes(part[: int(size)].tolist()).decode("utf-8", "surrogatepass")
            for part, size in zip(parts, sizes, strict=True)
        ]


def join(environment: Mapping[str, str] = os.environ) -> Group:
    """Meet the other processes that torchrun started.

    Raises:
        UsageError: the variables that say where to meet are missing or make no sense.
        UnsupportedError: this torch cannot do it.
        KbitError: the others did not come.
    """
    rank, world = (_number(environment, name) for name in (_RANK, _WORLD))
    missing = [name for name in _MEETING if not environment.get(name)]
    if missing or not 0 <= rank < world:
        problem = f"{missing[0]} is not set" if missing else f"process {rank} of {world} does not exist"
        raise UsageError(
            f"{_RANK} and {_WORLD} are set, but {problem}: start with torchrun --nproc-per-node N -m kbit run ..., or "
            f"unset {_RANK}"
        )
    if not distributed.is_available():
        raise UnsupportedError("this torch was built without torch.distributed: run one process, without torchrun")
    gpus = torch.cuda.is_available() and distributed.is_nccl_available()
    try:
        # gloo carries what is on the CPU; nccl is only started when it is first needed.
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if gpus else "gloo", rank=rank, world_size=world, timeout=_PATIENCE
        )
    except (RuntimeError, ValueError) as error:
        raise KbitError(f"process {rank} of {world} could not meet the others: {one_line(error)}") from None
    return Group()


def split(backend: Backend, group: Group, environment: Mapping[str, str] = os.environ) -> Backend:
    """The backend for this process's share of a model.

    On GPUs each process takes the one with its number on this machine, for the rest of its life.

    Raises:
        UnsupportedError: a backend that runs whole models only, or more processes than GPUs.
    """
    if not isinstance(backend, SplitBackend):
        raise UnsupportedError(
            f"the {backend.name} backend runs a model in one process, with all cores: start it without torchrun; to "
            "split a model, use --device cuda (or --backend reference)"
        )
    if backend.device.type == "cuda":
        local, gpus = _number(environment, _LOCAL), torch.cuda.device_count()
        if local >= gpus:
            raise UnsupportedError(
                f"process {local} on this machine has no GPU, as there are {gpus}: use --nproc-per-node {gpus}"
            )
        torch.cuda.set_device(local)
    return backend.split(group)


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    if not text.strip().isdecimal() or len(text) > 6:
        raise UsageError(f"{name} is {text[:40]!r} where torchrun puts a number: start with torchrun, or unset {_RANK}")
    return int(text)


@contextmanager
def _contact() -> Iterator[None]:
    """A collective that fails does so because another process is gone: torch says so in many words and types."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise PeerError(f"lost contact with the other processes: {one_line(error)}") from error
