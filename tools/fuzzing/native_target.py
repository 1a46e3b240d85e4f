"""Every entry point of the compiled module with arguments that are right but for some."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fuzzing.draw import Draw
from fuzzing.native_program import program
from fuzzing.target import Target
from kbit import _native
from kbit.host.errors import KbitError

_SCALES = ("fp16", "bf16", "fp32")
_GRIDS = (4, 8, 16, 64, 256)


class Native(Target):
    """The first byte says which entry point is called, the others with what."""

    longest = 1024
    frugal = False  # who asks for a cache of two gigabytes is given one
    # What nanobind and the module say of wrong arguments; MemoryError where somebody asks for too much.
    allowed = (ValueError, TypeError, IndexError, RuntimeError, OverflowError, OSError, MemoryError, KbitError)

    def __init__(self, scratch: Path) -> None:
        super().__init__(scratch)
        self._contexts = [_native.Context(isa, threads) for isa in _native.instruction_sets() for threads in (1, 2)]

    def run(self, data: bytes) -> None:
        draw = Draw(data)
        names = sorted(CALLS)
        CALLS[names[draw.below(len(names))]](draw, draw.choice(self._contexts), self.scratch)


def planes(draw: Draw, context: Any, scratch: Path) -> None:
    """Bits in and out of planes and streams."""
    rows, columns, width = draw.size(), draw.size(70), draw.choice((1, 2, 4, 8))
    shift = draw.given(draw.below(9 - width))
    codes, plane = draw.array((rows, columns), "u1"), draw.array((rows, -(-columns * width // 8)), "u1")
    if draw.below(2):
        _native.pack_plane(codes, draw.given(width), shift, plane)
    else:
        _native.unpack_plane(plane, draw.given(width), shift, bool(draw.below(2)), codes)
    bits = draw.size(8)
    _native.unpack_stream(draw.array((rows, -(-columns * bits // 8)), "u1"), draw.given(bits), codes)


def levels(draw: Draw, context: Any, scratch: Path) -> None:
    """Looking codes up."""
    rows, blocks, size, each = draw.size(9), draw.size(5), draw.choice(_GRIDS), draw.size(20)
    kind = draw.choice(("f4", "u2"))
    of = draw.array((blocks * each,), "i4", blocks) if draw.below(2) else None
    codes = draw.array((rows, blocks * each), "u1", size)
    _native.look_up_levels(codes, draw.array((rows, blocks, size), kind), of, draw.array((rows, blocks * each), kind))


def rounding(draw: Draw, context: Any, scratch: Path) -> None:
    """Rounding with feedback."""
    rows, columns, block, size = draw.size(20), draw.size(50), draw.size(60), draw.choice(_GRIDS)
    blocks, offsets, given = -(-columns // min(block, columns)), bool(draw.below(2)), bool(draw.below(2))
    some = lambda *shape: draw.floats(*shape) if draw.below(2) else None  # noqa: E731
    _native.round_matrix(
        draw.floats(rows, columns),
        some(rows, columns),
        some(columns, columns),
        draw.floats(columns),
        draw.floats(size),
        draw.array((size,), "u1"),
        draw.given(block),
        draw.given(draw.choice(_SCALES)),
        offsets,
        draw.floats(draw.below(4)),
        draw.floats(rows, blocks) if given else None,
        draw.floats(rows, blocks) if given and offsets else None,
        draw.array((rows, columns), "u1"),
        draw.floats(rows, blocks),
        draw.floats(rows, blocks) if offsets else None,
        some(rows, columns),
        draw.array((columns,), "i4", blocks) if given and draw.below(2) else None,
        draw.given(context.isa),
    )


def descent(draw: Draw, context: Any, scratch: Path) -> None:
    """Better codes for rounded rows."""
    rows, columns, block, size = draw.size(16), draw.size(50), draw.size(60), draw.choice(_GRIDS)
    blocks = -(-columns // min(block, columns))
    _native.descend_rows(
        draw.floats(rows, columns),
        draw.floats(columns, columns),
        draw.floats(rows, rows),
        draw.floats(size),
        draw.array((size,), "u1"),
        draw.given(block),
        draw.given(draw.choice(_SCALES)),
        bool(draw.below(2)),
        draw.array((rows, columns), "u1", size),
        draw.floats(rows, blocks),
        draw.floats(rows, blocks) if draw.below(2) else None,
        draw.floats(rows, columns),
        draw.given(context.isa),
    )


def nested_descent(draw: Draw, context: Any, scratch: Path) -> None:
    """The same for all widths together."""
    rows, columns, block, widths = draw.size(16), draw.size(50), draw.size(60), draw.size(7)
    first = 2 + draw.below(9 - widths - 1) if widths < 7 else 2
    blocks = -(-columns // block)
    _native.descend_nested_rows(
        draw.floats(widths, rows, columns),
        draw.floats(columns, columns),
        draw.floats(rows, rows),
        [draw.floats(1 << (first + i)) for i in range(widths)],
        [1.0] * (widths + draw.amiss()),
        draw.given(block),
        draw.floats(widths, rows, blocks),
        draw.array((rows, columns), "u1", 1 << (first + widths - 1)),
        draw.floats(widths, rows, columns),
        draw.given(context.isa),
    )


def trellis_search(draw: Draw, context: Any, scratch: Path) -> None:
    """Codes of tiles."""
    tiles, bits, window, half = draw.size(3), draw.size(4), draw.choice((4, 8, 9)), bool(draw.below(2))
    factors = [None, None]
    if draw.below(2):
        factors = [draw.array((tiles, 16, 16), "i2"), draw.array((tiles, 16, 16), "i4")]
    _native.trellis_search(
        draw.floats(tiles, 256),
        draw.floats(1 << window),
        draw.given(bits),
        draw.array((tiles, 16 * (2 * bits + half)), "u1"),
        draw.given(context),
        draw.given(half),
        *factors,
    )


def matrix(draw: Draw, context: Any, scratch: Path) -> Any:
    """A prepared matrix of some kind, some of whose weights may be kept apart."""
    made = plain_matrix(draw, context)
    if draw.below(2):
        count, one_more = draw.below(20), draw.below(8) == 0
        rows, columns = (draw.array((count,), "i4", size + one_more) for size in (made.rows, made.columns))
        values = draw.floats(count) if draw.below(2) else np.ones(count, dtype=np.float32)
        made.keep_apart(np.sort(rows, axis=0) if draw.below(8) else rows, columns, values)
    return made


def plain_matrix(draw: Draw, context: Any) -> Any:
    """A prepared matrix of some kind."""
    rows, columns = draw.size(40), draw.size(80)
    kind, what = draw.choice(_SCALES), draw.below(4)
    half = "f4" if kind == "fp32" else "u2"
    mixed = draw.choice((0, 0, 16, 32, 64))
    wide = -(-columns // 16) * 16
    signs = draw.array((wide // 8,), "u1") if mixed else None
    if what == 0:
        return _native.Matrix.dense(draw.array((rows, columns), half), draw.given(kind), draw.given(context))
    if what == 1:
        bits, code, more = 2 + draw.below(5), draw.choice(("sum2", "sum4")), bool(draw.below(2))
        return _native.Matrix.trellis(
            draw.array((-(-rows // 16), wide // 16, 16 * (2 * bits + more)), "u1"),
            draw.given(bits),
            draw.given(code),
            draw.given(8 + draw.below(9)),
            draw.given(columns),
            draw.array((rows, 1), "u2"),
            signs if signs is not None else draw.array((wide // 8,), "u1"),
            draw.given(mixed or 16),
            draw.given(context),
            draw.given(more),
        )
    bits, block, apart = 2 + draw.below(7), 16 * draw.below(5), bool(draw.below(2))
    apart = apart and bits > 2
    coded = wide if mixed else columns
    widths = [2, *[1] * (bits - 2)] if apart else [width for width in (8, 4, 2, 1) if bits & width]
    blocks = -(-columns // block) if block else 1
    return _native.Matrix.quantized(
        [draw.array((rows, -(-coded * width // 8)), "u1") for width in widths],
        draw.given(bits),
        draw.given(columns),
        draw.given(block),
        draw.array((rows, blocks), half),
        draw.array((rows, blocks), half) if draw.below(2) else None,
        draw.given(kind),
        draw.floats(1 << bits),
        draw.given(context),
        signs,
        draw.given(mixed),
        apart,
    )


def mapped(draw: Draw, context: Any, scratch: Path) -> None:
    """A matrix to a file and back."""
    made = matrix(draw, context, scratch)
    said, arrays = _native.describe_matrix(made), _native.matrix_arrays(made)
    path = scratch / "prepared"
    begins, content = [], b""
    for array in arrays:
        begins.append(len(content))
        content += array.tobytes() + b"\0" * (-array.nbytes % 64)
    path.write_bytes(
        content + b"\0" * draw.below(64) if draw.below(8) else content[: draw.below(len(content) + 1)] or b"x"
    )
    file = _native.MappedFile(str(path))
    begins = [draw.given(begin) for begin in begins]
    found = _native.map_matrix(
        file,
        draw.given(said["rows"]),
        draw.given(said["columns"]),
        draw.given(said["bits"]),
        draw.given(said["block_size"]),
        draw.given(said["kind"]),
        said["offsets"],
        begins,
        draw.given(said["code"]),
        draw.given(said["window"]),
        draw.given(said["mixed"]),
        said["apart"],
        draw.given(said["half"]),
        draw.given(said["outliers"]),
    )
    assert found.nbytes >= 0
    file.prefetch(draw.given(draw.below(100)), draw.given(draw.below(1000)))
    file.bytes(draw.given(draw.below(100)), draw.given(draw.below(1000)))
    file.check()


def pages(draw: Draw, context: Any, scratch: Path) -> None:
    """The cache, and one attention over it."""
    layers, kv_heads, heads, dim = draw.size(3), draw.size(3), draw.size(3), 8 * draw.size(6)
    kind = draw.choice(("fp32", "fp16", "8", "4", "3", "2", "8,4", "4,2", "2,8", "16", ""))
    cache = _native.KVPages(
        draw.given(layers), draw.given(kv_heads), draw.given(dim), draw.given(kind), draw.given(draw.size(6))
    )
    cache.resize(draw.given(draw.size(8)))
    count = min(cache.count, 64)
    cache.copy(draw.given(draw.below(count)), draw.given(draw.below(count)))
    rows, sequences = draw.size(5), draw.size(2)
    tables = draw.array((sequences, count), "i4", count)
    half = draw.below(dim // 2 + 1)
    _native.attention(
        draw.given(context),
        draw.floats(rows, heads * kv_heads, dim),
        draw.floats(rows, kv_heads, dim),
        draw.floats(rows, kv_heads, dim),
        draw.array((rows,), "i4", 64 * count) if draw.below(4) == 0 else np.arange(rows, dtype=np.int32),
        draw.array((rows,), "i4", sequences) if draw.below(4) == 0 else np.zeros(rows, np.int32),
        draw.floats(rows, half),
        draw.floats(rows, half),
        cache,
        tables,
        draw.given(draw.below(layers)),
        draw.given(0.5),
        draw.given(draw.below(9)),
        draw.floats(kv_heads * dim) if draw.below(4) == 0 else None,
    )
    cache.dequantized(
        draw.given(draw.below(layers)), draw.array((count,), "i4", count), draw.given(draw.below(64 * count))
    )


def sizes(draw: Draw, context: Any, scratch: Path) -> None:
    """What is said before anything is allocated."""
    kind = draw.choice((*_SCALES, "fp32-steps"))
    call = draw.below(5)
    if call == 0:
        bits, block = 2 + draw.below(7), 16 * draw.below(9)
        arguments = [draw.given(draw.size()), draw.given(draw.size(100)), draw.given(bits), draw.given(block)]
        _native.matrix_bytes(*arguments, draw.given(kind), bool(draw.below(2)))
    elif call == 1:
        _native.matrix_segment(draw.given(16 * draw.below(9)))
    elif call == 2:
        _native.attention_task_bytes(draw.given(draw.size()), draw.given(draw.size(128)))
    elif call == 3:
        heads = draw.size() if draw.below(2) else [draw.given(draw.size()) for _ in range(3)]
        _native.kv_page_bytes(draw.given(3), draw.given(heads), draw.given(draw.size(128)), draw.given("8,4"))
    else:
        _native.simd_trace(draw.given(context.isa), draw.array((draw.below(300),), "u1"))
        _native.Context(draw.given(context.isa), draw.given(draw.size(3)))


def pairs(draw: Draw, context: Any, scratch: Path) -> None:
    """A vocabulary in tables."""
    tokens, rules = draw.size(20), draw.below(20)
    texts = b"".join(bytes([97 + i % 26]) * (1 + i // 26) for i in range(tokens))
    ends = np.cumsum([1 + i // 26 for i in range(tokens)]).astype("<u4")
    merges = np.array([[draw.below(tokens), draw.below(tokens), draw.below(tokens)] for _ in range(rules)], "<u4")
    if draw.amiss():
        ends[draw.below(tokens)] = draw.choice((0, 1 << 31, len(texts) + 1))
    if draw.amiss() and merges.size:
        merges.flat[draw.below(merges.size)] = draw.choice((tokens, 1 << 31))
    slots, merge_slots = (bytearray(4 << (draw.below(7) if draw.amiss() else 6)) for _ in range(2))
    parts = [np.frombuffer(texts, "u1"), np.frombuffer(ends.tobytes(), "u1"), np.frombuffer(merges.tobytes(), "u1")]
    _native.fill_token_slots(parts[0], parts[1], draw.given(np.frombuffer(slots, "u1")))
    _native.fill_merge_slots(parts[2], draw.given(np.frombuffer(merge_slots, "u1")))
    if draw.amiss():
        for table in (slots, merge_slots):
            table[draw.below(len(table))] = draw.byte()
    made = _native.BytePairs(
        draw.given(memoryview(texts)),
        draw.given(memoryview(parts[1])),
        draw.given(memoryview(slots)),
        draw.given(memoryview(parts[2])),
        draw.given(memoryview(merge_slots)),
        bool(draw.below(2)),
    )
    made.token_to_id(draw.choice(("a", "aa", "z", "", "\0")))
    made.id_to_token(draw.given(draw.below(tokens)))
    ids = [draw.given(draw.below(tokens)) for _ in range(draw.below(9))]
    made.encode(ids, [draw.choice((0, 0, 1, None)) for _ in ids])


def sampling(draw: Draw, context: Any, scratch: Path) -> None:
    """Tokens drawn from logits, and their scores."""
    rows, width, held = draw.size(4), draw.size(70), draw.size(5)
    samplers = []
    for _ in range(rows):
        biased = draw.below(4)
        sampler = _native.RowSampler(
            draw.given(draw.choice((0.0, 1.0, 1.5, 1e6))),
            draw.given(draw.choice((0, 1, 5, 100))),
            draw.given(draw.choice((1.0, 0.5, 0.0))),
            draw.given(draw.choice((-float("inf"), -2.0, 0.0))),
            draw.given(draw.choice((1.0, 0.5))),
            draw.given(draw.choice((1.0, 1.3))),
            draw.given(0.0),
            draw.given(0.5),
            draw.array((biased,), "i8", width),
            draw.floats(biased),
            draw.given(draw.below(1 << 16)),
            draw.given(0),
        )
        sampler.see(draw.array((draw.below(9),), "i8", width))
        samplers.append(draw.given(sampler))
    logits = draw.floats(held, width)
    chosen = draw.array((rows,), "i8", held)
    masks = [draw.array((width,), "?") if draw.below(3) == 0 else None for _ in samplers]
    given, isa = draw.given(samplers), draw.given(context.isa)
    _native.sample_rows(given, logits, chosen, masks, draw.array((rows,), "i8", width), draw.floats(rows), isa)
    most = draw.size(5)
    _native.score_rows(
        logits,
        chosen,
        draw.floats(rows),
        draw.array((rows,), "f8"),
        draw.array((rows, most), "i8", width),
        draw.floats(rows, most),
        isa,
    )
    _native.keyed_uniform(draw.given(1), draw.given(2), draw.given(3))


CALLS: dict[str, Callable[[Draw, Any, Path], Any]] = {
    "planes": planes,
    "levels": levels,
    "rounding": rounding,
    "descent": descent,
    "nested descent": nested_descent,
    "trellis search": trellis_search,
    "matrix": matrix,
    "mapped": mapped,
    "pages": pages,
    "sizes": sizes,
    "pairs": pairs,
    "program": program,
    "sampling": sampling,
    "program with another matrix": program,
}
