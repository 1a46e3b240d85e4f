"""Models of the Hugging Face hub: fetching what kbit reads of one, or finding it in the hub's cache."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

from kbit.host.errors import KbitError, UsageError, one_line
from kbit.host.notes import note

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w./-]+\.gguf)?")
_PART = re.compile(r"(.*-)(\d{5})(-of-(\d{5})\.gguf)")
# Not wanted of a repository. The hub's patterns match across "/", so "*.safetensors" alone would also fetch original/,
# onnx/ and the like; consolidated.*.safetensors are the same weights once more, in Mistral's own format.
_NOT_FROM_HUB = ["*/*", "consolidated*"]
_FACTS_SECONDS = 5.0
# Whose errors huggingface_hub lets through when there is no connection; their types changed between releases.
_HTTP_LIBRARIES = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")


def hub_path(model: str) -> Path:
    """The folder or .gguf file of a hub id, fetched if need be; where the hub cannot be reached, as the cache has it.

    Args:
        model: "org/name", or "org/name:file.gguf".

    Raises:
        UsageError: there is no such model, or no such file in it.
        KbitError: neither the hub nor the cache gave it.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        return _fetched(model)
    except GatedRepoError:
        raise KbitError(
            f"{model}: access to this model is restricted; ask for it on its page, then hf auth login"
        ) from None
    except RepositoryNotFoundError:
        raise UsageError(
            f"{model}: neither a local path nor a model on the hub (or it is private: hf auth login)"
        ) from None
    except HFValidationError as error:
        raise UsageError(f"{model}: no such folder, and not a possible hub id ({_first_line(error)})") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        reason = _first_line(error)
    except Exception as error:
        if isinstance(error, RuntimeError) and "home directory" in str(error):  # a user id without a home
            raise KbitError(f"{model}: there is no home folder for the hub's cache: set HF_HOME to a folder") from None
        if type(error).__module__.split(".")[0] not in _HTTP_LIBRARIES:
            raise
        reason = type(error).__name__
    found = hub_cached(model)
    if found is None:
        raise KbitError(
            f"{model}: not a local path, and the hub could not be reached ({reason}); download it elsewhere and pass "
            "the folder"
        )
    note(f"{model}: the hub could not be reached; {found} of its cache is used")
    return found


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


def gguf_models(names: list[str]) -> list[str]:
    """The models among GGUF files: the first part of each that is split, and no projectors of vision models."""
    firsts = sorted({gguf_parts(name)[0] for name in names})
    return [name for name in firsts if "mmproj" not in name.rpartition("/")[2].lower()] or firsts


def only_gguf(where: str, names: list[str], separator: str) -> str:
    """The one model among GGUF files.

    Args:
        where: what holds them, for the error.
        names: one file at least.
        separator: between `where` and the name of a file, where a user names both.

    Raises:
        UsageError: there are several.
    """
    models = gguf_models(names)
    if len(models) > 1:
        raise UsageError(
            f"{where}: holds {len(models)} GGUF files; name one, for example {where}{separator}{models[0]}"
        )
    return models[0]


def _fetched(model: str) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    repository, _, file = model.partition(":")
    if file:
        return _fetched_gguf(repository, file)
    folder = Path(snapshot_download(repository, allow_patterns=hub_patterns(), ignore_patterns=_NOT_FROM_HUB))
    if not any(folder.glob("*.safetensors")):
        # Not list_repo_files, which would try again for half a minute where there is no network.
        siblings = HfApi().model_info(repository).siblings or []
        ggufs = [sibling.rfilename for sibling in siblings if sibling.rfilename.endswith(".gguf")]
        if ggufs:
            return _fetched_gguf(repository, only_gguf(model, ggufs, ":"))
    return folder


def _fetched_gguf(repository: str, file: str) -> Path:
    from huggingface_hub import snapshot_download

    parts = gguf_parts(file)
    # Not hf_hub_download: that would retry for 20 s where there is no network, and could mix revisions of the parts.
    folder = Path(snapshot_download(repository, allow_patterns=[glob.escape(part) for part in parts]))
    missing = [part for part in parts if not (folder / part).is_file()]
    if missing:
        raise UsageError(f"{repository}:{file}: there is no {missing[0]} in this repository")
    return folder / parts[0]


