"""Which tokens the tokens of a text attend to, layer by layer and head by head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kbit.backends.reference.attention_shares import SharesOps
from kbit.backends.reference.gradients import KeepingBackend
from kbit.checkpoint.source import CheckpointSource
from kbit.host.errors import UnsupportedError, UsageError
from kbit.models.decoder import DecoderDefinition
from kbit.models.families import spec_from_config
from kbit.models.load import load_decoder
from kbit.text.tokenizer import Tokenizer

# Shares of so many numbers are computed at most: all heads of one layer of a long text are a gigabyte.
_MOST_SHARES = 1 << 28


@dataclass(frozen=True, eq=False)
class AttentionMap:
    """What tokens take of each other.

    Attributes:
        tokens: the text of each, as the model reads it.
        layers, heads: which ones the map is the mean of.
        shares: float32 (T, T), row q, column k: the share that token k has in what token q gets. Rows add up to 1; with
            attention sinks (gpt-oss) to less.
    """

    tokens: tuple[str, ...]
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    shares: NDArray[np.float32]


def attention_map(
    source: CheckpointSource, text: str, *, layers: Sequence[int] = (), heads: Sequence[int] = ()
) -> AttentionMap:
    """The shares of a text's tokens, averaged over layers and heads, as the reference backend computes them.

    Args:
        source: the model; a decoder or an encoder.
        text: what it reads.
        layers, heads: whose shares; empty: those of all.

    Raises:
        UsageError: an empty text, one that is too long, or a layer or head that the model has not.
        CheckpointError, UnsupportedError: a model that cannot be read or run.
    """
    spec = spec_from_config(source.config, where=f"config of {source.path}")
    if spec.encoder is not None:
        raise UnsupportedError(
            f"{source.path}: {spec.family} is an encoder-decoder, whose attentions are of two texts; kbit draws those "
            "of decoders and encoders"
        )
    tokenizer = Tokenizer.from_source(source)
    ids = tokenizer.encode(text)
    chosen_layers = _chosen("layer", layers, spec.attention_layers)
    chosen_heads = _chosen("head", heads, range(spec.heads))
    if not ids:
        raise UsageError("the text has no tokens: give some text")
    if len(ids) > spec.context_length:
        raise UsageError(f"the text has {len(ids)} tokens, and this model reads at most {spec.context_length}")
    if len(ids) ** 2 * spec.heads > _MOST_SHARES:
        raise UsageError(f"the text has {len(ids)} tokens, too many for a map of them: give a shorter one")
    definition = DecoderDefinition(spec, load_decoder(source, KeepingBackend()).weights)
    total = torch.zeros(len(ids), len(ids))
    ops = _Averaging(definition, len(ids), chosen_layers, chosen_heads, total)
    with torch.no_grad():
        definition.body(ops, torch.tensor([ids]))
    labels = tuple(tokenizer.decode([token], skip_special_tokens=False) for token in ids)
    return AttentionMap(labels, chosen_layers, chosen_heads, total.numpy())


class _Averaging(SharesOps):
    """Shares that are added up as they come, so that those of one layer are held at once."""

    def __init__(
        self,
        definition: DecoderDefinition,
        tokens: int,
        layers: Sequence[int],
        heads: Sequence[int],
        total: torch.Tensor,
    ) -> None:
        super().__init__(definition, tokens)
        self._layers, self._heads, self._total = set(layers), list(heads), total
        self._coming = iter(definition.spec.attention_layers)

    def keep(self, shares: torch.Tensor) -> None:
        if next(self._coming) in self._layers:
            self._total += shares[self._heads].mean(dim=0) / len(self._layers)


def _chosen(what: str, numbers: Sequence[int], known: Sequence[int]) -> tuple[int, ...]:
    """These, in order; all where none is named."""
    for number in numbers:
        if number not in known:
            whole = len(known) == known[-1] + 1
            named = f"0 to {known[-1]}" if whole else f"{', '.join(map(str, known))}, which attend"
            raise UsageError(f"--{what} {number}: the model has {what}s {named}")
    return tuple(sorted(set(numbers))) or tuple(known)
