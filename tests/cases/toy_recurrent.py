"""A recurrent family that no file of kbit knows: two layers with states of fixed size, then one of attention.

A recurrent layer convolves what it reads over 4 tokens, then applies a gated delta rule: two states each.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from kbit.graph.backend import Backend, Runner
from kbit.graph.batch import Batch
from kbit.graph.cache import Cache
from kbit.graph.ops import Attention, Ops, X
from kbit.graph.pages import PagePool
from kbit.graph.states import Recurrence, ShortConvolution, StateSpec
from kbit.models.rope import rope_tables
from kbit.models.spec import RopeSpec

WIDTH, KEY_HEADS, HEADS, KEY, VALUE, TAPS, VOCABULARY, EPS = 48, 2, 4, 20, 37, 4, 131, 1e-5
QKV = 2 * KEY_HEADS * KEY + HEADS * VALUE
RECURRENT = 2  # layers
ATTENTION = Attention(0, 2, 1, 16, 0.25, None)
ROPE = RopeSpec("default", 16, 10000.0, max_positions=512)
CONVOLUTIONS = [ShortConvolution(2 * layer, TAPS, WIDTH) for layer in range(RECURRENT)]
RECURRENCES = [Recurrence(2 * layer + 1, KEY_HEADS, HEADS, KEY, VALUE) for layer in range(RECURRENT)]
STATES: list[StateSpec] = [one.spec for pair in zip(CONVOLUTIONS, RECURRENCES, strict=True) for one in pair]

Tensors = Mapping[str, torch.Tensor]
Table = tuple[NDArray[np.float32], NDArray[np.float32]]


def toy_tensors(seed: int = 17) -> Tensors:
    """Random weights as `decoder_cases.tame_tensors` makes them, by name."""
    shapes: dict[str, tuple[int, ...]] = {"words": (VOCABULARY, WIDTH), "norm": (WIDTH,), "2.norm": (WIDTH,)}
    for layer in range(RECURRENT):
        shapes |= {f"{layer}.norm": (WIDTH,), f"{layer}.taps": (TAPS * WIDTH,), f"{layer}.o": (WIDTH, HEADS * VALUE)}
        shapes |= {f"{layer}.qkv": (QKV, WIDTH), f"{layer}.rates": (HEADS,)}
        shapes |= {f"{layer}.{name}": (HEADS, WIDTH) for name in ("decay", "write")}
    shapes |= {"2.q": (32, WIDTH), "2.k": (16, WIDTH), "2.v": (16, WIDTH), "2.o": (WIDTH, 32)}
    generator = torch.Generator().manual_seed(seed)
    noise = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: 1.0 + 0.2 * x if "norm" in name else 0.25 * x for name, x in noise.items()}


class ToyRecurrent:
    """A `kbit.graph.backend.Definition`."""

    rotation_depends_on_length = False

    def __init__(self, backend: Backend, tensors: Tensors) -> None:
        self.matrices = {n: backend.prepare(x, lookup=n == "words") for n, x in tensors.items() if x.ndim == 2}
        self.vectors = {n: backend.prepare_vector(x) for n, x in tensors.items() if x.ndim == 1}

    def body(self, ops: Ops[X], ids: X) -> X:
        x = ops.embed(self.matrices["words"], ids)
        for layer in range(RECURRENT):
            seen = ops.norm(x, self.vectors[f"{layer}.norm"], EPS)
            seen = ops.short_convolution(seen, self.vectors[f"{layer}.taps"], CONVOLUTIONS[layer])
            seen = ops.activate(seen, None, "silu")
            names = ("qkv", "decay", "write")
            qkv, decay, write = ops.linear_group([self.matrices[f"{layer}.{n}"] for n in names], seen, [None] * 3)
            seen = ops.recur(qkv, decay, write, self.vectors[f"{layer}.rates"], RECURRENCES[layer])
            x = ops.add(x, ops.linear(self.matrices[f"{layer}.o"], seen))
        seen = ops.norm(x, self.vectors["2.norm"], EPS)
        q, k, v = ops.linear_group([self.matrices[f"2.{n}"] for n in "qkv"], seen, [None] * 3)
        return ops.add(x, ops.linear(self.matrices["2.o"], ops.self_attention(q, k, v, ATTENTION)))

    def head(self, ops: Ops[X], hidden: X) -> X:
        return ops.logits(self.matrices["words"], ops.norm(hidden, self.vectors["norm"], EPS))

    def rotation(self, positions: NDArray[np.int64], lengths: NDArray[np.int64]) -> Table:
        return rope_tables(ROPE, positions, lengths)


class ToyModel:
    """It on one backend."""

    def __init__(self, backend: Backend, tensors: Tensors) -> None:
        self.backend = backend
        self.runner: Runner = backend.bind(ToyRecurrent(backend, tensors))

    def new_pool(self, pages: int, slots: int) -> PagePool:
        pool = self.backend.new_pool(1, ATTENTION.kv_heads, ATTENTION.head_dim, pages)
        pool.states = self.backend.new_states(STATES, slots)
        return pool

    def new_cache(self, batch: int, capacity: int) -> Cache:
        return Cache.alone(self.new_pool(batch * (capacity // 64 + 1), batch), batch, capacity)

    def logits(self, texts: list[list[int]], cache: Cache) -> list[torch.Tensor]:
        """The next tokens of each text: logits (T, VOCABULARY) each."""
        cache.reserve([len(text) for text in texts])
        found = self.runner.forward(Batch.of(texts, cache.lengths, "all"), cache)
        return list(torch.as_tensor(found).split([len(text) for text in texts]))


def plain_logits(tensors: Tensors, text: list[int]) -> torch.Tensor:
    """The same in float64, the whole text at once: (T, VOCABULARY).

    The delta rule as its paper writes it, S <- S (a (I - b k k^T)) + b v k^T, o = S q; the convolution as torch's.
    """
    t = {name: x.double() for name, x in tensors.items()}

    def norm(x: torch.Tensor, at: str) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * t[at]

    def unit(x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)

    x = t["words"][text]
    for layer in range(RECURRENT):
        taps = t[f"{layer}.taps"].view(TAPS, WIDTH).T[:, None]
        seen = torch.nn.functional.conv1d(norm(x, f"{layer}.norm").T, taps, groups=WIDTH, padding=TAPS - 1)
        seen = torch.nn.functional.silu(seen[:, : len(text)].T)
        keys, values = KEY_HEADS * KEY, HEADS * VALUE
        q, k, v = (seen @ t[f"{layer}.qkv"].T).split([keys, keys, values], dim=-1)
        q, k = (unit(y.view(len(text), KEY_HEADS, KEY)).repeat_interleave(HEADS // KEY_HEADS, 1) for y in (q, k))
        q, v = q * KEY**-0.5, v.view(len(text), HEADS, VALUE)
        a, b = (seen @ t[f"{layer}.{n}"].T for n in ("decay", "write"))
        # 1 - sigmoid to a power: another way to write exp(-rate softplus).
        a, b = (1.0 - a.sigmoid()) ** t[f"{layer}.rates"].exp(), b.sigmoid()
        state, out = torch.zeros(HEADS, VALUE, KEY).double(), []
        for i in range(len(text)):
            erased = torch.eye(KEY).double() - b[i, :, None, None] * k[i, :, :, None] * k[i, :, None]
            state = state @ (a[i, :, None, None] * erased) + b[i, :, None, None] * v[i, :, :, None] * k[i, :, None]
            out.append(torch.einsum("hvk,hk->hv", state, q[i]))
        x = x + torch.stack(out).flatten(1) @ t[f"{layer}.o"].T
    seen = norm(x, "2.norm")
    q, k, v = ((seen @ t[f"2.{n}"].T).view(len(text), -1, 16).transpose(0, 1) for n in "qkv")
    cos, sin = (torch.from_numpy(a[0]).double() for a in rope_tables(ROPE, np.arange(len(text))[None], np.array([1])))
    q, k = (torch.cat([y[..., :8] * cos - y[..., 8:] * sin, y[..., 8:] * cos + y[..., :8] * sin], -1) for y in (q, k))
    seen = torch.nn.functional.scaled_dot_product_attention(q, k.expand(2, -1, -1), v.expand(2, -1, -1), is_causal=True)
    x = x + seen.transpose(0, 1).flatten(1) @ t["2.o"].T
    return norm(x, "norm") @ t["words"].T
