"""Instruction sets: each one's vector operations equal the plain C++ ones bit for bit, and those equal NumPy's.

The operations are traced by kernels/cpu/simd/trace.h, which also describes the trace's layout and the data it takes.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest

from kbit import _native

Array = npt.NDArray[np.generic]

RECORD_BYTES = 192  # three vectors of 64 bytes: a, b, c
TAGS = {
    **{f"lookup{bits}": bits for bits in range(4, 9)},  # Tag::kLookup4 is 4
    "dot4": 19,
    "fma": 27,
    "round_to_int": 32,
    "reduce_add": 33,
    "load_half": 37,
    "store_half": 38,
    "half_to_float": 43,
    "float_to_half": 44,
    "load_i8": 45,
    "dot4_pairs": 46,
}
LAST_TAG = 55


def trace(isa: str, data: Array) -> bytes:
    """What the instruction set makes of the data: the trace's bytes."""
    raw = np.frombuffer(data.tobytes(), np.uint8).copy()
    return np.asarray(_native.simd_trace(isa, raw)).tobytes()


def sections(traced: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(traced):
        tag, size = struct.unpack_from("=HH", traced, at)
        yield tag, traced[at + 4 : at + 4 + size]
        at += 4 + size


def scalar_results(data: Array) -> dict[int, list[bytes]]:
    results = defaultdict(list)
    for tag, payload in sections(trace("scalar", data)):
        results[tag].append(payload)
    return results


def joined(payloads: list[bytes], dtype: type[np.generic]) -> Array:
    return np.frombuffer(b"".join(payloads), dtype)


def random_data(records: int, seed: int) -> Array:
    return np.random.default_rng(seed).integers(0, 256, RECORD_BYTES * records, dtype=np.uint8)


def random_floats(records: int, seed: int) -> Array:
    """Floats of like magnitude, so that sums and products round instead of vanishing."""
    return np.random.default_rng(seed).normal(size=records * 48).astype(np.float32)


def special_floats() -> Array:
    """Every pair of special values as (a, b), each with every third one in turn."""
    half_edges = [65504.0, 65519.996, 65520.0, 2.0**-14, 2.0**-24, 2.0**-25, 1.5 * 2.0**-25, 2.0**-26, 1 + 2.0**-11]
    edges = [0.0, 1.0, 0.5, 1.5, 2.5, 2.0**-126, 2.0**-149, 3.0e38, np.inf, 8388607.5, 16777217.0, *half_edges]
    values = np.array(edges, np.float32)
    nans = np.array([0x7FC00000, 0xFFC00001, 0x7F800001, 0xFFBFFFFF], np.uint32).view(np.float32)
    # Joined as integers: no load or store of a float may quiet the signalling ones.
    bits = np.concatenate([values.view(np.uint32), (-values).view(np.uint32), nans.view(np.uint32)])
    a, b = (m.ravel() for m in np.meshgrid(bits, bits))
    a, b = (np.resize(v, -(-len(v) // 16) * 16) for v in (a, b))
    return np.stack([v.reshape(-1, 16) for v in (a, b, np.roll(b, 7))], axis=1).ravel()


def special_bytes() -> Array:
    """Every byte in every vector, and vectors of the extreme bytes alone."""
    every = np.arange(256, dtype=np.uint8)
    extremes = np.repeat(np.array([0x00, 0x7F, 0x80, 0x81, 0xFF], np.uint8), 64)
    a = np.concatenate([every, extremes])
    b = np.concatenate([every[::-1], np.roll(extremes, 64)])
    return np.stack([v.reshape(-1, 64) for v in (a, b, np.roll(a, 64))], axis=1).ravel()


def every_half() -> Array:
    return np.resize(np.arange(65536, dtype=np.uint16), -(-65536 // 96) * 96)


DATA = {
    "random": random_data(100, seed=1),
    "normal floats": random_floats(50, seed=2),
    "special floats": special_floats(),
    "special bytes": special_bytes(),
    "every half": every_half(),
}


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("isa", _native.instruction_sets())
def test_every_operation_equals_scalar(isa: str, name: str) -> None:
    expected, actual = trace("scalar", DATA[name]), trace(isa, DATA[name])
    if actual != expected:
        pairs = enumerate(zip(sections(expected), sections(actual), strict=True))
        wrong = {tag: i for i, ((tag, want), (_, got)) in pairs if want != got}
        pytest.fail(f"{isa} differs from scalar in operations (Tag: last section) {wrong}")


def test_trace_holds_every_operation_for_each_record() -> None:
    one, three = (scalar_results(random_data(records, seed=3)) for records in (1, 3))
    assert set(one) == set(range(LAST_TAG + 1))
    assert {tag: 3 * len(payloads) for tag, payloads in one.items()} == {tag: len(p) for tag, p in three.items()}


def test_dot4_is_the_exact_integer_sum() -> None:
    for data in (DATA["random"], DATA["special bytes"]):
        vectors = data.reshape(-1, 3, 64)
        levels, x = (np.where(v == 128, 129, v).view(np.int8).astype(np.int64) for v in (vectors[:, 0], vectors[:, 1]))
        start = np.ascontiguousarray(vectors[:, 2]).view(np.uint32).astype(np.int64) >> 2
        # (records, quads of x, 16): each quad meets the same four bytes of each of the 16 lanes.
        dots = np.einsum("rlj,rqj->rql", levels.reshape(-1, 16, 4), x.reshape(-1, 16, 4)) + start[:, None, :]
        np.testing.assert_array_equal(joined(scalar_results(data)[TAGS["dot4"]], np.int32), dots.ravel())


def test_dot4_of_codes_is_the_exact_integer_sum() -> None:
    for data in (DATA["random"], DATA["special bytes"]):
        a, b, c = np.moveaxis(data.reshape(-1, 3, 64), 1, 0)
        codes, x = (a & 15).astype(np.int64), np.where(b == 128, 129, b).view(np.int8).astype(np.int64)
        start = np.ascontiguousarray(c).view(np.uint32).astype(np.int64) >> 2
        dots = np.einsum("rlj,rqj->rl", codes.reshape(-1, 16, 4), x[:, :32].reshape(-1, 8, 4)) + start
        np.testing.assert_array_equal(joined(scalar_results(data)[TAGS["dot4_pairs"]], np.int32), dots.ravel())


def test_signed_bytes_widen_to_integers() -> None:
    data = DATA["special bytes"]
    expected = data.reshape(-1, 3, 64)[:, 1, :16].view(np.int8).astype(np.int32)
    np.testing.assert_array_equal(joined(scalar_results(data)[TAGS["load_i8"]], np.int32), expected.ravel())


@pytest.mark.parametrize("bits", range(4, 9))
def test_lookup_reads_the_table_at_the_low_bits(bits: int) -> None:
    data = np.concatenate([DATA["random"], DATA["special bytes"]])
    index, b, c = np.moveaxis(data.reshape(-1, 3, 64).astype(np.int64), 1, 0)
    i = np.arange(256)
    entries = ((b[:, i % 64] ^ c[:, i // 4 % 64]) + 37 * i + i // 64) % 256
    expected = np.take_along_axis(entries, index % 2**bits, axis=1)
    np.testing.assert_array_equal(joined(scalar_results(data)[TAGS[f"lookup{bits}"]], np.uint8), expected.ravel())


@pytest.mark.parametrize("operation", ["load_half", "half_to_float"])
def test_every_half_becomes_the_float_it_stands_for(operation: str) -> None:
    halves = every_half().view(np.float16)
    floats = joined(scalar_results(every_half())[TAGS[operation]], np.float32)
    np.testing.assert_array_equal(floats, halves.astype(np.float32))  # NaN equals NaN here
    np.testing.assert_array_equal(np.signbit(floats[floats == 0]), np.signbit(halves[halves == 0]))


@pytest.mark.parametrize("operation", ["store_half", "float_to_half"])
def test_floats_round_to_the_nearest_half(operation: str) -> None:
    steps = np.arange(0, 0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    middles = (steps[:-1] + steps[1:]) / 2  # exact: ties between neighbouring halves
    near = [np.nextafter(middles, np.float32(limit)) for limit in (-np.inf, np.inf)]
    floats = np.concatenate([steps, middles, *near, -middles, special_floats().view(np.float32)])
    floats = np.resize(floats, -(-len(floats) // 48) * 48)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = floats.astype(np.float16)
    actual = joined(scalar_results(floats)[TAGS[operation]], np.uint16).view(np.float16)
    np.testing.assert_array_equal(actual, expected)
    np.testing.assert_array_equal(np.signbit(actual[actual == 0]), np.signbit(expected[expected == 0]))


def test_rounding_is_to_the_nearest_integer_with_ties_to_even() -> None:
    data = np.concatenate([DATA["random"], DATA["special floats"].view(np.uint8)])
    vectors = data.reshape(-1, 3, 64)
    a, b = (np.ascontiguousarray(vectors[:, i]) for i in (0, 1))
    halves = ((b.view(np.uint32) >> 12).astype(np.float64) - 524288) / 2
    limit = np.float32(2147483520)
    floats = a.view(np.float32)
    clipped = np.clip(np.where(np.isnan(floats), -limit, floats), -limit, limit)
    assert {0.0, 0.5, 1.0, 1.5} == set(np.unique(halves % 2))  # ties to both sides among them
    expected = np.stack([np.rint(halves), np.rint(clipped)], axis=1).astype(np.int64)
    np.testing.assert_array_equal(joined(scalar_results(data)[TAGS["round_to_int"]], np.int32), expected.ravel())


def test_fma_rounds_once() -> None:
    """With c = -round(a b), a fused a b + c is the rounding error of the product, which is exact in float64."""
    rng = np.random.default_rng(4)
    a, b = (rng.integers(1, 2**24, (50, 16)).astype(np.float32) for _ in range(2))
    c = -(a * b)
    fused, twice = np.moveaxis(
        joined(scalar_results(np.stack([a, b, c], axis=1))[TAGS["fma"]], np.float32).reshape(-1, 2, 16), 1, 0
    )
    errors = a.astype(np.float64) * b + c
    assert np.count_nonzero(errors) > errors.size // 2
    np.testing.assert_array_equal(fused, errors)
    np.testing.assert_array_equal(twice, np.zeros_like(twice))


def test_sum_of_lanes_folds_halves() -> None:
    a = random_floats(100, seed=5).reshape(-1, 3, 16)[:, 0]
    lanes = a
    while lanes.shape[1] > 1:
        n = lanes.shape[1] // 2
        lanes = lanes[:, :n] + lanes[:, n:]
    sums = joined(scalar_results(random_floats(100, seed=5))[TAGS["reduce_add"]], np.float32).reshape(-1, 16)
    np.testing.assert_array_equal(sums, np.repeat(lanes, 16, axis=1))
    in_order = np.cumsum(a, axis=1, dtype=np.float32)[:, -1]
    assert np.any(in_order != lanes[:, 0])  # so the order is told apart


def test_sets_are_listed_from_scalar_to_the_best() -> None:
    known = ["scalar", "avx2", "avx512vnni", "avx512bf16", "amx", "neon", "i8mm"]
    names = _native.instruction_sets()
    assert names[0] == "scalar"
    assert names == [name for name in known if name in names]


@pytest.mark.parametrize("isa", _native.instruction_sets())
def test_environment_chooses_the_instruction_set(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KBIT_CPU_ISA", isa)
    assert _native.Context().isa == isa


def test_without_a_choice_the_best_set_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KBIT_CPU_ISA", raising=False)
    assert _native.Context().isa == _native.instruction_sets()[-1]


def test_unknown_set_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KBIT_CPU_ISA", "sse9")
    with pytest.raises(ValueError, match=r"KBIT_CPU_ISA=sse9 .* choose one of: scalar.*, or unset it$"):
        _native.Context()
    with pytest.raises(ValueError, match=r"instruction set sse8 .* choose one of: scalar"):
        _native.Context(isa="sse8")
