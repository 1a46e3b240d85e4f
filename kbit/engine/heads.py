"""Heads on hidden states (`kbit.models.task_heads`), in numpy: they read few rows, so kernels would gain nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kbit.checkpoint.finite import read_array
from kbit.checkpoint.source import CheckpointSource, StoredSource
from kbit.graph.backend import HoldsPrepared
from kbit.models.spec import ModelSpec

Floats = NDArray[np.float32]

_erf = np.vectorize(math.erf, otypes=[np.float64])


def _gelu(x: Floats) -> Floats:
    wide = x.astype(np.float64)
    exact: Floats = (0.5 * wide * (1.0 + _erf(wide / math.sqrt(2.0)))).astype(np.float32)
    return exact


def _gelu_tanh(x: Floats) -> Floats:
    inner = np.float32(math.sqrt(2.0 / math.pi)) * (x + np.float32(0.044715) * x**3)
    values: Floats = (0.5 * x * (1.0 + np.tanh(inner))).astype(np.float32)
    return values


def sigmoid(x: Floats) -> Floats:
    """1 / (1 + exp(-x)), without overflow."""
    values: Floats = (0.5 * (1.0 + np.tanh(0.5 * x))).astype(np.float32)
    return values


ACTIVATIONS: Mapping[str, Callable[[Floats], Floats]] = {
    "tanh": np.tanh,
    "relu": lambda x: np.maximum(x, np.float32(0)),
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": lambda x: x * sigmoid(x),
    "sigmoid": sigmoid,
    "identity": lambda x: x,
}


def softmax(x: Floats) -> Floats:
    """Over the last axis."""
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    shares: Floats = (weights / weights.sum(axis=-1, keepdims=True)).astype(np.float32)
    return shares


@dataclass(frozen=True, eq=False)
class Head:
    """A head's tensors; empty where the model has none.

    Attributes:
        spec: the model.
        tensors: its tensors by name, float32.
    """

    spec: ModelSpec
    tensors: Mapping[str, Floats]

    @classmethod
    def of(cls, source: CheckpointSource, spec: ModelSpec) -> Head:
        """Reads it.

        Raises:
            CheckpointError: a tensor that is not finite.
        """
        from kbit.models.params import parameters

        shapes = {p.name: p.shape for p in parameters(spec) if p.role == "task"}
        if isinstance(source, HoldsPrepared):
            found = {name: np.array(source.prepared_vector(name), dtype=np.float32) for name in shapes}
            return cls(spec, {name: values.reshape(shapes[name]) for name, values in found.items()})
        if isinstance(source, StoredSource):
            return cls(spec, {name: read_array(source, name) for name in shapes})
        return cls(spec, {name: source.read(name).numpy() for name in shapes})

    def inner(self, hidden: Floats) -> Floats:
        """All but the last linear: (L, hidden) -> (L, hidden)."""
        task = self.spec.task
        assert task is not None
        x = hidden
        if task.dense is not None:
            x = self._linear(x, task.dense, f"{task.dense}.bias" if task.dense_bias else None)
        if task.activation is not None:
            x = ACTIVATIONS[task.activation](x)
        if task.norm is not None:
            x = x - x.mean(axis=-1, keepdims=True)
            x = x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + np.float32(self.spec.norm_eps))
            x = x * self.tensors[f"{task.norm}.weight"]
            if task.norm_bias:
                x = x + self.tensors[f"{task.norm}.bias"]
        return x

    def scores(self, hidden: Floats) -> Floats:
        """(L, hidden) -> (L, labels). Not of the vocabulary: see `with_bias`."""
        task = self.spec.task
        assert task is not None
        assert task.out is not None
        return self._linear(self.inner(hidden), task.out, task.out_bias)

    def with_bias(self, logits: Floats) -> Floats:
        """Logits of the vocabulary (L, V) with their bias, where the head has one."""
        task = self.spec.task
        assert task is not None
        return logits if task.out_bias is None else logits + self.tensors[task.out_bias]

    def _linear(self, x: Floats, name: str, bias: str | None) -> Floats:
        product: Floats = x @ self.tensors[f"{name}.weight"].T
        return product if bias is None else product + self.tensors[bias]
