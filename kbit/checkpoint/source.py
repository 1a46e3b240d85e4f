"""What every checkpoint reader offers, whatever the file format behind it.

A source speaks one language: Hugging Face tensor names, Hugging Face row order (rotate-half RoPE), a Hugging
Face config dictionary and Hugging Face tokenizer files. Readers of other formats translate into it, so nothing
above this layer knows where a model came from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from kbit.formats.quant_tensor import QuantTensor
    from kbit.formats.stored import AnyStored, StoredMatrix


# The key of a configuration whose tensors are canonical (`kbit.models.canonical`) although its family publishes others.
CANONICAL = "kbit_canonical_tensors"


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as it lies in a checkpoint.

    Attributes:
        name: Hugging Face parameter name, for example `model.layers.0.mlp.up_proj.weight`.
        shape: logical shape, outermost dimension first (a linear weight is (N out, K in)).
        stored_as: how the file holds it: a safetensors dtype ("F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", ...),
            a GGUF type ("Q4_1", ...) or a kbit format ("nf4-b64").
        nbytes: bytes it occupies in the file, scales included.
        file: the file that holds it.
        packed_as: how another quantizer has packed it ("GPTQ 4-bit"); `stored_as` is then what kbit holds it as, and
            `nbytes` what it takes in the file.
    """

    name: str
    shape: tuple[int, ...]
    stored_as: str
    nbytes: int
    file: Path
    packed_as: str = ""

    @property
    def numel(self) -> int:
        count = 1
        for dim in self.shape:
            count *= dim
        return count


class CheckpointSource(ABC):
    """A model on disk: configuration, tokenizer files and named tensors, read one at a time.

    Opening a source reads headers only and imports no torch; tensor data is mapped when asked for.
    """

    path: Path
    config: dict[str, Any]

    @property
    @abstractmethod
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors by Hugging Face name, in file order."""

    @abstractmethod
    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a tensor along its first dimension, as float32 (values exactly as stored).

        The result owns its memory. Raises CheckpointError when the data is unreadable.
        """

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor as float32 (see read_rows)."""
        shape = self.tensors[name].shape
        return self.read_rows(name, 0, shape[0] if shape else 1)

    def read_weight(self, name: str) -> torch.Tensor | QuantTensor:
        """The tensor in the form the engine keeps: a QuantTensor where the file holds kbit codes, else float32."""
        return self.read(name)

    @abstractmethod
    def sidecar_files(self) -> Mapping[str, bytes]:
        """Files that travel with the weights, by name: tokenizer.json, tokenizer_config.json,
        generation_config.json, chat_template.jinja, ... Only those that exist. Never config.json."""

    def token_table(self) -> memoryview | None:
        """The tokenizer as `kbit.text.token_table.build_table` makes it, mapped, where one was prepared: then
        tokenizer.json of `sidecar_files` is asked for only by what the table cannot do."""
        return None

    @abstractmethod
    def fingerprint(self) -> str:
        """A hex digest that changes when the source's content may have changed (headers, sizes, mtimes)."""

    def close(self) -> None:
        """Release file handles; reading afterwards is an error."""

    def __enter__(self) -> CheckpointSource:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@runtime_checkable
class PackedStacks(Protocol):
    """A reader of files that hold several packed matrices in one tensor, as of all experts of a layer."""

    def read_packed(self, name: str, index: int) -> StoredMatrix:
        """The matrix at an index of the first axis, rows as they are stored.

        Raises CheckpointError when the data is unreadable.
        """


class StoredSource(CheckpointSource):
    """A reader of files: what it reads are numpy arrays, so that an engine that needs no torch loads none."""

    @abstractmethod
    def read_array_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """`read_rows` without torch."""

    @abstractmethod
    def read_stored(self, name: str) -> AnyStored:
        """A matrix as the file holds it, without torch: quantized, 16-bit floats as they are, all else as float32.

        Raises CheckpointError when the data is unreadable.
        """

    def read_array(self, name: str) -> NDArray[np.float32]:
        """`read` without torch."""
        shape = self.tensors[name].shape
        return self.read_array_rows(name, 0, shape[0] if shape else 1)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        import torch

        return torch.from_numpy(self.read_array_rows(name, start, stop))

    def read_weight(self, name: str) -> torch.Tensor | QuantTensor:
        import torch

        from kbit.formats.stored import StoredMatrix, widened

        if len(self.tensors[name].shape) != 2:
            return self.read(name)
        stored = self.read_stored(name)
        if isinstance(stored, StoredMatrix):
            return stored.tensor()
        return torch.from_numpy(widened(stored.values, stored.kind))
