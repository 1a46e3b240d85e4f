"""Factors of a model that GGUF files keep in weights: the model without them, and its tensors with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from kbit.checkpoint.source import StoredSource, TensorInfo
from kbit.formats.grids import NotOnGrid
from kbit.formats.stored import AnyStored, DenseMatrix
from kbit.models.spec import NO_MULTIPLIERS, ModelSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Factor:
    """What the rows of a tensor are multiplied by.

    Attributes:
        values: factors, each of a run of rows.
        counts: rows of each run.
        source: the tensor that they are read from, if it is another one.
    """

    values: tuple[float, ...]
    counts: tuple[int, ...]
    source: str | None = None

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """Of some rows: float32 (stop - start,)."""
        return np.repeat(np.array(self.values, dtype=np.float32), self.counts)[start:stop]


def without_factors(spec: ModelSpec) -> tuple[ModelSpec, dict[str, Factor]]:
    """A model that computes the same without the factors of Falcon-H1, and T5's on logits; and what its tensors are
    multiplied by for it. A head that is the embedding becomes one of its own where both are multiplied otherwise.

    Queries get all that is on scores, and attention's last linear all that is on what it makes.
    """
    if spec.encoder is not None:
        changed, factors = _with_own_head(spec, {})
        # (Which has no logits, and says what the decoder does.)
        encoder = replace(spec.encoder, tied_embeddings=changed.tied_embeddings, logit_multiplier=1.0)
        return replace(changed, encoder=encoder), factors
    if spec.scan_beside is None:
        return spec, {}
    scan, names, factors = spec.scan_beside, spec.names, dict[str, Factor]()

    def put(template: str | None, layer: int | None, rows: int, *values: float) -> None:
        name = f"{str(template).format(layer=layer)}.weight"
        if any(value != 1.0 for value in values):
            counts = scan.part_widths if len(values) > 1 else (rows,)
            factors[name] = Factor(values, counts)

    on_scores = 1.0 if spec.score_scale is None else spec.score_scale * spec.head_dim**0.5
    for layer in range(spec.layers):
        put(names.q, layer, spec.heads * spec.head_dim, on_scores)
        put(names.o, layer, spec.hidden_size, spec.multipliers.output)
        put(names.gate, layer, spec.intermediate_size, spec.multipliers.gate)
        put(names.down, layer, spec.hidden_size, spec.multipliers.down)
        put(names.scan_z, layer, scan.inner_width, scan.gate)
        put(names.scan_x, layer, 0, *scan.parts)
        put(names.scan_steps, layer, scan.heads, scan.steps)
        put(names.scan_out, layer, spec.hidden_size, scan.out)
    changed, factors = _with_own_head(spec, factors)
    put(names.embedding, None, spec.vocab_size, spec.embedding_multiplier)
    plain = replace(scan, gate=1.0, parts=(1.0, 1.0, 1.0), steps=1.0, out=1.0)
    scale = None if spec.score_scale is None else spec.head_dim**-0.5
    return replace(changed, scan=plain, multipliers=NO_MULTIPLIERS, score_scale=scale), factors


def _with_own_head(spec: ModelSpec, factors: dict[str, Factor]) -> tuple[ModelSpec, dict[str, Factor]]:
    """Without factors on embeddings, which the caller sees to, and on logits."""
    changed = replace(spec, embedding_multiplier=1.0, logit_multiplier=1.0)
    if spec.logit_multiplier == (spec.embedding_multiplier if spec.tied_embeddings else 1.0):
        return changed, factors
    copied = f"{spec.names.embedding}.weight" if spec.tied_embeddings else None
    head = Factor((spec.logit_multiplier,), (spec.vocab_size,), copied)
    return replace(changed, tied_embeddings=False), factors | {f"{spec.names.head}.weight": head}


class MultipliedSource(StoredSource):
    """A checkpoint some of whose tensors are multiplied. Does not close what it reads from.

    Args:
        source: the checkpoint.
        factors: of the tensors, by name.
    """

    def __init__(self, source: StoredSource, factors: Mapping[str, Factor]) -> None:
        self.path, self.config = source.path, source.config
        self._source, self._factors = source, factors
        copies = {name: factor.source for name, factor in factors.items() if factor.source is not None}
        made = {name: replace(source.tensors[other], name=name) for name, other in copies.items()}
        self._tensors = {**source.tensors, **made}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def read_array_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        factor = self._factors.get(name)
        if factor is None:
            return self._source.read_array_rows(name, start, stop)
        values = self._source.read_array_rows(factor.source or name, start, stop)
        return values * factor.rows(start, stop)[:, None]

    def read_stored(self, name: str) -> AnyStored:
        if name not in self._factors:
            return self._source.read_stored(name)
        if not isinstance(self._source.read_stored(self._factors[name].source or name), DenseMatrix):
            raise NotOnGrid("has a factor that GGUF files keep in its weights")
        return DenseMatrix(self.read_array(name), "fp32")

    def sidecar_files(self) -> Mapping[str, bytes]:
        return self._source.sidecar_files()

    def fingerprint(self) -> str:
        return self._source.fingerprint()

    def close(self) -> None:
        pass
