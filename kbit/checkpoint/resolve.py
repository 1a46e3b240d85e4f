"""From what a user types to an open model: a folder, a .gguf file, a catalogue name or a hub id."""

from __future__ import annotations

import os
from pathlib import Path

from kbit.checkpoint.source import CheckpointSource
from kbit.host.errors import CheckpointError, UsageError
from kbit.host.notes import note


def open_model(model: str) -> CheckpointSource:
    """Open a model for reading: headers only, no torch.

    Args:
        model: a Hugging Face folder, a kbit folder, a .gguf file, a name `kbit pull` lists, or a hub id
            ("org/name", or "org/name:file.gguf" where a repository holds several GGUF files).

    Raises:
        UsageError: there is no such thing.
        CheckpointError, UnsupportedError: there is, but it cannot be read.
        KbitError: a download failed.
    """
    path = locate(model)
    try:
        if path is not None:
            return open_folder(path) if path.is_dir() else _open_file(path)
    except OSError as error:
        raise CheckpointError(f"{model[:200]}: cannot be opened ({error.strerror})") from None
    from kbit.checkpoint.foreign import PICKLE_ENDINGS
    from kbit.checkpoint.hub import HUB_ID, hub_path
    from kbit.checkpoint.pull import CATALOGUE

    path = Path(os.path.expanduser(model))
    hub_id = HUB_ID.fullmatch(model)
    # "models/x.gguf" is a path with a typing error; "org/name:x.gguf" is not.
    if hub_id and (hub_id[1] or path.suffix not in (".gguf", ".safetensors", *PICKLE_ENDINGS)):
        path = hub_path(model)
        return open_folder(path) if path.is_dir() else _open_file(path)
    raise UsageError(
        f"{model}: no such folder or file, and not a name kbit knows ({', '.join(CATALOGUE)}); a hub id looks like "
        "org/name"
    )


def locate(model: str) -> Path | None:
    """The folder or file of a model that is on this machine, or is in the catalogue; None for what may be a hub id.

    Raises:
        UsageError: no name at all.
        CheckpointError: a path that cannot be looked at.
        KbitError: a download failed.
    """
    if not model.strip():
        raise UsageError("the model's name is empty: give a folder, a .gguf file, a hub id or a name kbit pull lists")
    path = Path(os.path.expanduser(model))
    try:
        if path.is_dir() or path.is_file():
            return path
    except OSError as error:
        raise CheckpointError(f"{model[:200]}: cannot be opened ({error.strerror})") from None
    from kbit.checkpoint.pull import CATALOGUE, pull

    return pull(model) if model in CATALOGUE else None


def open_folder(path: Path) -> CheckpointSource:
    """Open a Hugging Face style folder, quantized by kbit or not."""
    from kbit.checkpoint.foreign import quantizer_of, refuse_pointers
    from kbit.checkpoint.hub import only_gguf
    from kbit.checkpoint.packed import READERS
    from kbit.checkpoint.readers.hf_folder import HFFolder
    from kbit.checkpoint.readers.kbit_folder import KbitFolder
    from kbit.checkpoint.readers.lora_file import is_adapter
    from kbit.checkpoint.readers.lora_folder import LoraFolder
    from kbit.host.files import read_json_object

    config = path / "config.json"
    ggufs = [found.name for found in path.glob("*.gguf")]
    if ggufs and config.is_file() and any(path.glob("*.safetensors")):
        note(f"{path}: the safetensors files are the model; {min(ggufs)} beside them is not used")
    elif ggufs:
        gguf = only_gguf(str(path), ggufs, os.sep)
        if config.is_file():
            note(f"{path}: {gguf} is the model; config.json beside it is not used")
        return _open_file(path / gguf)
    if is_adapter(path):
        return LoraFolder(path, open_model)
    if not config.is_file():
        return HFFolder(path)  # says what is missing
    refuse_pointers(path, [config.name])
    method = quantizer_of(path, read_json_object(config)).method
    if method == "kbit":
        return KbitFolder(path)
    if method in READERS:
        from kbit.checkpoint.readers.packed_folder import PackedFolder

        return PackedFolder(path)
    return HFFolder(path)


def _open_file(path: Path) -> CheckpointSource:
    if path.suffix == ".safetensors":
        raise UsageError(f"{path}: name the folder that holds it (its config.json and tokenizer are needed too)")
    from kbit.checkpoint.gguf.source import GGUFSource

    return GGUFSource(path)
