"""How much memory a model takes while it runs, from its configuration alone: no weight is read.

What is counted is what the backends allocate, to the byte where that is possible:

    weights      every matrix in its backend's layout, padding included (codecs/matrix.h; triton/codecs/layout.py)
    cache        keys and values of every layer for the whole context (kv_pages.h; kv_layout.py)
    workspace    buffers of the recorded program for a pass of at most 512 tokens, scratch of every thread, rotary
                 tables, logits
    tokenizer    vocabulary and merges in memory, read first; what that leaves free is used again by the weights
    loading      what the worst moment of loading takes beyond the weights that are ready by then

The peak is the larger of two moments, running and loading: a 16-bit matrix passes through float32 when it is read, so
an embedding or a head that stays at 16 bits costs 6 bytes per weight for a moment, which in a large vocabulary can
exceed all the rest. The interpreter, torch and the libraries come on top: a constant of the machine, measured by
`planner.machine`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil

from kbit import _native
from kbit.backends.cpu.runner import PASS_ROWS
from kbit.backends.rotary import FIRST_POSITIONS
from kbit.engine.prompt_cache import kept_states
from kbit.formats.quant_format import QuantFormat
from kbit.formats.trellis import TrellisFormat
from kbit.graph.pages import pages_for
from kbit.host.errors import UnsupportedError, UsageError
from kbit.models.latent import with_latents
from kbit.models.params import weightless_norms
from kbit.models.spec import ModelSpec
from kbit.planner.weights import DENSE_BYTES, Weight

KV_KINDS = ("fp32", "fp16", "8", "4", "3", "2")

# Fraction of rows that a layer's int8 products multiply a second time (kSpike of the CPU's products).
# They are not the same rows in every layer, so in a deep model most of that memory is touched.
_SPIKY = 0.05

# Memory of a BPE tokenizer of the `tokenizers` library: bytes per entry (a token and its merge) and per slot of its
# hash tables, which have a power of two of them, at most 7/8 full. Fitted to resident memory (docs/measurements.md).
_TOKEN_BYTES, _SLOT_BYTES = 560, 65
# What reading a GGUF file's tokenizer leaves, per token: its metadata and the tokenizer.json made of it.
_GGUF_TOKEN_BYTES = 390
# How much of either is free memory that the weights, which are read afterwards, take up again (docs/measurements.md).
# The rest is in use, or lies in pieces too small for weights, as all of a small vocabulary's does.
_TOKENIZER_REUSED, _GGUF_REUSED, _SMALL_TOKENIZER = 0.477, 0.33, 2e6
# Allocations below this come from the heap, which keeps what was freed (glibc's M_MMAP_THRESHOLD_MAX).
_HEAP_LIMIT = 32 << 20


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of a model in memory, at the worst moment.

    Attributes:
        linear, embedding, head, vectors: weights as the backend keeps them. A tied head counts as the embedding, as do
            other tables; vectors include routers.
        cache: keys and values, for the whole context, and states of fixed size: before
            and after a pass, and some that are kept.
        workspace: buffers, scratch and tables of a pass.
        tokenizer: vocabulary and merges.
        loading: what the worst moment of loading takes, weights loaded by then included.
    """

    linear: int
    embedding: int
    head: int
    vectors: int
    cache: int
    workspace: int
    tokenizer: int
    loading: int

    @property
    def weights(self) -> int:
        """All weights."""
        return self.linear + self.embedding + self.head + self.vectors

    @property
    def running(self) -> int:
        """While generating, the context full."""
        return self.weights + self.cache + self.workspace + self.tokenizer

    @property
    def peak(self) -> int:
        """The larger of running and loading; the process's constant comes on top."""
        return max(self.running, self.loading)

    def to_dict(self) -> dict[str, int]:
        """For JSON."""
        parts = ("linear", "embedding", "head", "vectors", "cache", "workspace", "tokenizer", "loading")
        return {**{part: getattr(self, part) for part in parts}, "running": self.running, "peak": self.peak}


@dataclass(frozen=True)
class ReadyWeights:
    """What weights take as a backend keeps them.

    Attributes:
        sizes: bytes by role.
        loading: the most that the weights take together while they are made ready one after another.
        leftover: what the heap keeps of that.
    """

    sizes: Mapping[str, int]
    loading: int
    leftover: int


