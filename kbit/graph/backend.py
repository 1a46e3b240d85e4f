"""Backend: who runs a model, and what it must be able to do for it.

A model is a `Definition`: it calls operations (`kbit.graph.ops`), which a backend runs or records. Several processes
may share a model (`SplitBackend`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, TypeAlias, TypeVar, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from kbit.formats.quant_tensor import QuantTensor
    from kbit.formats.stored import AnyStored
    from kbit.graph.batch import Batch
    from kbit.graph.cache import Cache
    from kbit.graph.ops import Ops, Vector, Weight
    from kbit.graph.pages import PagePool, PerLayer
    from kbit.graph.states import StateSpec

X = TypeVar("X")

# Rows of features as a runner returns them: on the backend's device, numpy's on the native backend.
Array: TypeAlias = "torch.Tensor | NDArray[np.float32]"


class Definition(Protocol):
    """A model as its backend sees it: what it computes, and how its positions rotate.

    An encoder-decoder is two: the encoder's body stores what the decoder's attends to.
    """

    def body(self, ops: Ops[X], ids: X) -> X:
        """Token ids -> hidden states (..., hidden size), before the final norm."""

    def head(self, ops: Ops[X], hidden: X) -> X:
        """Hidden states -> logits (..., V). An encoder has no head, and returns `hidden` itself."""

    @property
    def rotation_depends_on_length(self) -> bool:
        """Whether `rotation` looks at the lengths, or at positions alone."""

    def rotation(
        self, positions: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Rotary cosines and sines of tokens.

        Args:
            positions: (B, T).
            lengths: (B,), tokens of each row once these are in.

        Returns:
            (B, T, R/2) each, R = rotated features of a head, 0 where nothing rotates.
        """


class Runner(Protocol):
    """A definition bound to a backend: what runs it.

    Arguments have been checked: there are tokens, all in the vocabulary, and the cache has room for them. Every method
    that takes tokens leaves them in the cache. Results are the caller's own.
    """

    def hidden(self, batch: Batch, cache: Cache) -> Array:
        """The body: hidden states (L, hidden size) of the tokens that are wanted."""

    def logits(self, hidden: Array) -> Array:
        """The head: (L, hidden size) -> float32 (L, V)."""

    def forward(self, batch: Batch, cache: Cache) -> Array:
        """Both: float32 (L, V) of the tokens that are wanted."""

    def extend(self, ids: Sequence[int], cache: Cache, last_only: bool) -> NDArray[np.float32]:
        """Both for the T tokens of one sequence, with as little around them as there can be: (T, V), or (1, V)."""


@runtime_checkable
class HoldsPrepared(Protocol):
    """A checkpoint that holds its weights as one backend prepared them before."""

    def prepared_weight(self, name: str) -> Weight:
        """A matrix."""

    def prepared_vector(self, name: str) -> Vector:
        """A norm's weight or a bias."""


@runtime_checkable
class PreparesStored(Protocol):
    """A backend that takes weights as files hold them, without torch."""

    def prepare_stored(self, stored: AnyStored) -> Weight:
        """`Backend.prepare`."""

    def prepare_array(self, vector: NDArray[np.float32]) -> Vector:
        """`Backend.prepare_vector`."""


class SharedWeights(Protocol):
    """What was prepared of a model whose widths share memory, as long as somebody uses it."""

    def weight(self, name: str, format: str, read: Callable[[], torch.Tensor | QuantTensor]) -> Weight:
        """A matrix: one that is there already, or on memory that other widths of it have, else as `Backend.prepare`
        makes it.

        Args:
            name: of the tensor.
            format: what `read` will give, as text (`TensorInfo.stored_as`); of a nested one it says the width.
            read: reads it, if it must be.
        """


@runtime_checkable
class SharesWidths(Protocol):
    """A backend on which the widths of a nested model are one memory, when and in whatever order they are loaded."""

    def shared(self, model: str) -> SharedWeights:
        """What is there of a model.

        Args:
            model: what tells it from all others: the same for all widths of one file.
        """


class Backend(Protocol):
    """What a device must be able to do to run a model."""

    @property
    def name(self) -> str:
        """A short name for reports, for example "reference"."""

    @property
    def keeps_latents(self) -> bool:
        """Whether its caches keep latent vectors in place of the keys and values made of them, where a model's sizes
        allow it (`kbit.models.latent.compressed`)."""

    @property
    def device(self) -> torch.device:
        """Where token ids and lengths live."""

    def describe(self) -> str:
        """One line for people: what computes, in which types, and how weights are held."""

    def prepare(self, weight: torch.Tensor | QuantTensor, *, lookup: bool = False) -> Weight:
        """Take over a matrix (N, K), rearranging it once if that helps. The argument may be kept: do not change it.

        Args:
            weight: float, or quantized.
            lookup: its rows will also be looked up with `embed` (an embedding, perhaps tied to the head).

        Raises:
            UnsupportedError: a format this backend does not run.
        """

    def prepare_vector(self, vector: torch.Tensor) -> Vector:
        """A norm's weight or a bias (N,), in this backend's type and on its device."""

    def new_pool(
        self, layers: int, kv_heads: PerLayer, head_dim: PerLayer, pages: int, *, latent: bool = False
    ) -> PagePool:
        """Pages for keys and values, all free. Layers may have different heads.

        Args:
            latent: keys are the values, too, and kept once (`Attention.latent`).

        Raises:
            UnsupportedError: heads, or latents, that this backend's pages cannot hold.
        """

    def new_cache(
        self, layers: int, batch: int, kv_heads: PerLayer, head_dim: PerLayer, capacity: int, *, latent: bool = False
    ) -> Cache:
        """An empty cache with room for `capacity` tokens per row, in a pool of its own."""

    def new_states(self, specs: Sequence[StateSpec], slots: int) -> PagePool:
        """Slots for the states of fixed size of a model, all free.

        Raises:
            UnsupportedError: this backend runs no recurrent layers.
        """

    def bind(self, definition: Definition) -> Runner:
        """What runs a model whose weights this backend prepared."""


class Group(Protocol):
    """The processes that share a model. Each calls the same methods in the same order, or all wait forever."""

    rank: int
    size: int

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of every process's x, in every process. x may be overwritten."""

    def from_first(self, x: torch.Tensor) -> torch.Tensor:
        """The first process's x, in every process. x may be overwritten."""


@runtime_checkable
class SplitBackend(Backend, Protocol):
    """A backend that can run one process's share of a model (`kbit.models.shard`), together with the others.

    Parts of a sum are added up over the group (`Ops.sum_parts`). Its logits are the first process's in all:
    neither gloo nor nccl promises that a sum comes out with the same last bit everywhere, and processes that chose
    different tokens would go separate ways.
    """

    @property
    def group(self) -> Group | None:
        """The processes; None: a whole model in one."""

    def split(self, group: Group) -> Backend:
        """The same backend as one of a group's, on torch's current device."""
