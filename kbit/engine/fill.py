"""Masked words: what a model that was trained on them puts in their place."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kbit.checkpoint.source import CheckpointSource
from kbit.engine.encoder import Encoder, TokenizedText
from kbit.engine.heads import softmax
from kbit.graph.backend import Backend
from kbit.host.errors import UnsupportedError, UsageError
from kbit.text.encoding import TextEncoder


@dataclass(frozen=True)
class Filling:
    """A token for a masked place: its id, its text as the vocabulary has it, and its probability."""

    token_id: int
    token: str
    probability: float


class MaskFiller:
    """A model with a head that predicts masked tokens.

    Attributes:
        encoder: the model.
        mask: how a masked token is written.

    Args:
        source: the checkpoint.
        backend: who computes.

    Raises:
        UnsupportedError: the model has no such head, or its tokenizer no mask.
        CheckpointError: the model cannot be read.
    """

    def __init__(self, source: CheckpointSource, backend: Backend) -> None:
        require_head(source, ("mask",), "predicts masked words", "ForMaskedLM")
        self.text = TextEncoder(source)
        mask = self.text.tokenizer.special_tokens.get("mask_token")
        found = None if mask is None else self.text.tokenizer.token_id(mask)
        if mask is None or found is None:
            raise UnsupportedError(f"{source.path}: the tokenizer files name no mask_token, so nothing can be masked")
        self.mask, self._mask_id = mask, found
        self.encoder = Encoder(source, backend)

    def fill(self, text: str, top: int = 5) -> list[list[Filling]]:
        """The most probable tokens for every masked place, in order.

        Args:
            text: with the mask written out.
            top: how many tokens for each.

        Raises:
            UsageError: nothing is masked; the text is too long.
        """
        encoded = self.text.encode(text)
        places = [at for at, token in enumerate(encoded.ids) if token == self._mask_id]
        if not places:
            raise UsageError(f"nothing is masked in the text: write {self.mask} where the model should put a word")
        states = self.encoder.hidden([TokenizedText(encoded.ids, encoded.types)])[0]
        probabilities = softmax(self.encoder.logits(states[places]))
        found = []
        for row in probabilities:
            best = np.argsort(-row, kind="stable")[:top]
            found.append([Filling(int(i), self.text.tokenizer.decode([int(i)]).strip(), float(row[i])) for i in best])
        return found


def require_head(source: CheckpointSource, kinds: tuple[str, ...], what: str, architecture: str) -> None:
    """Raise where a checkpoint has none of the heads that are needed, before anything is read.

    Raises:
        UnsupportedError: it has not.
    """
    from kbit.models.families import spec_from_config

    spec = spec_from_config(source.config, where=f"config of {source.path}")
    if spec.task is None or spec.task.kind not in kinds:
        named = source.config.get("architectures")
        raise UnsupportedError(
            f"{source.path}: architectures is {named}, which has no head that {what}: use a model whose architecture "
            f"ends in {architecture}"
        )
