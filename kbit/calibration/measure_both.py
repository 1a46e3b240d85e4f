"""Measuring what goes in to the matrices of an encoder-decoder: it reads texts, and its decoder what it writes of them.

What is written is drawn from the model itself, token by token, from a seed: so are the inputs those of its use. Both
stacks are gone through layer by layer; keys and values of the encoder's text are made anew for every decoder's layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray

from kbit.backends.reference.backend import ReferenceBackend
from kbit.backends.reference.gradients import KeepingBackend
from kbit.calibration.collected import Capture, CapturingOps, Collected
from kbit.calibration.factors import Factors
from kbit.calibration.measure import LayerFactors, Nothing, Passes, Progress
from kbit.calibration.sizes import CHUNK_TOKENS
from kbit.calibration.workers import workers
from kbit.checkpoint.source import CheckpointSource
from kbit.graph.batch import Batch
from kbit.graph.ops import Attention
from kbit.host.errors import CheckpointError, KbitError
from kbit.host.progress import Progress as Told
from kbit.models import blocks
from kbit.models.blocks import Weights
from kbit.models.decoder import DecoderDefinition, DecoderWeights
from kbit.models.encoder_decoder import load_encoder_decoder
from kbit.models.families import spec_from_config
from kbit.models.load import load_ends, load_layer
from kbit.models.params import own_parameters
from kbit.models.sampled_text import CALIBRATION_SEED
from kbit.models.spec import ModelSpec
from kbit.text.added_tokens import read_json
from kbit.text.tokenizer import Tokenizer

# Texts that are written at once.
_ROWS = 16


def written_texts(
    source: CheckpointSource, ids: NDArray[np.int64], *, threads: int | None = None, progress: Told | None = None
) -> list[list[int]]:
    """What a model writes of texts: drawn token by token, at most as long as these, without what ends them.

    Args:
        source: the model.
        ids: what it reads, (S, T).
        threads: of the native backend.
        progress: called as ("writing texts", done, total).

    Raises:
        CheckpointError: there is no token to begin with; a model that cannot be run.
    """
    from kbit.backends.select import select_backend

    model = load_encoder_decoder(source, select_backend("cpu", threads=threads))
    ends, start = Tokenizer.from_source(source).eos_ids, _start(source)
    longest = min(ids.shape[1], model.spec.context_length)
    found: list[list[int]] = []
    for first in range(0, len(ids), _ROWS):
        rows = [row.tolist() for row in ids[first : first + _ROWS]]
        draws = [np.random.default_rng([CALIBRATION_SEED, first + index]) for index in range(len(rows))]
        texts, cache, open_ones = [[start] for _ in rows], model.encode(rows, longest), list(range(len(rows)))
        while open_ones:
            logits = model.run(Batch.of([texts[index][-1:] for index in open_ones], cache.lengths), cache)
            chosen = [_draw(row, draws[index]) for row, index in zip(logits, open_ones, strict=True)]
            still = [at for at, token in enumerate(chosen) if token not in ends]
            for at in still:
                texts[open_ones[at]].append(chosen[at])
            still = [at for at in still if len(texts[open_ones[at]]) < longest]
            if still and len(still) < len(open_ones):
                cache.select(still)
            open_ones = [open_ones[at] for at in still]
        found += texts
        if progress is not None:
            progress("writing texts", len(found), len(ids))
    return found


def measure_both(
    source: CheckpointSource,
    ids: NDArray[np.int64],
    written: Sequence[Sequence[int]],
    *,
    threads: int,
    skip: Callable[[int | None], bool] = lambda layer: False,
    progress: Progress | None = None,
) -> Iterator[LayerFactors]:
    """The second moments of what goes in to every linear matrix (`Factors.weighted` False).

    Args:
        source: the model.
        ids: what it reads, (S, T).
        written: what it writes of each.
        threads: workers; the result does not depend on it.
        skip: layers whose factors are at hand already, the decoder's counted on from the encoder's.
        progress: called after each layer.

    Raises:
        CheckpointError, UnsupportedError: a model that cannot be run.
        KbitError: activations that are NaN or infinite.
    """
    spec = spec_from_config(source.config, where=f"config of {source.path}")
    assert spec.encoder is not None
    count = spec.encoder.layers
    with workers(threads) as pool:
        passes = Passes(source, spec.encoder, ids, 0.0, 0, pool, None)
        for done, factors in enumerate(passes.forward_only(skip), 1):
            yield factors
            if progress is not None:
                progress(done, spec.stacked_layers)
        ends = load_ends(source, spec.encoder, KeepingBackend())
        with torch.no_grad():
            ops = CapturingOps(passes.definition, ids.shape[1])
            states = blocks.norm(ops, spec.encoder, ends.final, "final_norm", passes.made.float())
        for index, found in _of_decoder(source, spec, states, written, pool, lambda layer: skip(count + layer)):
            if found is not None:
                yield LayerFactors(count + index, found)
            if progress is not None:
                progress(count + index + 1, spec.stacked_layers)


class _CrossingOps(CapturingOps):
    """The operations of one decoder's layer, which attend to the keys and values of one text."""

    def store_keys(self, k: torch.Tensor, v: torch.Tensor, attention: Attention) -> None:
        self._text = k, v

    def cross_attention(self, q: torch.Tensor, attention: Attention) -> torch.Tensor:
        q, k, v = (x.view(*x.shape[:2], -1, attention.head_dim).transpose(1, 2) for x in (q, *self._text))
        groups = attention.heads // attention.kv_heads
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=attention.scale)
        return out.transpose(1, 2).flatten(-2)


