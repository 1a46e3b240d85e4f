"""From a checkpoint to a Decoder: check that every tensor is there and sane, then prepare them one by one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import torch

from kbit.checkpoint.source import CheckpointSource
from kbit.errors import CheckpointError
from kbit.formats.quant_tensor import QuantTensor
from kbit.models.config_values import shown
from kbit.models.decoder import Decoder, DecoderWeights, Layer, Linear
from kbit.models.families import spec_from_config
from kbit.models.spec import ModelSpec
from kbit.ops.backend import Backend

# Buffers that old checkpoints carry and that are computed here instead.
_HARMLESS = re.compile(r"(^|.*\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$")

# Rows of the head and the embedding compared at once, in bytes of float32.
_COMPARE_BYTES = 32 << 20


def load_decoder(
    source: CheckpointSource, backend: Backend, *, progress: Callable[[int, int], None] | None = None
) -> Decoder:
    """Read a model.

    Names and shapes are checked from headers before any data is read. Tensors are read one at a time, so memory stays
    at the prepared weights plus one tensor.

    Args:
        source: the checkpoint.
        backend: who will run it, and prepares each weight.
        progress: called as (tensors done, tensors in all) after each tensor.

    Raises:
        UnsupportedError: an unknown architecture.
        CheckpointError: a senseless configuration; a missing, surplus, misshapen or non-finite tensor.
    """
    where = str(source.path)
    spec = spec_from_config(source.config, where=f"config of {where}")
    head = f"{spec.names.head}.weight"
    _check_tensors(source, spec, head)
    if spec.tied_embeddings and head in source.tensors:
        _check_tied(source, f"{spec.names.embedding}.weight", head)
    return _Loader(source, spec, backend, progress).decoder()


def _check_tensors(source: CheckpointSource, spec: ModelSpec, head: str) -> None:
    """Raise unless the checkpoint holds exactly what the spec needs."""
    where, expected = str(source.path), spec.expected_tensors()
    missing = [name for name in expected if name not in source.tensors]
    if missing:
        raise CheckpointError(
            f"{where}: {_some(missing)} missing: the checkpoint is incomplete, or its config.json is another model's"
        )
    for name, shape in expected.items():
        found = tuple(source.tensors[name].shape)
        if found != shape:
            raise CheckpointError(f"{where}: {name} has shape {found}, but config.json asks for {shape}")
    surplus = [name for name in source.tensors if name not in expected and not _HARMLESS.match(name)]
    if spec.tied_embeddings and head in surplus:
        surplus.remove(head)
    if surplus:
        raise CheckpointError(
            f"{where}: {_some(surplus)} not part of a {spec.family} model as config.json describes it; leaving them "
            "out would change the model, so correct config.json or the checkpoint"
        )


def _some(names: list[str]) -> str:
    """Up to three names, for a message."""
    listed = ", ".join(name if name.isprintable() and len(name) < 120 else shown(name) for name in names[:3])
    if len(names) == 1:
        return f"1 tensor ({listed}) is"
    return f"{len(names)} tensors ({listed}{', ...' if len(names) > 3 else ''}) are"


def _check_tied(source: CheckpointSource, embedding: str, head: str) -> None:
    """Some files store a tied head again. It must equal the embedding, or the configuration is wrong."""
    rows, columns = source.tensors[embedding].shape
    step = max(1, _COMPARE_BYTES // (4 * columns))
    same = source.tensors[head].shape == source.tensors[embedding].shape and all(
        torch.equal(source.read_rows(embedding, start, stop), source.read_rows(head, start, stop))
        for start, stop in ((start, min(start + step, rows)) for start in range(0, rows, step))
    )
    if not same:
        raise CheckpointError(
            f"{source.path}: tie_word_embeddings is true, but {head} differs from {embedding}: set tie_word_embeddings "
            f"to false to use {head}, or remove it from the checkpoint"
        )


class _Loader:
    """Reads, checks and prepares the tensors of one model."""

    def __init__(
        self,
        source: CheckpointSource,
        spec: ModelSpec,
        backend: Backend,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.source, self.spec, self.backend, self.progress = source, spec, backend, progress
        self.done, self.total = 0, len(spec.expected_tensors())

    def decoder(self) -> Decoder:
        spec, names, backend = self.spec, self.spec.names, self.backend
        embedding = backend.prepare(self._matrix(f"{names.embedding}.weight"), lookup=True)
        layers = tuple(self._layer(index) for index in range(spec.layers))
        final_norm = self._vector(f"{names.final_norm}.weight")
        head = embedding if spec.tied_embeddings else backend.prepare(self._matrix(f"{names.head}.weight"))
        return Decoder(spec, backend, DecoderWeights(embedding, layers, final_norm, head))

    def _layer(self, index: int) -> Layer:
        spec, names = self.spec, self.spec.names

        def linear(name: str, has_bias: bool) -> Linear:
            name = name.format(layer=index)
            weight = self.backend.prepare(self._matrix(f"{name}.weight"))
            return Linear(weight, self._vector(f"{name}.bias") if has_bias else None)

        def norm(name: str) -> torch.Tensor:
            return self._vector(f"{name.format(layer=index)}.weight")

        return Layer(
            attention_norm=norm(names.attention_norm),
            qkv=(linear(names.q, spec.qkv_bias), linear(names.k, spec.qkv_bias), linear(names.v, spec.qkv_bias)),
            output=linear(names.o, spec.output_bias),
            mlp_norm=norm(names.mlp_norm),
            gate_up=(linear(names.gate, spec.mlp_bias), linear(names.up, spec.mlp_bias)),
            down=linear(names.down, spec.mlp_bias),
        )

    def _matrix(self, name: str) -> torch.Tensor | QuantTensor:
        weight = self.source.read_weight(name)
        parts = [*weight.stored.values(), weight.codebook] if isinstance(weight, QuantTensor) else [weight]
        self._check_finite(name, parts)
        return weight

    def _vector(self, name: str) -> torch.Tensor:
        vector = self.source.read(name)
        self._check_finite(name, [vector])
        return self.backend.prepare_vector(vector)

    def _check_finite(self, name: str, parts: Iterable[torch.Tensor]) -> None:
        for part in parts:
            # A sum is finite only if every term is; it may overflow without a bad term, so count before complaining.
            if part.is_floating_point() and not torch.isfinite(part.sum(dtype=torch.float32)):
                nans, infinities = int(part.isnan().sum()), int(part.isinf().sum())
                if nans or infinities:
                    raise CheckpointError(
                        f"{self.source.path}: {name} holds {nans} NaN and {infinities} infinite values; the checkpoint "
                        "is damaged or overflowed when it was converted"
                    )
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total)
