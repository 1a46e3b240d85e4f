"""From a model's name to something that generates: source, backend, decoder, tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

from kbit.engine.tokenizer import Tokenizer
from kbit.models.decoder import Decoder

if TYPE_CHECKING:
    from kbit.checkpoint.source import CheckpointSource


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model in memory.

    Attributes:
        name: what the user called it.
        decoder: the model, prepared for its backend.
        tokenizer: its tokenizer.
        load_seconds: from opening the checkpoint to the last prepared weight, a download not included.
    """

    name: str
    decoder: Decoder
    tokenizer: Tokenizer
    load_seconds: float

    @property
    def backend_name(self) -> str:
        """Short name of the backend, for reports."""
        return self.decoder.backend.name


def load_model(
    model: str,
    device: str = "auto",
    threads: int | None = None,
    *,
    check: Callable[[Tokenizer, CheckpointSource], object] | None = None,
) -> LoadedModel:
    """Loads a model.

    Args:
        model: a folder, a .gguf file, a hub id or a catalogue name (`kbit.checkpoint.resolve.open_model`).
        device: "auto", "cpu" or "cuda".
        threads: CPU threads for torch, for the whole process; None leaves torch's choice.
        check: called with tokenizer and checkpoint before any weight is read, to refuse early what these can tell.

    Raises:
        UsageError: no such model, no such device, or an impossible number of threads.
        CheckpointError, UnsupportedError: the model cannot be read or run.
    """
    from kbit.checkpoint.resolve import open_model
    from kbit.models.load import load_decoder
    from kbit.ops.select import select_backend, set_threads

    set_threads(threads)
    backend = select_backend(device)  # before the model: a wrong device needs no download to be reported
    with open_model(model) as source:
        start = perf_counter()
        tokenizer = Tokenizer.from_source(source)
        if check is not None:
            check(tokenizer, source)
        decoder = load_decoder(source, backend)
        return LoadedModel(model, decoder, tokenizer, perf_counter() - start)
