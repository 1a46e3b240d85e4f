"""What the kernels of recurrent layers are told of a layer, and what they ask of their arguments."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from kbit.host.errors import UnsupportedError
from kbit.kernels.triton.product.limits import MOST_KEY_FEATURES


@dataclass(frozen=True)
class RecurrentHeads:
    """A layer's heads.

    Attributes:
        key_heads: G, heads of queries and keys, each of which is that of H / G heads of values, one after another.
        heads: H, heads of values and states.
        key_dim: D_k, at most 256.
        value_dim: D_v.

    Raises:
        UnsupportedError: keys of more features.
    """

    key_heads: int
    heads: int
    key_dim: int
    value_dim: int

    def __post_init__(self) -> None:
        if self.key_dim > MOST_KEY_FEATURES:
            raise UnsupportedError(
                f"the triton backend runs recurrent heads with keys of up to {MOST_KEY_FEATURES} features, not "
                f"{self.key_dim}; use --device cpu"
            )

    @property
    def width(self) -> int:
        """Features of a token's queries, keys and values together."""
        return 2 * self.key_heads * self.key_dim + self.heads * self.value_dim

    @property
    def key_block(self) -> int:
        """A power of two, of at least 16, that holds a key."""
        return max(16, int(triton.next_power_of_2(self.key_dim)))


@dataclass(frozen=True, eq=False)
class Sequences:
    """The sequences of a pass, and the slots of their states. Everything is on the device.

    Attributes:
        bounds: int32 (B + 1,): sequence b has the tokens bounds[b] .. bounds[b + 1].
        before: int32 or int64 (B,), the slot of the state each has; negative for one that begins: zeros.
        after: int32 or int64 (B,), where the next one goes; of sequences with tokens, all different, and the before of
            no other.
        longest: no sequence has more tokens; what grids are made for.
    """

    bounds: torch.Tensor
    before: torch.Tensor
    after: torch.Tensor
    longest: int

    @property
    def count(self) -> int:
        """B."""
        return len(self.before)


def check_sequences(sequences: Sequences) -> None:
    """
    Raises:
        ValueError: shapes that do not belong together.
    """
    count = sequences.count
    if sequences.bounds.shape != (count + 1,) or sequences.after.shape != (count,):
        raise ValueError(
            f"bounds {tuple(sequences.bounds.shape)} and after {tuple(sequences.after.shape)} for {count} sequences"
        )
    for name in ("bounds", "before", "after"):
        if not getattr(sequences, name).is_contiguous():
            raise ValueError(f"{name} must be contiguous")


def check_rows(name: str, x: torch.Tensor, tokens: int, width: int) -> None:
    """
    Raises:
        ValueError: not (tokens, width) with features side by side.
    """
    if x.shape != (tokens, width) or (width > 1 and x.stride(1) != 1):
        raise ValueError(f"{name}: ({tokens}, {width}) with contiguous features wanted, not {tuple(x.shape)}")


def check_states(states: torch.Tensor, shape: tuple[int, ...]) -> None:
    """
    Raises:
        ValueError: not contiguous float32 (slots, *shape).
    """
    if states.dtype != torch.float32 or tuple(states.shape[1:]) != shape or not states.is_contiguous():
        wanted = ", ".join(map(str, shape))
        raise ValueError(
            f"states: contiguous float32 (slots, {wanted}) wanted, not {states.dtype} {tuple(states.shape)}"
        )
