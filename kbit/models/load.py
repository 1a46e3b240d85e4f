"""From a checkpoint to a Decoder: check that every tensor is there and sane, then prepare them one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import isfinite
from typing import TYPE_CHECKING

from kbit.checkpoint.finite import read_array, read_stored
from kbit.checkpoint.source import CheckpointSource, StoredSource
from kbit.graph.ops import Backend, HoldsPrepared, PreparesStored, Vector, Weight
from kbit.host.errors import CheckpointError
from kbit.models.check import check_tensors
from kbit.models.decoder import Decoder, DecoderWeights, Layer, Linear
from kbit.models.families import spec_from_config
from kbit.models.spec import ModelSpec

if TYPE_CHECKING:
    import torch

    from kbit.formats.quant_tensor import QuantTensor


def load_decoder(
    source: CheckpointSource, backend: Backend, *, progress: Callable[[int, int], None] | None = None
) -> Decoder:
    """Read a model.

    Names and shapes are checked from headers before any data is read (check_tensors). Tensors are read one at a time,
    so memory stays at the prepared weights plus one tensor.

    Args:
        source: the checkpoint.
        backend: who will run it, and prepares each weight.
        progress: called as (tensors done, tensors in all) after each tensor.

    Raises:
        UnsupportedError: an unknown architecture, or heads that the backend's cache cannot hold.
        CheckpointError: a senseless configuration; a missing, surplus, misshapen or non-finite tensor; a tied head that
            differs from the embedding.
    """
    return _Loader(source, check_loadable(source, backend), backend, progress).decoder()


def check_loadable(source: CheckpointSource, backend: Backend) -> ModelSpec:
    """What the checkpoint holds, once it is known that `load_decoder` will not refuse it but for a tensor's values.

    Raises:
        UnsupportedError, CheckpointError: see load_decoder.
    """
    spec = spec_from_config(source.config, where=f"config of {source.path}")
    check_tensors(source, spec, read_data=not isinstance(source, HoldsPrepared))  # else compared when prepared
    backend.new_cache(1, 1, spec.kv_heads, spec.head_dim, 1)  # refuses now what it would refuse once all is read
    return spec


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
        spec, names = self.spec, self.spec.names
        embedding = self._weight(f"{names.embedding}.weight", lookup=True)
        layers = tuple(self._layer(index) for index in range(spec.layers))
        final_norm = self._vector(f"{names.final_norm}.weight")
        head = embedding if spec.tied_embeddings else self._weight(f"{names.head}.weight")
        return Decoder(spec, self.backend, DecoderWeights(embedding, layers, final_norm, head))

    def _layer(self, index: int) -> Layer:
        spec, names = self.spec, self.spec.names

        def linear(name: str, has_bias: bool) -> Linear:
            name = name.format(layer=index)
            weight = self._weight(f"{name}.weight")
            return Linear(weight, self._vector(f"{name}.bias") if has_bias else None)

        def norm(name: str) -> Vector:
            return self._vector(f"{name.format(layer=index)}.weight")

        return Layer(
            attention_norm=norm(names.attention_norm),
            qkv=(linear(names.q, spec.qkv_bias), linear(names.k, spec.qkv_bias), linear(names.v, spec.qkv_bias)),
            output=linear(names.o, spec.output_bias),
            mlp_norm=norm(names.mlp_norm),
            gate_up=(linear(names.gate, spec.mlp_bias), linear(names.up, spec.mlp_bias)),
            down=linear(names.down, spec.mlp_bias),
        )

    def _weight(self, name: str, *, lookup: bool = False) -> Weight:
        """A matrix as the backend keeps it: as prepared before, as the file holds it, or from torch."""
        source, backend = self.source, self.backend
        if isinstance(source, HoldsPrepared):
            weight = source.prepared_weight(name)
        elif isinstance(source, StoredSource) and isinstance(backend, PreparesStored):
            weight = backend.prepare_stored(read_stored(source, name))
        else:
            return backend.prepare(self._matrix(name), lookup=lookup)
        self._count()
        return weight

    def _vector(self, name: str) -> Vector:
        source, backend = self.source, self.backend
        if isinstance(source, HoldsPrepared):
            vector = source.prepared_vector(name)
        elif isinstance(source, StoredSource) and isinstance(backend, PreparesStored):
            vector = backend.prepare_array(read_array(source, name))
        else:
            values = source.read(name)
            self._check_finite(name, [values])
            return backend.prepare_vector(values)
        self._count()
        return vector

    def _matrix(self, name: str) -> torch.Tensor | QuantTensor:
        import torch

        from kbit.formats.quant_tensor import QuantTensor

        weight = self.source.read_weight(name)
        parts = [*weight.stored.values(), weight.codebook] if isinstance(weight, QuantTensor) else [weight]
        self._check_finite(name, parts)
        if isinstance(weight, torch.Tensor):
            # Sources read every float as float32; what the file holds in 16 bits fits them again, exactly.
            sixteen_bits = {"F16": torch.float16, "BF16": torch.bfloat16}
            weight = weight.to(sixteen_bits.get(self.source.tensors[name].stored_as, weight.dtype))
        return weight

    def _check_finite(self, name: str, parts: Iterable[torch.Tensor]) -> None:
        import torch

        for part in parts:
            # A sum is finite only if every term is; it may overflow without a bad term, so count before complaining.
            if part.is_floating_point() and not isfinite(part.sum(dtype=torch.float32)):
                nans, infinities = int(part.isnan().sum()), int(part.isinf().sum())
                if nans or infinities:
                    raise CheckpointError(
                        f"{self.source.path}: {name} holds {nans} NaN and {infinities} infinite values; the checkpoint "
                        "is damaged or overflowed when it was converted; get it again"
                    )
        self._count()

    def _count(self) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total)
