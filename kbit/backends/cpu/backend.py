"""NativeBackend: models as recorded programs of C++ kernels, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kbit import _native
from kbit.backends.cpu.kv_cache import new_pool
from kbit.backends.cpu.runner import NativeRunner, record
from kbit.backends.cpu.weight import NativeWeight, prepare, prepare_stored
from kbit.graph.backend import Definition
from kbit.graph.cache import Cache, check_size
from kbit.graph.pages import PagePool, PerLayer, of_layers, pages_for
from kbit.graph.states import StateSpec, StateStore
from kbit.host.errors import UnsupportedError

if TYPE_CHECKING:
    import torch

    from kbit.formats.quant_tensor import QuantTensor
    from kbit.formats.stored import AnyStored


class NativeBackend:
    """Runs models on the native kernels of this machine's best instruction set.

    `compute` says how activations and weights are multiplied:

        int8   activations are rounded to 8 bits, a scale for every 64 (or 32, 16) features: fastest. Weights that are
               not quantized are multiplied in fp32.
        bf16   activations and expanded weights are rounded to bfloat16
        fp32   nothing is rounded: equal to the reference but for the order of sums

    Everything else is in float32, attention over a cache of codes excepted (kernels/cpu/attention/kv_pages.h).

    Args:
        threads: members of the team that computes, at least 1.
        compute: "int8", "bf16" or "fp32".
        kv: what keys and values are stored as: "fp32", "fp16", or bits of codes, "8", "4", "3" or "2"; "8,4" where
            those of keys and values differ.
        isa: an instruction set of `_native.instruction_sets()`; None takes the best, or what the environment variable
            KBIT_CPU_ISA names.

    Raises:
        UnsupportedError: an instruction set this machine does not have, or one that cannot compute like this.
    """

    name = "native"
    keeps_latents = True

    def __init__(self, threads: int, *, compute: str = "int8", kv: str = "fp16", isa: str | None = None) -> None:
        try:
            self._context = _native.Context(isa, threads)
        except ValueError as error:
            raise UnsupportedError(str(error)) from None
        if compute == "bf16" and not self._context.has_bf16:
            raise UnsupportedError(
                f"--compute bf16: the {self._context.isa} kernels have no bfloat16 products; use --compute int8 or fp32"
            )
        self.compute = compute
        self.kv = kv

    @property
    def context(self) -> _native.Context:
        """The kernels, and the threads that run them."""
        return self._context

    @property
    def device(self) -> torch.device:
        """torch's name for the CPU."""
        import torch

        return torch.device("cpu")

    @property
    def isa(self) -> str:
        """The instruction set whose kernels run."""
        return self._context.isa

    @property
    def threads(self) -> int:
        """Members of the team."""
        return self._context.threads

    def describe(self) -> str:
        threads = f"{self.threads} thread{'s' if self.threads != 1 else ''}"
        kv = self.kv if self.kv.startswith("fp") else f"{self.kv}-bit"
        return f"native: {self.isa} kernels, {threads}, {self.compute} compute, {kv} KV cache"

    def prepare(self, weight: torch.Tensor | QuantTensor, *, lookup: bool = False) -> NativeWeight:
        return prepare(weight, self._context)

    def prepare_vector(self, vector: torch.Tensor) -> NDArray[np.float32]:
        array: NDArray[np.float32] = vector.to("cpu").float().contiguous().numpy()
        return array

    def prepare_stored(self, stored: AnyStored) -> NativeWeight:
        """`prepare` without torch: a matrix as files hold it."""
        return prepare_stored(stored, self._context)

    def prepare_array(self, vector: NDArray[np.float32]) -> NDArray[np.float32]:
        """`prepare_vector` without torch."""
        return np.ascontiguousarray(vector, dtype=np.float32)

    def new_pool(
        self, layers: int, kv_heads: PerLayer, head_dim: PerLayer, pages: int, *, latent: bool = False
    ) -> PagePool:
        if latent and "," in self.kv:
            raise UnsupportedError(
                f"--kv-bits {self.kv}: this model's cache keeps the vectors that both keys and values are made of; "
                "give one width"
            )
        uneven = next((dim for dim in of_layers(head_dim, layers) if dim % 16), None)
        if not self.kv.startswith("fp") and uneven:
            raise UnsupportedError(
                f"--kv-bits {self.kv}: this model's heads have {uneven} features, and codes need a multiple of 16; "
                "use --kv-bits 16 or 32"
            )
        return new_pool(layers, kv_heads, head_dim, self.kv, pages, latent=latent)

    def new_states(self, specs: Sequence[StateSpec], slots: int) -> PagePool:
        return PagePool(StateStore(specs, slots))

    def new_cache(
        self, layers: int, batch: int, kv_heads: PerLayer, head_dim: PerLayer, capacity: int, *, latent: bool = False
    ) -> Cache:
        check_size(batch, capacity)
        pool = self.new_pool(layers, kv_heads, head_dim, batch * pages_for(capacity), latent=latent)
        return Cache.alone(pool, batch, capacity)

    def bind(self, definition: Definition) -> NativeRunner:
        return NativeRunner(definition, record(definition, self._context, self.compute))
