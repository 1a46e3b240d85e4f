"""Whether a model fits what limits leave this process, asked when its tokenizer is read and before its weights are."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kbit.checkpoint.source import CheckpointSource
from kbit.graph.backend import HoldsPrepared
from kbit.host.errors import KbitError, UnsupportedError
from kbit.host.memory import Room, limits
from kbit.models.families import spec_from_config
from kbit.models.task_heads import HIDDEN
from kbit.planner.memory import predict_memory
from kbit.planner.weights import stored_weights

# Address space that threads take beyond what they use: a stack each, and an arena of the allocator (glibc's, 64-bit).
THREAD_ADDRESSES = (8 + 64) << 20


@dataclass(frozen=True)
class Wanted:
    """What a command is about to ask of the native engine.

    Attributes:
        context: tokens that the cache has room for.
        prompt: of these, tokens of the longest pass, or None for all.
        batch: sequences.
        kv: what keys and values are kept as.
        compute: of products.
        threads: of the team.
        cache: bytes of keys and values, where these are not `context` tokens'.
        headless: only hidden states: what is small, and computed of them, is not counted.
    """

    context: int
    prompt: int | None = None
    batch: int = 1
    kv: str = "fp16"
    compute: str = "int8"
    threads: int = 1
    cache: int | None = None
    headless: bool = False


def refuse_what_does_not_fit(source: CheckpointSource, wanted: Wanted, name: str) -> None:
    """Ends what a limit leaves no memory for, before it takes any.

    Args:
        source: the model, opened; its tokenizer has been read.
        wanted: of it.
        name: what to call it in the error.

    Raises:
        KbitError: a limit (ulimit, a control group) leaves less than the model takes.
    """
    rooms = limits()
    if not rooms:
        return
    try:
        spec = spec_from_config(source.config, where=f"config of {source.path}")
        if wanted.headless:
            spec = replace(spec, task=HIDDEN)
        use = predict_memory(
            spec, stored_weights(source, spec), context=wanted.context, prompt=wanted.prompt, batch=wanted.batch,
            kv=wanted.kv, compute=wanted.compute, threads=wanted.threads,
        )  # fmt: skip
    except UnsupportedError:  # a format or a cache whose size the planner does not know
        return
    cache = use.cache if wanted.cache is None else wanted.cache
    running = use.weights + cache + use.workspace
    prepared = isinstance(source, HoldsPrepared)
    # Loading's worst moment holds the tokenizer, which this process has by now.
    needed = running if prepared else max(running, use.loading - use.tokenizer)
    for room in rooms:
        more = needed
        if room.mapped:
            more += wanted.threads * THREAD_ADDRESSES - (use.weights if prepared else 0)
        if more > room.nbytes:
            raise KbitError(_refusal(name, room, more, cache if wanted.cache is None else 0))


def _refusal(name: str, room: Room, more: int, cache: int) -> str:
    """`cache` bytes depend on the tokens that are asked for."""
    whole = room.limit - room.nbytes + more
    fewer = f", or ask for fewer tokens: their keys and values take {cache}" if cache > more - room.nbytes else ""
    return (
        f"{name} needs {whole} bytes ({whole / 1e6:.0f} MB), of which this process has {room.limit - room.nbytes} "
        f"already, and {room.what} allows {room.limit} ({room.limit / 1e6:.0f} MB): raise the limit{fewer}"
    )
