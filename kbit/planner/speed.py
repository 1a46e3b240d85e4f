"""Tokens per second that a model will make, from the rates of a machine (planner.machine) and its shapes alone.

A token's time is a sum: every weight that it goes through once, at the rate of its format's kernel; every slot of the
context once, at the rate of its cache kind; and what products, layers and Python cost beside that. Rates lie between
those of weights in the processor's caches and in memory, by how much a token reads in all.

Against decoding timed by benchmarks/test_plan.py the errors were within TYPICAL_ERROR, but for models of about the size
of the caches. Intervals are that wide, and wider where rates varied while they were measured or caches may or may not
hold a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kbit.backends.cpu.runner import PASS_ROWS
from kbit.graph.pages import PAGE
from kbit.host.errors import KbitError
from kbit.models.spec import ModelSpec
from kbit.planner.kernel_timing import LATENT, AttentionRate, KernelRate, kernel_key
from kbit.planner.machine import MachineSpeed, attention_key
from kbit.planner.memory import as_run, page_bytes, prepared_bytes
from kbit.planner.weights import Weight

# What predictions are off by, as a fraction (benchmarks/test_plan.py prints it).
TYPICAL_ERROR = 0.15
# Caches hold less of a model than of as many bytes in a measurement: pages of a process that has lived lie where they
# may, and others share the last level; the same model can be three times as slow in the next process
# (docs/measurements.md). So shares are looked up at more than the bytes read: the estimate, and its interval's ends.
_CROWDING, _LEAST_CROWDING, _MOST_CROWDING = 1.5, 1.0, 2.5


@dataclass(frozen=True)
class SpeedEstimate:
    """Tokens per second.

    Attributes:
        decode: one sequence, the context full: the slowest moment.
        low, high: interval of `decode`.
        decode_empty: at the beginning of a context.
        prefill: reading a prompt that fills the context.
        bytes_per_token: weights and cache that a token reads, the context full.
        basis: "measured rates", or what the estimate rests on.
    """

    decode: float
    low: float
    high: float
    decode_empty: float
    prefill: float | None
    bytes_per_token: int
    basis: str = "measured rates"


def needed_kernels(weights: Sequence[Weight], tied: bool) -> list[str]:
    """Keys of the kernels that a model's products run (`MachineSpeed.kernels`)."""
    return list(dict.fromkeys(kernel_key(weight.kept) for weight in _multiplied(weights, tied)))


