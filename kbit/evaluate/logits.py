"""Logits of a model over windows, a few positions at a time.

A window of 2048 tokens over 150,000 words makes 1.2 GB of logits, so no window's logits are ever held: the window
goes through the KV cache in pieces, and each piece's logits are used and dropped. Where only the second half of a
window counts, the first half runs without its logits.
"""

from __future__ import annotations

import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Protocol, TypeVar

import numpy as np
import torch

from kbit.engine.prompt_cache import DecoderSpec, check_vocabulary
from kbit.graph.cache import Cache
from kbit.host.errors import KbitError, UsageError
from kbit.text.windows import Windows

# Positions per forward pass: as many as keep the logits below 128 MiB, at most 512.
_PIECE_ELEMENTS = 1 << 25
_PIECE_MAX = 512
# Elements per float64 temporary in log-softmax arithmetic: 1 MiB, which stays in a core's cache between the passes
# over it (32 MiB took three times as long: 27 ns an element instead of 9 for a comparison).
_ROW_ELEMENTS = 1 << 17
# Disk a reference's stored logits may take unless the caller allows more.
DEFAULT_CACHE_BYTES = 16 << 30


Kept = TypeVar("Kept", bound="KeptLogits")


class Evaluable(Protocol):
    """A model that gives logits over windows: `kbit.models.decoder.Decoder` or the like."""

    @property
    def spec(self) -> DecoderSpec:
        """Its sizes."""

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """An empty cache."""

    def forward(
        self, ids: torch.Tensor, cache: Cache, lengths: torch.Tensor | None = None, last_only: bool = False
    ) -> torch.Tensor:
        """ids (B, T) -> logits (B, T, V), or (B, 1, V) with last_only; the tokens are then in the cache."""


class LogitsSource(ABC):
    """A model's logits over windows: computed (ModelLogits) or kept in a file (KeptLogits)."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """V."""

    @abstractmethod
    def window(self, windows: Windows, index: int) -> Iterator[torch.Tensor]:
        """The scored positions of one window in order, in pieces: float32 (P, V), P as in `pieces`."""


def pieces(windows: Windows, vocab_size: int) -> list[tuple[int, int]]:
    """[start, stop) of every forward pass over the scored positions first_scored .. n-2 of a window."""
    step = max(1, min(_PIECE_MAX, _PIECE_ELEMENTS // vocab_size))
    stop = windows.context - 1
    return [(start, min(start + step, stop)) for start in range(windows.first_scored, stop, step)]


def row_step(vocab_size: int) -> int:
    """Rows of logits to widen to float64 at a time."""
    return max(1, _ROW_ELEMENTS // vocab_size)


class ModelLogits(LogitsSource):
    """Logits computed by a model as they are asked for."""

    def __init__(self, model: Evaluable) -> None:
        self._model = model

    @property
    def vocab_size(self) -> int:
        return self._model.spec.vocab_size

    def window(self, windows: Windows, index: int) -> Iterator[torch.Tensor]:
        """See LogitsSource.

        Raises:
            UsageError: a token id outside the model's vocabulary (the tokenizer is another model's).
            KbitError: the model's logits do not have the vocabulary's width.
        """
        ids = torch.from_numpy(windows.ids[index])[None]  # (1, n)
        check_vocabulary((int(ids.min()), int(ids.max())), self.vocab_size)
        with torch.inference_mode():
            # The last token is only predicted, never fed.
            cache = self._model.new_cache(1, windows.context - 1)
            for start in range(0, windows.first_scored, _PIECE_MAX):
                stop = min(start + _PIECE_MAX, windows.first_scored)
                self._model.forward(ids[:, start:stop], cache, last_only=True)
        for start, stop in pieces(windows, self.vocab_size):
            with torch.inference_mode():
                logits = self._model.forward(ids[:, start:stop], cache)[0]  # (P, V)
            if logits.shape != (stop - start, self.vocab_size):
                raise KbitError(
                    f"the model gave logits of shape {tuple(logits.shape)} for {stop - start} tokens "
                    f"and a vocabulary of {self.vocab_size}"
                )
            yield logits


class KeptLogits(LogitsSource):
    """A model's logits over certain windows in a file: float32 (W, S, V), exactly as computed.

    Args:
        windows: the windows they belong to.
        vocab_size: V.
    """

    def __init__(self, windows: Windows, vocab_size: int) -> None:
        self._windows, self._vocab_size = windows, vocab_size

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    def window(self, windows: Windows, index: int) -> Iterator[torch.Tensor]:
        """See LogitsSource; `windows` must be those given at construction."""
        if windows is not self._windows:
            raise ValueError("stored logits belong to the windows they were made for")
        return self._window(index)

    @abstractmethod
    def _window(self, index: int) -> Iterator[torch.Tensor]:
        """`window` of the windows that the file belongs to."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the file."""

    def __enter__(self: Kept) -> Kept:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def logits_bytes(windows: Windows, vocab_size: int) -> int:
    """Disk that the logits of all windows take."""
    return 4 * windows.scored * vocab_size


