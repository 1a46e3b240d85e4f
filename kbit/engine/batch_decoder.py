"""What the batch engine asks of a model, and how long its texts may be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from kbit.engine.prompt_cache import DecoderSpec
from kbit.graph.batch import Batch
from kbit.graph.cache import Cache
from kbit.graph.pages import PAGE, PagePool
from kbit.host.errors import UsageError

if TYPE_CHECKING:
    from kbit.graph.backend import Array


class BatchDecoder(Protocol):
    """A model that runs batches: `kbit.models.decoder.Decoder` or the like."""

    @property
    def spec(self) -> DecoderSpec:
        """Its sizes."""

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the LoRA adapters that its sequences may have."""

    def run(self, batch: Batch, cache: Cache) -> Array:
        """The logits (L, V) of the tokens that are wanted; the tokens are in the cache afterwards."""


def longest_text(spec: DecoderSpec, pool: PagePool, asked: int | None) -> int:
    """Tokens of a text at most: as many as go through the model in pieces, with keys that stay as they are.

    Args:
        spec: of the model.
        pool: pages for keys and values.
        asked: what was asked for; None: all that model and pool allow.

    Raises:
        UsageError: more than these allow, or less than two.
    """
    model = min(spec.max_positions, spec.longest_in_pieces)
    if spec.begins_anew_beyond is not None:
        model = min(model, spec.begins_anew_beyond)
    room = pool.count * PAGE
    if asked is None:
        return min(model, room)
    if not 2 <= asked <= min(model, room):
        raise UsageError(
            f"a context of {asked} tokens: the model serves texts of 2 to {model}, and the cache holds {room}"
        )
    return asked