def needed_attention(spec: ModelSpec, kv: str) -> list[tuple[str, int, int]]:
    """The attention shapes of a model: cache kind, features of a head, query heads per key/value head."""
    spec = as_run(spec, "native")
    return [(_kept(spec, kv), dim, spec.heads // count) for count, dim in spec.cache_sizes]


def predict_speed(
    spec: ModelSpec, weights: Sequence[Weight], machine: MachineSpeed, *, context: int, kv: str = "fp16"
) -> SpeedEstimate:
    """What a model makes on a machine.

    Args:
        spec: the model.
        weights: its tensors (`planner.memory`).
        machine: rates; must have those of the model's kernels and attention.
        context: tokens in the cache.
        kv: what keys and values are kept as.

    Raises:
        KbitError: a rate that was not measured.
    """
    multiplied = _multiplied(weights, spec.tied_embeddings)
    if not spec.continues_text:
        return _encoding_speed(spec, multiplied, machine, context, kv)
    full, best, worst = (
        _decode_seconds(spec, multiplied, machine, kv, context, crowding)
        for crowding in (_CROWDING, _LEAST_CROWDING, _MOST_CROWDING)
    )
    spread = max(_kernel(machine, weight).spread for weight in multiplied)
    error = 1 + max(TYPICAL_ERROR, spread)
    prefill = context / prompt_seconds(spec, weights, machine, context, kv)
    return SpeedEstimate(
        decode=1 / full,
        low=1 / (worst * error),
        high=error / best,
        decode_empty=1 / _decode_seconds(spec, multiplied, machine, kv, 0, _CROWDING),
        prefill=prefill,
        bytes_per_token=bytes_per_token(spec, weights, context, kv),
    )


def _encoding_speed(
    spec: ModelSpec, weights: Sequence[Weight], machine: MachineSpeed, tokens: int, kv: str
) -> SpeedEstimate:
    """What an encoder makes: tokens per second of a text of so many, whose weights are read once for all."""
    rate = tokens / prompt_seconds(spec, weights, machine, tokens, kv)
    error = 1 + max(TYPICAL_ERROR, max(_kernel(machine, weight).spread for weight in weights))
    read = sum(weight.active * prepared_bytes(weight) for weight in weights)
    return SpeedEstimate(rate, rate / error, rate * error, rate, rate, round(read / tokens))


def prompt_seconds(spec: ModelSpec, weights: Sequence[Weight], machine: MachineSpeed, tokens: int, kv: str) -> float:
    """Seconds that a prompt of so many tokens takes, in passes of PASS_ROWS.

    Raises:
        KbitError: a rate that was not measured.
    """
    over = machine.overheads
    passes = -(-tokens // PASS_ROWS)
    seconds = over.prompt + passes * over.layer * spec.layers
    for weight in _multiplied(weights, spec.tied_embeddings):
        kernel = _kernel(machine, weight)
        if weight.role == "linear":  # a pass of few tokens still reads every weight
            seconds += weight.numel * max(kernel.prompt * tokens * weight.active, kernel.cached * passes)
        else:  # logits of a pass's last token alone
            seconds += passes * weight.numel * kernel.memory
    step = min(16, tokens)  # a sum over positions, every sixteenth of them
    for layer, window in enumerate(spec.windows):
        rate = _attention(machine, kv, spec, layer)
        seen = step * sum(_seen(window, position + step // 2) for position in range(0, tokens, step))
        if spec.mask == "bidirectional":
            seen = tokens * _seen(None if window is None else 2 * window - 1, tokens)
        seconds += as_run(spec, "native").cache_size(layer)[0] * (rate.prompt * seen + rate.row * tokens)
    return seconds


def bytes_per_token(spec: ModelSpec, weights: Sequence[Weight], context: int, kv: str, backend: str = "native") -> int:
    """Bytes of weights and cache that one token reads with `context` tokens in the cache."""
    multiplied = _multiplied(weights, spec.tied_embeddings)
    read = sum(weight.active * prepared_bytes(weight, backend) for weight in multiplied)
    for layer in spec.attention_layers:
        read += page_bytes(spec, layer, kv, backend) / PAGE * _seen(spec.windows[layer], context)
    return round(read + 2 * spec.state_bytes)


def _decode_seconds(
    spec: ModelSpec, weights: Sequence[Weight], machine: MachineSpeed, kv: str, context: int, crowding: float
) -> float:
    """Seconds of one token with `context` tokens in the cache."""
    spec = as_run(spec, "native")
    attended = [
        (_attention(machine, kv, spec, layer), spec.cache_size(layer)[0] * _seen(spec.windows[layer], context))
        for layer in spec.attention_layers
    ]
    read = sum(weight.active * prepared_bytes(weight) for weight in weights) + 2 * spec.state_bytes
    read += sum(slots * rate.nbytes for rate, slots in attended)
    share = machine.memory_share(crowding * read)
    over = machine.overheads
    seconds = over.token + over.vocabulary * spec.vocab_size + over.layer * spec.layers + over.matmul
    for weight in weights:
        kernel = _kernel(machine, weight)
        seconds += weight.active * weight.numel * (kernel.cached + share * (kernel.memory - kernel.cached))
    # q, k and v share their input, as do gate and up; the activation goes over its features once more.
    queries = spec.heads * sum(spec.shape(layer).head_dim for layer in range(spec.layers))
    features = 2 * spec.layers * spec.hidden_size + queries + 2 * spec.inner_features
    seconds += over.column * (features + spec.hidden_size)
    return seconds + sum(slots * (rate.cached + share * (rate.memory - rate.cached)) for rate, slots in attended)


def _kept(spec: ModelSpec, kv: str) -> str:
    """The cache kind of an attention shape (`LATENT`)."""
    return f"{LATENT}{kv}" if spec.keeps_latents else kv


def _seen(window: int | None, context: int) -> int:
    """Slots of a layer that a token sees with `context` tokens in the cache."""
    return context if window is None else min(window, context)


def _multiplied(weights: Sequence[Weight], tied: bool) -> list[Weight]:
    """Matrices that a token is multiplied with: an embedding is only looked up in, unless it is the head too. (Routers
    are too small to count.)"""
    return [w for w in weights if w.role in ("linear", "head") or (w.role == "embedding" and tied)]


def _kernel(machine: MachineSpeed, weight: Weight) -> KernelRate:
    key = kernel_key(weight.kept)
    if key not in machine.kernels:
        raise KbitError(f"products with {key} weights have not been timed on this machine")
    return machine.kernels[key]


def _attention(machine: MachineSpeed, kv: str, spec: ModelSpec, layer: int) -> AttentionRate:
    spec = as_run(spec, "native")
    heads, dim = spec.cache_size(layer)
    key = attention_key(_kept(spec, kv), dim, spec.heads // heads)
    if key not in machine.attention:
        raise KbitError(f"attention {key} has not been timed on this machine")
    return machine.attention[key]
