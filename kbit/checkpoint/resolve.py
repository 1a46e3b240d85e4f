"""From what a user types to an open model: a folder, a .gguf file, a catalogue name or a hub id."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path

from kbit.checkpoint.source import CheckpointSource
from kbit.host.errors import CheckpointError, KbitError, UnsupportedError, UsageError

_PICKLE_ENDINGS = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w./-]+\.gguf)?")
_PART = re.compile(r"(.*-)(\d{5})(-of-(\d{5})\.gguf)")
# Not wanted of a repository. The hub's patterns match across "/", so "*.safetensors" alone would also fetch original/,
# onnx/ and the like; consolidated.*.safetensors are the same weights once more, in Mistral's own format.
_NOT_FROM_HUB = ["*/*", "consolidated*"]


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
    from kbit.checkpoint.pull import CATALOGUE

    path = Path(os.path.expanduser(model))
    hub_id = _HUB_ID.fullmatch(model)
    # "models/x.gguf" is a path with a typing error; "org/name:x.gguf" is not.
    if hub_id and (hub_id[1] or path.suffix not in (".gguf", ".safetensors", *_PICKLE_ENDINGS)):
        return _open_hub(model)
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
    from kbit.checkpoint.readers.hf_folder import HFFolder
    from kbit.checkpoint.readers.kbit_folder import KbitFolder
    from kbit.host.files import read_json_object

    config = path / "config.json"
    if not config.is_file():
        ggufs = sorted(path.glob("*.gguf"))
        if len(ggufs) == 1:
            return _open_file(ggufs[0])
        if ggufs:
            raise UsageError(f"{path}: holds {len(ggufs)} GGUF files; name one, for example {ggufs[0]}")
        return HFFolder(path)  # says what is missing
    section = read_json_object(config).get("quantization_config")
    if isinstance(section, dict) and section.get("quant_method") == "kbit":
        return KbitFolder(path)
    return HFFolder(path)


def _open_file(path: Path) -> CheckpointSource:
    if path.suffix in _PICKLE_ENDINGS:
        raise UnsupportedError(
            f"{path}: looks like a pickle, and loading those can run code: convert it to safetensors"
        )
    if path.suffix == ".safetensors":
        raise UsageError(f"{path}: name the folder that holds it (its config.json and tokenizer are needed too)")
    from kbit.checkpoint.gguf.source import GGUFSource

    return GGUFSource(path)


def hub_patterns() -> list[str]:
    """What to fetch of a model's repository: what kbit reads, so neither pickles nor code."""
    from kbit.checkpoint.readers.hf_folder import INDEX_NAME, SIDECAR_NAMES

    return ["*.safetensors", "config.json", "adapter_config.json", INDEX_NAME, *SIDECAR_NAMES]


def gguf_parts(name: str) -> list[str]:
    """All parts of the split GGUF file that `name` is one part of ("m-00002-of-00003.gguf"), or just `name`."""
    match = _PART.fullmatch(name)
    if match is None or not 1 <= int(match[2]) <= int(match[4]):
        return [name]
    return [f"{match[1]}{part:05d}{match[3]}" for part in range(1, int(match[4]) + 1)]


def _open_hub_gguf(repository: str, file: str) -> CheckpointSource:
    from huggingface_hub import snapshot_download

    parts = gguf_parts(file)
    # Not hf_hub_download: that would retry for 20 s where there is no network, and could mix revisions of the parts.
    folder = Path(snapshot_download(repository, allow_patterns=[glob.escape(part) for part in parts]))
    missing = [part for part in parts if not (folder / part).is_file()]
    if missing:
        raise UsageError(f"{repository}:{file}: there is no {missing[0]} in this repository")
    return _open_file(folder / parts[0])


def _open_hub(model: str) -> CheckpointSource:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    repository, _, file = model.partition(":")
    try:
        if file:
            return _open_hub_gguf(repository, file)
        folder = Path(snapshot_download(repository, allow_patterns=hub_patterns(), ignore_patterns=_NOT_FROM_HUB))
        if not any(folder.glob("*.safetensors")):
            names = [name for name in HfApi().list_repo_files(repository) if name.endswith(".gguf")]
            ggufs = [name for name in names if gguf_parts(name)[0] == name]
            if len(ggufs) == 1:
                return _open_hub_gguf(repository, ggufs[0])
            if ggufs:
                raise UsageError(f"{model}: holds {len(ggufs)} GGUF files; name one, for example {model}:{ggufs[0]}")
        return open_folder(folder)
    except GatedRepoError:
        raise KbitError(
            f"{model}: access to this model is restricted; ask for it on its page, then hf auth login"
        ) from None
    except RepositoryNotFoundError:
        raise UsageError(
            f"{model}: neither a local path nor a model on the hub (or it is private: hf auth login)"
        ) from None
    except HFValidationError as error:
        reason = str(error).strip().splitlines()[0][:160]
        raise UsageError(f"{model}: no such folder, and not a possible hub id ({reason})") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise KbitError(
            f"{model}: not a local path, and the hub could not be reached ({reason}); download it elsewhere and pass "
            "the folder"
        ) from None
    except Exception as error:
        # huggingface_hub surfaces its HTTP library's own connection errors, whose types changed between releases.
        if type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"):
            raise KbitError(
                f"{model}: not a local path, and the hub could not be reached ({type(error).__name__})"
            ) from None
        raise
