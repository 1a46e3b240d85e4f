"""How fast this machine runs the native kernels: short measurements, each of one thing that a token's time is made of.

Every figure comes from a recorded program, the same that a model is (kbit.backends.cpu.lowering), over matrices of
random codes: what a code stands for does not matter to the speed. A matrix is timed twice, from cache (a few
megabytes that are read again and again) and from memory (more than the caches hold), because the width decides which
of both a product waits for: two-bit codes for decoding, eight-bit codes for memory.

Times are medians. No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from kbit import _native
from kbit.backends.cpu.runner import PASS_ROWS, record
from kbit.backends.cpu.weight import NativeWeight
from kbit.formats.quant_format import QuantFormat
from kbit.formats.registry import parse_format
from kbit.formats.trellis import TrellisFormat
from kbit.graph.pages import pages_for
from kbit.models.decoder import DecoderDefinition
from kbit.models.families import spec_from_config
from kbit.models.parameter import Parameter
from kbit.models.structure import assemble
from kbit.planner.random_matrix import COLUMNS, ROWS, random_matrix

# Tokens that products of a prompt are timed with: passes are whole, or what is left of a prompt.
_PRODUCT_ROWS = (256, PASS_ROWS)
# Read again and again from cache: beyond the second level of most processors, well below the third.
CACHED_BYTES = 4 << 20
# Seconds for each figure, and the fewest times that something is run.
SECONDS, REPEATS = 0.12, 5
_TOKENS = 1024  # slots that attention is timed with
_ATTENTION_BYTES = 64 << 20  # the most that a cache is filled with
# Before the cache kind of attention whose keys are its values.
LATENT = "latent-"
_TINY = {
    "model_type": "llama",
    "vocab_size": 16,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 1,
}


@dataclass(frozen=True)
class KernelRate:
    """What a product with weights of one format takes, in seconds.

    Attributes:
        cached: per weight, one token, matrices in cache.
        memory: the same, matrices in memory.
        prompt: per weight and token, some hundred tokens at once.
        nbytes: per weight, as the backend keeps it.
        spread: interquartile range over median of the slower single-token figure.
    """

    cached: float
    memory: float
    prompt: float
    nbytes: float
    spread: float


@dataclass(frozen=True)
class AttentionRate:
    """What attention over a cache of one kind takes, in seconds.

    Attributes:
        cached: per slot and key/value head, one token, the cache in the processor's caches.
        memory: the same from memory.
        prompt: per slot, key/value head and token, PASS_ROWS tokens at once.
        row: per key/value head and token, PASS_ROWS tokens at once: rotating, and writing to the cache.
        nbytes: per slot and key/value head.
    """

    cached: float
    memory: float
    prompt: float
    row: float
    nbytes: float


@dataclass(frozen=True)
class Overheads:
    """What is left without weights to read and slots to see, in seconds.

    Attributes:
        matmul: per product.
        column: per feature of a product's input (its norm, and rounding to int8).
        layer: per layer, its five instructions on tiny matrices included.
        token: per token: the call, choosing the most probable token, turning it into text.
        vocabulary: per logit, in choosing.
        prompt: per prompt: what happens once, memory that is touched for the first time above all.
    """

    matmul: float
    column: float
    layer: float
    token: float
    vocabulary: float
    prompt: float


def kernel_key(format: QuantFormat | TrellisFormat | str) -> str:
    """Formats with the same key run the same instructions: the data type counts only where it needs two digits, and of
    a trellis not the window, nor the few weights that it keeps apart.

    A codebook that int8 does not hold well is multiplied in two digits (kernels/cpu/codecs/matrix_storage.cpp), and
    int8 itself needs no lookup.
    """
    if isinstance(format, str):
        return format
    if isinstance(format, TrellisFormat):
        return str(replace(format, window=0, outliers=0))
    scales = "fp32" if format.double_quant else format.scale_dtype
    tail = ("-asym" if format.asymmetric else "") + ("" if scales == "fp16" else f"-{scales}")
    block = f"b{format.block_size}" if format.block_size else "row"
    dtype = "nf" if _two_digits(format) else "int"
    return f"{dtype}{format.bits}-{block}{tail}"


def _two_digits(format: QuantFormat) -> bool:
    if format.bits < 6 or format.dtype == "int":
        return False
    return format.has_own_codebook or random_matrix(format, _native.Context("scalar", 1), 16, 64).two_digits


@dataclass(frozen=True, eq=False)
class _Recorded:
    """A program, and the width of what it gives."""

    program: _native.Program
    hidden: int


class Timer:
    """Times programs on a team of threads.

    Args:
        threads: members.
        compute: "int8", "bf16" or "fp32".
        memory_bytes: what is more than the caches hold; None: found from their sizes.
    """

    def __init__(self, threads: int, compute: str, memory_bytes: int | None = None) -> None:
        self.context = _native.Context(None, threads)
        self.compute = compute
        self.memory_bytes = memory_bytes or 3 * _cache_bytes()
        self._overheads: tuple[float, float] | None = None

    def kernel(self, key: str) -> KernelRate:
        """What a product takes with weights of this kind (`kernel_key`)."""
        format = _parse(key)
        per_product, per_column = self._product_overheads()
        count = ROWS * COLUMNS
        fixed = per_product + COLUMNS * per_column
        one = random_matrix(format, self.context)
        few = [random_matrix(format, self.context) for _ in range(max(2, CACHED_BYTES // one.nbytes))]
        cached, spread = self._time(self._chain(few), 1)
        pair = self._chain(few[:2])
        prompt = sum(self._time(pair, rows)[0] / rows for rows in _PRODUCT_ROWS) / len(_PRODUCT_ROWS)
        many = few + [random_matrix(format, self.context) for _ in range(self.memory_bytes // one.nbytes - len(few))]
        memory, memory_spread = self._time(self._chain(many), 1)
        cached, memory = cached / len(few), max(memory / len(many), cached / len(few))
        return KernelRate(
            cached=max(cached - fixed, 0.1 * cached) / count,
            memory=max(memory - fixed, 0.1 * memory) / count,
            prompt=prompt / 2 / count,
            nbytes=one.nbytes / count,
            spread=max(spread, memory_spread),
        )

    def misses(self) -> list[tuple[int, float]]:
        """How far from cache to memory a model of some size is: (bytes read per token, 0 to 1), rising."""
        matrix = random_matrix(QuantFormat("int", 8), self.context)
        sizes = [CACHED_BYTES]
        while sizes[-1] * 3 // 2 < self.memory_bytes:
            sizes.append(sizes[-1] * 3 // 2)
        sizes.append(self.memory_bytes)
        matrices = [matrix] + [
            random_matrix(QuantFormat("int", 8), self.context) for _ in range(self.memory_bytes // matrix.nbytes - 1)
        ]
        times = []
        for size in sizes:
            part = matrices[: max(2, size // matrix.nbytes)]
            times.append(self._time(self._chain(part), 1)[0] / len(part))
        first, last = times[0], times[-1]
        if last <= first:  # no cache that is worth the name
            return [(sizes[0], 1.0)]
        curve, highest = [], 0.0
        for size, seconds in zip(sizes, times, strict=True):
            highest = max(highest, min(1.0, (seconds - first) / (last - first)))
            curve.append((size, highest))
        return curve

    def bandwidth(self) -> float:
        """Bytes per second that the int8 product of one token reads from memory: the most that weights are read at."""
        matrices = [random_matrix(QuantFormat("int", 8, 0), self.context) for _ in range(self.memory_bytes >> 20)]
        return sum(matrix.nbytes for matrix in matrices) / self._time(self._chain(matrices), 1)[0]

    def attention(self, kind: str, head_dim: int, group: int) -> AttentionRate:
        """What attention takes: cache kind, features of a head, query heads per key/value head."""
        latent = kind.startswith(LATENT)
        kind, kv_heads = kind.removeprefix(LATENT), 1 if latent else 2
        page_bytes = _native.kv_page_bytes(1, kv_heads, head_dim, kind, latent)
        layer_bytes = pages_for(_TOKENS) * page_bytes
        slots = kv_heads * _TOKENS
        layers = max(2, min(self.memory_bytes, _ATTENTION_BYTES) // layer_bytes)
        times: dict[int, float] = {}
        begin = later = 0.0
        for count in (1, layers):
            cache = _one_sequence(count, kv_heads, head_dim, kind, _TOKENS + PASS_ROWS, latent)
            write = self._attentions(count, kv_heads, head_dim, group, 1, latent)
            for start in range(0, _TOKENS, PASS_ROWS):  # what was never written is a page of zeros, always in cache
                _passes(write, PASS_ROWS, cache, start)()
            program = self._attentions(count, kv_heads, head_dim, group, None, latent)
            full = _seconds(_passes(program, 1, cache, _TOKENS - 1))[0]
            times[count] = max(full - _seconds(_passes(program, 1, cache))[0], 0.0) / count / slots
            if count == 1:
                later = _seconds(_passes(program, PASS_ROWS, cache, _TOKENS))[0]
                begin = _seconds(_passes(program, PASS_ROWS, cache))[0]
        prompt = max(later - begin, 0.0) / (_TOKENS * PASS_ROWS * kv_heads)
        row = begin / (PASS_ROWS * kv_heads) - prompt * (PASS_ROWS + 1) / 2
        return AttentionRate(times[1], max(times[layers], times[1]), prompt, max(row, 0.0), layer_bytes / slots)

    def overheads(self, token: float, prompt: float) -> Overheads:
        """Everything else. `token` and `prompt` are measured elsewhere, as they take a whole model."""
        per_product, per_column = self._product_overheads()
        times = []
        for layers in (4, 36):
            recorded, cache = self._tiny_model(layers)
            times.append(_seconds(_passes(recorded, 1, cache, logits=True))[0])
        layer = max(times[1] - times[0], 0.0) / 32
        logits = np.random.default_rng(0).standard_normal(1 << 16, dtype=np.float32)
        vocabulary = _seconds(logits.argmax)[0] / len(logits)
        return Overheads(per_product, per_column, layer, token, vocabulary, prompt)

    def _product_overheads(self) -> tuple[float, float]:
        """Seconds per product, and per feature of its input."""
        if self._overheads is None:
            times = []
            for columns in (64, 2048):
                matrices = [random_matrix(QuantFormat("int", 4), self.context, 16, columns) for _ in range(32)]
                times.append(self._time(self._chain(matrices, 16, columns), 1)[0] / len(matrices))
            column = max(times[1] - times[0], 0.0) / (2048 - 64)
            self._overheads = (max(times[0] - 64 * column, 0.0), column)
        return self._overheads

    def _chain(self, matrices: Sequence[_native.Matrix], rows: int = ROWS, columns: int = COLUMNS) -> _Recorded:
        """Products one after another, each with a norm, as in a model."""
        program = _native.Program(self.context, self.compute)
        x, out = program.buffer(columns), program.buffer(rows)
        program.embed(self._embedding(columns), x)
        norm = np.ones(columns, dtype=np.float32)
        for matrix in matrices:
            program.matmul(x, [matrix], [None], [out], norm, 1e-5, None, None)
        program.finish(out)
        return _Recorded(program, rows)

    def _attentions(
        self, layers: int, kv_heads: int, dim: int, group: int, window: int | None, latent: bool
    ) -> _Recorded:
        """The same attention in every layer."""
        program = _native.Program(self.context, self.compute)
        q, k, v, out = (
            program.buffer(dim * heads) for heads in (kv_heads * group, kv_heads, kv_heads, kv_heads * group)
        )
        program.embed(self._embedding(dim * kv_heads * group), q)
        program.embed(self._embedding(dim * kv_heads), k)
        program.embed(self._embedding(dim * kv_heads), v)
        # A program sizes its buffers by its products, of which it needs one.
        least = random_matrix(QuantFormat("int", 4), self.context, 16, dim * kv_heads)
        program.matmul(k, [least], [None], [program.buffer(16)], None, 0.0, None, None)
        for layer in range(layers):
            heads = kv_heads * group
            values = k if latent else v
            program.attend(q, k, values, out, layer, heads, kv_heads, dim, dim**-0.5, window, latent=latent)
        program.finish(out)
        return _Recorded(program, dim * kv_heads * group)

    def _tiny_model(self, layers: int) -> tuple[_Recorded, _Sequence]:
        """A whole decoder whose weights take no time to read, recorded as any model is."""
        spec = spec_from_config({**_TINY, "num_hidden_layers": layers}, where="a tiny model")

        def matrix(parameter: Parameter) -> NativeWeight:
            rows, columns = parameter.shape
            quantized = parameter.role != "embedding"
            small = (
                random_matrix(QuantFormat("int", 4), self.context, rows, columns)
                if quantized
                else self._embedding(columns)
            )
            return NativeWeight(small)

        weights = assemble(spec, matrix, lambda parameter: np.ones(parameter.shape, dtype=np.float32))
        model = record(DecoderDefinition(spec, weights), self.context, self.compute)
        cache = _one_sequence(spec.cache_layers, spec.kv_heads, spec.head_dim, "fp16", 16)
        return _Recorded(model.program, model.hidden_width), cache

    def _embedding(self, columns: int) -> _native.Matrix:
        values = np.random.default_rng(0).standard_normal((16, columns), dtype=np.float32)
        return _native.Matrix.dense(values, "fp32", self.context)

    @staticmethod
    def _time(recorded: _Recorded, rows: int) -> tuple[float, float]:
        """Seconds of a pass of `rows` tokens, and its spread."""
        return _seconds(_passes(recorded, rows, _one_sequence(1, 1, 16, "fp32", rows)))


@dataclass(frozen=True, eq=False)
class _Sequence:
    """Keys and values of one sequence: its pages, and all of them in order."""

    pages: _native.KVPages
    table: NDArray[np.int32]


def _one_sequence(layers: int, kv_heads: int, head_dim: int, kind: str, tokens: int, latent: bool = False) -> _Sequence:
    count = pages_for(tokens)
    pages = _native.KVPages(layers, kv_heads, head_dim, kind, count, latent)
    return _Sequence(pages, np.arange(count, dtype=np.int32)[None])


def _seconds(run: Callable[[], object]) -> tuple[float, float]:
    """Median time of a call, and interquartile range over median."""
    run()
    times: list[float] = []
    end = perf_counter() + SECONDS
    while perf_counter() < end or len(times) < REPEATS:
        begin = perf_counter()
        run()
        times.append(perf_counter() - begin)
    times.sort()
    middle = median(times)
    return middle, (times[len(times) * 3 // 4] - times[len(times) // 4]) / middle


def _passes(
    recorded: _Recorded, rows: int, cache: _Sequence, start: int = 0, *, logits: bool = False
) -> Callable[[], None]:
    """A call that runs `rows` tokens at positions from `start` on."""
    ids = np.arange(rows, dtype=np.int64) % 16
    positions = np.arange(start, start + rows, dtype=np.int32)
    zeros = np.zeros(rows, dtype=np.int32)
    turn = np.ones((1, 1), dtype=np.float32)
    wanted = np.zeros(1, dtype=np.int64) if logits else None
    out = np.empty((1, 16) if logits else (rows, recorded.hidden), dtype=np.float32)

    def run() -> None:
        recorded.program.run(ids, zeros, positions, turn, turn, zeros, cache.pages, cache.table, wanted, out)

    return run


def _parse(key: str) -> QuantFormat | TrellisFormat | str:
    if key in ("fp16", "bf16", "fp32"):
        return key
    format = parse_format(key)
    assert isinstance(format, QuantFormat | TrellisFormat)
    return format


def _cache_bytes(root: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Bytes of the largest cache of a processor, between 16 and 128 MiB; 32 MiB where the system does not say."""
    sizes = []
    for path in root.glob("index*/size"):
        try:
            text = path.read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text[:-1].isdigit() and text[-1] in "KM":
            sizes.append(int(text[:-1]) << (10 if text[-1] == "K" else 20))
    return min(max(sizes, default=32 << 20), 128 << 20) if max(sizes, default=0) >= 16 << 20 else 32 << 20
