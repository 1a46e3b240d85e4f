"""The batch engine of a loaded model, with pages for its keys and values: what the server and `kbit.load` run on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kbit.engine.batch_engine import BatchEngine
from kbit.engine.batch_speculation import batch_drafter
from kbit.engine.scheduler import BATCH_TOKENS
from kbit.graph.pages import PAGE, pages_for
from kbit.host.errors import UsageError
from kbit.host.memory import available_memory

if TYPE_CHECKING:
    from kbit.engine.loader import LoadedModel

# Tokens of the KV cache, all requests together, where nobody says: for several texts of this length, or one of the
# model's context; and never more than a part of the memory that is free.
_CACHE_TOKENS = 32768
_CACHE_SHARE = 4


def batch_engine(
    loaded: LoadedModel,
    *,
    context: int | None = None,
    cache_bytes: int | None = None,
    seats: int = 64,
    batch_tokens: int = BATCH_TOKENS,
    speculate: str | None = None,
) -> BatchEngine:
    """An engine for a model, its pages reserved.

    Args:
        loaded: the model.
        context: tokens of a prompt and its answer at most; None: what model and cache allow.
        cache_bytes: memory for keys and values; None: for 32768 tokens or one whole context, at most a quarter of what
            is free.
        seats: sequences that are computed at once.
        batch_tokens: most tokens of a pass.
        speculate: who guesses tokens (`kbit.engine.batch_speculation.batch_drafter`); None: nobody.

    Raises:
        UsageError: a context that model or cache does not have; memory that holds no page; who cannot guess.
    """
    decoder = loaded.decoder
    pool = decoder.new_pool(1, 2)
    pool.ensure(_pages(decoder.spec.max_positions, pool.store.page_bytes, cache_bytes))
    drafter = None if speculate is None else batch_drafter(loaded, speculate)
    return BatchEngine(
        decoder, loaded.tokenizer, pool, context=context, seats=seats, batch_tokens=batch_tokens, drafter=drafter
    )


def usual_tokens(context: int) -> int:
    """Tokens of the KV cache of a model of such a context, where nobody says and there is memory."""
    return max(_CACHE_TOKENS, min(context, 4 * _CACHE_TOKENS))


def _pages(context: int, page_bytes: int, cache_bytes: int | None) -> int:
    if cache_bytes is not None:
        pages = cache_bytes // page_bytes
        if pages < 1:
            raise UsageError(
                f"--cache-size {cache_bytes} bytes: {PAGE} tokens of this model take {page_bytes}: give more"
            )
        return pages
    free = available_memory()
    most = pages_for(usual_tokens(context))
    return most if free is None else max(1, min(most, free // _CACHE_SHARE // page_bytes))
