"""Embeddings: texts in, vectors out, as the checkpoint's sentence-transformers files say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from kbit.checkpoint.source import CheckpointSource
from kbit.engine.encoder import Encoder, TokenizedText
from kbit.engine.heads import Floats
from kbit.engine.pooling import VectorHead, normalized, pool
from kbit.graph.backend import Backend
from kbit.host.errors import UsageError
from kbit.text.encoding import EncodedText, TextEncoder
from kbit.text.sentence_config import POOLINGS, read_sentence_config

Long = Literal["truncate", "windows", "refuse"]


@dataclass(frozen=True, eq=False)
class Embeddings:
    """What became of some texts.

    Attributes:
        vectors: float32 (N, D).
        tokens: how many each text has, special ones included, the prompt too.
        cut: indices of texts that were longer than the model takes, and of which only the beginning was read.
        windows: indices of those that were read in windows.
    """

    vectors: Floats
    tokens: tuple[int, ...]
    cut: tuple[int, ...]
    windows: tuple[int, ...]


class Embedder:
    """A model that makes vectors of texts.

    Attributes:
        encoder: the model.
        config: how hidden states become vectors.
        longest: the longest text it takes, in tokens.

    Args:
        source: the checkpoint.
        backend: who computes.
        pooling: of `POOLINGS`, in place of what the checkpoint says.
        normalize: vectors have length 1, in place of what the checkpoint says.
        longest: the longest text to take, in tokens, in place of what the checkpoint says.

    Raises:
        CheckpointError, UnsupportedError: the model cannot be read or run.
        UsageError: no such pooling; a text longer than the model's context.
    """

    def __init__(
        self,
        source: CheckpointSource,
        backend: Backend,
        *,
        pooling: Sequence[str] | None = None,
        normalize: bool | None = None,
        longest: int | None = None,
    ) -> None:
        files, where = source.sidecar_files(), str(source.path)
        config = read_sentence_config(files, where)
        if pooling is not None:
            unknown = [kind for kind in pooling if kind not in POOLINGS]
            if unknown or not pooling:
                raise UsageError(f"pooling {unknown[0] if unknown else 'by nothing'}: use one of {', '.join(POOLINGS)}")
            config = replace(config, pooling=tuple(kind for kind in POOLINGS if kind in pooling))
        if normalize is not None:
            config = replace(config, normalize=normalize)
        self.text = TextEncoder(source)
        self.encoder = Encoder(source, backend, headless=True)
        self.config = config
        context = self.encoder.spec.context_length
        if longest is not None and not 1 <= longest <= context:
            raise UsageError(f"texts of {longest} tokens: this model takes 1 to {context}")
        self.longest = longest or min(config.max_seq_length or context, context)
        self._head = VectorHead.of(config, files, self.encoder.spec.hidden_size * len(config.pooling), where)

    def prompt(self, name: str | None) -> str:
        """What goes before texts: the prompt of this name, or the checkpoint's default, or nothing.

        Raises:
            UsageError: there is none of this name.
        """
        prompts = self.config.prompts
        if name is None:
            return "" if self.config.default_prompt is None else prompts[self.config.default_prompt]
        if name not in prompts:
            known = f"it has {', '.join(prompts)}" if prompts else "it has none"
            raise UsageError(f"this model has no prompt named {name!r}: {known}")
        return prompts[name]

    def embed(self, texts: Sequence[str], prompt: str = "", long: Long = "truncate") -> Embeddings:
        """Vectors of texts.

        Args:
            texts: what to embed.
            prompt: what to put before each.
            long: what becomes of texts of more than `longest` tokens: only their beginning is read, as
                sentence-transformers does it; or they are read in windows, whose pooled vectors are averaged, weighted
                by their tokens; or they are refused.

        Raises:
            UsageError: a text that cannot be encoded, or that is too long and refused.
        """
        pieces: list[EncodedText] = []
        owner: list[int] = []
        tokens, cut, windowed = [], [], []
        skipped = self._prompt_tokens(prompt)
        for index, text in enumerate(texts):
            whole = self.text.encode(self._cleaned(prompt + text))
            tokens.append(len(whole.ids))
            found = [whole]
            if len(whole.ids) > self.longest:
                if long == "refuse":
                    raise UsageError(
                        f"text {index + 1} has {len(whole.ids)} tokens, and this model takes {self.longest}: shorten "
                        "it, or use --long truncate or --long windows"
                    )
                found = self.text.windows(self._cleaned(prompt + text), None, self.longest)
                if long == "truncate":
                    found = found[:1]
                    cut.append(index)
                else:
                    windowed.append(index)
            pieces += found
            owner += [index] * len(found)
        states = self.encoder.hidden([TokenizedText(piece.ids, piece.types) for piece in pieces])
        pooled = np.zeros((len(texts), self.encoder.spec.hidden_size * len(self.config.pooling)))
        weights = np.zeros((len(texts), 1))
        first = [at == 0 or owner[at - 1] != index for at, index in enumerate(owner)]
        for index, part, begins in zip(owner, states, first, strict=True):
            pooled[index] += len(part) * pool(part, self.config.pooling, skipped if begins else 0).astype(np.float64)
            weights[index] += len(part)
        vectors = self._head((pooled / np.maximum(weights, 1)).astype(np.float32))
        return Embeddings(vectors, tuple(tokens), tuple(cut), tuple(windowed))

    def _cleaned(self, text: str) -> str:
        """A text as sentence-transformers gives it to the tokenizer."""
        text = text.strip()
        return text.lower() if self.config.lower_case else text

    def _prompt_tokens(self, prompt: str) -> int:
        """Tokens of a prompt that do not count in pooling: its own, and the special ones before it."""
        if not prompt or self.config.include_prompt:
            return 0
        encoded = self.text.encode(self._cleaned(prompt))
        ends = len(encoded.parts) > 0 and encoded.parts[-1] is None  # what closes a text comes after the text itself
        return len(encoded.ids) - ends


def similarities(one: Floats, other: Floats) -> Floats:
    """Cosines of vectors, row by row: (N, D), (N, D) -> (N,)."""
    products: Floats = (normalized(one) * normalized(other)).sum(axis=-1)
    return products
