"""ReferenceBackend: every operation exactly as kernels/reference.py defines it, on the CPU, in float32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kbit.backends.reference.kv_cache import ReferencePages, reference_pages
from kbit.backends.rotary import RotaryTable
from kbit.backends.split_norm import norm_of_parts
from kbit.formats.quant_tensor import QuantTensor
from kbit.graph.backend import Array, Definition, Group
from kbit.graph.batch import Batch, given_features
from kbit.graph.cache import Cache, check_size, encoder_lengths
from kbit.graph.experts import Experts, Mixture
from kbit.graph.ops import Attention, Place, Vector, Weight, check_source
from kbit.graph.pages import PAGE, PagePool, PerLayer, pages_for
from kbit.graph.states import Recurrence, ShortConvolution, States, StateSpace, StateSpec, StateStore
from kbit.kernels import reference, reference_experts
from kbit.kernels import reference_recurrent as recurrent


@dataclass(frozen=True, eq=False)
class ReferenceWeight(Weight):
    """A float32 matrix, or a quantized one that is dequantized at every use."""

    data: torch.Tensor | QuantTensor

    @property
    def shape(self) -> tuple[int, int]:
        return (self.data.shape[0], self.data.shape[1])

    @property
    def nbytes(self) -> int:
        if isinstance(self.data, QuantTensor):
            return self.data.nbytes
        return self.data.numel() * self.data.element_size()


class RowOps:
    """The operations that take every token by itself, on tensors (..., K).

    Args:
        group: the processes that share the model, if several do.
    """

    def __init__(self, group: Group | None = None) -> None:
        self._group = group

    def embed(self, weight: Weight, ids: torch.Tensor) -> torch.Tensor:
        return reference.embed(_data(weight), ids)

    def look_up(self, weight: Weight, of: Place, first: int = 0) -> torch.Tensor:
        raise _without_tokens()

    def given(self, width: int) -> torch.Tensor:
        raise _without_tokens()

    def linear(
        self,
        weight: Weight,
        x: torch.Tensor,
        bias: Vector | None = None,
    ) -> torch.Tensor:
        return reference.linear(x, _data(weight), None if bias is None else tensor_of(bias))

    def sum_parts(self, x: torch.Tensor, bias: Vector | None = None) -> torch.Tensor:
        out = x if self._group is None else self._group.sum(x)
        return out if bias is None else out + tensor_of(bias)

    def add(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y

    def multiply(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x * y

    def scale(self, x: torch.Tensor, factor: float | Vector) -> torch.Tensor:
        return x * (factor if isinstance(factor, float) else tensor_of(factor))

    def columns(self, x: torch.Tensor, first: int, count: int) -> torch.Tensor:
        return x[..., first : first + count]

    def soft_cap(self, x: torch.Tensor, cap: float) -> torch.Tensor:
        return reference.soft_cap(x, cap)

    def rotate(self, x: torch.Tensor, head_dim: int, angles: tuple[int, int]) -> torch.Tensor:
        raise _without_tokens()

    def fit_heads(self, x: torch.Tensor, heads: int, head_dim: int, shared: torch.Tensor | None = None) -> torch.Tensor:
        return reference.fit_heads(x, heads, head_dim, shared)

    def by_heads(self, weight: Weight, x: torch.Tensor, heads: int, first: int, *, backward: bool) -> torch.Tensor:
        return reference.by_heads(x, dequantized(weight), heads, first, backward)

    def linear_group(
        self, weights: Sequence[Weight], x: torch.Tensor, biases: Sequence[Vector | None]
    ) -> tuple[torch.Tensor, ...]:
        return tuple(self.linear(weight, x, bias) for weight, bias in zip(weights, biases, strict=True))

    def norm(self, x: torch.Tensor, weight: Vector, eps: float, groups: int = 1, parts: bool = False) -> torch.Tensor:
        of = tensor_of(weight)
        if parts and self._group is not None:
            return norm_of_parts(x, of, eps, self._group)
        if groups > 1:
            runs = x.view(*x.shape[:-1], groups, -1)
            return reference.rms_norm(runs, of.view(groups, -1), eps).flatten(-2)
        if len(of) == x.shape[-1]:
            return reference.rms_norm(x, of, eps)
        return reference.rms_norm(x.view(*x.shape[:-1], -1, len(of)), of, eps).flatten(-2)

    def layer_norm(self, x: torch.Tensor, weight: Vector, bias: Vector | None, eps: float) -> torch.Tensor:
        return reference.layer_norm(x, tensor_of(weight), None if bias is None else tensor_of(bias), eps)

    def activate(self, gate: torch.Tensor, up: torch.Tensor | None, kind: str) -> torch.Tensor:
        return reference.activate(gate, up, kind)

    def sigmoid_gate(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(gate) * x

    def experts(self, x: torch.Tensor, logits: torch.Tensor, experts: Experts, mixture: Mixture) -> torch.Tensor:
        routing, clamp = mixture.routing, mixture.clamp
        bias = None if experts.selection_bias is None else tensor_of(experts.selection_bias)
        if self._group is not None:  # one choice for all: sums that differ in a last bit may choose others
            logits = self._group.from_first(logits)
        chosen, weights = reference_experts.route(
            logits.reshape(-1, routing.experts),
            bias,
            routing.chosen,
            routing.score,
            routing.normalise,
            routing.scale,
            routing.groups,
            routing.chosen_groups,
            routing.group_score,
            routing.jitter,
        )
        if experts.scales is not None:
            weights = weights * tensor_of(experts.scales)[chosen]

        def compute(expert: int, rows: torch.Tensor) -> torch.Tensor:
            gate = self.linear(experts.gates[expert], rows, experts.gate_biases[expert])
            single = experts.ups[expert] is experts.gates[expert]  # (one product, and one gradient)
            up = gate if single else self.linear(experts.ups[expert], rows, experts.up_biases[expert])
            if clamp is None:
                inner = reference.activate(gate, up, mixture.activation)
            else:
                inner = reference_experts.clamped_gate(gate, up, clamp.alpha, clamp.limit)
            return self.linear(experts.downs[expert], inner, experts.down_biases[expert])

        return reference_experts.mix(x.reshape(-1, x.shape[-1]), chosen, weights, compute, routing.scales_input).view(
            x.shape
        )

    def logits(self, weight: Weight, x: torch.Tensor, bias: Vector | None = None) -> torch.Tensor:
        out = reference.logits(x, _data(weight))
        out = out if bias is None else out + tensor_of(bias)
        return out if self._group is None else self._group.from_first(out)

    def self_attention(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        attention: Attention,
        key_bias: Vector | None = None,
        sinks: Vector | None = None,
        by_distance: Vector | None = None,
    ) -> torch.Tensor:
        raise _without_tokens()

    def store_keys(self, k: torch.Tensor, v: torch.Tensor, attention: Attention) -> None:
        raise _without_tokens()

    def cross_attention(self, q: torch.Tensor, attention: Attention) -> torch.Tensor:
        raise _without_tokens()

    def recur(
        self,
        x: torch.Tensor,
        decay: torch.Tensor,
        write: torch.Tensor,
        log_rates: Vector,
        recurrence: Recurrence,
    ) -> torch.Tensor:
        raise _without_tokens()

    def scan(
        self, x: torch.Tensor, steps: torch.Tensor, log_rates: Vector, skips: Vector, space: StateSpace
    ) -> torch.Tensor:
        raise _without_tokens()

    def short_convolution(
        self, x: torch.Tensor, weight: Vector, convolution: ShortConvolution, bias: Vector | None = None
    ) -> torch.Tensor:
        raise _without_tokens()


class StepOps(RowOps):
    """All operations, for the tokens of one batch: values are (R, K).

    Args:
        batch: the tokens.
        cos: float32 (R, F/2), rotary cosines of each token, F rotated features of a head.
        sin: likewise.
        cache: where keys and values go; the caller has reserved room.
        group: see RowOps.
    """

    def __init__(
        self, batch: Batch, cos: torch.Tensor, sin: torch.Tensor, cache: Cache, group: Group | None = None
    ) -> None:
        super().__init__(group)
        self._batch, self._cache = batch, cache
        self._cos, self._sin = cos[None], sin[None]
        self._tables = [row.pages for row in cache.rows]
        self._pages = reference_pages(cache)
        positions = batch.positions.astype(np.int64)
        pages = cache.tables[batch.sequences, positions // PAGE].astype(np.int64)
        self._slots = torch.from_numpy(pages * PAGE + positions % PAGE)
        self._positions = torch.from_numpy(positions)

    def self_attention(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        attention: Attention,
        key_bias: Vector | None = None,
        sinks: Vector | None = None,
        by_distance: Vector | None = None,
    ) -> torch.Tensor:
        check_source(attention, "self")
        q = self._heads(q, attention, turned=True)
        if k is not None and v is not None:
            k, v = self._heads(k, attention, turned=True), self._heads(v, attention, turned=False)
            self._pages.append(attention.layer, self._slots, k[0], None if attention.latent else v[0])
        own = None if sinks is None else tensor_of(sinks)
        return self._attend(q, attention, self._pages, self._tables, self._batch.lengths, own, by_distance)

    def _heads(self, x: torch.Tensor, attention: Attention, *, turned: bool) -> torch.Tensor:
        """(R, H D) -> (1, R, H, D), turned to the tokens' positions where that is for attention to do."""
        x = x.view(1, len(x), -1, attention.head_dim)
        if not turned or attention.positions != "rotary":
            return x
        of = slice(*attention.angles) if attention.angles else slice(None)
        return reference.rope(x, self._cos[..., of], self._sin[..., of])

    def look_up(self, weight: Weight, of: Place, first: int = 0) -> torch.Tensor:
        return reference.embed(_data(weight), first + places(self._batch, of))

    def given(self, width: int) -> torch.Tensor:
        return torch.from_numpy(given_features(self._batch, width))

    def rotate(self, x: torch.Tensor, head_dim: int, angles: tuple[int, int]) -> torch.Tensor:
        return rotated(x[None], head_dim, angles, self._cos, self._sin)[0]

    def store_keys(self, k: torch.Tensor, v: torch.Tensor, attention: Attention) -> None:
        check_source(attention, "encoder")
        k, v = (x.view(len(x), -1, attention.head_dim) for x in (k, v))
        self._pages.append(attention.layer, self._slots, k, v)

    def cross_attention(self, q: torch.Tensor, attention: Attention) -> torch.Tensor:
        check_source(attention, "encoder")
        encoder, lengths = encoder_lengths(self._cache, self._batch.counts)
        tables = [row.pages for row in encoder.rows]
        return self._attend(
            q.view(1, len(q), -1, attention.head_dim), attention, reference_pages(encoder), tables, lengths
        )

    def recur(
        self,
        x: torch.Tensor,
        decay: torch.Tensor,
        write: torch.Tensor,
        log_rates: Vector,
        recurrence: Recurrence,
    ) -> torch.Tensor:
        q, k, v = taken_apart(x, recurrence)
        rates, out = tensor_of(log_rates), torch.empty_like(v)
        for rows, before, after in self._state(recurrence.state):
            out[rows], after[...] = recurrent.gated_delta(
                q[rows], k[rows], v[rows], decay[rows], write[rows], rates, before
            )
        return out.flatten(-2)

    def scan(
        self, x: torch.Tensor, steps: torch.Tensor, log_rates: Vector, skips: Vector, space: StateSpace
    ) -> torch.Tensor:
        v, k, q = of_space(x, space)
        rates, past, out = tensor_of(log_rates), tensor_of(skips), torch.empty_like(v)
        for rows, before, after in self._state(space.state):
            out[rows], after[...] = recurrent.state_space(v[rows], k[rows], q[rows], steps[rows], rates, past, before)
        return out.flatten(-2)

    def short_convolution(
        self, x: torch.Tensor, weight: Vector, convolution: ShortConvolution, bias: Vector | None = None
    ) -> torch.Tensor:
        taps, out = tensor_of(weight).view(convolution.width, -1), torch.empty_like(x)
        for rows, before, after in self._state(convolution.state):
            out[rows], after[...] = recurrent.short_convolution(x[rows], taps, before)
        return out if bias is None else out + tensor_of(bias)

    def _state(self, index: int) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """The rows of each sequence, one of its states before them, and where that after them goes."""
        states = States.of(self._cache, StateStore)
        array = torch.from_numpy(states.store.arrays[index])
        for sequence, (before, after) in enumerate(zip(states.before.tolist(), states.after.tolist(), strict=True)):
            rows = slice(int(self._batch.bounds[sequence]), int(self._batch.bounds[sequence + 1]))
            if rows.start < rows.stop:
                yield rows, torch.zeros_like(array[0]) if before < 0 else array[before], array[after]

    def _attend(
        self,
        q: torch.Tensor,
        attention: Attention,
        pages: ReferencePages,
        tables: Sequence[Sequence[int]],
        lengths: NDArray[np.int64],
        sinks: torch.Tensor | None = None,
        by_distance: Vector | None = None,
    ) -> torch.Tensor:
        """Queries (1, R, H, D) of the batch to what their sequences have in some pages -> (R, H D).

        Args:
            tables: the pages of each sequence.
            lengths: int64 (B,), tokens there.
            sinks: see `kernels.reference.attend`.
        """
        batch, seen = self._batch, torch.empty_like(q)
        added = None if by_distance is None else tensor_of(by_distance).view(attention.heads, -1)
        prefixes = batch.prefixes if attention.mask == "prefix" else np.zeros_like(batch.prefixes)
        for index, (length, prefix) in enumerate(zip(lengths.tolist(), prefixes.tolist(), strict=True)):
            rows = slice(int(batch.bounds[index]), int(batch.bounds[index + 1]))
            if rows.start == rows.stop:
                continue
            keys, values = pages.read(attention.layer, tables[index], length)
            seen[:, rows] = reference.attend(
                q[:, rows],
                keys[None],
                values[None],
                self._positions[None, rows],
                torch.tensor([length]),
                attention.scale,
                attention.window,
                attention.mask in ("causal", "prefix"),
                prefix,
                attention.soft_cap,
                sinks,
                added,
                attention.chunked,
            )
        return seen[0].flatten(-2)


