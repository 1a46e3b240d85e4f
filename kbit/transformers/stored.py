"""Folders of `kbit quantize` as models of transformers: read by kbit, checksums included, and put where the family
publishes each tensor."""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers.integrations.accelerate import get_device

from kbit.checkpoint.source import CheckpointSource
from kbit.host.errors import CheckpointError, UnsupportedError
from kbit.host.notes import note
from kbit.models.check import check_tensors, stored_spec
from kbit.models.families import FAMILIES, spec_from_config
from kbit.models.family import family_of
from kbit.models.opening import open_model
from kbit.models.published import PublishedTensor, StackedTensor, published_tensors
from kbit.modules.embedding import KbitEmbedding
from kbit.modules.linear import KbitLinear
from kbit.modules.published import packed_parts
from kbit.transformers.config import KbitConfig
from kbit.transformers.names import Names
from kbit.transformers.waiting import can_wait, fill, replace, untie

_VALUES_AT_ONCE = 1 << 22


class StoredModel:
    """A folder of `kbit quantize`.

    Args:
        config: its quantization_config.
        name: what `from_pretrained` was given.
        files: the weight files that transformers found, which kbit finds itself.
    """

    def __init__(self, config: KbitConfig, name: str, files: list[str] | None) -> None:
        self._config = config
        self._folder = name  # (of a hub's repository transformers has fetched a part; kbit fetches the rest)
        self._wanted: list[tuple[PublishedTensor, str]] = []  # with what the model calls it
        self._tied: dict[str, list[str]] = {}  # layers that share an embedding's table, by the embedding's
        self._devices: dict[str, Any] = {}
        self._before: tuple[Any, Any] = (None, None)
        self._shapes: dict[str, torch.Size] = {}  # of parameters whose shape is another in the folder

    def prepare(self, model: Any, device_map: Any) -> None:
        """Takes the weights out of all layers that are k-bit, so that transformers makes none up.

        Raises:
            CheckpointError: the folder is not complete, or not this model's.
            UnsupportedError: transformers has its tensors in another form.
        """
        names = Names(model, f"use kbit export {self._folder} -o plain/, and load that")
        with open_model(self._folder) as source:
            self._wanted = self._found(source, names)
            self._shapes = self._reshaped(source, model, names)
        packed = [(tensor, name) for tensor, name in self._wanted if self._is_packed(tensor)]
        for _, name in self._wanted:
            self._devices[name] = get_device(device_map or {"": "cpu"}, name, valid_torch_device=True)
        for tensor, name in packed:
            path = name.removesuffix(".weight")
            layer = model.get_submodule(path)
            if not can_wait(layer):
                note(
                    f"{self._folder}: {name} is held as plain numbers, as transformers' {type(layer).__name__} does "
                    f"more than look up or multiply ({tensor.name} is k-bit in the folder)"
                )
            elif replace(model, path).embeds:
                self._tied[path] = untie(model, name)
        # What transformers finds in the files by itself, or misses there, is read here.
        self._before = model._keys_to_ignore_on_load_unexpected, model._keys_to_ignore_on_load_missing
        model._keys_to_ignore_on_load_unexpected = {".*"}
        provided = {f"^{re.escape(name)}$" for _, name in self._wanted}
        model._keys_to_ignore_on_load_missing = provided.union(self._before[1] or ())

    def load(self, model: Any) -> None:
        """Reads every tensor that the model has a place for.

        Raises:
            CheckpointError: a tensor is damaged, or has another shape than the model's.
        """
        model._keys_to_ignore_on_load_unexpected, model._keys_to_ignore_on_load_missing = self._before
        with open_model(self._folder) as source:
            for tensor, name in self._wanted:
                path = name.removesuffix(".weight")
                if name in model.state_dict(keep_vars=True):
                    self._load_plain(source, tensor, model.get_parameter_or_buffer(name), name)
                else:
                    self._load_packed(source, tensor, model, path, name)
        for embedding, layers in self._tied.items():
            table = model.get_submodule(embedding)
            assert isinstance(table, KbitEmbedding)
            for path in layers:
                fill(model, path, [table.packed], self._devices[f"{embedding}.weight"], self._config.compute)

    def _reshaped(self, source: CheckpointSource, model: Any, names: Names) -> dict[str, torch.Size]:
        """Gives parameters whose names are the same in the folder, and the shapes not, those of the folder, as
        transformers refuses others; their own shapes."""
        shapes, parameters = {}, model.state_dict(keep_vars=True)
        for stored, info in source.tensors.items():
            name = names.in_model(stored)
            found = parameters.get(name)
            if found is not None and stored not in self._config.tensors and tuple(found.shape) != info.shape:
                shapes[name] = found.shape
                found.data = found.data.new_empty(info.shape)
        return shapes

    def _found(self, source: CheckpointSource, names: Names) -> list[tuple[PublishedTensor, str]]:
        """Every tensor that the model has a place for, and what it calls it."""
        where = f"config of {source.path}"
        family, spec = family_of(FAMILIES, source.config, where), spec_from_config(source.config, where=where)
        if spec.task is not None:
            spec = stored_spec(source, spec)
        check_tensors(source, spec)
        found = []
        for tensor in published_tensors(spec, family.layout):
            if isinstance(tensor, StackedTensor):
                raise UnsupportedError(
                    f"{source.path}: {tensor.name} holds the matrices of all experts, which transformers multiplies "
                    f"itself: use kbit export {self._folder} -o plain/, and load that"
                )
            name = names.in_model(tensor.name)
            if name in names:
                found.append((tensor, name))
        if not found:
            raise CheckpointError(f"{source.path}: none of its tensors is part of this model: load it as its own class")
        return found

    def _is_packed(self, tensor: PublishedTensor) -> bool:
        """Whether all of it is k-bit."""
        kbit = [part.parameter.name in self._config.tensors for part in tensor.parts]
        if any(kbit) and not all(kbit):
            note(f"{self._folder}: {tensor.name} is held as plain numbers, as only some of it is k-bit in the folder")
        return all(kbit)

    def _load_plain(self, source: CheckpointSource, tensor: PublishedTensor, parameter: Any, name: str) -> None:
        if name in self._shapes:
            parameter.data = parameter.data.new_empty(self._shapes[name])
        values = torch.cat(list(tensor.rows(source, _VALUES_AT_ONCE)))
        if values.numel() != parameter.numel():
            raise CheckpointError(
                f"{source.path}: {tensor.name} has shape {tuple(values.shape)}, and the model's {name} "
                f"{tuple(parameter.shape)}: load it as its own class"
            )
        with torch.no_grad():
            parameter.copy_(values.view(parameter.shape))

    def _load_packed(
        self, source: CheckpointSource, tensor: PublishedTensor, model: Any, path: str, name: str
    ) -> KbitLinear | KbitEmbedding:
        packed, order = packed_parts(source, tensor)
        return fill(model, path, packed, self._devices[name], self._config.compute, order)
