"""LoRA adapters beside a model: folders as PEFT saves them, as factors of the model's canonical matrices.

The matrices stay as they are, whatever they are packed as, and every sequence may have another adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kbit.checkpoint.readers.lora_file import LoraFile, check_adapter
from kbit.checkpoint.source import CANONICAL, StoredSource, TensorInfo
from kbit.formats.stored import KINDS, DenseMatrix, narrowed
from kbit.graph.backend import Backend, PreparesStored
from kbit.graph.operations import Symbol
from kbit.graph.ops import LowRank, Weight
from kbit.graph.recording import Recorder
from kbit.host.errors import CheckpointError, UnsupportedError
from kbit.models.adapted import AdaptedDefinition, Adapters
from kbit.models.canonical import canonical, origin
from kbit.models.decoder import Decoder, DecoderDefinition
from kbit.models.params import own_parameters

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kbit.formats.stored import AnyStored


def add_adapters(decoder: Decoder, config: Mapping[str, Any], folders: Mapping[str, str | Path]) -> Decoder:
    """A decoder whose sequences may have adapters, on the same weights.

    Args:
        decoder: the model.
        config: its checkpoint's configuration.
        folders: of the adapters, by the names that they get.

    Raises:
        UsageError: a folder that holds no adapter.
        CheckpointError: a damaged adapter, or one of another model; the message names the file.
        UnsupportedError: one that is more than pairs of factors of the layers' matrices, or a backend that runs none.
    """
    multiplied = (p for p in own_parameters(decoder.spec) if p.role in ("linear", "router"))
    matrices = {p.name: (p.layer, p.slot) for p in multiplied if p.layer is not None}
    factors: dict[Weight, list[LowRank | None]] = {}
    labels: dict[Weight, str] = {}
    for number, folder in enumerate(folders.values()):
        path = check_adapter(folder)
        with ExitStack() as stack:
            lora = LoraFile(path)
            stack.callback(lora.close)
            _refuse_replaced(lora)
            for name, found in _factors_of(lora, config, decoder.backend).items():
                if name not in matrices:
                    raise CheckpointError(
                        f"{lora.file.path}: it changes {name}, which is no matrix of this model's layers: it is an "
                        "adapter of another; or open its folder as the model, which adds it to the weights"
                    )
                layer, slot = matrices[name]
                weight = decoder.weights.layers[layer].matrices[slot]
                if weight.shape != (found.up.shape[0], found.down.shape[1]):
                    raise CheckpointError(
                        f"{lora.file.path}: its factors of {name} make {found.up.shape[0]} x {found.down.shape[1]} "
                        f"numbers, and the model has {weight.shape[0]} x {weight.shape[1]}: it is another model's"
                    )
                factors.setdefault(weight, [None] * len(folders))[number] = found
                labels[weight] = name
    fixed = {weight: tuple(of_adapters) for weight, of_adapters in factors.items()}
    adapters = Adapters(tuple(folders), fixed, labels)
    recorder = Recorder(Symbol(1))
    AdaptedDefinition(DecoderDefinition(decoder.spec, decoder.weights), adapters).body(recorder, recorder.input)
    return Decoder(decoder.spec, decoder.backend, decoder.weights, adapters)


def _refuse_replaced(lora: LoraFile) -> None:
    """
    Raises:
        UnsupportedError: the adapter has tensors in place of the model's, or changes embeddings.
    """
    embeddings = [name for name, each in lora.loras.items() if "lora_embedding" in each.down]
    heads = [name for name in lora.loras if name.endswith("lm_head.weight")]
    for name in (*lora.replaced, *embeddings, *heads):
        raise UnsupportedError(
            f"{lora.file.path}: it changes {name}, and only matrices of the layers take an adapter beside the model: "
            f"open {lora.path} as the model, which adds it to the weights"
        )


def _factors_of(lora: LoraFile, config: Mapping[str, Any], backend: Backend) -> dict[str, LowRank]:
    """An adapter's factors by canonical names. A matrix that is published for several has some for each of these."""
    for name, each in lora.loras.items():
        down_shape, up_shape = (lora.file.tensors[stored].shape for stored in (each.down, each.up))
        if len(down_shape) != 2 or len(up_shape) != 2 or down_shape[0] != up_shape[1]:
            raise CheckpointError(f"{lora.file.path}: {each.down} and {each.up} are no pair of factors of {name}")
    found = {}
    published = {key: value for key, value in config.items() if key != CANONICAL}
    with canonical(_Ups(lora, published)) as ups:
        assert isinstance(ups, StoredSource)
        for name, info in ups.tensors.items():
            pair = lora.loras.get(origin(ups, name))
            if pair is None:  # what every model of the family has, such as norms without weights
                continue
            rank = lora.file.tensors[pair.down].shape[0]
            up = np.ascontiguousarray(ups.read_array_rows(name, 0, info.shape[0])[:, :rank])
            found[name] = LowRank(
                _prepared(lora, pair.down, lora.values(pair.down), backend),
                _prepared(lora, pair.up, up, backend),
                pair.scale,
            )
    return found


def _prepared(lora: LoraFile, stored: str, values: NDArray[np.float32], backend: Backend) -> Weight:
    """A factor in the type that the file has it in."""
    if not np.isfinite(values).all():
        raise CheckpointError(f"{lora.file.path}: {stored} has values that are no numbers: train the adapter again")
    kind = KINDS.get(lora.file.tensors[stored].dtype, "fp32")
    if isinstance(backend, PreparesStored):
        return backend.prepare_stored(DenseMatrix(narrowed(values, kind), kind))
    import torch

    return backend.prepare(torch.from_numpy(values))


class _Ups(StoredSource):
    """The second factors (N, R) of an adapter in the places of its base's matrices (N, K), zeros beside them: so that
    whatever the family's layout makes of the rows of those becomes of these.

    Args:
        lora: the adapter.
        config: of a published checkpoint of its base.

    Raises:
        CheckpointError: a rank as large as the matrix.
    """

    def __init__(self, lora: LoraFile, config: dict[str, Any]) -> None:
        self.path, self.config, self._lora = lora.path, config, lora
        self._infos: dict[str, TensorInfo] = {}
        for name, each in lora.loras.items():
            (rank, columns), (rows, _) = lora.file.tensors[each.down].shape, lora.file.tensors[each.up].shape
            if rank > columns:
                raise CheckpointError(f"{lora.file.path}: {each.down} has rank {rank}, more than its {columns} columns")
            shape = (columns, rows) if each.transposed else (rows, columns)
            self._infos[name] = TensorInfo(name, shape, "F32", 4 * rows * columns, lora.file.path)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def read_array_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        each = self._lora.loras[name]
        up = self._lora.values(each.up)
        whole = np.zeros((len(up), self._lora.file.tensors[each.down].shape[1]), dtype=np.float32)
        whole[:, : up.shape[1]] = up
        return np.ascontiguousarray((whole.T if each.transposed else whole)[start:stop])

    def read_stored(self, name: str) -> AnyStored:
        return DenseMatrix(self.read_array(name), "fp32")

    def sidecar_files(self) -> Mapping[str, bytes]:
        return {}

    def fingerprint(self) -> str:
        return ""
