"""An encoder-decoder: two definitions, of which the encoder's leaves what the decoder's attends to.

The encoder's cache has a layer for its own attention, which all of its layers share, as a text goes through at once,
and behind it one for each of the decoder's: the keys and values that its cross attention reads, computed once a text.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kbit.checkpoint.finite import read_array
from kbit.checkpoint.source import CheckpointSource, StoredSource
from kbit.graph.backend import Array, Backend, HoldsPrepared
from kbit.graph.batch import Batch
from kbit.graph.cache import Cache
from kbit.graph.ops import Ops, X
from kbit.host.errors import CheckpointError, UsageError
from kbit.models import blocks
from kbit.models.blocks import Weights
from kbit.models.check import check_tensors
from kbit.models.decoder import DecoderDefinition, DecoderWeights
from kbit.models.families import spec_from_config
from kbit.models.load import load_stack
from kbit.models.sinusoids import sinusoids
from kbit.models.sound import Frames, convolved, numpy_rows
from kbit.models.spec import ModelSpec

Floats = NDArray[np.float32]

# A stored copy of computed sines may have been rounded to bfloat16.
_ROUNDED = 2.0**-8


class EncoderDefinition(DecoderDefinition):
    """The encoder: a `kbit.graph.backend.Definition` without a head.

    Args:
        spec, weights: of the encoder.
        decoder: of the decoder.
        layers: the decoder's, whose cross attention makes keys and values of what the encoder returns.
    """

    def __init__(self, spec: ModelSpec, weights: DecoderWeights, decoder: ModelSpec, layers: Sequence[Weights]) -> None:
        super().__init__(spec, weights)
        self.decoder = decoder
        self.layers = layers

    def body(self, ops: Ops[X], ids: X) -> X:
        """Token ids -> hidden states (..., hidden), after the final norm; keys and values stay in the cache."""
        states = self._of_sound(ops) if self.spec.sound is not None else super().body(ops, ids)
        blocks.store_keys(ops, self.decoder, self.layers, states)
        return states

    def _of_sound(self, ops: Ops[X]) -> X:
        """Frames that `kbit.models.sound.Frames` made -> hidden states."""
        outside = self.weights.final
        x = convolved(ops, self.spec, outside, "sound_second")
        x = ops.add(x, ops.look_up(outside.matrices["positions"], "positions", self.spec.first_position))
        for index, layer in enumerate(self.weights.layers):
            x = blocks.layer(ops, self.spec, layer, index, x)
        return blocks.norm(ops, self.spec, outside, "final_norm", x)


class EncoderDecoder:
    """A model ready to run. `load_encoder_decoder` makes one from a checkpoint.

    Attributes:
        spec: of the decoder, with the encoder's in `encoder`.
        encoder_spec: that.
        backend: who computes.
        encoder, decoder: weights, prepared by that backend.
        logit_bias: (V,), added to logits; None: nothing is.
    """

    def __init__(
        self,
        spec: ModelSpec,
        backend: Backend,
        encoder: DecoderWeights,
        decoder: DecoderWeights,
        logit_bias: Floats | None = None,
    ) -> None:
        assert spec.encoder is not None
        self.spec, self.encoder_spec = spec, spec.encoder
        self.backend = backend
        self.encoder, self.decoder = encoder, decoder
        self.logit_bias = logit_bias
        self._encode = backend.bind(EncoderDefinition(spec.encoder, encoder, spec, decoder.layers))
        self._decode = backend.bind(DecoderDefinition(spec, decoder))
        sound = spec.encoder.sound
        self._frames = None if sound is None else Frames(spec.encoder, sound, encoder.final, backend)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights in memory, a shared embedding counted once."""
        shared = self.encoder.embedding.nbytes if self.encoder.embedding is self.decoder.embedding else 0
        bias = 0 if self.logit_bias is None else self.logit_bias.nbytes
        return self.encoder.nbytes + self.decoder.nbytes - shared + bias

    def encode(self, sources: Sequence[Sequence[int]], room: int) -> Cache:
        """Runs the encoder on some texts.

        Args:
            sources: token ids, what stands around a text included.
            room: tokens that there may be of every text that is then written.

        Returns:
            An empty cache of a row for each, for `run`.

        Raises:
            UsageError: a text without tokens, one that is too long, with padding in it, or an id that does not exist.
        """
        cache, _ = self._encoded(sources, room, [])
        return cache

    def encode_sounds(self, sounds: Sequence[Floats], room: int) -> Cache:
        """Runs the encoder on some sounds.

        Args:
            sounds: float32 (T, bins) each, frames of which each has its features; T is `sound_frames`.
            room: tokens that there may be of every text that is then written.

        Returns:
            An empty cache of a row for each, for `run`.

        Raises:
            UsageError: the model reads texts; a sound of another length, or other features.
        """
        return self._encoded_sounds(sounds, room)[0]

    def sound_states(self, sounds: Sequence[Floats]) -> list[Floats]:
        """The encoder's hidden states: (T / stride, hidden) each. Arguments and errors as for `encode_sounds`."""
        return np.split(numpy_rows(self._encoded_sounds(sounds, 1)[1]), len(sounds))

    @property
    def sound_frames(self) -> int:
        """Frames of a sound that is read; 0 where the model reads texts."""
        sound = self.encoder_spec.sound
        return 0 if sound is None else sound.stride * self.encoder_spec.context_length

    def states(self, sources: Sequence[Sequence[int]]) -> list[Floats]:
        """The encoder's hidden states of every token: (T, hidden) each. Arguments and errors as for `encode`."""
        _, states = self._encoded(sources, 1, None)
        return np.split(numpy_rows(states), np.cumsum([len(source) for source in sources])[:-1])

    def run(self, batch: Batch, cache: Cache) -> Floats:
        """Feeds the decoder the tokens of a batch; logits of those that are wanted.

        Args:
            batch: the new tokens of the cache's rows.
            cache: made by `encode`; rows may have been selected since (`Cache.select`).

        Returns:
            float32 (L, V), on the CPU.

        Raises:
            UsageError: an id that does not exist, more tokens than the model has positions, or a full cache.
        """
        if len(batch):
            self._check_ids(self.spec, int(batch.ids.min()), int(batch.ids.max()))
            self._check_length(self.spec, int(batch.lengths.max()))
        cache.reserve(batch.counts)
        logits = numpy_rows(self._decode.forward(batch, cache))
        return logits if self.logit_bias is None else logits + self.logit_bias

    def _encoded(
        self, sources: Sequence[Sequence[int]], room: int, wanted: Sequence[int] | None
    ) -> tuple[Cache, Array]:
        for source in sources:
            self._check_source(source)
        return self._read(Batch.of(sources, [0] * len(sources), "all" if wanted is None else wanted), room)

    def _encoded_sounds(self, sounds: Sequence[Floats], room: int) -> tuple[Cache, Array]:
        sound = self.encoder_spec.sound
        if sound is None or self._frames is None:
            raise UsageError(f"a {self.spec.family} model reads texts, not sounds: use kbit translate or kbit run")
        for frames in sounds:
            if frames.shape != (self.sound_frames, sound.bins):
                raise UsageError(
                    f"a sound has {frames.shape} frames and features, and this {self.spec.family} model reads "
                    f"{(self.sound_frames, sound.bins)}: cut it into pieces, and fill up the last with silence"
                )
        return self._read(Batch.of_features(self._frames.rows(sounds)), room)

    def _read(self, batch: Batch, room: int) -> tuple[Cache, Array]:
        """The encoder's states of a batch, and an empty cache of a row for each of its sequences."""
        spec, count = self.spec, len(batch.counts)
        texts = self.backend.new_cache(1 + spec.layers, count, spec.kv_heads, spec.head_dim, int(batch.counts.max()))
        texts.reserve(batch.counts)
        states = self._encode.hidden(batch, texts)
        texts = Cache(texts.pool, texts.rows, texts.capacity)  # (read only from here on: beams need no room in it)
        own = self.backend.new_cache(spec.layers, count, spec.kv_heads, spec.head_dim, room)
        return Cache(own.pool, own.rows, room, private=True, encoder=texts), states

    def _check_source(self, source: Sequence[int]) -> None:
        spec = self.encoder_spec
        if spec.sound is not None:
            raise UsageError(f"a {spec.family} model reads sound, and no text: use kbit transcribe")
        if not source:
            raise UsageError("a text has no tokens, so there is nothing to read: give some text")
        self._check_ids(spec, min(source), max(source))
        self._check_length(spec, len(source))
        padding = spec.first_position - 1
        if spec.sinusoids == "fairseq" and padding in source:
            raise UsageError(f"a text holds the padding token (id {padding}), which has no position: remove it")

    @staticmethod
    def _check_ids(spec: ModelSpec, low: int, high: int) -> None:
        if low < 0 or high >= spec.vocab_size:
            bad = low if low < 0 else high
            raise UsageError(f"token id {bad} is outside the model's vocabulary of {spec.vocab_size}")

    @staticmethod
    def _check_length(spec: ModelSpec, length: int) -> None:
        if length > spec.context_length:
            raise UsageError(
                f"a text of {length} tokens is longer than the {spec.context_length} positions that this {spec.family} "
                "model has: shorten it, or split it"
            )