def ready_weights(weights: Sequence[Weight], backend: str = "native") -> ReadyWeights:
    """What a model's tensors take, in the order in which they are read."""
    sizes = {"linear": 0, "embedding": 0, "table": 0, "head": 0, "other": 0, "router": 0}
    ready, loading, leftover = 0, 0, 0
    # Experts are thousands of matrices of a few kinds.
    known: dict[tuple[int, int, int, bool, bool], tuple[int, int]] = {}
    for weight in weights:
        kind = (id(weight.kept), weight.rows, weight.columns, weight.steps, weight.role == "other")
        found = known.get(kind)
        if found is None:
            size = prepared_bytes(weight, backend)
            found = known[kind] = size, _passing_bytes(weight, size, backend)
            if isinstance(weight.kept, str) and 4 * weight.numel < _HEAP_LIMIT:
                leftover = max(leftover, 4 * weight.numel)  # a float32 copy that is freed, and that the heap keeps
        sizes[weight.role] += found[0]
        loading = max(loading, ready + found[1])
        ready += found[0]
    return ReadyWeights(sizes, loading, leftover)


def predict_memory(
    spec: ModelSpec,
    weights: Sequence[Weight],
    *,
    context: int,
    prompt: int | None = None,
    batch: int = 1,
    kv: str = "fp16",
    compute: str = "int8",
    threads: int = 1,
    backend: str = "native",
    gguf: bool = False,
    ready: ReadyWeights | None = None,
) -> MemoryUse:
    """What a model takes.

    Args:
        spec: the model.
        weights: its tensors (`planned_weights`, `stored_weights`).
        context: tokens per sequence that the cache has room for, all of them used.
        prompt: tokens of the longest prompt, which passes are as large as; None: the whole context.
        batch: sequences at once.
        kv: what keys and values are kept as, one of KV_KINDS.
        compute: "int8", "bf16" or "fp32" (native), "fp16" or "bf16" (triton).
        threads: members of the native team.
        backend: "native", or "triton": then all of this is the GPU's memory, its workspace is an estimate, and what the
            driver takes is not in it.
        gguf: the model is read from a GGUF file, whose tokenizer takes more memory to read.
        ready: `ready_weights` of these, where they are known already.

    Raises:
        UsageError: a context or batch below 1.
        UnsupportedError: a cache kind that the backend or the model's heads cannot have.
    """
    if context < 1 or batch < 1:
        raise UsageError(f"a context of {context} tokens for {batch} sequences: both need to be at least 1")
    ready = ready or ready_weights(weights, backend)
    sizes = ready.sizes
    made = (weightless_norms(spec, layer).values() for layer in range(spec.layers))
    norms = 4 * sum(width for widths in made for width in widths)
    tokenizer = tokenizer_bytes(spec.vocab_size)
    reused = _TOKENIZER_REUSED * max(0.0, tokenizer - _SMALL_TOKENIZER)
    if gguf:
        tokenizer += _GGUF_TOKEN_BYTES * spec.vocab_size
        reused += _GGUF_REUSED * _GGUF_TOKEN_BYTES * spec.vocab_size
    kept = tokenizer - int(reused)
    # A text whose tokens all see each other goes through at once.
    rows = (
        context * batch
        if spec.mask == "bidirectional"
        else min((prompt or context) * batch, context * batch, PASS_ROWS)
    )
    if backend == "native":
        workspace = program_bytes(spec, weights, rows, compute, threads, resident=True)
        workspace = max(workspace + _attention_bytes(spec, context, threads), ready.leftover)
    else:
        tokenizer = kept = 0  # not on the GPU
        # Residual stream, q, k, v and attention's output, gate and up, each in float32 at most.
        heads = max((spec.heads + count) * dim for count, dim in spec.attention_sizes)
        width = 2 * spec.hidden_size + 2 * heads + 3 * max(spec.inner_widths) + spec.layers * spec.layer_features
        workspace = 4 * rows * width
    workspace += _rotary_bytes(spec, context) + 3 * 4 * spec.vocab_size * batch
    slots = 2 * batch + kept_states(spec.state_bytes)
    cache = cache_bytes(spec, context, batch, kv, backend) + slots * spec.state_bytes
    return MemoryUse(
        sizes["linear"],
        sizes["embedding"] + sizes["table"],
        sizes["head"],
        sizes["other"] + norms + sizes["router"],
        cache,
        workspace,
        kept,
        max(tokenizer, kept + ready.loading),
    )