class ReferenceRunner:
    """Runs a definition by calling it (a `kbit.graph.backend.Runner`)."""

    def __init__(self, definition: Definition, group: Group | None = None) -> None:
        self._definition = definition
        self._rotary = RotaryTable(definition)
        self._group = group

    @torch.no_grad()
    def hidden(self, batch: Batch, cache: Cache) -> torch.Tensor:
        (cos, sin), angles = self._rotary.of_batch(batch)
        ops = StepOps(batch, torch.from_numpy(cos[angles]), torch.from_numpy(sin[angles]), cache, self._group)
        x = self._definition.body(ops, torch.from_numpy(batch.ids))
        cache.advance(batch.counts)
        return x[torch.from_numpy(batch.wanted)]

    @torch.no_grad()
    def logits(self, hidden: Array) -> torch.Tensor:
        return self._definition.head(RowOps(self._group), torch.as_tensor(hidden))

    def forward(self, batch: Batch, cache: Cache) -> torch.Tensor:
        return self.logits(self.hidden(batch, cache))

    def extend(self, ids: Sequence[int], cache: Cache, last_only: bool) -> NDArray[np.float32]:
        batch = Batch.of([ids], cache.lengths, "last" if last_only else "all")
        rows: NDArray[np.float32] = self.forward(batch, cache).numpy()
        return rows


