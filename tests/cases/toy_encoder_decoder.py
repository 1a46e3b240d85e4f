"""An encoder-decoder that no file of kbit knows, made of the operations that decoders are made of.

The encoder's tokens see each other, through layers that share one layer of its cache; behind that lie the keys and values
of every layer of the decoder, which are computed once. The decoder's see those up to themselves, and all of the
encoder's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kbit.graph.backend import Backend, Runner
from kbit.graph.batch import Batch
from kbit.graph.cache import Cache
from kbit.graph.ops import Attention, Ops, Vector, Weight, X
from kbit.models.rope import rope_tables
from kbit.models.spec import RopeSpec

WIDTH, INNER, HEADS, KV_HEADS, DIM = 48, 77, 6, 2, 16
QUERIES, KEYS = HEADS * DIM, KV_HEADS * DIM
LAYERS, VOCABULARY, EPS = 2, 131, 1e-5
ROPE = RopeSpec("default", DIM, 10000.0, max_positions=512)

Tensors = Mapping[str, torch.Tensor]


def toy_tensors(seed: int = 17) -> Tensors:
    """Random weights as `decoder_cases.tame_tensors` makes them, by name; those of encoder and decoder."""
    shapes: dict[str, tuple[int, ...]] = {
        "words": (VOCABULARY, WIDTH),
        "encoder.norm": (WIDTH,),
        "decoder.norm": (WIDTH,),
    }
    for layer in range(LAYERS):
        for side, blocks in (("encoder", ("self",)), ("decoder", ("self", "cross"))):
            for block in blocks:
                at = f"{side}.{layer}.{block}"
                shapes |= {f"{at}.norm": (WIDTH,), f"{at}.q": (QUERIES, WIDTH), f"{at}.k": (KEYS, WIDTH)}
                shapes |= {f"{at}.v": (KEYS, WIDTH), f"{at}.o": (WIDTH, QUERIES)}
            at = f"{side}.{layer}.mlp"
            shapes |= {f"{at}.norm": (WIDTH,), f"{at}.up": (INNER, WIDTH), f"{at}.down": (WIDTH, INNER)}
    generator = torch.Generator().manual_seed(seed)
    noise = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: 1.0 + 0.2 * x if "norm" in name else 0.25 * x for name, x in noise.items()}


@dataclass(frozen=True, eq=False)
class Side:
    """What the two definitions have in common."""

    matrices: Mapping[str, Weight]
    norms: Mapping[str, Vector]

    rotation_depends_on_length = False

    @classmethod
    def of(cls, backend: Backend, tensors: Tensors) -> Side:
        matrices = {n: backend.prepare(x, lookup=n == "words") for n, x in tensors.items() if x.ndim == 2}
        return cls(matrices, {n: backend.prepare_vector(x) for n, x in tensors.items() if x.ndim == 1})

    def norm(self, ops: Ops[X], x: X, at: str) -> X:
        return ops.layer_norm(x, self.norms[f"{at}.norm"], None, EPS)

    def together(self, ops: Ops[X], x: X, at: str, *names: str) -> tuple[X, ...]:
        return ops.linear_group([self.matrices[f"{at}.{name}"] for name in names], x, [None] * len(names))

    def attend(self, ops: Ops[X], x: X, at: str, attention: Attention) -> X:
        q, k, v = self.together(ops, self.norm(ops, x, at), at, "q", "k", "v")
        return ops.add(x, ops.linear(self.matrices[f"{at}.o"], ops.self_attention(q, k, v, attention)))

    def mlp(self, ops: Ops[X], x: X, at: str) -> X:
        (up,) = self.together(ops, self.norm(ops, x, at), at, "up")
        return ops.add(x, ops.linear(self.matrices[f"{at}.down"], ops.activate(up, None, "gelu")))

    def rotation(
        self, positions: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        return rope_tables(ROPE, positions, lengths)


def cross_attention(layer: int) -> Attention:
    return Attention(1 + layer, HEADS, KV_HEADS, DIM, DIM**-0.5, None, "cross", "encoder", "none")


class ToyEncoder(Side):
    """A `kbit.graph.backend.Definition`; its cache has 1 + LAYERS layers."""

    def body(self, ops: Ops[X], ids: X) -> X:
        x = ops.embed(self.matrices["words"], ids)
        for layer in range(LAYERS):
            described = Attention(0, HEADS, KV_HEADS, DIM, DIM**-0.5, None, "bidirectional")
            x = self.mlp(ops, self.attend(ops, x, f"encoder.{layer}.self", described), f"encoder.{layer}.mlp")
        x = self.norm(ops, x, "encoder")
        for layer in range(LAYERS):
            k, v = self.together(ops, x, f"decoder.{layer}.cross", "k", "v")
            ops.store_keys(k, v, cross_attention(layer))
        return x

    def head(self, ops: Ops[X], hidden: X) -> X:
        return hidden


class ToyDecoder(Side):
    """Likewise; its cache has LAYERS layers and an encoder's."""

    def body(self, ops: Ops[X], ids: X) -> X:
        x = ops.embed(self.matrices["words"], ids)
        for layer in range(LAYERS):
            at = f"decoder.{layer}"
            x = self.attend(ops, x, f"{at}.self", Attention(layer, HEADS, KV_HEADS, DIM, DIM**-0.5, None))
            (q,) = self.together(ops, self.norm(ops, x, f"{at}.cross"), f"{at}.cross", "q")
            seen = ops.cross_attention(q, cross_attention(layer))
            x = self.mlp(ops, ops.add(x, ops.linear(self.matrices[f"{at}.cross.o"], seen)), f"{at}.mlp")
        return x

    def head(self, ops: Ops[X], hidden: X) -> X:
        return ops.logits(self.matrices["words"], self.norm(ops, hidden, "decoder"))


