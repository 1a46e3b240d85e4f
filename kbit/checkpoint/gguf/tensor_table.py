"""Whether a GGUF file's tensors are those of the model that its metadata says."""

from __future__ import annotations

from collections.abc import Mapping

from kbit.checkpoint.gguf.metadata import GGUFHeader, GGUFTensor, quoted
from kbit.host.errors import CheckpointError, UnsupportedError


def check_tensors(
    header: GGUFHeader, kind: str, tensors: Mapping[str, GGUFTensor], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Every expected tensor is there with its shape, and nothing else is.

    Args:
        header: of the file.
        kind: what to call such a model in an error.
        tensors: those of the file, by name.
        shapes: of those that the model has, by name.

    Raises:
        CheckpointError: one is missing, or has another shape.
        UnsupportedError: there is one more.
    """
    for name, shape in shapes.items():
        if name not in tensors:
            raise CheckpointError(
                f"{header.path}: tensor '{name}' is missing; the file is incomplete, download or convert it again"
            )
        if tensors[name].shape != shape:
            header.fail(f"tensor '{name}' has the shape {tensors[name].shape}, the metadata says {shape}")
    for name in tensors:
        if name not in shapes:
            raise UnsupportedError(
                f"{header.path}: tensor {quoted(name)} has no place in a {kind} model that kbit knows; leaving it out "
                "would change the model"
            )