class ReferenceBackend:
    """Runs any model anywhere torch runs; the yardstick for every other backend.

    Args:
        expand: dequantize quantized weights once, when they are prepared: fast, but 4 bytes a weight. False keeps them
            packed and dequantizes at every use: lean, and slow, since every token pays for it.
        group: the processes that share a model, if several do (`kbit.graph.backend.SplitBackend`).
        keeps_latents: caches keep latent vectors, as other backends' do. False: the keys and values of every head,
            which is what latent attention means.
    """

    name = "reference"

    def __init__(self, *, expand: bool = True, group: Group | None = None, keeps_latents: bool = False) -> None:
        self.expand = expand
        self.group = group
        self.keeps_latents = keeps_latents
        self.device = torch.device("cpu")

    def describe(self) -> str:
        held = "expanded" if self.expand else "kept packed"
        shared = "" if self.group is None else f", {self.group.size} processes"
        return f"reference: torch on CPU, {torch.get_num_threads()} threads, fp32, quantized weights {held}{shared}"

    def split(self, group: Group) -> ReferenceBackend:
        return ReferenceBackend(expand=self.expand, group=group, keeps_latents=self.keeps_latents)

    def prepare(self, weight: torch.Tensor | QuantTensor, *, lookup: bool = False) -> ReferenceWeight:
        if isinstance(weight, QuantTensor):
            return ReferenceWeight(weight.dequantize() if self.expand else weight)
        return ReferenceWeight(weight.to(self.device, torch.float32).contiguous())

    def prepare_vector(self, vector: torch.Tensor) -> torch.Tensor:
        return vector.to(self.device, torch.float32).contiguous()

    def new_pool(
        self, layers: int, kv_heads: PerLayer, head_dim: PerLayer, pages: int, *, latent: bool = False
    ) -> PagePool:
        return PagePool(ReferencePages(layers, kv_heads, head_dim, pages, latent=latent))

    def new_states(self, specs: Sequence[StateSpec], slots: int) -> PagePool:
        return PagePool(StateStore(specs, slots))

    def new_cache(
        self, layers: int, batch: int, kv_heads: PerLayer, head_dim: PerLayer, capacity: int, *, latent: bool = False
    ) -> Cache:
        check_size(batch, capacity)
        pool = self.new_pool(layers, kv_heads, head_dim, batch * pages_for(capacity), latent=latent)
        return Cache.alone(pool, batch, capacity)

    def bind(self, definition: Definition) -> ReferenceRunner:
        return ReferenceRunner(definition, self.group)


