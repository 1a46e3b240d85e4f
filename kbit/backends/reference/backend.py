"""ReferenceBackend: every operation exactly as kernels/reference.py defines it, on the CPU, in float32."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from kbit.backends.reference.kv_cache import ReferencePages
from kbit.backends.reference.row_ops import RowOps
from kbit.backends.reference.step_ops import StepOps
from kbit.backends.reference.weight import ReferenceWeight
from kbit.backends.rotary import RotaryTable
from kbit.formats.quant_tensor import QuantTensor
from kbit.graph.backend import Array, Definition, Group
from kbit.graph.batch import Batch
from kbit.graph.cache import Cache, check_size
from kbit.graph.pages import PagePool, PerLayer, pages_for
from kbit.graph.states import StateSpec, StateStore


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