def prepared_bytes(weight: Weight, backend: str = "native") -> int:
    """Bytes of a tensor as a backend keeps it: what its prepared weight calls `nbytes`."""
    if weight.role == "other":
        return 4 * weight.numel
    kept = weight.kept
    if backend != "native":
        if isinstance(kept, str):
            return 2 * weight.numel
        from kbit.kernels.triton.codecs.sizes import nested_bytes, planes_bytes, trellis_bytes

        if isinstance(kept, TrellisFormat):
            return trellis_bytes(kept, weight.rows, weight.columns)
        return (nested_bytes if weight.nested else planes_bytes)(kept, weight.rows, weight.columns)
    if isinstance(kept, str):
        return _native.matrix_bytes(weight.rows, weight.columns, 0, 0, kept, False)
    if isinstance(kept, TrellisFormat):
        return _native.matrix_bytes(weight.rows, weight.columns, kept.bits, 0, "fp16", False, kept.half)
    # Factors of double-quantized scales are multiplied in at load; K types keep steps of a number for 256 columns.
    scales = "fp32" if kept.double_quant else kept.scale_dtype
    kind = "fp32-steps" if weight.steps else scales
    return _native.matrix_bytes(weight.rows, weight.columns, kept.bits, kept.block_size, kind, kept.asymmetric)


def as_run(spec: ModelSpec, backend: str) -> ModelSpec:
    """The model as a backend runs it: the native one keeps latent vectors where it can."""
    return with_latents(spec) if backend == "native" else spec


def cache_bytes(spec: ModelSpec, context: int, batch: int = 1, kv: str = "fp16", backend: str = "native") -> int:
    """Bytes of a key/value cache with room for `context` tokens in each of `batch` rows: its `nbytes`.

    Raises:
        UnsupportedError: a kind that does not exist there, or heads that it cannot hold.
    """
    if kv not in KV_KINDS or (kv == "fp32" and backend != "native"):
        raise UnsupportedError(f"a KV cache of {kv}: the {backend} backend has 16-bit floats and 8, 4, 3 or 2 bits")
    spec = as_run(spec, backend)
    uneven = next((dim for _, dim in spec.cache_sizes if dim % 16), None)
    if kv.isdigit() and uneven:
        raise UnsupportedError(
            f"a KV cache of {kv} bits: heads of {uneven} features are not a multiple of 16; use 16 bits"
        )
    pages = batch * pages_for(context)
    return pages * sum(page_bytes(spec, layer, kv, backend) for layer in range(spec.cache_layers))


def page_bytes(spec: ModelSpec, layer: int, kv: str, backend: str) -> int:
    """Bytes of one layer's part of a page."""
    spec = as_run(spec, backend)
    heads, dim = spec.cache_size(layer)
    if backend == "native":
        return _native.kv_page_bytes(1, heads, dim, kv, spec.keeps_latents)
    from kbit.kernels.triton.attention.kv_layout import KVFormat

    return heads * 2 * KVFormat(kv, dim).page_bytes