def check_room(folder: Path, needed: int, have: int = 0) -> None:
    """
    Args:
        folder: where logits are to be kept.
        needed: bytes of their file.
        have: bytes of it that are there already.

    Raises:
        KbitError: the disk has less room than that.
        OSError: there is no such folder.
    """
    free = shutil.disk_usage(folder).free + have
    if free < needed:
        raise KbitError(
            f"{folder} has {free / 1e9:.1f} GB free, the reference's logits need {needed / 1e9:.1f} GB: "
            "use fewer tokens (--max-tokens) or another folder"
        )


def stored_bytes(logits: torch.Tensor) -> memoryview:
    """Logits (P, V) as they are kept in a file."""
    return logits.to("cpu", torch.float32).contiguous().numpy().data.cast("B")


class StoredLogits(KeptLogits):
    """A model's logits on disk, so that many models can be compared with one that runs once per window.

    The first pass over a window computes it and writes float32 logits, exactly as computed, to a temporary file
    (4 * V bytes per scored token: 200 kB at V = 49,152, so 1.6 GB for 8,176 tokens); later passes read the file.
    The file lives in `directory` and goes away on close.

    Args:
        model: the model whose logits are wanted.
        windows: the windows all comparisons run on.
        directory: where the temporary file goes (default: the system's temporary folder).
        max_bytes: refuse to take more disk than this.

    Raises:
        UsageError: the file would exceed `max_bytes`.
        KbitError: the disk has less room than the file needs.
    """

    def __init__(
        self,
        model: Evaluable,
        windows: Windows,
        directory: Path | None = None,
        max_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> None:
        self._live = ModelLogits(model)
        super().__init__(windows, self._live.vocab_size)
        needed = logits_bytes(windows, self.vocab_size)
        if needed > max_bytes:
            raise UsageError(
                f"the reference's logits for {windows.scored} tokens would take {needed / 1e9:.1f} GB of disk, more "
                f"than the {max_bytes / 1e9:.1f} GB allowed: use fewer tokens"
            )
        folder = Path(tempfile.gettempdir()) if directory is None else directory
        try:
            check_room(folder, needed)
            # Closed by close(); unlinked by the operating system even when the process is killed.
            self._file = tempfile.TemporaryFile(dir=folder, prefix="kbit-logits-")  # noqa: SIM115
        except OSError as error:
            raise KbitError(f"cannot keep logits in {folder}: {error.strerror or error}") from error
        self._stored = [False] * windows.count

    def _window(self, index: int) -> Iterator[torch.Tensor]:
        offset = 4 * self._vocab_size * self._windows.scored_per_window * index
        if self._stored[index]:
            yield from self._read(offset)
            return
        for logits in self._live.window(self._windows, index):
            data = stored_bytes(logits)
            try:
                self._file.seek(offset)
                self._file.write(data)
            except OSError as error:
                raise KbitError(f"cannot store the reference's logits: {error.strerror or error}") from error
            offset += data.nbytes
            yield logits
        self._stored[index] = True

    def _read(self, offset: int) -> Iterator[torch.Tensor]:
        for start, stop in pieces(self._windows, self._vocab_size):
            data = np.empty((stop - start, self._vocab_size), dtype=np.float32)
            self._file.seek(offset)
            if self._file.readinto(data.data) != data.nbytes:
                raise KbitError("the file of stored logits is shorter than what was written to it")
            offset += data.nbytes
            yield torch.from_numpy(data)

    def close(self) -> None:
        """Give the disk back."""
        self._file.close()
