"""Which backend runs, how it computes, and on how many threads: decided once and in one place."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from kbit.host.cpu import default_threads
from kbit.host.errors import UnsupportedError, UsageError

if TYPE_CHECKING:
    from kbit.graph.backend import Backend

DEVICES = ("auto", "cpu", "cuda")
BACKENDS = ("auto", "native", "triton", "reference")
COMPUTE = ("int8", "fp8", "fp16", "bf16", "fp32")
# --kv-bits to what a cache stores.
KV_KINDS = {2: "2", 3: "3", 4: "4", 8: "8", 16: "fp16", 32: "fp32"}
KV_CODES = ("2", "3", "4", "8")  # widths that keys and values may have apart
# More than any machine has. OpenMP ends the process (without a word) when it cannot start its threads.
MAX_THREADS = 1024


def select_backend(
    device: str = "auto",
    *,
    backend: str = "auto",
    threads: int | None = None,
    compute: str | None = None,
    kv_bits: int | str | None = None,
    expand: bool = True,
) -> Backend:
    """The backend for the values of --device, --backend, --threads, --compute and --kv-bits.

    Args:
        device: "cpu", "cuda" (a GPU), or "auto": a GPU that passed `kbit check-gpu` here, else the CPU. The CPU too
            where another argument is for it alone: a backend, threads, compute or a cache that a GPU has not.
        backend: "native" (C++ kernels), "triton" (GPU kernels), "reference" (torch in fp32, the yardstick), or "auto":
            native on the CPU, triton on a GPU.
        threads: threads of the native backend; None: one per physical core this process may use. The reference runs on
            torch's (see `set_threads`).
        compute: how quantized weights are multiplied. native: "int8" (None means this), "bf16" or "fp32"; triton:
            "fp16" (None means this), "bf16", "int8" or "fp8" (see TritonBackend).
        kv_bits: bits of keys and values in the cache: 2, 3, 4 or 8 (codes), 16 or, natively, 32 (float), as a number or
            as text; "8,4" for two widths of codes, of keys and of values. None: 32 for compute "fp32", else 16.
        expand: see ReferenceBackend.

    Raises:
        UsageError: a value that does not exist, or one the backend has no use for.
        UnsupportedError: a GPU that is not there, or an instruction set that cannot compute like this. It never runs
            otherwise instead.
    """
    _check_choice("--device", device, DEVICES)
    _check_choice("--backend", backend, BACKENDS)
    if compute is not None:
        _check_choice("--compute", compute, COMPUTE)
    kv = None if kv_bits is None else kv_kind(kv_bits)
    if threads is not None:
        check_threads(threads)
    if device == "auto" and _suits_gpu(backend, threads, compute, kv):
        from kbit.backends.checked import auto_device

        device = auto_device()
    if device == "cuda" or backend == "triton":
        return _gpu(device, backend, compute, kv)
    if compute in ("fp16", "fp8"):
        raise UsageError(f"--compute {compute}: this is for GPUs; on the CPU use int8, bf16 or fp32")
    if backend == "reference":
        from kbit.backends.reference.backend import ReferenceBackend

        for flag, given, value in (("--compute", compute, "fp32"), ("--kv-bits", kv_bits, "32")):
            if given is not None and str(given) != value:
                raise UsageError(f"{flag} {given}: the reference backend has only {value}; use --backend native")
        return ReferenceBackend(expand=expand)
    from kbit.backends.cpu.backend import NativeBackend

    compute = compute or "int8"
    kv = kv or ("fp32" if compute == "fp32" else "fp16")
    return NativeBackend(threads or min(default_threads(), MAX_THREADS), compute=compute, kv=kv)


def _suits_gpu(backend: str, threads: int | None, compute: str | None, kv: str | None) -> bool:
    """Whether --device auto may mean a GPU; --compute int8 and bf16 mean other things on the two."""
    return backend == "auto" and threads is None and compute is None and kv != "fp32"


def kv_kind(kv_bits: int | str) -> str:
    """What a cache stores for a value of --kv-bits, as backends take it: "fp32", "fp16", "8" or "8,4".

    Raises:
        UsageError: a width that does not exist.
    """
    widths = str(kv_bits).split(",")
    if len(widths) == 2:
        if not all(width in KV_CODES for width in widths):
            raise UsageError(
                f"--kv-bits {kv_bits}: two widths, of keys and of values, are each one of {', '.join(KV_CODES)}"
            )
        return widths[0] if widths[0] == widths[1] else ",".join(widths)
    _check_choice("--kv-bits", str(kv_bits), [str(width) for width in KV_KINDS])
    return KV_KINDS[int(kv_bits)]


def _gpu(device: str, backend: str, compute: str | None, kv: str | None) -> Backend:
    """The Triton backend, or why not."""
    if backend not in ("auto", "triton"):
        raise UsageError(f"--backend {backend} runs on the CPU: drop --device cuda, or use --backend triton")
    if device == "cpu":
        raise UsageError("--backend triton runs on GPUs: use --device cuda")
    if compute == "fp32":
        raise UsageError("--compute fp32: on a GPU use fp16, bf16, int8 or fp8")
    if kv == "fp32":
        raise UsageError("--kv-bits 32: on a GPU use 16, 8, 4, 3 or 2")
    try:
        from kbit.backends.triton.backend import TritonBackend
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "triton":
            raise
        raise UnsupportedError(
            "--device cuda needs Triton, which this Python has not: pip install triton (Linux), or use --device cpu"
        ) from None
    return TritonBackend(compute=compute or "fp16", kv="16" if kv is None or kv == "fp16" else kv)


def check_threads(threads: int) -> None:
    """
    Raises:
        UsageError: a --threads value below 1 or above MAX_THREADS.
    """
    if not 1 <= threads <= MAX_THREADS:
        raise UsageError(f"--threads {threads}: expected at least 1 and at most {MAX_THREADS}")


def set_threads(threads: int | None) -> None:
    """Applies a --threads value to torch, for the whole process; None leaves torch's choice.

    Raises:
        UsageError: see check_threads.
    """
    if threads is not None:
        import torch

        check_threads(threads)
        torch.set_num_threads(threads)


def _check_choice(flag: str, value: object, choices: Collection[object]) -> None:
    if value not in choices:
        raise UsageError(f"{flag} {value}: use one of {', '.join(str(choice) for choice in choices)}")