@dataclass(frozen=True)
class HubFacts:
    """What the hub says of a model: bytes of its weight files, its licence, and whether its terms must be accepted."""

    nbytes: int
    licence: str | None
    gated: bool


def hub_facts(repositories: Sequence[str]) -> dict[str, HubFacts]:
    """What the hub says of models now; those that it does not know are left out.

    Raises:
        KbitError: it cannot be asked.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    api, found = HfApi(), {}
    for repository in repositories:
        try:
            info = api.model_info(repository, files_metadata=True, timeout=_FACTS_SECONDS)
        except RepositoryNotFoundError:
            continue
        except (OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
            raise KbitError(_first_line(error)) from None
        except Exception as error:
            if type(error).__module__.split(".")[0] not in _HTTP_LIBRARIES:
                raise
            raise KbitError(type(error).__name__) from None
        files = {file.rfilename: file.size or 0 for file in info.siblings or []}
        weights = [name for name in files if fnmatch(name, "*.safetensors") and not _unwanted(name)]
        licence = next((tag.removeprefix("license:") for tag in info.tags or [] if tag.startswith("license:")), None)
        found[repository] = HubFacts(sum(files[name] for name in weights), licence, bool(info.gated))
    return found


def _unwanted(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in _NOT_FROM_HUB)


def cached_models() -> Iterator[tuple[str, Path]]:
    """(name as commands take it, folder or .gguf file) of all models in the hub's cache."""
    from huggingface_hub import constants

    for storage in sorted(Path(constants.HF_HUB_CACHE).glob("models--*--*")):
        repository = storage.name.removeprefix("models--").replace("--", "/", 1)
        for folder in _snapshots(repository):
            if holds_safetensors(folder):
                yield repository, folder
                break
            names = gguf_models(_ggufs(folder))
            if names:
                for name in names:
                    yield repository if len(names) == 1 else f"{repository}:{name}", folder / name
                break


def cache_of(repository: str) -> tuple[list[Path], Callable[[], int]] | None:
    """What the hub's cache holds of a repository: its files, and a function that removes it all and says how many bytes
    that freed; None where it holds nothing.

    Args:
        repository: "org/name", of a model.
    """
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        cache = scan_cache_dir()
    except CacheNotFound:
        return None
    found = next((r for r in cache.repos if (r.repo_type, r.repo_id) == ("model", repository)), None)
    if found is None:
        return None
    files = sorted({file.blob_path for revision in found.revisions for file in revision.files})

    def remove() -> int:
        # Of this repository alone: a copy of it may have revisions of the same hash.
        only = replace(cache, repos=frozenset({found}))
        strategy = only.delete_revisions(*(revision.commit_hash for revision in found.revisions))
        strategy.execute()
        return int(strategy.expected_freed_size)

    return files, remove


def _snapshots(repository: str) -> list[Path]:
    """What the hub's cache holds of a repository: the folder of revision main first, then the newest."""
    from huggingface_hub import constants

    storage = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
    try:
        snapshots = sorted((storage / "snapshots").iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
        main = (storage / "refs" / "main").read_text(encoding="utf-8").strip() if snapshots else ""
    except (OSError, UnicodeDecodeError):
        return []
    return sorted(snapshots, key=lambda path: path.name != main)


def holds_safetensors(folder: Path) -> bool:
    """Whether a folder holds a configuration and weights in safetensors files."""
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def _ggufs(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*.gguf")]


def hub_cached(model: str) -> Path | None:
    """What the hub's cache holds of a model, a folder or .gguf file, if that is one: revision main, or the newest."""
    repository, _, file = model.partition(":")
    for folder in _snapshots(repository):
        if file:
            parts = gguf_parts(file)
            if all((folder / part).is_file() for part in parts):
                return folder / parts[0]
            continue
        if holds_safetensors(folder):
            return folder
        names = _ggufs(folder)
        if names:
            only = only_gguf(model, names, ":")
            if all((folder / part).is_file() for part in gguf_parts(only)):
                return folder / only
    return None


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return one_line(text.splitlines()[0], 160) if text else type(error).__name__
