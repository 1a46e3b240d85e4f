"""The reference operations against torch.nn.functional and against themselves in float64; the cache; the backend."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kbit.backends.reference.backend import ReferenceBackend, RowOps, StepOps
from kbit.backends.reference.kv_cache import reference_pages
from kbit.backends.select import select_backend
from kbit.formats.blockwise import quantize_blockwise
from kbit.formats.quant_format import QuantFormat
from kbit.graph.batch import Batch
from kbit.graph.cache import Cache
from kbit.graph.ops import Attention
from kbit.graph.pages import PAGE
from kbit.host.errors import UnsupportedError, UsageError
from kbit.kernels import reference

EPS = 2.0**-24  # unit roundoff of float32


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1000 * len(shape)))


def assert_within(ours: torch.Tensor, exact: torch.Tensor, bound: torch.Tensor | float) -> None:
    assert ours.dtype == torch.float32
    assert ours.shape == exact.shape
    assert bool(((ours.double() - exact.double()).abs() <= bound).all())


# ---- linear, embed, logits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lead", "k", "n"), [*itertools.product([(), (1,), (3, 5), (2, 0)], [1, 17, 96], [1, 33])])
def test_linear(lead: tuple[int, ...], k: int, n: int) -> None:
    x, weight, bias = randn(*lead, k), randn(n, k, seed=1), randn(n, seed=2)
    exact = x.double() @ weight.double().T
    # A float32 dot product of n terms is off by at most n eps sum |x||w|, in any order (Higham, section 3.1).
    bound = (k + 1) * EPS * (x.abs().double() @ weight.abs().double().T + bias.abs())
    assert_within(reference.linear(x, weight), exact, bound)
    assert_within(reference.linear(x, weight, bias), exact + bias, bound)
    assert_within(reference.logits(x, weight), exact, bound)
    half = reference.linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16())
    assert_within(
        half, F.linear(x.bfloat16().double(), weight.bfloat16().double(), bias.bfloat16().double()), bound * 1.1
    )


@pytest.mark.parametrize("text", ["nf4-b16", "int3-b32-asym", "int5-row", "nf4-b64-dq"])
def test_quantized_linear_and_embed(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = quantize_blockwise(randn(37, 70), QuantFormat.parse(text))
    dense = weight.dequantize()
    x, bias = randn(2, 3, 70), randn(37)
    expected = reference.linear(x, dense, bias)
    assert torch.equal(reference.linear(x, weight, bias), expected)
    ids = torch.tensor([[0, 36, 5], [5, 5, 1]])
    assert torch.equal(reference.embed(weight, ids), dense[ids])
    # In pieces of 4 rows (the last one shorter): the same weights, perhaps summed in another order.
    monkeypatch.setattr(reference, "SCRATCH_BYTES", 4 * 4 * 70)
    bound = 2 * 71 * EPS * (x.abs() @ dense.abs().T + bias.abs())
    assert_within(reference.linear(x, weight, bias), expected, bound)
    assert torch.equal(reference.embed(dense.half(), ids), dense.half()[ids].float())


# ---- norm, rotation, activation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1e-10, 1e15, 0.0])
@pytest.mark.parametrize("shape", [(1,), (7,), (2, 3, 48), (1, 1, 577)])
def test_rms_norm(shape: tuple[int, ...], scale: float) -> None:
    x, weight = randn(*shape) * scale, randn(shape[-1], seed=1)
    exact = F.rms_norm(x.double(), shape[-1:], weight.double(), 1e-6)
    # The mean square is off by K eps relatively, its root by half of that, and three products follow.
    assert_within(reference.rms_norm(x, weight, 1e-6), exact, (shape[-1] / 2 + 5) * EPS * exact.abs())


@pytest.mark.parametrize(("dim", "rotated"), [(2, 2), (10, 10), (64, 64), (10, 4)])
def test_rope_is_a_rotation_in_the_plane(dim: int, rotated: int) -> None:
    x, angles = randn(2, 3, 5, dim), randn(2, 3, rotated // 2, seed=1) * 3
    turned = reference.rope(x, angles.cos(), angles.sin())
    half = rotated // 2
    plane = torch.complex(x[..., :half].double(), x[..., half:rotated].double())
    plane = plane * torch.polar(torch.ones_like(angles.double()), angles.double())[:, :, None]
    exact = torch.cat([plane.real, plane.imag, x[..., rotated:].double()], dim=-1)
    assert_within(turned, exact, 4 * EPS * (x.abs().max() + 1) * 2)
    assert torch.equal(turned[..., rotated:], x[..., rotated:])
    assert torch.equal(reference.rope(x, torch.ones(2, 3, half), torch.zeros(2, 3, half)), x)


def test_rope_scores_depend_on_distance_only() -> None:
    q, k = randn(1, 1, 1, 16), randn(1, 1, 1, 16, seed=1)
    frequencies = 100.0 ** (-torch.arange(8) / 8)

    def score(at: int, other: int) -> float:
        a, b = at * frequencies[None, None], other * frequencies[None, None]
        return float((reference.rope(q, a.cos(), a.sin()) * reference.rope(k, b.cos(), b.sin())).sum())

    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-4)
    assert abs(score(9, 4) - score(9, 5)) > 1e-2


@pytest.mark.parametrize("kind", reference.ACTIVATIONS)
def test_activations(kind: str) -> None:
    gate = torch.cat([randn(3, 50) * 4, torch.tensor([[0.0, -0.0, 1e-30, 88.0, -88.0] * 10] * 3)])
    up = randn(6, 50, seed=1)
    x = gate.double()
    exact = {
        "silu": x / (1 + torch.exp(-x)),
        "gelu": x * 0.5 * torch.erfc(-x / math.sqrt(2)),
        "gelu_tanh": 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        "relu": x.clamp(min=0),
        "elu": x.clamp(min=0) + torch.expm1(x.clamp(max=0)),
    }[kind]
    # gelu's factor 1 + erf cancels for negative x, so errors are relative to |x|, not to the result.
    assert_within(reference.activate(gate, None, kind), exact, 8 * EPS * x.abs())
    assert_within(reference.activate(gate, up, kind), exact * up, 9 * EPS * (x * up).abs())
    edge = reference.activate(torch.tensor([1e30, -1e30]), None, kind)
    assert edge.tolist() == pytest.approx([1e30, -1.0 if kind == "elu" else 0.0])


def test_unknown_activation() -> None:
    with pytest.raises(UnsupportedError, match="'mish' is not one of silu"):
        reference.activate(torch.zeros(1), None, "mish")


# ---- attention -----------------------------------------------------------------------------------------------------


def sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    kv_lengths: torch.Tensor,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """The same in float64 through torch.nn.functional.scaled_dot_product_attention with an explicit mask."""
    slots = torch.arange(k.shape[2])
    seen = (slots <= positions[..., None]) & (slots < kv_lengths[:, None, None])  # (B, T, S)
    if window is not None:
        seen &= slots > positions[..., None] - window
    out = F.scaled_dot_product_attention(
        q.double().transpose(1, 2), k.double(), v.double(), attn_mask=seen[:, None], scale=scale, enable_gqa=True
    )
    return torch.where(seen.any(-1)[..., None, None], out.transpose(1, 2), 0.0)


def attention_bound(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> float:
    """Scores are off by D eps |q||k| scale, which moves softmax weights relatively by twice that; then S terms sum."""
    score = (q.shape[-1] + 1) * EPS * float(q.norm(dim=-1).max() * k.norm(dim=-1).max()) * scale
    return (2 * score + (2 * k.shape[2] + 10) * EPS) * float(v.abs().max())


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(1, 1, 1), (6, 2, 8), (5, 5, 7), (4, 1, 16)])
@pytest.mark.parametrize("scratch", [1, 3000, 64 << 20])
def test_attend(
    heads: int, kv_heads: int, dim: int, window: int | None, scratch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ragged rows, padding, leftovers in the cache, odd sizes, any piece size."""
    monkeypatch.setattr(reference, "SCRATCH_BYTES", scratch)
    q, k, v = randn(3, 9, heads, dim), randn(3, kv_heads, 21, dim, seed=1), randn(3, kv_heads, 21, dim, seed=2)
    starts, new = torch.tensor([12, 0, 5]), torch.tensor([9, 4, 0])
    positions, kv_lengths = starts[:, None] + torch.arange(9), starts + new
    exact = sdpa(q, k, v, positions, kv_lengths, dim**-0.5, window)
    for row in range(3):  # what lies beyond a row's length must not matter
        k[row, :, kv_lengths[row] :] = math.nan
        v[row, :, kv_lengths[row] :] = math.inf
    ours = reference.attend(q, k, v, positions, kv_lengths, dim**-0.5, window)
    assert_within(ours, exact, attention_bound(q, k.nan_to_num(0), v.nan_to_num(0, 0, 0), dim**-0.5))


