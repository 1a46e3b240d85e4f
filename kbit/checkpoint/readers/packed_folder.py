"""Reading a Hugging Face folder whose weights another quantizer has packed.

Which tensors belong to a packed weight, and what they mean, the quantizer's file in `kbit.checkpoint.packed` says.
Here they become one tensor each; whatever is left is a tensor of its own, and nothing in the files is passed over.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING

from kbit.checkpoint.foreign import PLAIN, is_companion
from kbit.checkpoint.packed import READERS
from kbit.checkpoint.packed.weight import FLOAT_KINDS, PackedTensors, PackedWeight
from kbit.checkpoint.readers.hf_folder import HFFolder
from kbit.checkpoint.source import TensorInfo
from kbit.checkpoint.surplus import harmless
from kbit.host.errors import CheckpointError
from kbit.host.notes import note

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kbit.formats.stored import AnyStored

Find = Callable[[PackedTensors], list[PackedWeight]]

_SECTIONS = ("quantization_config", "quantization", "compression_config")
ZERO_BIAS = "zeros"


class PackedFolder(HFFolder):
    """A folder with packed weights.

    Raises:
        CheckpointError, UnsupportedError: as of HFFolder; and packed weights that are incomplete, or of a kind that
            kbit does not read.
    """

    _unpacks = True

    def _describe(self) -> dict[str, TensorInfo]:
        method, certain, section = self._quantizer
        assert method is not None
        find: Find = import_module(f"kbit.checkpoint.packed.{READERS[method]}").find
        tensors = PackedTensors(self.path, self._where, section, self.config)
        packed = find(tensors)
        for key in _SECTIONS:
            self.config.pop(key, None)
        self._packed = {weight.name: weight for weight in packed}
        part_of = {part: weight for weight in packed for part in weight.parts}
        infos: dict[str, TensorInfo] = {}
        for name, plain in super()._describe().items():
            weight = part_of.get(name)
            if weight is None:
                infos[name] = self._plain(plain)
            elif weight.name not in infos:
                nbytes = sum(self.stored(part).nbytes for part in weight.parts)
                infos[weight.name] = TensorInfo(
                    weight.name, weight.shape, weight.held_as, nbytes, plain.file, weight.label
                )
        if not packed and certain:
            raise CheckpointError(
                f"{self.path}/config.json: the weights should be packed by {method}, but none is; remove "
                "quantization_config from it if they are plain numbers"
            )
        if not packed:
            note(f"{self.path}: {method} is named as the quantizer, but the weights are plain numbers, which are used")
        return infos

    def _plain(self, info: TensorInfo) -> TensorInfo:
        """A tensor that is no part of a packed weight.

        Raises:
            CheckpointError: it looks like one.
        """
        module, _, end = info.name.rpartition(".")
        if info.name in self._packed:
            parts = ", ".join(self._packed[info.name].parts)
            raise CheckpointError(
                f"{info.file}: {info.name} is there twice, packed ({parts}) and not; download the model again"
            )
        if is_companion(info):
            raise CheckpointError(
                f"{info.file}: {info.name} belongs to a packed weight, but its other tensors are missing "
                "or of another kind; download the model again"
            )
        if info.stored_as not in PLAIN and harmless(info) is None:
            raise CheckpointError(
                f"{info.file}: {info.name} is {info.stored_as}: neither a plain weight nor part of a packed one that "
                "kbit reads; use the original 16-bit checkpoint"
            )
        bias = end == "bias" and f"{module}.weight" in self._packed and info.stored_as in FLOAT_KINDS
        # Tools write one for every layer that they pack, whether the layer has one or not.
        if bias and not self._where[info.name].read_array(info.name).any():
            return replace(info, packed_as=ZERO_BIAS)
        return info

    def read_array_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        weight = self._packed.get(name)
        return super().read_array_rows(name, start, stop) if weight is None else weight.rows(start, stop)

    def read_stored(self, name: str) -> AnyStored:
        weight = self._packed.get(name)
        return super().read_stored(name) if weight is None else weight.stored()
