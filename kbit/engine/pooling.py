"""From the hidden states of a text to one vector, as sentence-transformers does it: pooling, dense layers, length 1."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kbit.engine.heads import ACTIVATIONS, Floats
from kbit.formats.stored import KINDS, widened
from kbit.host.errors import CheckpointError, UnsupportedError
from kbit.text.sentence_config import DenseModule, SentenceConfig

# Vectors shorter than this keep their length, as in torch.nn.functional.normalize.
_SHORTEST = 1e-12
_DTYPES: Mapping[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<u2"), "BF16": np.dtype("<u2")}


def pool(states: Floats, kinds: Sequence[str], skipped: int = 0) -> Floats:
    """One vector for a text.

    Args:
        states: (T, hidden).
        kinds: of `kbit.text.sentence_config.POOLINGS`; their vectors are put beside each other.
        skipped: tokens at the beginning that do not count, but for "cls".

    Returns:
        (hidden * kinds,).
    """
    counted = states[skipped:]
    if not len(counted):  # a mean of nothing: sentence-transformers divides by a tiny number then
        counted = np.zeros((1, states.shape[1]), dtype=np.float32)
    wide = counted.astype(np.float64)
    places = np.arange(skipped + 1, skipped + 1 + len(counted))[:, None]
    found = {
        "cls": lambda: states[0],
        "max": lambda: counted.max(axis=0),
        "mean": lambda: wide.mean(axis=0),
        "mean_sqrt_len": lambda: wide.sum(axis=0) / len(counted) ** 0.5,
        "weightedmean": lambda: (wide * places).sum(axis=0) / places.sum(),
        "lasttoken": lambda: counted[-1],
    }
    vector: Floats = np.concatenate([found[kind]() for kind in kinds]).astype(np.float32)
    return vector


def normalized(vectors: Floats) -> Floats:
    """Vectors (N, D) of length 1."""
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=-1, keepdims=True)
    scaled: Floats = (vectors / np.maximum(lengths, _SHORTEST)).astype(np.float32)
    return scaled


@dataclass(frozen=True, eq=False)
class VectorHead:
    """What happens to pooled vectors.

    Attributes:
        layers: dense layers with their weights (out, in) and biases.
        normalize: vectors get length 1 in the end.
    """

    layers: tuple[tuple[DenseModule, Floats, Floats | None], ...]
    normalize: bool

    @classmethod
    def of(cls, config: SentenceConfig, files: Mapping[str, bytes], pooled: int, where: str) -> VectorHead:
        """Reads it.

        Args:
            config: the checkpoint's.
            files: its `sidecar_files`.
            pooled: features of a pooled vector.
            where: what to call the checkpoint in errors.

        Raises:
            CheckpointError: a missing or misshapen tensor.
            UnsupportedError: weights that are pickled.
        """
        layers = []
        for module in config.dense:
            tensors = _tensors(module.folder, files, where)
            name = f"{module.folder}/model.safetensors"
            wanted = {"linear.weight": (module.out_features, module.in_features)}
            if module.bias:
                wanted["linear.bias"] = (module.out_features,)  # type: ignore[assignment]
            found = {key: tensor.shape for key, tensor in tensors.items()}
            if found != wanted or module.in_features != pooled:
                raise CheckpointError(
                    f"{where}: {name} holds {found}, where config.json beside it and {pooled} features before it ask "
                    f"for {wanted}"
                )
            layers.append((module, tensors["linear.weight"], tensors.get("linear.bias")))
            pooled = module.out_features
        return cls(tuple(layers), config.normalize)

    def __call__(self, vectors: Floats) -> Floats:
        """(N, pooled) -> (N, D)."""
        for module, weight, bias in self.layers:
            vectors = vectors @ weight.T
            vectors = ACTIVATIONS[module.activation](vectors if bias is None else vectors + bias)
        return normalized(vectors) if self.normalize else vectors


def _tensors(folder: str, files: Mapping[str, bytes], where: str) -> dict[str, Floats]:
    """The tensors of a module's safetensors file.

    Raises:
        CheckpointError: it is missing, or no such file.
        UnsupportedError: there is only a pickled one.
    """
    name = f"{folder}/model.safetensors"
    if name not in files:
        if f"{folder}/pytorch_model.bin" in files:
            raise UnsupportedError(
                f"{where}: {folder}/pytorch_model.bin: pickled weights; loading them can run code: convert them to "
                "safetensors first"
            )
        raise CheckpointError(f"{where}: {name} is missing; download it again")
    data = files[name]
    found = {}
    try:
        begin = 8 + int.from_bytes(data[:8], "little")
        for key, entry in json.loads(data[8:begin]).items():
            if key == "__metadata__":
                continue
            first, stop = entry["data_offsets"]
            raw: NDArray[Any] = np.frombuffer(data[begin + first : begin + stop], _DTYPES[entry["dtype"]])
            found[key] = widened(raw, KINDS[entry["dtype"]]).reshape(entry["shape"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{where}: {name} is damaged, or in a type that kbit does not read ({error})") from None
    if not all(np.isfinite(tensor).all() for tensor in found.values()):
        raise CheckpointError(f"{where}: {name} has values that are not finite; download it again")
    return found
