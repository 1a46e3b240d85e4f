"""A model that reads whole texts: hidden states of their tokens, and what its head makes of them.

Encoders, and decoders whose hidden states are wanted (Qwen3-Embedding). Nothing is kept of a text afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from kbit.checkpoint.source import CheckpointSource
from kbit.engine.heads import Floats, Head
from kbit.engine.passes import passes_of
from kbit.graph.backend import Array, Backend
from kbit.graph.batch import Batch
from kbit.host.errors import UsageError
from kbit.models.decoder import Decoder
from kbit.models.families import spec_from_config
from kbit.models.load import load_decoder
from kbit.models.spec import ModelSpec
from kbit.models.task_heads import HIDDEN


@dataclass(frozen=True, eq=False)
class TokenizedText:
    """What a model reads.

    Attributes:
        ids: token ids.
        types: of which part of a pair each token is; None: there is one part.
    """

    ids: Sequence[int]
    types: Sequence[int] | None = None


class Encoder:
    """A model in memory.

    Attributes:
        spec: what it is.
        head: on its hidden states.
        load_seconds: from checking the checkpoint to the last prepared weight.

    Args:
        source: the checkpoint, as `kbit.models.opening.open_model` opens it.
        backend: who computes.
        headless: only hidden states are wanted, whatever head the checkpoint has.

    Raises:
        CheckpointError, UnsupportedError: the model cannot be read or run.
    """

    def __init__(self, source: CheckpointSource, backend: Backend, *, headless: bool = False) -> None:
        start = perf_counter()
        spec = spec_from_config(source.config, where=f"config of {source.path}")
        if headless or spec.task is None:  # (a decoder's are those after its final norm)
            spec = replace(spec, task=HIDDEN)
        self._decoder: Decoder = load_decoder(source, backend, spec=spec)
        self.spec: ModelSpec = spec
        self.backend = backend
        self.head = Head.of(source, spec)
        self.load_seconds = perf_counter() - start

    @property
    def nbytes(self) -> int:
        """Bytes of the weights in memory."""
        return self._decoder.weights.nbytes + sum(tensor.nbytes for tensor in self.head.tensors.values())

    def hidden(self, texts: Sequence[TokenizedText]) -> list[Floats]:
        """Hidden states of every token of every text: (T, hidden) each.

        Texts of about one length go through the model together, whatever their order.

        Raises:
            UsageError: a text without tokens, one longer than the model's context, an id or type that does not exist,
                or padding in a text.
        """
        for text in texts:
            self._check(text)
        found: list[Floats] = [np.empty((0, self.spec.hidden_size), dtype=np.float32)] * len(texts)
        for group in passes_of([len(text.ids) for text in texts]):
            lengths = [len(texts[index].ids) for index in group]
            states = self._pass([texts[index] for index in group], lengths)
            for index, part in zip(group, np.split(states, np.cumsum(lengths)[:-1]), strict=True):
                found[index] = part
        return found

    def logits(self, hidden: Floats) -> Floats:
        """Logits of the vocabulary where the hidden states (L, hidden) of masked tokens are given: (L, V)."""
        if not self.spec.has_logits:
            raise UsageError(f"this {self.spec.family} model has no head that predicts masked tokens")
        return self.head.with_bias(_numpy(self._decoder.run_head(self.head.inner(hidden))))

    def _pass(self, texts: Sequence[TokenizedText], lengths: Sequence[int]) -> Floats:
        batch = Batch.of([text.ids for text in texts], [0] * len(texts), "all")
        # (With one type there is nothing to tell apart, whatever the tokenizer's template says.)
        if any(text.types is not None for text in texts) and self.spec.types > 1:
            types = [kind for text in texts for kind in (text.types or [0] * len(text.ids))]
            batch = replace(batch, types=np.array(types, dtype=np.int64))
        return _numpy(self._decoder.run_hidden(batch, self._decoder.new_cache(len(texts), max(lengths))))

    def _check(self, text: TokenizedText) -> None:
        spec, count = self.spec, len(text.ids)
        if not count:
            raise UsageError("a text has no tokens, so there is nothing to encode: give some text")
        if count > spec.context_length:
            raise UsageError(
                f"a text has {count} tokens, and a {spec.family} model of this shape reads at most "
                f"{spec.context_length}: shorten it, or read it in windows"
            )
        if spec.first_position and spec.first_position - 1 in text.ids:
            raise UsageError(
                f"a text holds the padding token (id {spec.first_position - 1}), which has no position in a "
                f"{spec.family} model: remove it"
            )
        if text.types is not None and spec.types > 1 and not 0 <= min(text.types) <= max(text.types) < spec.types:
            raise UsageError(f"token types go from 0 to {spec.types - 1} in this model, not to {max(text.types)}")


def _numpy(x: Array) -> Floats:
    if isinstance(x, np.ndarray):
        return x
    values: NDArray[np.float32] = x.float().cpu().numpy()
    return values
