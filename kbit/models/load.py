"""From a checkpoint to a Decoder: check that every tensor is there and sane, then prepare them one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from math import isfinite
from typing import TYPE_CHECKING, Any

from kbit.checkpoint.finite import not_finite, read_array, read_stored
from kbit.checkpoint.source import CheckpointSource, StoredSource
from kbit.graph.backend import Backend, HoldsPrepared, PreparesStored, SharedWeights
from kbit.graph.ops import Vector, Weight
from kbit.host.errors import UnsupportedError
from kbit.models.blocks import Weights
from kbit.models.check import check_tensors
from kbit.models.decoder import Decoder, DecoderWeights
from kbit.models.families import spec_from_config
from kbit.models.latent import compressed
from kbit.models.parameter import Parameter
from kbit.models.params import OUTSIDE, XIELU_PARTS, own_parameters, parameters, weightless_norms
from kbit.models.spec import ModelSpec

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from kbit.formats.quant_tensor import QuantTensor


# Of xIELU: what is published is -1e-6.
_LEAST_EPS = -1e-5


def load_decoder(
    source: CheckpointSource,
    backend: Backend,
    *,
    progress: Callable[[int, int], None] | None = None,
    spec: ModelSpec | None = None,
    shared: SharedWeights | None = None,
) -> Decoder:
    """Read a model.

    Names and shapes are checked from headers before any data is read (check_tensors). Tensors are read one at a time,
    so memory stays at the prepared weights plus one tensor.

    Args:
        source: the checkpoint.
        backend: who will run it, and prepares each weight.
        progress: called as (tensors done, tensors in all) after each tensor.
        spec: what to make of it, where that is not all that its configuration says.
        shared: of the backend, where this is one width of several (`kbit.graph.backend.SharesWidths`).

    Raises:
        UnsupportedError: an unknown architecture, or heads that the backend's cache cannot hold.
        CheckpointError: a senseless configuration; a missing, surplus, misshapen or non-finite tensor; a tied head that
            differs from the embedding.
    """
    return _Loader(source, check_loadable(source, backend, spec), backend, progress, shared).decoder()


def check_loadable(source: CheckpointSource, backend: Backend, spec: ModelSpec | None = None) -> ModelSpec:
    """What the checkpoint holds, once it is known that `load_decoder` will not refuse it but for a tensor's values.

    Args:
        source, backend, spec: of `load_decoder`.

    Raises:
        UnsupportedError, CheckpointError: see load_decoder.
    """
    published = spec_from_config(source.config, where=f"config of {source.path}")
    if published.encoder is not None:
        raise UnsupportedError(
            f"{source.path}: a {published.family} model is an encoder-decoder; use kbit translate, summarize or "
            "run (kbit.models.encoder_decoder)"
        )
    spec = spec or published
    # (A head that is not wanted may be there, or, as in all-mpnet-base-v2, may not.)
    ignored = () if spec == published else (*published.expected_tensors(), f"{spec.names.head}.weight")
    spec = compressed(spec, backend)
    read_data = not isinstance(source, HoldsPrepared)  # else compared when prepared
    check_tensors(source, spec, read_data=read_data, ignored=ignored)
    # Refuses now what it would refuse once all is read.
    backend.new_cache(spec.cache_layers, 1, *spec.cache_heads, 1, latent=spec.keeps_latents)
    if spec.states:
        backend.new_states(spec.states, 1)
    return spec


def load_stack(source: CheckpointSource, spec: ModelSpec, backend: Backend, embedding: Weight | None) -> DecoderWeights:
    """The weights of one stack of layers, whose tensors have been checked.

    Args:
        source: the checkpoint.
        spec: of the stack.
        backend: prepares each weight.
        embedding: where another stack has the same one, that.

    Raises:
        CheckpointError: a tensor that is not finite.
    """
    return _Loader(source, spec, backend, None).weights(embedding)


def load_layer(source: CheckpointSource, spec: ModelSpec, backend: Backend, layer: int) -> Weights:
    """The parameters of one layer, for who works through a model that is larger than memory.

    Raises:
        CheckpointError: a tensor that is not finite.
    """
    return _Loader(source, spec, backend, None).layer(layer)


def load_ends(source: CheckpointSource, spec: ModelSpec, backend: Backend) -> DecoderWeights:
    """What stands outside of the layers: embedding, final norm and head.

    Raises:
        CheckpointError: a tensor that is not finite.
    """
    return _Loader(source, spec, backend, None).ends()


def numbers_of(spec: ModelSpec) -> set[str]:
    """Names of the tensors that are read as numbers, whatever their shape, and not multiplied by as matrices: of heads
    on hidden states, and of what is added to scores by distance."""
    return {parameter.name for parameter in parameters(spec) if parameter.role in ("task", "distances")}


class _Loader:
    """Reads, checks and prepares the tensors of one model."""

    def __init__(
        self,
        source: CheckpointSource,
        spec: ModelSpec,
        backend: Backend,
        progress: Callable[[int, int], None] | None,
        shared: SharedWeights | None = None,
    ) -> None:
        self.source, self.spec, self.backend, self.progress = source, spec, backend, progress
        self.shared = shared
        self._declared = own_parameters(spec)
        self._outside = [p for p in self._declared if p.layer is None]
        self.done, self.total = 0, sum(p.role != "task" for p in self._declared)

    def decoder(self) -> Decoder:
        return Decoder(self.spec, self.backend, self.weights(None))

    def weights(self, embedding: Weight | None) -> DecoderWeights:
        if embedding is None:
            embedding = self._weight(self._outside[0].name, lookup=True)
        layers = tuple(self.layer(index) for index in range(self.spec.layers))
        return self._ends(embedding, layers)

    def layer(self, index: int) -> Weights:
        found = self._weights(p for p in self._declared if p.layer == index)
        ones = {slot: self._ones(width) for slot, width in weightless_norms(self.spec, index).items()}
        return replace(found, norms={**found.norms, **ones}) if ones else found

    def ends(self) -> DecoderWeights:
        return self._ends(self._weight(self._outside[0].name, lookup=True), ())

    def _ends(self, embedding: Weight, layers: tuple[Weights, ...]) -> DecoderWeights:
        final = self._weights(p for p in self._outside if p.role in OUTSIDE)
        if self.spec.sloped:
            final = replace(final, biases={**final.biases, "distances": self._slopes()})
        if self.spec.sinusoids is not None:
            final = replace(final, matrices={**final.matrices, "positions": self._sinusoids()})
        heads = [p for p in self._outside if p.role == "head"]
        head = self._weight(heads[0].name) if heads else embedding
        return DecoderWeights(embedding, layers, final, head)

    def _weights(self, declared: Iterable[Parameter]) -> Weights:
        """The parameters of one layer, or of none."""
        matrices: dict[str, Weight] = {}
        norms: dict[str, Vector] = {}
        biases: dict[str, Vector] = {}
        for parameter in declared:
            if parameter.role in ("linear", "router", "rows", "table"):
                matrices[parameter.slot] = self._weight(parameter.name, lookup=parameter.role in ("rows", "table"))
            elif parameter.role == "distances":
                biases[parameter.slot] = self._distances(parameter.name)
            elif parameter.role == "taps":
                biases[parameter.slot] = self._taps(parameter)
            else:
                vectors = norms if parameter.role == "norm" else biases
                vectors[parameter.slot] = self._vector(parameter.name)
        steps = 1.0 if self.spec.scan is None else self.spec.scan.steps
        if steps != 1.0 and "scan_steps" in biases:  # which are multiplied with them, once this is added
            biases["scan_steps"] = _times(biases["scan_steps"], 1.0 / steps)
        if "xielu_linear" in biases:
            biases |= self._xielu(*(biases.pop(f"xielu_{part}") for part in XIELU_PARTS))
        return Weights(matrices, norms, biases)

    def _weight(self, name: str, *, lookup: bool = False) -> Weight:
        """A matrix as the backend keeps it: as prepared before, as the file holds it, or from torch."""
        source, backend = self.source, self.backend
        if isinstance(source, HoldsPrepared):
            weight = source.prepared_weight(name)
        elif isinstance(source, StoredSource) and isinstance(backend, PreparesStored):
            weight = backend.prepare_stored(read_stored(source, name))
        elif self.shared is not None:
            before = self.done
            weight = self.shared.weight(name, source.tensors[name].stored_as, lambda: self._matrix(name))
            if self.done > before:  # it was read
                return weight
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

    def _xielu(self, *parts: Any) -> dict[str, Vector]:
        """The factors that `kbit.models.blocks` reads, of what is stored: before a softplus that of the square and,
        less b, that of the exponential; and eps, -1e-6, below which exponents are kept: that changes less than itself.

        Raises:
            UnsupportedError: an eps that changes more.
        """
        import numpy as np

        p, n, b, eps = (np.float32(vector.reshape(-1)[0]) for vector in parts)
        if not _LEAST_EPS <= eps <= 0:
            raise UnsupportedError(
                f"{self.source.path}: an act_fn.eps of {eps:g} is not supported, only {_LEAST_EPS:g} to 0, which "
                "change nothing beyond rounding"
            )
        p, n = np.logaddexp(np.float32(0), p), np.logaddexp(np.float32(0), n)
        factors = {"positive": p, "negative": b + n, "linear": -n}
        return {f"xielu_{part}": self._made(np.array([factor], np.float32)) for part, factor in factors.items()}

    def _slopes(self) -> Vector:
        """What slopes add to scores: of no tensor."""
        from kbit.models.distances import by_slope

        return self._made(by_slope(self.spec.heads, self.spec.context_length, self.spec.slope_factor))

    def _ones(self, width: int) -> Vector:
        """The weight of a norm that has none."""
        import numpy as np

        return self._made(np.ones(width, dtype=np.float32))

    def _made(self, values: NDArray[np.float32]) -> Vector:
        """A vector that no tensor holds."""
        if isinstance(self.backend, PreparesStored):
            return self.backend.prepare_array(values)
        import torch

        return self.backend.prepare_vector(torch.from_numpy(values))

    def _sinusoids(self) -> Weight:
        """A table of positions that is of no tensor."""
        from kbit.models.sinusoids import sinusoids

        assert self.spec.sinusoids is not None
        values = sinusoids(self.spec.position_rows, self.spec.hidden_size, self.spec.sinusoids)
        if isinstance(self.backend, PreparesStored):
            from kbit.formats.stored import DenseMatrix

            return self.backend.prepare_stored(DenseMatrix(values, "fp32"))
        import torch

        return self.backend.prepare(torch.from_numpy(values), lookup=True)

    def _distances(self, name: str) -> Vector:
        """What a table of distances adds to scores."""
        from kbit.models.distances import by_distance

        assert self.spec.distances is not None
        source, largest, causal = self.source, self.spec.distances[1], self.spec.mask == "causal"
        if isinstance(self.backend, PreparesStored) and isinstance(source, HoldsPrepared | StoredSource):
            table = self._numbers(source, name)
            vector = self.backend.prepare_array(by_distance(table, largest, causal=causal))
            self._count()
            return vector
        import torch

        values = source.read(name)
        self._check_finite(name, [values])
        return self.backend.prepare_vector(torch.from_numpy(by_distance(values.numpy(), largest, causal=causal)))

    def _taps(self, parameter: Parameter) -> Vector:
        """A convolution's factors (features, 1, tokens) as `Ops.short_convolution` takes them: those of a token
        together."""
        source, name, features = self.source, parameter.name, parameter.shape[0]
        factors = self._tap_factors()
        if isinstance(self.backend, PreparesStored) and isinstance(source, HoldsPrepared | StoredSource):
            import numpy as np

            values = self._numbers(source, name).reshape(features, -1)
            values = values if factors is None else values * factors[:, None]
            vector = self.backend.prepare_array(np.ascontiguousarray(values.T).reshape(-1))
            self._count()
            return vector
        values_read = source.read(name)
        self._check_finite(name, [values_read])
        values_read = values_read.reshape(features, -1)
        if factors is not None:
            import torch

            values_read = values_read * torch.from_numpy(factors)[:, None]
        return self.backend.prepare_vector(values_read.T.reshape(-1))

    def _tap_factors(self) -> NDArray[np.float32] | None:
        """What the features of a convolution are multiplied with before it, which its taps may be instead: (features,),
        or None."""
        scan = self.spec.scan
        if scan is None or scan.parts == (1.0, 1.0, 1.0):
            return None
        import numpy as np

        return np.repeat(np.array(scan.parts, dtype=np.float32), scan.part_widths)

    def _numbers(self, source: HoldsPrepared | StoredSource, name: str) -> NDArray[np.float32]:
        """A tensor that something else is made of, in its shape."""
        if not isinstance(source, HoldsPrepared):
            return read_array(source, name)
        import numpy as np

        return np.asarray(source.prepared_vector(name)).reshape(self.source.tensors[name].shape)

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
                    raise not_finite(self.source, name, nans, infinities)
        self._count()

    def _count(self) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total)


def _times(vector: Any, factor: float) -> Vector:
    """A prepared vector times a number: backends keep arrays or tensors."""
    product: Vector = vector * factor
    return product
