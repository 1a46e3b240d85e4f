"""TritonRunner: runs a recorded model on the Triton kernels, one launch per fused operation.

The residual stream is float32; what is multiplied is half precision (fp16 or bf16). Only real tokens become rows of a
pass, sequence after sequence. The host knows every length, so nothing waits for the device before the logits are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray

from kbit.backends.rotary import RotaryTable
from kbit.backends.triton.graph import DecodeGraph
from kbit.backends.triton.kv_cache import DeviceTables, TritonPages, slots, triton_pages
from kbit.backends.triton.weight import merge, round_activations, triton_vector, triton_weight
from kbit.graph.batch import Batch
from kbit.graph.cache import Cache
from kbit.graph.fuse import fuse
from kbit.graph.ops import Array, Definition, Group, Vector, refuse_attention
from kbit.graph.recording import (
    Activate,
    Add,
    Attend,
    Embed,
    Norm,
    Operation,
    Project,
    Recorder,
    SumParts,
    Symbol,
    reads,
)
from kbit.kernels.triton.attention.decode import attention_decode
from kbit.kernels.triton.attention.kv_append import kv_append
from kbit.kernels.triton.attention.prefill import attention_prefill_paged
from kbit.kernels.triton.codecs.layout import TritonWeight
from kbit.kernels.triton.product.limits import DECODE_TOKENS
from kbit.kernels.triton.product.matmul import gated_matmul, matmul
from kbit.kernels.triton.rows.activate import activate
from kbit.kernels.triton.rows.embed import embed
from kbit.kernels.triton.rows.norm import layer_norm, rms_norm
from kbit.kernels.triton.target import active

# Tokens that go through the model at once: bounds the memory of activations, and fills any GPU.
PASS_ROWS = 2048


@dataclass(frozen=True, eq=False)
class Pass:
    """The tokens of one pass, N in all, and where they stand. Everything is on the device.

    Attributes:
        pages: where keys and values go.
        block_table: int32 (B, pages of a row), the pages of each row.
        slots: int64 (N,), places in the pages.
        cos, sin: float32 (rows, R/2), rotary tables.
        angles: int64 (N,), row of the tables for each token.
        positions: int64 (B, T) where every row has the same T <= DECODE_TOKENS new tokens, else None.
        bounds: int32 (B + 1,): row b's tokens are bounds[b] .. bounds[b + 1]. Not used with positions.
        lengths: int32 (B,), tokens of each row, the new ones included.
        longest: most new tokens of a row.
        reach: a bound on lengths.
    """

    pages: TritonPages
    block_table: torch.Tensor
    slots: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    angles: torch.Tensor
    positions: torch.Tensor | None
    bounds: torch.Tensor | None
    lengths: torch.Tensor
    longest: int
    reach: int


class Replay:
    """A recorded function of one symbol as launches.

    Args:
        operations: fused (`kbit.graph.fuse.fuse`).
        input: the symbol it is called with.
        result: the symbol it returns.
        dtype: of what is multiplied.
        group: processes over which parts of sums are added up.
        activations: what products with many tokens round these to, "int8" or "fp8"; "" for not at all.

    Raises:
        UnsupportedError: a weight's format cannot be multiplied with such activations.
    """

    def __init__(
        self,
        operations: Sequence[Operation],
        input: Symbol,
        result: Symbol,
        dtype: torch.dtype,
        group: Group | None = None,
        activations: str = "",
    ) -> None:
        self._operations = list(operations)
        self._input, self._result, self._dtype, self._group = input, result, dtype, group
        last = {symbol: index for index, operation in enumerate(operations) for symbol in reads(operation)}
        last[result] = len(operations)
        # Symbols that nobody reads after an operation: their memory is free for the next one.
        self._dead = [[symbol for symbol, index in last.items() if index == i] for i in range(len(operations))]
        # What is added or normalised stays in float32, as does what comes out.
        self._exact = {result}
        for operation in operations:
            if isinstance(operation, Add | SumParts | Norm):
                self._exact.update(reads(operation))
            elif isinstance(operation, Attend):
                refuse_attention(
                    operation.attention, "triton", mask=("causal",), source=("self",), positions=("rotary",)
                )
        self._merged: dict[Operation, TritonWeight] = {}
        if activations:
            projects = [operation for operation in operations if isinstance(operation, Project)]
            round_activations([weight for project in projects for weight in project.weights], activations)
        for operation in operations:
            if isinstance(operation, Project) and operation.activation is None and len(operation.weights) > 1:
                merged = merge(operation.weights) if all(bias is None for bias in operation.biases) else None
                if merged is not None:
                    self._merged[operation] = merged

    def __call__(self, x: torch.Tensor, step: Pass | None) -> torch.Tensor:
        """x: token ids (N,), or hidden states (N, hidden) float32 -> (N, width) float32."""
        values = {self._input: x}
        for operation, dead in zip(self._operations, self._dead, strict=True):
            self._run(operation, values, step)
            for symbol in dead:
                del values[symbol]
        return values[self._result]

    def _run(self, operation: Operation, values: dict[Symbol, torch.Tensor], step: Pass | None) -> None:
        if isinstance(operation, Embed):
            ids = values[self._input]
            values[operation.out] = embed(triton_weight(operation.weight), ids, dtype=torch.float32)
        elif isinstance(operation, Norm):
            dtype = torch.float32 if operation.out in self._exact else self._dtype
            values[operation.out] = _normalised(values[operation.x], operation, dtype)
        elif isinstance(operation, Add):
            values[operation.out] = values[operation.x].float() + values[operation.y]
        elif isinstance(operation, SumParts):
            values[operation.out] = self._sum(values[operation.x].float(), operation.bias)
        elif isinstance(operation, Activate):
            up = None if operation.up is None else values[operation.up]
            values[operation.out] = activate(values[operation.gate], up, operation.kind, out_dtype=self._dtype)
        elif isinstance(operation, Attend):
            assert step is not None
            values[operation.out] = self._attend(operation, values, step)
        else:
            self._project(operation, values)

    def _project(self, operation: Project, values: dict[Symbol, torch.Tensor]) -> None:
        x = values[operation.x]
        if operation.norm is not None:
            x = _normalised(x, operation.norm, self._dtype)
        elif x.dtype != self._dtype:
            x = x.to(self._dtype)
        outs = operation.outs
        biases = tuple(None if bias is None else triton_vector(bias) for bias in operation.biases)
        if operation in self._merged:
            product = matmul(x, self._merged[operation])
            values.update(zip(outs, torch.split(product, [out.width for out in outs], dim=1), strict=True))
            return
        weights = [triton_weight(weight) for weight in operation.weights]
        if operation.activation is not None:
            if len(weights) == 2 and all(bias is None for bias in biases):
                values[outs[0]] = gated_matmul(x, weights[0], weights[1], operation.activation)
                return
            products = [matmul(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
            values[outs[0]] = activate(products[0], products[1] if len(products) > 1 else None, operation.activation)
            return
        residual = None if operation.residual is None else values[operation.residual]
        if operation.parts and self._group is not None:
            # In float32, as one process sums: half precision would halve what travels and round every part.
            total = self._sum(matmul(x, weights[0], out_dtype=torch.float32), operation.biases[0])
            values[outs[0]] = total if residual is None else total.add_(residual)
            return
        for weight, bias, out in zip(weights, biases, outs, strict=True):
            exact = residual is not None or out in self._exact
            values[out] = matmul(x, weight, bias, residual, out_dtype=torch.float32 if exact else None)

    def _sum(self, part: torch.Tensor, bias: Vector | None) -> torch.Tensor:
        """The sum of every process's part (N, K) float32, plus a bias; `part` may be overwritten."""
        total = part if self._group is None else self._group.sum(part)
        return total if bias is None else total + triton_vector(bias)

    def _attend(self, operation: Attend, values: dict[Symbol, torch.Tensor], step: Pass) -> torch.Tensor:
        a, store = operation.attention, step.pages
        q = values[operation.q].view(-1, a.heads, a.head_dim)
        k = values[operation.k].view(-1, a.kv_heads, a.head_dim)
        v = values[operation.v].view(-1, a.kv_heads, a.head_dim)
        pages = (store.keys[a.layer], store.values[a.layer])
        k_kind, v_kind = store.k_kind, store.v_kind
        q = kv_append(
            q, k, v, step.cos, step.sin, step.slots, *pages, rope_rows=step.angles, k_kind=k_kind, v_kind=v_kind
        )
        if step.positions is not None:
            batch, tokens = step.positions.shape
            q = q.view(batch, tokens, a.heads, a.head_dim)
            out = attention_decode(
                q, *pages, step.block_table, step.positions, step.lengths, a.scale, window=a.window,
                max_length=step.reach, k_kind=k_kind, v_kind=v_kind,
            )  # fmt: skip
        else:
            assert step.bounds is not None
            out = attention_prefill_paged(
                q, step.bounds, *pages, step.block_table, step.lengths, a.scale, window=a.window,
                max_queries=step.longest, k_kind=k_kind, v_kind=v_kind,
            )  # fmt: skip
        return out.reshape(-1, operation.out.width)


