"""Flags that several commands share, and what they mean together. Imports nothing heavy: `kbit --help` reads it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from kbit.host.errors import UsageError
from kbit.host.utf8 import decode

DEFAULT_MODEL = "smollm2-135m-instruct"
MAX_PROMPT_BYTES = 64 << 20

ENGINE = "Engine"

ModelOption = Annotated[
    str,
    typer.Option("--model", "-m", metavar="MODEL", help="A folder, a .gguf file, a hub id, or a name kbit pull lists."),
]


def _check_threads(threads: int | None) -> int | None:
    if threads is not None:  # torch comes with this import, and every command that is given threads needs it anyway
        from kbit.backends.select import check_threads

        check_threads(threads)
    return threads


BitsOption = Annotated[
    float | None,
    typer.Option(
        "--bits",
        metavar="K",
        help="Bits to run a nested model at (kbit quantize --nested), 3.4 too where its widths are mixed: only their "
        "bytes are read. [default: the widest]",
        rich_help_panel=ENGINE,
    ),
]
DeviceOption = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="auto|cpu|cuda",
        help="Where to run: the CPU, or a GPU (cuda, which is also what torch calls AMD's); auto takes a GPU that "
        "passed kbit check-gpu here, else the CPU.",
        rich_help_panel=ENGINE,
    ),
]
BackendOption = Annotated[
    str,
    typer.Option(
        "--backend",
        metavar="auto|native|triton|reference",
        help="Who computes: C++ kernels (native, which auto takes on the CPU), Triton kernels (triton, on a GPU), or "
        "torch in fp32 (reference: slow, and what the others are measured against).",
        rich_help_panel=ENGINE,
    ),
]
ComputeOption = Annotated[
    str | None,
    typer.Option(
        "--compute",
        metavar="int8|fp8|fp16|bf16|fp32",
        help="How quantized weights are multiplied. On the CPU: int8 rounds activations to 8 bits, a scale per 64 "
        "values: fastest, and less of an error than 4-bit weights by far; bf16 rounds both sides to 8 significant "
        "bits; fp32 rounds nothing and gives the reference's results. On a GPU: fp16, or bf16 for models that leave "
        "the range of fp16; int8 and fp8 round activations of prompts and large batches to 8 bits, for speed at some "
        "loss (int8 less of it; fp8 from compute capability 8.9). [default: int8; on a GPU fp16]",
        rich_help_panel=ENGINE,
    ),
]
KvBitsOption = Annotated[
    str | None,
    typer.Option(
        "--kv-bits",
        metavar="2|3|4|8|16|32|K,V",
        help="Bits of a number in the KV cache, or two widths, of keys and of values (8,4): fewer for long contexts in "
        "little memory, at a loss that grows from 8 (small) to 2 (large). [default: 16; 32 with --compute fp32]",
        rich_help_panel=ENGINE,
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        "--threads",
        metavar="N",
        callback=_check_threads,
        help="CPU threads. [default: one per physical core]",
        rich_help_panel=ENGINE,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def read_prompt(prompt: str | None) -> str:
    """The PROMPT argument, or all of standard input for "-" (without its last line break), also where it is a pipe.

    Raises:
        UsageError: no prompt, nothing but white space, no UTF-8, or more than 64 MiB.
    """
    if prompt is None:
        if sys.stdin is None or sys.stdin.isatty():
            raise UsageError('there is no prompt: give some text, for example kbit run "The capital of France is"')
        prompt = "-"
    if prompt == "-":
        data = sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1)
        if len(data) > MAX_PROMPT_BYTES:
            raise UsageError(f"the prompt from standard input is longer than {MAX_PROMPT_BYTES >> 20} MiB: shorten it")
        prompt = decode(data, "the prompt from standard input")
        prompt = prompt.removesuffix("\n").removesuffix("\r")
        if not prompt.strip():
            raise UsageError("the prompt from standard input is empty: give some text")
    check_text("the prompt", prompt)
    if not prompt.strip():
        raise UsageError('the prompt is empty: give some text, for example kbit run "The capital of France is"')
    return prompt


def check_text(what: str, text: str) -> None:
    """
    Raises:
        UsageError: the text came from bytes that were not UTF-8.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(f"{what} is not valid UTF-8 at character {error.start}: convert it") from None


@contextmanager
def streaming_output() -> Iterator[None]:
    """Makes standard output fit for streamed text: what the terminal's encoding lacks becomes "?", never an error."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)  # a replaced stdout may not have it
    errors = sys.stdout.errors
    if reconfigure is not None:
        reconfigure(errors="replace")
    try:
        yield
    finally:
        if reconfigure is not None:
            reconfigure(errors=errors)


def show(text: str) -> None:
    """Writes streamed text at once. On a terminal, control characters a model may produce are made harmless."""
    if sys.stdout.isatty():
        text = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" if c != "\r" else "" for c in text)
    sys.stdout.write(text)
    sys.stdout.flush()