@pytest.mark.parametrize("scratch", [4 * 6 * 16, 4 * 6 * 16 * 5, 64 << 20])
def test_attend_with_equal_rows(scratch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of one length run together, split where the scratch is small; torch's own causal mask as the measure."""
    monkeypatch.setattr(reference, "SCRATCH_BYTES", scratch)
    q, k, v = randn(4, 16, 6, 8), randn(4, 3, 16, 8, seed=1), randn(4, 3, 16, 8, seed=2)
    exact = F.scaled_dot_product_attention(
        q.double().transpose(1, 2), k.double(), v.double(), is_causal=True, enable_gqa=True
    ).transpose(1, 2)
    positions, lengths = torch.arange(16).expand(4, 16), torch.full((4,), 16)
    assert_within(reference.attend(q, k, v, positions, lengths, 8**-0.5), exact, attention_bound(q, k, v, 8**-0.5))


def test_attend_with_capped_scores() -> None:
    """Against the formula: the cap comes after the scale and before the mask."""
    q, k, v = (
        torch.randn(1, *shape, 8, generator=torch.Generator().manual_seed(3)) for shape in ((5, 2), (2, 5), (2, 5))
    )
    found = reference.attend(q, k, v, torch.arange(5)[None], torch.tensor([5]), 0.7, window=3, cap=1.5)
    scores = 1.5 * torch.tanh(0.7 * torch.einsum("bthd,bhsd->bhts", q, k) / 1.5)
    behind = torch.arange(5)[:, None] - torch.arange(5)
    weights = scores.masked_fill((behind < 0) | (behind >= 3), -torch.inf).softmax(-1)
    expected = torch.einsum("bhts,bhsd->bthd", weights, v)
    assert float((found - expected).abs().max()) < 16 * 2**-24 * float(v.abs().max())


@pytest.mark.parametrize("sink", [0.3, -200.0, 200.0])
def test_attend_with_sinks(sink: float) -> None:
    """A score more in every softmax, whose share is lost: far below all others nothing, far above them everything."""
    generator = torch.Generator().manual_seed(8)
    q, k, v = (torch.randn(1, *shape, 4, generator=generator) for shape in ((5, 4), (2, 5), (2, 5)))
    sinks = sink + torch.arange(4.0) * 0.1
    found = reference.attend(q, k, v, torch.arange(5)[None], torch.tensor([5]), 0.7, window=3, sinks=sinks)
    for head in range(4):
        scores = 0.7 * q[0, :, head].double() @ k[0, head // 2].double().T
        behind = torch.arange(5)[:, None] - torch.arange(5)
        scores = scores.masked_fill((behind < 0) | (behind >= 3), -torch.inf)
        beside = torch.cat([scores, sinks[head].double().expand(5, 1)], dim=1)
        wanted = torch.softmax(beside, dim=1)[:, :5] @ v[0, head // 2].double()
        assert torch.allclose(found[0, :, head].double(), wanted, atol=1e-6)
    plain = reference.attend(q, k, v, torch.arange(5)[None], torch.tensor([5]), 0.7, window=3)
    if sink != 0.3:
        assert torch.allclose(found, plain if sink < 0 else torch.zeros(()), atol=1e-6)


def test_soft_cap() -> None:
    x = torch.tensor([-1e30, -3.0, -1e-3, 0.0, 1e-3, 3.0, 1e30])
    assert torch.allclose(reference.soft_cap(x, 2.0).double(), 2.0 * torch.tanh(x.double() / 2.0), rtol=4e-7, atol=0)


def test_attend_extreme_scores() -> None:
    """Scores of +-10^4 overflow a naive exp; the largest wins outright, ties share, and nothing is NaN."""
    q = torch.tensor([[[[100.0]], [[-100.0]]]])  # (1, 2, 1, 1), both queries see all 3 slots
    k = torch.tensor([[[[100.0], [-100.0], [100.0]]]])
    v = torch.tensor([[[[1.0], [2.0], [4.0]]]])
    out = reference.attend(q, k, v, torch.tensor([[2, 3]]), torch.tensor([3]), 1.0)
    assert out.flatten().tolist() == [2.5, 2.0]
    tiny = reference.attend(q * 0, k * 1e-30, v, torch.tensor([[2, 3]]), torch.tensor([3]), 1.0)
    assert tiny.flatten().tolist() == pytest.approx([7 / 3, 7 / 3])


def test_attend_scratch_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No piece holds more scores than the budget allows (one query of one row excepted)."""
    sizes: list[int] = []
    original = reference._softmax_weighted

    def measured(q: torch.Tensor, k: torch.Tensor, *rest: object) -> torch.Tensor:
        sizes.append(4 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2])
        return original(q, k, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(reference, "_softmax_weighted", measured)
    monkeypatch.setattr(reference, "SCRATCH_BYTES", 10_000)
    q, kv = randn(5, 50, 4, 8), randn(5, 2, 50, 8)
    reference.attend(q, kv, kv, torch.arange(50).expand(5, 50), torch.full((5,), 50), 1.0)
    assert len(sizes) > 5
    assert max(sizes) <= 10_000


# ---- the cache -----------------------------------------------------------------------------------------------------


def reference_cache(layers: int, batch: int, kv_heads: int, head_dim: int, capacity: int) -> Cache:
    return ReferenceBackend().new_cache(layers, batch, kv_heads, head_dim, capacity)


def append(cache: Cache, layer: int, counts: list[int], k: torch.Tensor, v: torch.Tensor) -> None:
    """The first counts[b] tokens of each row of k and v (B, T, H_kv, D)."""
    cache.reserve(counts)
    batch = Batch.packed(np.arange(sum(counts)), counts, cache.lengths)
    positions = batch.positions.astype(np.int64)
    slots = cache.tables[batch.sequences, positions // PAGE].astype(np.int64) * PAGE + positions % PAGE
    real = [torch.cat([row[:count] for row, count in zip(x, counts, strict=True)]) for x in (k, v)]
    reference_pages(cache).append(layer, torch.from_numpy(slots), *real)


def contents(cache: Cache, layer: int, row: int, length: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    table = cache.rows[row]
    return reference_pages(cache).read(layer, table.pages, table.length if length is None else length)


def test_cache_append_uniform_and_ragged() -> None:
    cache = reference_cache(layers=2, batch=2, kv_heads=3, head_dim=4, capacity=64)
    assert cache.nbytes == 2 * 2 * 2 * 3 * 64 * 4 * 4
    first_k, first_v = randn(2, 3, 3, 4), randn(2, 3, 3, 4, seed=1)
    for layer in range(2):
        append(cache, layer, [3, 3], first_k + layer, first_v + layer)
    assert cache.lengths.tolist() == [0, 0]  # nothing counts before advance
    cache.advance([3, 3])
    # Row 0 adds 3, row 1 adds 1: what follows must not reach the cache.
    second = randn(2, 3, 3, 4, seed=2)
    append(cache, 1, [3, 1], second, -second)
    cache.advance([3, 1])
    assert cache.lengths.tolist() == [6, 4]
    assert torch.equal(contents(cache, 1, 0)[0], torch.cat([first_k[0] + 1, second[0]]).transpose(0, 1))
    assert torch.equal(contents(cache, 1, 1)[0], torch.cat([first_k[1] + 1, second[1, :1]]).transpose(0, 1))
    assert torch.equal(contents(cache, 1, 0)[1][:, 3:], -second[0].transpose(0, 1))
    assert not contents(cache, 1, 1, 64)[0][:, 4:].any()
    assert torch.equal(contents(cache, 0, 1)[1][:, :3], first_v[1].transpose(0, 1))


def test_cache_reserve() -> None:
    cache = reference_cache(1, 2, 1, 2, capacity=5)
    cache.reserve(torch.tensor([2, 4]))
    cache.advance(torch.tensor([2, 4]))
    cache.reserve(torch.tensor([3, 1]))
    with pytest.raises(UsageError, match="holds 5 tokens per row: row 1 has 4 and 2 more do not fit"):
        cache.reserve(torch.tensor([0, 2]))


def test_cache_grows_and_keeps_its_tokens() -> None:
    cache = reference_cache(2, 2, 3, 4, capacity=5)
    for layer in range(2):
        append(cache, layer, [5, 2], randn(2, 5, 3, 4, seed=layer), randn(2, 5, 3, 4, seed=layer))
    cache.advance(torch.tensor([5, 2]))
    keys = [contents(cache, layer, 0)[0] for layer in range(2)]
    cache.grow(4)
    assert cache.capacity == 5
    cache.grow(90)
    assert cache.lengths.tolist() == [5, 2]
    assert cache.nbytes == 2 * 2 * 2 * 3 * 128 * 4 * 4
    cache.reserve([85, 88])
    with pytest.raises(UsageError, match="holds 90 tokens per row: row 0 has 5 and 86 more"):
        cache.reserve([86, 88])
    for layer in range(2):
        assert torch.equal(contents(cache, layer, 0)[0], keys[layer])
        assert not contents(cache, layer, 0, 90)[0][:, 5:].any()


def test_cache_truncate_and_select() -> None:
    cache = reference_cache(2, 3, 1, 2, capacity=4)
    for layer in range(2):
        append(cache, layer, [4, 1, 3], randn(3, 4, 1, 2, seed=layer), randn(3, 4, 1, 2, seed=layer))
    cache.advance(torch.tensor([4, 1, 3]))
    keys = [[contents(cache, layer, row)[0] for row in range(3)] for layer in range(2)]
    cache.truncate(3)
    assert cache.lengths.tolist() == [3, 1, 3]
    cache.truncate(torch.tensor([9, 0, 2]))
    assert cache.lengths.tolist() == [3, 0, 2]
    cache.select(torch.tensor([2, 0, 2, 2]))
    assert cache.lengths.tolist() == [2, 3, 2, 2]
    assert cache.batch == 4
    for layer in range(2):
        for row, was in enumerate([2, 0, 2, 2]):
            length = int(cache.lengths[row])
            assert torch.equal(contents(cache, layer, row)[0], keys[layer][was][:, :length])
    cache.reserve([2, 1, 2, 2])
    with pytest.raises(UsageError, match="negative length"):
        cache.truncate(-1)
    for rows in ([4], [-1], []):
        with pytest.raises(UsageError, match="4 rows"):
            cache.select(torch.tensor(rows, dtype=torch.int64))


@pytest.mark.parametrize(("batch", "capacity"), [(0, 5), (1, 0), (1, -3)])
def test_cache_needs_room(batch: int, capacity: int) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        reference_cache(1, batch, 1, 1, capacity)


# ---- the backend ---------------------------------------------------------------------------------------------------


def test_step_ops_rotate_append_and_attend() -> None:
    """Two ragged steps equal one explicit computation over the real tokens of each row."""
    cache = ReferenceBackend().new_cache(layers=1, batch=2, kv_heads=1, head_dim=4, capacity=7)
    attention = Attention(layer=0, heads=2, kv_heads=1, head_dim=4, scale=0.5, window=None)
    angles = torch.arange(7)[None, :, None].expand(2, -1, -1) * torch.tensor([1.0, 0.1])
    q, k, v = randn(2, 7, 2, 4), randn(2, 7, 1, 4, seed=1), randn(2, 7, 1, 4, seed=2)
    turned_q, turned_k = (reference.rope(x, angles.cos(), angles.sin()) for x in (q, k))
    taken = torch.tensor([0, 0])
    for lengths in (torch.tensor([4, 2]), torch.tensor([3, 5])):
        cache.reserve(lengths)
        batch = Batch.packed(np.zeros(int(lengths.sum()), dtype=np.int64), lengths.tolist(), cache.lengths)
        rows, where = torch.from_numpy(batch.sequences).long(), torch.from_numpy(batch.positions).long()
        turns = angles[0, where]
        features = (x[rows, where].flatten(-2) for x in (q, k, v))
        packed = StepOps(batch, turns.cos(), turns.sin(), cache).self_attention(*features, attention).view(-1, 2, 4)
        out = [part[None] for part in torch.split(packed, lengths.tolist())]
        cache.advance(lengths)
        taken = taken + lengths
        for row in range(2):
            new = slice(int(taken[row] - lengths[row]), int(taken[row]))
            exact = sdpa(
                turned_q[row : row + 1, new],
                turned_k[row : row + 1].transpose(1, 2),
                v[row : row + 1].transpose(1, 2),
                torch.arange(new.start, new.stop)[None],
                taken[row : row + 1],
                0.5,
                None,
            )
            bound = attention_bound(q, k, v, 0.5)
            assert_within(out[row], exact, bound)
    assert cache.lengths.tolist() == [7, 7]


def test_ops_groups_residuals_and_foreign_weights() -> None:
    backend, ops = ReferenceBackend(), RowOps()
    weights = [backend.prepare(randn(n, 6, seed=n).half()) for n in (3, 5)]
    assert [weight.shape for weight in weights] == [(3, 6), (5, 6)]
    assert [weight.nbytes for weight in weights] == [72, 120]
    x, bias, residual = randn(2, 6), randn(5), randn(2, 5)
    first, second = ops.linear_group(weights, x, [None, bias])
    assert torch.equal(first, ops.linear(weights[0], x))
    assert torch.equal(second, ops.linear(weights[1], x, bias))
    assert torch.equal(ops.add(ops.linear(weights[1], x, bias), residual), residual + second)
    with pytest.raises(TypeError, match="prepared by another backend"):
        ops.linear(torch.zeros(3, 6), x)  # type: ignore[arg-type]


def test_select_backend() -> None:
    for device in ("auto", "cpu"):
        backend = select_backend(device, backend="reference")
        assert backend.name == "reference"
        assert backend.device == torch.device("cpu")
        assert "CPU" in backend.describe()
    assert "packed" in select_backend("cpu", backend="reference", expand=False).describe()
    select_backend("cpu", backend="reference", compute="fp32", kv_bits=32)
    with pytest.raises(UnsupportedError, match=r"--device cuda.*--device cpu"):
        select_backend("cuda")
    for choice, message in (
        ({"device": "tpu"}, r"--device tpu: .*auto, cpu, cuda"),
        ({"backend": "cutlass"}, r"--backend cutlass: .*auto, native, triton, reference"),
        ({"backend": "triton", "device": "cpu"}, r"--backend triton runs on GPUs: use --device cuda"),
        ({"backend": "native", "device": "cuda"}, r"--backend native runs on the CPU"),
        ({"device": "cuda", "compute": "fp32"}, r"--compute fp32: on a GPU use fp16, bf16, int8 or fp8"),
        ({"device": "cuda", "kv_bits": 32}, r"--kv-bits 32: on a GPU use 16, 8, 4, 3 or 2"),
        ({"compute": "fp16"}, r"--compute fp16: this is for GPUs"),
        ({"compute": "fp8"}, r"--compute fp8: this is for GPUs"),
        ({"compute": "int4"}, r"--compute int4: .*int8, fp8, fp16, bf16, fp32"),
        ({"kv_bits": 5}, r"--kv-bits 5: .*2, 3, 4, 8, 16, 32"),
        ({"kv_bits": "four"}, r"--kv-bits four: .*2, 3, 4, 8, 16, 32"),
        ({"kv_bits": "8,4,2"}, r"--kv-bits 8,4,2: .*2, 3, 4, 8, 16, 32"),
        ({"kv_bits": "16,4"}, r"--kv-bits 16,4: two widths, of keys and of values, are each one of 2, 3, 4, 8"),
        ({"threads": 0}, r"--threads 0: expected at least 1"),
        ({"backend": "reference", "compute": "int8"}, r"--compute int8: .*only fp32; use --backend native"),
        ({"backend": "reference", "kv_bits": 4}, r"--kv-bits 4: .*only 32; use --backend native"),
        ({"backend": "reference", "kv_bits": "8,4"}, r"--kv-bits 8,4: .*only 32; use --backend native"),
    ):
        with pytest.raises(UsageError, match=message):
            select_backend(**choice)  # type: ignore[arg-type]


def test_cached_keys_put_the_bias_back() -> None:
    """Keys that are nothing but their bias come out exact, whatever the width; without a bias there are codes alone."""
    angles = torch.rand(1, 7, 16) * 6
    bias = 300 * torch.randn(2, 32)
    k = bias.expand(1, 7, 2, 32)
    for bits in (8, 4, 3, 2):
        assert torch.equal(
            reference.cached_keys(k, angles.cos(), angles.sin(), bits, bias),
            reference.rope(k, angles.cos(), angles.sin()),
        )
        codes = reference.quantize_kv_4 if bits == 4 else lambda x, bits=bits: reference.quantize_kv(x, bits)
        plain = reference.dequantize_kv(*codes(reference.rope(k, angles.cos(), angles.sin())))
        assert torch.equal(reference.cached_keys(k, angles.cos(), angles.sin(), bits), plain)
