"""Who runs the models of an evaluation: what perplexity and zero-shot tasks ask alike."""

from __future__ import annotations

from dataclasses import dataclass

from kbit.backends.select import select_backend
from kbit.graph.backend import Backend
from kbit.host.errors import UsageError

_REFERENCE_BACKENDS = ("reference", "native", "native-fp32")


@dataclass(frozen=True, kw_only=True)
class EngineRequest:
    """The part of a request that says who computes, and how.

    Attributes:
        device: "auto", "cpu" or "cuda".
        threads: CPU threads, also of torch for the whole process; None takes one per physical core and leaves torch's.
        backend, compute, kv_bits: who runs the model, and how (`kbit.backends.select.select_backend`).
        bits: to run a nested model at; None: its widest. A reference is not narrowed.
        reference_backend: who runs the reference, on the CPU: "reference" (exactly, weights expanded to float32),
            "native-fp32" (exactly, too, with packed weights as they are), or "native": computing as the model does
            where that runs natively too, else as by default.
    """

    device: str = "auto"
    threads: int | None = None
    backend: str = "auto"
    compute: str | None = None
    kv_bits: int | str | None = None
    bits: float | None = None
    reference_backend: str = "reference"

    def check(self) -> None:
        """
        Raises:
            UsageError: a reference backend that does not exist.
        """
        if self.reference_backend not in _REFERENCE_BACKENDS:
            raise UsageError(f"--reference-backend {self.reference_backend}: use reference, native-fp32 or native")

    def backends(self) -> tuple[Backend, Backend]:
        """Who runs the model, and who would run a reference.

        Raises:
            UsageError, UnsupportedError: an impossible choice.
        """
        self.check()
        backend = select_backend(
            self.device, backend=self.backend, threads=self.threads, compute=self.compute, kv_bits=self.kv_bits
        )
        if self.reference_backend == "native" == backend.name:
            return backend, backend
        name, _, compute = self.reference_backend.partition("-")
        return backend, select_backend("cpu", backend=name, threads=self.threads, compute=compute or None)
