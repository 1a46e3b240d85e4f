"""What the commands of encoders share: flags, reading texts, and opening a model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from kbit.cli.options import (
    MAX_PROMPT_BYTES,
    BackendOption,
    BitsOption,
    ComputeOption,
    DeviceOption,
    ModelOption,
    ThreadsOption,
    check_text,
)
from kbit.host.errors import UsageError
from kbit.host.utf8 import decode

if TYPE_CHECKING:
    from kbit.checkpoint.source import CheckpointSource
    from kbit.graph.backend import Backend

T = TypeVar("T")

# Tokens of a text that must fit, before texts are read.
ORDINARY_TOKENS = 512

FileOption = Annotated[
    Path | None,
    typer.Option("--file", "-f", metavar="FILE", help='Read texts from FILE, one a line ("-": standard input).'),
]


@dataclass(frozen=True)
class EncoderFlags:
    """Flags of a command that runs an encoder."""

    model: ModelOption
    device: DeviceOption = "auto"
    backend: BackendOption = "auto"
    threads: ThreadsOption = None
    compute: ComputeOption = None
    bits: BitsOption = None

    @contextmanager
    def opened(self, make: Callable[[CheckpointSource, Backend], T]) -> Iterator[T]:
        """A model, as `make` makes it of its checkpoint and of who computes."""
        from kbit.backends.select import select_backend, set_threads
        from kbit.engine.loader import open_prepared

        on_gpu = self.device == "cuda" or self.backend == "triton"
        # Nothing of a text is kept, so its keys and values need not be small: on the CPU they are float32.
        kv = None if on_gpu or self.backend == "reference" else 32
        backend = select_backend(
            self.device, backend=self.backend, threads=self.threads, compute=self.compute, kv_bits=kv
        )
        if backend.name == "reference":
            set_threads(self.threads)
        check = partial(_refuse_too_large, backend=backend, name=self.model) if backend.name == "native" else None
        with open_prepared(self.model, backend, check, self.bits) as source:
            made = make(source, backend)
        yield made


def _refuse_too_large(source: CheckpointSource, backend: Backend, name: str) -> None:
    """
    Raises:
        KbitError: a limit leaves this process less memory than the model takes with a text of ordinary length.
    """
    from kbit.backends.cpu.backend import NativeBackend
    from kbit.models.families import spec_from_config
    from kbit.planner.fits import Wanted, refuse_what_does_not_fit

    assert isinstance(backend, NativeBackend)
    longest = spec_from_config(source.config, where=f"config of {source.path}").context_length
    wanted = Wanted(
        min(longest, ORDINARY_TOKENS),
        kv="fp32",
        compute=backend.compute,
        threads=backend.context.threads,
        headless=True,
    )
    refuse_what_does_not_fit(source, wanted, name)


def read_lines(arguments: list[str] | None, file: Path | None, example: str) -> list[str]:
    """Texts from the command line, from the lines of a file, or of standard input where there are neither.

    Raises:
        UsageError: both or none are given; a file that cannot be read, is no UTF-8, too large, or has an empty line.
    """
    if arguments and file is not None:
        raise UsageError("texts come from the command line or from --file, not from both")
    if arguments:
        texts = list(arguments)
        for number, text in enumerate(texts, 1):
            check_text(f"text {number}", text)
            if not text.strip():
                raise UsageError(f"text {number} is empty: give some text, for example {example}")
        return texts
    if file is None and (sys.stdin is None or sys.stdin.isatty()):
        raise UsageError(f"there is no text: give some, for example {example}")
    name = "standard input" if file is None or str(file) == "-" else str(file)
    lines = read_text(file or Path("-")).splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise UsageError(f"{name}: line {number} is empty, and every line is a text: remove it")
    if not lines:
        raise UsageError(f"{name} is empty: give some text, for example {example}")
    return lines


def read_text(file: Path) -> str:
    """All of a file, or of standard input ("-").

    Raises:
        UsageError: it cannot be read, is no UTF-8, or larger than MAX_PROMPT_BYTES.
    """
    name = "standard input" if str(file) == "-" else str(file)
    try:
        if str(file) == "-":
            data = sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1)
        else:
            with file.open("rb") as opened:
                data = opened.read(MAX_PROMPT_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{name}: cannot be read ({error.strerror}); give a text file") from None
    if len(data) > MAX_PROMPT_BYTES:
        raise UsageError(f"{name} is larger than {MAX_PROMPT_BYTES >> 20} MiB: split it")
    return decode(data, name)