def _of_decoder(
    source: CheckpointSource,
    spec: ModelSpec,
    states: torch.Tensor,
    written: Sequence[Sequence[int]],
    pool: ThreadPoolExecutor,
    skip: Callable[[int], bool],
) -> Iterator[tuple[int, dict[str, Factors] | None]]:
    """Every layer's factors, or None where they are at hand."""
    ends, backend = load_ends(source, spec, KeepingBackend()), ReferenceBackend()
    definition = DecoderDefinition(spec, DecoderWeights(Nothing(), (), Weights(), Nothing()))
    named = {(p.layer, p.slot): p.name for p in own_parameters(spec) if p.role == "linear"}
    by_distance, total = ends.final.biases.get("distances"), sum(map(len, written))
    with torch.no_grad():
        xs = [
            blocks.embedding(
                CapturingOps(definition, len(text)), spec, ends.embedding, ends.final, torch.tensor([list(text)])
            )
            for text in written
        ]
    for layer in range(spec.layers):
        weights = load_layer(source, spec, backend, layer)
        names = {id(matrix): named[layer, slot] for slot, matrix in weights.matrices.items() if (layer, slot) in named}
        collected = None if skip(layer) else Collected()

        def run(index: int, layer: int = layer, weights: Weights = weights, names: dict[int, str] = names) -> Capture:
            capture = Capture(names)
            ops = _CrossingOps(definition, len(written[index]), capture)
            with torch.no_grad():
                blocks.store_keys(ops, spec, [weights], states[index : index + 1])
                xs[index] = blocks.layer(ops, spec, weights, layer, xs[index], by_distance)
            return capture

        for chunk in _chunks([len(text) for text in written]):
            captures = list(pool.map(run, chunk))
            if collected is not None:
                collected.add(captures, pool)
        if not all(bool(torch.isfinite(x).all()) for x in xs):
            raise KbitError(
                f"{source.path}: activations of the decoder's layer {layer} are not finite: the weights are broken"
            )
        yield layer, None if collected is None else collected.factors(total, source)


def _chunks(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Texts whose activations are held at once."""
    chunk: list[int] = []
    for index, _ in enumerate(lengths):
        if chunk and sum(lengths[at] for at in chunk) + lengths[index] > CHUNK_TOKENS:
            yield chunk
            chunk = []
        chunk.append(index)
    if chunk:
        yield chunk


def _draw(logits: NDArray[np.float32], draws: np.random.Generator) -> int:
    """A token, by its probability."""
    shares = np.cumsum(np.exp((logits - logits.max()).astype(np.float64)))
    return min(int(np.searchsorted(shares, draws.random() * shares[-1], side="right")), len(shares) - 1)


def _start(source: CheckpointSource) -> int:
    """The token that every text begins with."""
    generation = read_json(source.sidecar_files(), "generation_config.json", str(source.path))
    for config in (generation, source.config):
        for key in ("decoder_start_token_id", "bos_token_id"):
            if type(config.get(key)) is int:
                return int(config[key])
    raise CheckpointError(
        f"{source.path}: decoder_start_token_id is missing, so there is no token to begin a text with"
    )