@dataclass(frozen=True, eq=False)
class _Captured:
    """A cache's decoding as a graph, good as long as these are what they were."""

    graph: DecodeGraph
    version: int  # of the pages
    table: torch.Tensor  # the block tables on the device


class TritonRunner:
    """Runs a model (a `kbit.graph.ops.Runner`). Calls from several threads take turns.

    Args:
        definition: the model. Its body and head are called once; only its rotation is asked for again.
        device: where the kernels run.
        dtype: of what is multiplied: float16 or bfloat16.
        graphs: replay the decoding of a token as a CUDA graph; not with a group.
        group: the processes that share the model, if several do.
        activations: what the layers' products with many tokens round these to, "int8" or "fp8"; "" for not at all. The
            head's are never rounded: generating text, it has a row per sequence.

    Raises:
        UnsupportedError: a weight's format cannot be multiplied with such activations.
    """

    def __init__(
        self,
        definition: Definition,
        device: torch.device,
        dtype: torch.dtype,
        *,
        graphs: bool,
        group: Group | None = None,
        activations: str = "",
    ) -> None:
        self._device = device
        self._graphs = graphs
        self._group = group
        self._rotary = RotaryTable(definition)
        self._lock = Lock()
        body = Recorder(Symbol(1))
        hidden = definition.body(body, body.input)
        self._body = Replay(fuse(body.operations, hidden), body.input, hidden, dtype, group, activations)
        head = Recorder(Symbol(hidden.width))
        logits = definition.head(head, head.input)
        self._head = Replay(fuse(head.operations, logits), head.input, logits, dtype)
        self._device_tables: WeakKeyDictionary[Cache, DeviceTables] = WeakKeyDictionary()
        self._captured: WeakKeyDictionary[Cache, _Captured] = WeakKeyDictionary()
        empty = torch.empty((0, 0), dtype=torch.float32, device=device)
        self._angles: tuple[torch.Tensor, torch.Tensor] = (empty, empty)

    @torch.no_grad()
    def hidden(self, batch: Batch, cache: Cache) -> torch.Tensor:
        pages = triton_pages(cache)
        with self._lock, active(self._device):
            parts = []
            for piece in batch.pieces(PASS_ROWS):
                x = self._body(self._upload(piece.ids), self._pass(piece, cache, pages))
                if len(piece.wanted) < len(piece):
                    x = x[self._upload(piece.wanted)]
                parts.append(x)
        cache.advance(batch.counts)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @torch.no_grad()
    def logits(self, hidden: Array) -> torch.Tensor:
        x = torch.as_tensor(hidden).to(self._device)
        with self._lock, active(self._device):
            parts = [self._head(part, None) for part in torch.split(x, PASS_ROWS)]
            out = parts[0] if len(parts) == 1 else torch.cat(parts)  # a copy of 2048 rows may be a gigabyte
            if self._group is not None:
                out = self._group.from_first(out)
        return out

    @torch.no_grad()
    def forward(self, batch: Batch, cache: Cache) -> torch.Tensor:
        # Capturing pays where the same cache comes again and again, not for one made for a single pass.
        decodes = cache.private and bool((batch.counts == 1).all()) and len(batch.wanted) == len(batch)
        if self._graphs and not self._rotary.by_length and decodes:
            with self._lock, active(self._device):
                out = self._graph(batch, cache)
            cache.advance(batch.counts)
            return out
        return self.logits(self.hidden(batch, cache))

    def extend(self, ids: Sequence[int], cache: Cache, last_only: bool) -> NDArray[np.float32]:
        batch = Batch.of([ids], cache.lengths, "last" if last_only else "all")
        rows: NDArray[np.float32] = self.forward(batch, cache).cpu().numpy()
        return rows

    def _tables(self, cache: Cache) -> torch.Tensor:
        """The cache's block tables, on the device."""
        tables = self._device_tables.get(cache)
        if tables is None:
            tables = self._device_tables[cache] = DeviceTables(cache.tables, self._device)
        return tables.update(cache.tables)

    def _graph(self, batch: Batch, cache: Cache) -> torch.Tensor:
        """Logits (B, V) after one token for each row of a cache, by the graph that was captured for it."""
        pages, table = triton_pages(cache), self._tables(cache)
        captured = self._captured.get(cache)
        if captured is None or captured.version != pages.version or captured.table is not table:
            capacity = cache.capacity
            cos, sin = self._table(capacity)

            def run(ids: torch.Tensor, at: torch.Tensor, slots: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
                step = Pass(pages, table, slots, cos, sin, at, at[:, None], None, lengths, 1, capacity)
                return self._head(self._body(ids, step), None)

            first = slots(cache.tables, batch.sequences, np.zeros_like(batch.positions))
            graph = DecodeGraph(run, pages, first, self._device, held=(cos, sin, table))
            captured = self._captured[cache] = _Captured(graph, pages.version, table)
        places = slots(cache.tables, batch.sequences, batch.positions)
        return captured.graph(batch.ids.tolist(), batch.positions.tolist(), places.tolist())

    def _pass(self, batch: Batch, cache: Cache, pages: TritonPages) -> Pass:
        """The tokens of a batch and where they stand."""
        if self._rotary.by_length:
            tables = self._rotary.of_spans(batch.starts, batch.lengths)
            cos, sin = (self._upload(table) for table in tables)
            angles = np.arange(len(batch))
        else:
            (cos, sin), angles = self._table(int(batch.lengths.max())), batch.positions.astype(np.int64)
        longest = int(batch.counts.max())
        uniform = 0 < longest <= DECODE_TOKENS and int(batch.counts.min()) == longest
        positions = batch.positions.astype(np.int64).reshape(len(batch.counts), -1) if uniform else None
        return Pass(
            pages,
            self._tables(cache),
            self._upload(slots(cache.tables, batch.sequences, batch.positions)),
            cos,
            sin,
            self._upload(angles),
            None if positions is None else self._upload(positions),
            None if uniform else self._upload(batch.bounds.astype(np.int32)),
            self._upload(batch.lengths.astype(np.int32)),
            longest,
            int(batch.lengths.max()),
        )

    def _table(self, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The rotary table by position on the device, for positions below `stop` at least."""
        if len(self._angles[0]) < stop:
            cos, sin = self._rotary.by_position(stop)
            self._angles = (self._upload(cos), self._upload(sin))
        return self._angles

    def _upload(self, array: NDArray[np.int64] | NDArray[np.int32] | NDArray[np.float32]) -> torch.Tensor:
        values = torch.from_numpy(np.ascontiguousarray(array))
        if self._device.type == "cpu":
            return values
        return values.pin_memory().to(self._device, non_blocking=True)


def _normalised(x: torch.Tensor, norm: Norm, dtype: torch.dtype) -> torch.Tensor:
    """RMS norm or LayerNorm of x (N, K), in `dtype`."""
    weight = triton_vector(norm.weight)
    if norm.centred:
        bias = None if norm.bias is None else triton_vector(norm.bias)
        return layer_norm(x, weight, bias, norm.eps, out_dtype=dtype)[0]
    return rms_norm(x, weight, norm.eps, out_dtype=dtype)[0]