def program_bytes(
    spec: ModelSpec, weights: Sequence[Weight], rows: int, compute: str, threads: int, *, resident: bool = False
) -> int:
    """Bytes of a recorded native program that has run passes of `rows` tokens: its `nbytes`.

    Args:
        resident: only what such passes touch; memory that is never written costs nothing.
    """
    spec = as_run(spec, "native")
    hidden, experts = spec.hidden_size, spec.experts
    queries = spec.heads * (spec.value_dim if spec.latent is not None else max(dim for _, dim in spec.attention_sizes))
    buffers = sum(4 * rows * _up(width, _native.TILE_COLUMNS) for width in _buffer_widths(spec))
    latent = spec.latent
    ranks = () if latent is None else (latent.rank if latent.expanded else 0, latent.query_rank)
    recurred = max((net.inner_width for net in spec.recurrent), default=0)
    widest = _up(max(hidden, queries, recurred, *ranks, *spec.inner_widths), _native.TILE_COLUMNS)
    shared_numbers = rows * widest
    if latent is not None and not latent.expanded:  # what attention made of latents, head by head
        by_heads = rows * spec.heads * _up(latent.rank, _native.TILE_COLUMNS)
        shared_numbers = max(shared_numbers, by_heads)
        buffers += 4 * by_heads
    if experts is not None:  # rows of a token and each of its experts, ready to be multiplied, and inside the experts
        inside, outside = (_up(width, _native.TILE_COLUMNS) for width in (experts.width, hidden))
        pairs = rows * experts.routing.chosen
        shared_numbers = max(shared_numbers, pairs * inside, pairs * outside)
        buffers += 4 * pairs * (inside + outside)
    unused = {"table"} if spec.tied_embeddings else {"table", "embedding"}
    multiplied = {id(weight.kept): weight.kept for weight in weights if weight.role not in unused}.values()
    blocks = {kept.block_size for kept in multiplied if isinstance(kept, QuantFormat)}
    segments = [*{_native.matrix_segment(block) for block in blocks}] if compute == "int8" else []
    rotated = any(isinstance(kept, TrellisFormat) for kept in multiplied)
    if rotated and compute == "int8":
        segments.append(_native.matrix_segment(0))

    def inputs(count: int, floats: float, second: float) -> float:
        """Rows of x made ready: `count` numbers; `floats` and `second` of them in float32, and rounded once more."""
        total = (4 * floats + (2 * count if compute == "bf16" else 0)) * (2 if rotated else 1)
        if segments:
            total += 4 * second
        for segment in segments:
            rounded = 1 + 8 / segment  # a byte each, and scale and sum of a segment
            total += rounded * (count + second)
        return total

    few = max(1, min(rows, _native.REDUNDANT_INPUT // widest))
    scratch = _native.THREAD_SCRATCH_BYTES + inputs(few * widest, few * widest, few * widest)
    if resident:
        spiky = 1 - (1 - _SPIKY) ** spec.layers
        floats = max(rows, shared_numbers // widest) * _up(hidden, _native.TILE_COLUMNS)
        shared = inputs(shared_numbers, min(floats, shared_numbers), spiky * shared_numbers)
    else:
        shared = inputs(shared_numbers, shared_numbers, shared_numbers)
    return int(buffers + shared + threads * scratch)


def tokenizer_bytes(vocabulary: int) -> int:
    """Memory of a byte-pair tokenizer with so many tokens, about (see _TOKEN_BYTES)."""
    slots = 4
    while slots * 7 / 8 < vocabulary:
        slots *= 2
    return _TOKEN_BYTES * vocabulary + _SLOT_BYTES * slots


def _passing_bytes(weight: Weight, size: int, backend: str) -> int:
    """Most bytes that a tensor takes while it is made ready (kbit.models.load), its final `size` included."""
    if backend != "native":  # on the GPU: codes are unpacked to bytes, twice, before they are sorted
        return size + (0 if isinstance(weight.kept, str) else weight.stored_bytes + 2 * weight.numel)
    copies = weight.stored_bytes
    if isinstance(weight.kept, str) and DENSE_BYTES[weight.kept] == 2:
        copies += 4 * weight.numel  # read as float32, then rounded to what it was
    return max(copies, weight.stored_bytes + size)


@lru_cache(maxsize=256)
def _buffer_widths(spec: ModelSpec) -> tuple[int, ...]:
    """Widths of a program's buffers: recorded, fused and placed as the model itself would be."""
    from kbit.backends.cpu.lowering import place
    from kbit.graph.fuse import fuse
    from kbit.models.structure import recorded

    # From the second layer on nothing new is needed, nor from the second with experts, or of another kind, where layers
    # have one shape.
    first = spec.experts.layers.index(True) if spec.experts is not None else 0
    for net in spec.recurrent:
        first = max(first, *(net.layers.index(kind) for kind in set(net.layers)), 0)
    structure = recorded(spec, layers=None if spec.shapes else first + 2)
    return tuple(place(fuse(structure.operations, structure.result), structure.result).widths)


def _attention_bytes(spec: ModelSpec, context: int, threads: int) -> int:
    """Scratch of attention and, with threads, of chunks that wait."""
    total, spec = 0, as_run(spec, "native")
    for count, dim in spec.cache_sizes:  # each has a plan, and memory, of its own
        rows, padded = max(48, 16 * (spec.heads // count)), _up(dim, 16)
        waiting = 4 * spec.heads * ceil(context / _native.ATTENTION_CHUNK) * (padded + 2) if threads > 1 else 0
        total += threads * _native.attention_task_bytes(rows, dim) + waiting
    return total


def _rotary_bytes(spec: ModelSpec, context: int) -> int:
    """Cosines and sines of all positions, in tables that double."""
    positions = FIRST_POSITIONS
    while positions < context:
        positions *= 2
    tables = sum(rope.dim for rope in spec.ropes) * (1 if spec.query_temperature is None else 2)
    return 4 * tables * positions


def _up(value: int, multiple: int) -> int:
    return ceil(value / multiple) * multiple