def load_encoder_decoder(source: CheckpointSource, backend: Backend) -> EncoderDecoder:
    """Reads a model. Names and shapes are checked from headers before any data is read.

    Args:
        source: the checkpoint, as `kbit.models.opening.open_model` opens it.
        backend: who will run it, and prepares each weight.

    Raises:
        UnsupportedError: an unknown architecture, or what the backend cannot run.
        CheckpointError: a senseless configuration; a missing, surplus, misshapen or non-finite tensor.
    """
    spec = check_loadable(source, backend)
    encoder_spec = spec.encoder
    assert encoder_spec is not None
    # (An encoder of sound has no embedding, and is given the decoder's.)
    decoder = load_stack(source, spec, backend, None)
    one = encoder_spec.names.embedding == spec.names.embedding
    encoder = load_stack(source, encoder_spec, backend, decoder.embedding if one else None)
    name = spec.names.logit_bias
    bias = _read(source, name).reshape(-1) if name in source.tensors and name is not None else None
    return EncoderDecoder(spec, backend, encoder, decoder, bias)


def check_loadable(source: CheckpointSource, backend: Backend) -> ModelSpec:
    """What the checkpoint holds, once it is known that `load_encoder_decoder` will not refuse it but for a tensor's
    values.

    Raises:
        UnsupportedError, CheckpointError: see load_encoder_decoder.
    """
    spec = spec_from_config(source.config, where=f"config of {source.path}")
    if spec.encoder is None:
        raise UsageError(f"{source.path}: a {spec.family} model has no encoder and decoder: use kbit run")
    read_data = not isinstance(source, HoldsPrepared)  # else compared when prepared
    check_tensors(source, spec, read_data=read_data)
    backend.new_cache(1, 1, spec.kv_heads, spec.head_dim, 1)  # refuses now what it would refuse once all is read
    for stack in (spec.encoder, spec):
        if read_data:
            _check_sinusoids(source, stack)
    return spec


def _check_sinusoids(source: CheckpointSource, spec: ModelSpec) -> None:
    """Refuse a stored table of positions that is not the computed one."""
    name = f"{spec.names.positions}.weight"
    if spec.sinusoids is None or name not in source.tensors:
        return
    stored = _read(source, name)
    computed = sinusoids(spec.position_rows, spec.hidden_size, spec.sinusoids)
    if stored.shape != computed.shape or not np.abs(stored - computed).max() <= _ROUNDED:
        raise CheckpointError(
            f"{source.path}: {name} is not the table of sines that a {spec.family} model of {spec.position_rows} "
            "positions has: remove it, or restore the published checkpoint"
        )


def _read(source: CheckpointSource, name: str) -> Floats:
    if isinstance(source, HoldsPrepared):
        return np.array(source.prepared_vector(name), dtype=np.float32)
    if isinstance(source, StoredSource):
        return np.asarray(read_array(source, name), dtype=np.float32)
    values: Floats = source.read(name).float().numpy()
    return values