class ToyModel:
    """Both, on one backend."""

    def __init__(self, backend: Backend, tensors: Tensors) -> None:
        self.backend = backend
        self.encoder: Runner = backend.bind(ToyEncoder.of(backend, tensors))
        self.decoder: Runner = backend.bind(ToyDecoder.of(backend, tensors))

    def encode(self, sources: list[list[int]], room: int) -> Cache:
        """Runs the encoder on some texts: an empty cache, with room for `room` tokens, for texts that attend to them."""
        texts = self.backend.new_cache(1 + LAYERS, len(sources), KV_HEADS, DIM, max(map(len, sources)))
        texts.reserve([len(source) for source in sources])
        self.encoder.hidden(Batch.of(sources, [0] * len(sources)), texts)
        mine = self.backend.new_cache(LAYERS, len(sources), KV_HEADS, DIM, room)
        return Cache(mine.pool, mine.rows, room, private=True, encoder=texts)

    def logits(self, texts: list[list[int]], cache: Cache) -> list[torch.Tensor]:
        """The next tokens of each text: logits (T, VOCABULARY) each."""
        cache.reserve([len(text) for text in texts])
        found = self.decoder.forward(Batch.of(texts, cache.lengths, "all"), cache)
        return list(torch.as_tensor(found).cpu().split([len(text) for text in texts]))


def plain_logits(tensors: Tensors, source: list[int], text: list[int]) -> torch.Tensor:
    """The same in plain torch and float64, whole texts at once: (T, VOCABULARY)."""
    t = {name: x.double() for name, x in tensors.items()}

    def norm(x: torch.Tensor, at: str) -> torch.Tensor:
        return torch.nn.functional.layer_norm(x, (WIDTH,), t[f"{at}.norm"], eps=EPS)

    def heads(x: torch.Tensor, count: int, *, turn: bool) -> torch.Tensor:
        x = x.view(len(x), count, DIM).transpose(0, 1)
        if turn:
            cos, sin = (
                torch.from_numpy(a[0]).double()
                for a in rope_tables(ROPE, np.arange(x.shape[1])[None], np.array([x.shape[1]]))
            )
            a, b = x.chunk(2, -1)
            x = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
        return x.repeat_interleave(HEADS // count, 0)

    def attention(x: torch.Tensor, of: torch.Tensor, at: str, *, causal: bool, turn: bool) -> torch.Tensor:
        q = heads(norm(x, at) @ t[f"{at}.q"].T, HEADS, turn=turn)
        k = heads(of @ t[f"{at}.k"].T, KV_HEADS, turn=turn)
        v = heads(of @ t[f"{at}.v"].T, KV_HEADS, turn=False)
        seen = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return x + seen.transpose(0, 1).flatten(1) @ t[f"{at}.o"].T

    def mlp(x: torch.Tensor, at: str) -> torch.Tensor:
        return x + torch.nn.functional.gelu(norm(x, at) @ t[f"{at}.up"].T) @ t[f"{at}.down"].T

    memory, x = t["words"][source], t["words"][text]
    for layer in range(LAYERS):
        at = f"encoder.{layer}"
        memory = attention(memory, norm(memory, f"{at}.self"), f"{at}.self", causal=False, turn=True)
        memory = mlp(memory, f"{at}.mlp")
    memory = norm(memory, "encoder")
    for layer in range(LAYERS):
        at = f"decoder.{layer}"
        x = attention(x, norm(x, f"{at}.self"), f"{at}.self", causal=True, turn=True)
        x = mlp(attention(x, memory, f"{at}.cross", causal=False, turn=False), f"{at}.mlp")
    return norm(x, "decoder") @ t["words"].T
