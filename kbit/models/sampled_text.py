"""Text that a model writes by itself: sequences of tokens drawn from its own distribution, from nothing.

It needs no data and is, by definition, what the model is meant for: statistics for quantizing are taken on it, and a
quantized model is compared with its original on it (never on the same text: the two use different seeds).

Plain sampling, at temperature 1 and without cuts. Every sequence has random numbers of its own, so it is the same
whatever is sampled beside it; with kernels whose results do not depend on batch or threads, as the native ones', a seed
means the same tokens on any number of cores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from kbit.graph.batch import Batch
from kbit.graph.cache import Cache
from kbit.graph.pages import pages_for
from kbit.host.errors import KbitError, UsageError
from kbit.models.decoder import Decoder
from kbit.text.tokenizer import Tokenizer

# Seeds of the two uses of sampled text. Text that a model was calibrated on says nothing about how good it is.
CALIBRATION_SEED = 1
EVALUATION_SEED = 2
# Raised whenever the same model and seed give other tokens.
VERSION = 1

# Sequences that are sampled side by side: a step reads every weight once whatever their number, so many; and few
# enough for their keys and values.
_BATCH = 64
_CACHE_BYTES = 512 << 20
# Tokens whose probabilities are added up together, see _draw.
_BLOCK = 256
# Names under which vocabularies keep the token between two documents, where that is not BOS.
_SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "<|begin_of_text|>")


def start_tokens(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Tokens that a text of the model may begin with; the sequences take turns among them.

    BOS, and the token between documents where that is another: a chat model's BOS may begin conversations only, and
    what it learned before that comes after the other. Without either, what ends a text: the next one follows it. None
    where the tokenizer has none of these.
    """
    named = [tokenizer.bos_id, *(tokenizer.token_id(token) for token in _SEPARATORS)]
    found = dict.fromkeys(token for token in named if token is not None)
    return tuple(found) or tuple(sorted(tokenizer.eos_ids))


def sample_sequences(
    model: Decoder,
    starts: Sequence[int],
    *,
    count: int,
    length: int,
    seed: int,
    first: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> NDArray[np.int64]:
    """Sequences from a model's own distribution.

    Sequence i begins with starts[i % len(starts)], or any token of the vocabulary where there are none, and depends on
    the model, the seed and i alone; a shorter length gives its beginning. What follows the token that ends a text is
    sampled as well: another text.

    Args:
        model: causal, on any backend.
        starts: tokens to begin with (`start_tokens`).
        count: sequences to return.
        length: tokens of each, the first included; at least 1.
        seed: not negative.
        first: index of the first sequence: to go on where another call ended.
        on_progress: called as (tokens done, tokens in all) after every step.

    Returns:
        int64 (count, length).

    Raises:
        UsageError: a length beyond the model's context, no sequences, or a model that writes no text.
        KbitError: the model's logits are not finite.
    """
    longest = model.spec.longest_in_pieces
    if model.spec.mask == "bidirectional":
        raise UsageError(f"a {model.spec.family} model writes no text: give a text")
    if count < 1 or not 1 <= length <= longest or seed < 0 or first < 0:
        raise UsageError(f"cannot sample {count} sequences of {length} tokens from a model of {longest}, seed {seed}")
    ids = np.empty((count, length), dtype=np.int64)
    indices = range(first, first + count)
    uniform = np.stack([np.random.default_rng((seed, index)).random(length) for index in indices])
    ids[:, 0] = uniform[:, 0] * model.spec.vocab_size
    if starts:
        ids[:, 0] = [starts[index % len(starts)] for index in indices]
    done, step = 0, _side_by_side(model, length)
    for begin in range(0, count, step):
        part = slice(begin, begin + step)
        rows = len(ids[part])
        cache = model.new_cache(rows, length)
        for position in range(length - 1):
            batch = Batch.packed(ids[part, position], np.ones(rows, np.int64), np.full(rows, position))
            ids[part, position + 1] = _draw(_on_cpu(model, batch, cache), uniform[part, position + 1])
            done += rows
            if on_progress is not None:
                on_progress(done, count * (length - 1))
    return ids


def _side_by_side(model: Decoder, length: int) -> int:
    """Sequences whose keys and values there is room for."""
    pool = model.new_pool(1)
    nbytes = pages_for(length) * pool.store.page_bytes + (0 if pool.states is None else pool.states.nbytes)
    return max(1, min(_BATCH, _CACHE_BYTES // max(1, nbytes)))


def _on_cpu(model: Decoder, batch: Batch, cache: Cache) -> NDArray[np.float32]:
    """Logits (B, V) of a step."""
    logits = model.run(batch, cache)
    if isinstance(logits, np.ndarray):
        return logits
    found: NDArray[np.float32] = logits.cpu().numpy()
    return found


def _draw(logits: NDArray[np.float32], uniform: NDArray[np.float64]) -> NDArray[np.int64]:
    """A token for each row, distributed as softmax of its logits.

    Inverse transform sampling in two levels: which block of tokens, then which token of it. Sums are in float64.

    Args:
        logits: (B, V), overwritten.
        uniform: (B,), in [0, 1).

    Returns:
        int64 (B,).

    Raises:
        KbitError: a row whose largest logit is not finite.
    """
    largest = logits.max(axis=1, keepdims=True)
    if not np.isfinite(largest).all():
        raise KbitError("the model produced logits that are not finite: `kbit info MODEL` checks the file")
    weights = np.exp(np.subtract(logits, largest, out=logits), out=logits)
    sums = np.add.reduceat(weights, np.arange(0, weights.shape[1], _BLOCK), axis=1, dtype=np.float64)
    tokens = np.empty(len(weights), dtype=np.int64)
    for row, (values, running, share) in enumerate(zip(weights, sums.cumsum(axis=1), uniform, strict=True)):
        target = share * running[-1]  # below running[-1], as share < 1
        block = int(running.searchsorted(target, side="right"))
        inside = values[block * _BLOCK : (block + 1) * _BLOCK].cumsum(dtype=np.float64)
        index = int(inside.searchsorted(target - (running[block - 1] if block else 0.0), side="right"))
        if index == inside.size:  # added up in another order, the block just misses the target
            index = int(values[block * _BLOCK : (block + 1) * _BLOCK].nonzero()[0][-1])
        tokens[row] = block * _BLOCK + index
    return tokens
