"""Writing a model folder so that it is either complete and checked, or not there.

All sizes are known before the first byte: the plan fixes every stored tensor's dtype and shape, so the safetensors
headers are written first and tensors land at their final offsets in any order, from as little memory as one chunk.

Work happens in `OUT.partial/`. A journal there records each finished weight with the sha256 of its bytes. A run that
was killed is resumed from the journal: the recorded bytes are hashed again, and whatever does not match (a torn
write, a lost page after a power cut) is simply written once more. `config.json`, without which nothing loads the
folder, is written last, and a rename of the whole folder to `OUT` ends the work. Only then does the journal go: a run
killed at any moment leaves something that the next one recognises as its own.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

from filelock import FileLock, Timeout

from kbit.checkpoint.output_folder import check_output_folder, names_in
from kbit.checkpoint.planned_shards import StoredWeight, plan_shards
from kbit.checkpoint.readers.hf_folder import INDEX_NAME
from kbit.checkpoint.readers.kbit_folder import MANIFEST_NAME
from kbit.host.errors import KbitError, UsageError
from kbit.host.files import fsync_folder, write_durably
from kbit.host.notes import note

# Hugging Face's default. Large enough that most models have a few files, small enough to copy and retry.
DEFAULT_SHARD_BYTES = 5_000_000_000
# What a power cut takes of a conversion, at most. (A killed process loses nothing that it has written.)
SYNC_SECONDS = 60.0
_JOURNAL = "journal.jsonl"
_REPLACED = ".replaced"
_HASH_BLOCK = 1 << 22


class CheckpointWriter:
    """Writes weights into a new model folder.

    Args:
        out: the folder to create.
        weights: everything that will be written, in order.
        plan_id: identifies source and plan; a partial folder of another plan is not continued.
        shard_bytes: start a new file when one would exceed this.
        resume: continue an interrupted run of the same plan (else start over).
        overwrite: replace `out` if it is a folder kbit wrote.

    Raises:
        UsageError: `out` is in the way, or an interrupted run of another plan is.
        KbitError: no permission, disk full, or another process is writing there.
    """

    def __init__(
        self,
        out: Path,
        weights: Sequence[StoredWeight],
        plan_id: str,
        *,
        shard_bytes: int = DEFAULT_SHARD_BYTES,
        resume: bool = True,
        overwrite: bool = False,
    ) -> None:
        self.out = out
        self.partial = partial_folder(out)
        self.plan_id = plan_id
        self._overwrite = overwrite
        self._shards = plan_shards(weights, shard_bytes)
        self._shard_of = {name: shard for shard in self._shards for name in shard.ranges}
        self._weights = {weight.name: weight for weight in weights}
        self._done: dict[str, dict[str, str]] = {}
        self._files: dict[str, IO[bytes]] = {}
        self._disk_failed = False
        self._synced = time.monotonic()
        with self._errors():
            check_output_folder(out, overwrite=overwrite)
            self.partial.parent.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(str(self.partial) + ".lock")
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                raise KbitError(
                    f"{self.partial}: another kbit process is writing there; wait for it or stop it"
                ) from None
        try:
            with self._errors():
                self._prepare(resume)
        except BaseException:
            self.close()
            raise

    @property
    def nbytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.nbytes for shard in self._shards)

    @property
    def done(self) -> frozenset[str]:
        """Names of weights that are written, found on resuming or written since."""
        return frozenset(self._done)

    def write(self, name: str, parts: Mapping[str, Iterable[bytes | memoryview]]) -> None:
        """Write one weight.

        Args:
            name: the weight's name.
            parts: for every stored array of it, its bytes in any number of pieces.
        """
        digests = {}
        with self._errors():
            for stored_name, pieces in parts.items():
                shard = self._shard_of[stored_name]
                begin, end = shard.ranges[stored_name]
                file = self._files[shard.file_name]
                file.seek(begin)
                digest, written = hashlib.sha256(), 0
                for piece in pieces:
                    digest.update(piece)
                    written += file.write(piece)
                if written != end - begin:
                    raise RuntimeError(f"{stored_name}: {written} bytes written, {end - begin} planned")
                digests[stored_name] = digest.hexdigest()
                file.flush()
            missing = self._weights[name].parts.keys() - digests.keys()
            if missing:
                raise RuntimeError(f"{name}: parts {sorted(missing)} were not written")
            self._journal.write(json.dumps({"done": name, "sha256": digests}) + "\n")
            self._journal.flush()
            if time.monotonic() - self._synced > SYNC_SECONDS:
                self._sync()
        self._done[name] = digests

    def finish(
        self, config: Mapping[str, Any], sidecars: Mapping[str, bytes], about: Mapping[str, Any] | None = None
    ) -> None:
        """Write index, tokenizer files, manifest and config, and move the folder into place.

        Args:
            config: the model's.
            sidecars: other files by name.
            about: what else the manifest is to say.
        """
        missing = self._weights.keys() - self._done.keys()
        if missing:
            raise RuntimeError(f"not written: {sorted(missing)}")
        with self._errors():
            for file in self._files.values():
                file.flush()
                os.fsync(file.fileno())
                file.close()
            self._journal.close()
            files = dict(sidecars)
            if len(self._shards) > 1:
                files[INDEX_NAME] = _json_bytes(
                    {
                        "metadata": {"total_size": sum(shard.nbytes - len(shard.header) for shard in self._shards)},
                        "weight_map": {name: shard.file_name for name, shard in self._shard_of.items()},
                    }
                )
            files["config.json"] = _json_bytes(config)
            digests = {name: digest for weight in self._done.values() for name, digest in weight.items()}
            manifest = {
                "version": 1,
                "plan": self.plan_id,
                **(about or {}),
                "tensors": dict(sorted(digests.items())),
                "files": {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())},
            }
            files[MANIFEST_NAME] = _json_bytes(manifest)
            for name in sorted(files, key=lambda name: name == "config.json"):  # config.json last
                (self.partial / name).parent.mkdir(exist_ok=True)
                write_durably(self.partial / name, files[name])
                if "/" in name:
                    fsync_folder((self.partial / name).parent)
            fsync_folder(self.partial)
            self._move_into_place()
        self.close()

    def _sync(self) -> None:
        """Let what is written survive a power cut: a rerun goes on from here."""
        files: list[IO[Any]] = [*self._files.values(), self._journal]
        for file in files:
            file.flush()
            os.fsync(file.fileno())
        fsync_folder(self.partial)
        fsync_folder(self.partial.parent)
        self._synced = time.monotonic()

    def close(self) -> None:
        """Release files and lock; what is written stays for a later run."""
        journal = getattr(self, "_journal", None)
        for file in (*self._files.values(), *([] if journal is None else [journal])):
            # Closing flushes, which fails on a full disk; what is lost so was never recorded as done.
            with suppress(OSError):
                file.close()
        if self._lock.is_locked:
            # Removed while still held: afterwards it could be another process's. (Windows removes it on release.)
            with suppress(OSError):
                Path(self._lock.lock_file).unlink(missing_ok=True)
            self._lock.release()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        # What these settings cannot do: a run with others, or of a mended source, need not be told to discard it.
        if isinstance(error, KbitError) and not self._disk_failed:
            with suppress(OSError, ValueError):
                self._journal.write(json.dumps({"failed": True}) + "\n")
        self.close()

    def _prepare(self, resume: bool) -> None:
        journal = self.partial / _JOURNAL
        records = _read_journal(journal) if self.partial.is_dir() else None
        if records is not None and records.plan != self.plan_id and records.failed:
            note(f"{self.partial}: removed what a run that failed had left there")
            shutil.rmtree(self.partial)
            records = None
        if records is not None and records.plan != self.plan_id and resume:
            raise UsageError(
                f"{self.partial}: an interrupted run with another source or other settings is there; repeat it as it "
                "was, or discard it with --no-resume"
            )
        if self.partial.exists() and (records is None or not resume):
            # Without a journal it is ours only if a run was killed over the journal's first line.
            if not self.partial.is_dir() or (records is None and names_in(self.partial) - {f"{_JOURNAL}.tmp"}):
                raise UsageError(f"{self.partial}: in the way, and not an interrupted run of kbit's; move it")
            shutil.rmtree(self.partial)
            records = None
        self.partial.mkdir(exist_ok=True)
        if records is None:
            write_durably(journal, (json.dumps({"plan": self.plan_id}) + "\n").encode())
        # Left by a run killed at the very end: the folder must not load before everything in it is checked.
        (self.partial / "config.json").unlink(missing_ok=True)
        for shard in self._shards:
            path = self.partial / shard.file_name
            intact = path.is_file() and path.stat().st_size == shard.nbytes
            file = path.open("r+b" if intact else "w+b")
            self._files[shard.file_name] = file
            if not intact or file.read(len(shard.header)) != shard.header:
                file.seek(0)
                file.truncate(0)
                file.truncate(shard.nbytes)
                file.write(shard.header)
                file.flush()
        for name, digests in (records.done if records else {}).items():
            if self._still_there(name, digests):
                self._done[name] = digests
        # Rewritten without torn or stale lines; appended to from here on.
        lines = [json.dumps({"plan": self.plan_id})]
        lines += [json.dumps({"done": name, "sha256": digests}) for name, digests in self._done.items()]
        write_durably(journal, ("\n".join(lines) + "\n").encode())
        self._journal = journal.open("a", encoding="utf-8")

    def _still_there(self, name: str, digests: Mapping[str, str]) -> bool:
        weight = self._weights.get(name)
        if weight is None or weight.parts.keys() != digests.keys():
            return False
        for stored_name, expected in digests.items():
            shard = self._shard_of[stored_name]
            begin, end = shard.ranges[stored_name]
            file = self._files[shard.file_name]
            file.seek(begin)
            digest = hashlib.sha256()
            left = end - begin
            while left:
                block = file.read(min(left, _HASH_BLOCK))
                if not block:
                    return False
                digest.update(block)
                left -= len(block)
            if digest.hexdigest() != expected:
                return False
        return True

    def _move_into_place(self) -> None:
        check_output_folder(self.out, overwrite=self._overwrite)  # again: it may have appeared meanwhile
        if self.out.exists():
            shutil.rmtree(self.partial / _REPLACED, ignore_errors=True)  # of a run killed at this very point
            self.out.rename(self.partial / _REPLACED)
        self.partial.rename(self.out)
        fsync_folder(self.out.parent)
        remove_leftovers(self.out)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._disk_failed = True
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise KbitError(
                    f"{self.partial}: the disk is full; make room and run the same command again, it will continue"
                ) from None
            raise KbitError(f"{error.filename or self.partial}: cannot be written ({error.strerror})") from None


def partial_folder(out: Path) -> Path:
    """Where the model is written until it is complete.

    Raises:
        UsageError: `out` is no name for a new folder ("/", ".", "..").
    """
    if out.name in ("", ".."):
        raise UsageError(f"{out}: not a name for a new folder; name one to create")
    return out.with_name(out.name + ".partial")


def remove_leftovers(out: Path) -> None:
    """Remove what a run still needed until the folder was in place; a run killed just then leaves it there."""
    shutil.rmtree(out / _REPLACED, ignore_errors=True)
    (out / _JOURNAL).unlink(missing_ok=True)


class _Journal(NamedTuple):
    """What a run has left: the id of its plan, digests of its finished weights, and whether an error ended it."""

    plan: str
    done: dict[str, dict[str, str]]
    failed: bool


def _read_journal(path: Path) -> _Journal | None:
    """The journal of an interrupted run; None where there is none."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return None
    plan, done, failed = None, {}, False
    for line in lines:
        try:
            record = json.loads(line)
            if plan is None:
                plan = str(record["plan"])
            elif record.get("failed") is True:
                failed = True
            else:
                done[str(record["done"])] = dict(record["sha256"])
        except (ValueError, KeyError, TypeError, AttributeError):
            break  # a torn line: written when the run was killed
    return None if plan is None else _Journal(plan, done, failed)


def _json_bytes(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