def places(batch: Batch, of: Place) -> torch.Tensor:
    """int64 (R,): positions or types of a batch's tokens."""
    if of == "positions":
        return torch.from_numpy(batch.positions.astype(np.int64))
    return torch.zeros(len(batch), dtype=torch.int64) if batch.types is None else torch.from_numpy(batch.types)


def of_space(x: torch.Tensor, space: StateSpace) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `Ops.scan` takes, as (..., H, D_v) values and (..., G, D_k) keys and queries."""
    keys = space.groups * space.key_dim
    v, k, q = torch.split(x, [space.heads * space.value_dim, keys, keys], dim=-1)
    k, q = (part.reshape(*x.shape[:-1], space.groups, space.key_dim) for part in (k, q))
    return v.reshape(*x.shape[:-1], space.heads, space.value_dim), k, q


def taken_apart(x: torch.Tensor, recurrence: Recurrence) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `Ops.recur` takes, as (..., G, D_k) queries and keys and (..., H, D_v) values."""
    keys = recurrence.key_heads * recurrence.key_dim
    q, k, v = torch.split(x, [keys, keys, recurrence.heads * recurrence.value_dim], dim=-1)
    q, k = (part.reshape(*x.shape[:-1], recurrence.key_heads, recurrence.key_dim) for part in (q, k))
    return q, k, v.reshape(*x.shape[:-1], recurrence.heads, recurrence.value_dim)


def rotated(
    x: torch.Tensor, head_dim: int, angles: tuple[int, int], cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """`Ops.rotate` of x (B, T, H D) by tables (1 or B, T, columns)."""
    of = slice(*angles)
    return reference.rope(x.view(*x.shape[:-1], -1, head_dim), cos[..., of], sin[..., of]).flatten(-2)


def _without_tokens() -> TypeError:
    return TypeError("what depends on tokens needs a step and a cache: this is a pass without tokens (a head)")


def _data(weight: Weight) -> torch.Tensor | QuantTensor:
    if not isinstance(weight, ReferenceWeight):
        raise TypeError(f"{type(weight).__name__} was prepared by another backend")
    return weight.data


def dequantized(weight: Weight) -> torch.Tensor:
    """A matrix that this backend prepared, as floats."""
    data = _data(weight)
    return data.dequantize() if isinstance(data, QuantTensor) else data


def tensor_of(vector: Vector) -> torch.Tensor:
    """A vector that this backend prepared."""
    if not isinstance(vector, torch.Tensor):
        raise TypeError(f"{type(vector).__name__} was prepared by another backend")
    return vector
