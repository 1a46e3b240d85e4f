"""What transformers saves of k-bit models, and reading it back: the parts of every matrix, bit for bit.

A matrix `X.weight` is stored as in a folder of `kbit quantize` (`kbit.checkpoint.readers.kbit_folder`):
X.weight.plane4, X.weight.scales and so on; one that consists of several (q, k and v in one) as X.weight.0.plane4,
X.weight.1.plane4, ... and X.weight.order. So that nobody loads the folder without kbit, and with random weights, the
first matrix is there under its own name, too, with the shape (0,): transformers refuses that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import safe_open
from transformers.integrations.accelerate import get_device

from kbit.checkpoint.ladder import Order
from kbit.checkpoint.readers.kbit_folder import TRANSFORMERS
from kbit.formats.codec import Codec
from kbit.formats.nested import NestedFormat
from kbit.formats.quant_tensor import QuantTensor
from kbit.formats.registry import parse_format
from kbit.host.errors import CheckpointError
from kbit.host.notes import note
from kbit.modules.convert import kbit_layers
from kbit.modules.embedding import KbitEmbedding
from kbit.modules.linear import KbitLinear
from kbit.modules.packed import PackedMatrix
from kbit.transformers.config import KbitConfig
from kbit.transformers.names import Names, in_files
from kbit.transformers.waiting import fill, replace, untie

_ORDER = "order"


def state_to_save(model: Any, config: KbitConfig) -> dict[str, torch.Tensor]:
    """The tensors of a model, those of k-bit layers by the names above; `config` is told of them.

    Raises:
        UnsupportedError: transformers would save a k-bit tensor in another form.
    """
    layers = dict(kbit_layers(model))
    inside = tuple(f"{path}.{name}" for path in layers for name in ("packed.", "order"))
    state = {name: values for name, values in model.state_dict().items() if not name.startswith(inside)}
    tensors: dict[str, Any] = {}
    codebooks: dict[str, Any] = {}
    seen: set[int] = set()
    for path, layer in layers.items():
        parts = [layer.packed] if isinstance(layer, KbitEmbedding) else layer.parts
        if len(parts) == 1 and id(parts[0]) in seen:
            continue  # tied
        seen.update(map(id, parts))
        name = f"{path}.weight"
        entries = [_entry(part, codebooks) for part in parts]
        order = layer.order if isinstance(layer, KbitLinear) else None
        if len(parts) == 1 and order is None:
            tensors[in_files(model, name)] = entries[0]
            state |= {f"{name}.{key}": values for key, values in parts[0].stored.items()}
        else:
            tensors[in_files(model, name)] = {"parts": entries}
            for index, part in enumerate(parts):
                state |= {f"{name}.{index}.{key}": values for key, values in part.stored.items()}
            if order is not None:
                state[f"{name}.{_ORDER}"] = order
        if len(tensors) == 1:
            state[name] = torch.zeros(0)
    config.tensors, config.codebooks, config.written_by = tensors, codebooks, TRANSFORMERS
    _keep_order(config)
    return state


def _keep_order(config: KbitConfig) -> None:
    """Leaves out the order of nested widths where the matrices are not called as it calls them."""
    widths = {
        name: format.widths
        for name, entry in config.tensors.items()
        if "format" in entry and isinstance(format := parse_format(entry["format"]), NestedFormat)
    }
    try:
        if config.order is not None:
            Order.from_json(config.order, widths)
    except ValueError as error:
        note(f"the saved model has whole numbers of bits only: the order of its widths is for other matrices ({error})")
        config.order = None


def _entry(part: PackedMatrix, codebooks: dict[str, Any]) -> dict[str, Any]:
    """What config.json says of a matrix."""
    matrix = part.matrix
    key = matrix.format.codebook_key(matrix.shape[1])
    if key is not None:
        codebooks[key] = matrix.codebook.tolist()
    return {"format": str(matrix.format), "shape": list(matrix.shape)}


class SavedModel:
    """A folder that transformers saved.

    Args:
        config: its quantization_config.
        name: what `from_pretrained` was given.
        files: the weight files that transformers found.
    """

    def __init__(self, config: KbitConfig, name: str, files: list[str] | None) -> None:
        self._config, self._name, self._files = config, name, files or []
        self._layers: dict[str, str] = {}  # paths in the model, by names in the files
        self._tied: dict[str, list[str]] = {}
        self._devices: dict[str, Any] = {}

    def prepare(self, model: Any, device_map: Any) -> None:
        """Takes the weights out of all layers that are k-bit, so that transformers makes none up.

        Raises:
            CheckpointError: the configuration names a tensor that is none of a layer.
        """
        names = Names(model, "load it with the version of transformers that saved it")
        for stored in self._config.tensors:
            name = names.in_model(stored)
            if name in names:
                self._layers[stored] = name.removesuffix(".weight")
                self._devices[stored] = get_device(device_map or {"": "cpu"}, name, valid_torch_device=True)
        for stored, path in self._layers.items():
            if replace(model, path).embeds:
                self._tied[stored] = untie(model, f"{path}.weight")
        kbit = {rf"{re.escape(stored)}(\..*)?$" for stored in self._config.tensors}
        model._keys_to_ignore_on_load_unexpected = kbit.union(model._keys_to_ignore_on_load_unexpected or ())

    def load(self, model: Any) -> None:
        """Reads the k-bit layers.

        Raises:
            CheckpointError: a part is missing or damaged.
        """
        where: dict[str, str] = {}
        for file in self._files:
            with safe_open(file, framework="pt") as opened:
                where |= dict.fromkeys(opened.keys(), file)
        for stored, path in self._layers.items():
            entry, order = self._config.tensors[stored], None
            if "parts" in entry:
                matrices = [self._read(f"{stored}.{i}", each, where) for i, each in enumerate(entry["parts"])]
                order = _tensor(f"{stored}.{_ORDER}", where) if f"{stored}.{_ORDER}" in where else None
            else:
                matrices = [self._read(stored, entry, where)]
            layer = fill(model, path, matrices, self._devices[stored], self._config.compute, order)
            for tied in self._tied.get(stored, ()):
                assert isinstance(layer, KbitEmbedding)
                fill(model, tied, [layer.packed], self._devices[stored], self._config.compute)

    def _read(self, name: str, entry: Mapping[str, Any], where: Mapping[str, str]) -> QuantTensor:
        format, shape = parse_format(entry["format"]), (entry["shape"][0], entry["shape"][1])
        missing = [key for key in format.parts(*shape) if f"{name}.{key}" not in where]
        if missing:
            raise CheckpointError(f"{self._name}: {name}.{missing[0]} is missing: save the model again")
        stored = {key: _tensor(f"{name}.{key}", where) for key in format.parts(*shape)}
        return QuantTensor.checked(name, format, shape, stored, self._codebook(name, format, shape[1], stored))

    def _codebook(self, name: str, format: Codec, columns: int, stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if "codebook" in stored:
            return stored["codebook"]
        key = format.codebook_key(columns)
        if key is None:
            return torch.from_numpy(format.codebook(columns))
        values = self._config.codebooks.get(key)
        if not isinstance(values, list) or len(values) != format.codebook_size:
            raise CheckpointError(
                f"{self._name}/config.json: no codebook of {format.codebook_size} values for {name}: save the model "
                "again"
            )
        return torch.tensor(values, dtype=torch.float32)


def _tensor(name: str, where: Mapping[str, str]) -> torch.Tensor:
    with safe_open(where[name], framework="pt") as opened:
        tensor: torch.Tensor = opened.get_tensor(name)
    return tensor
