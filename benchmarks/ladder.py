"""One model at every width, in memory: what accuracy and throughput are measured on, each width quantized once.

Linear layers take the data type that `kbit quantize --bits` chooses, in blocks of 64; embedding and head have 8 bits:
in 16 bits they would be most of what a small model reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any

import torch

from kbit.backends.select import select_backend
from kbit.formats.quant_format import QuantFormat, default_dtype
from kbit.models.load import load_decoder
from kbit.models.opening import open_model
from kbit.quantizers.plan import Plan, make_plan
from kbit.quantizers.rtn import QuantizedView
from kbit.text.tokenizer import Tokenizer

WIDTHS = range(2, 9)
HEAD_BITS = 8


@dataclass(frozen=True, eq=False)
class Rung:
    """The model at one width.

    Attributes:
        bits: of the linear layers.
        plan: formats and sizes of all tensors.
        decoder: the model on the native backend with its default arithmetic (int8).
    """

    bits: int
    plan: Plan
    decoder: Any

    @property
    def format(self) -> str:
        return str(self.plan.default_format)

    def about(self) -> dict[str, Any]:
        """What a report says of it."""
        linear, all_tensors = self.plan.bits_per_weight("linear"), self.plan.bits_per_weight()
        return {
            "bits": self.bits,
            "format": self.format,
            "linear_bits_per_weight": linear,
            "bits_per_weight": all_tensors,
            "model_bytes": self.plan.bytes_after,
        }


class Ladder:
    """A model's widths, quantized when they are first asked for; all share one backend, and with it its threads.

    Args:
        name: for reports.
        path: of the model.
    """

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self.source = open_model(str(path))
        self.tokenizer = Tokenizer.from_source(self.source)

    @cached_property
    def rungs(self) -> list[Rung]:
        """Every width on the native backend: some 0.6 GB in all for the default model."""
        backend = select_backend("cpu")
        rungs = []
        for bits in WIDTHS:
            plan = self.plan(bits)
            rungs.append(Rung(bits, plan, self.load(plan, backend)))
        return rungs

    def plan(self, bits: int) -> Plan:
        format = QuantFormat(default_dtype(bits), bits, 64)
        return make_plan(self.source, format, embedding_bits=HEAD_BITS)

    def load(self, plan: Plan | None, backend: Any) -> Any:
        """The model as planned, or as it is, on a backend."""
        return load_decoder(self.source if plan is None else QuantizedView(self.source, plan), backend)

    def __enter__(self) -> Ladder:
        self.source.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.source.__exit__(kind, error, trace)


def bytes_per_token(decoder: Any) -> int:
    """Bytes of weights that one decoded token reads: everything but an embedding that is only looked up in."""
    weights = decoder.weights
    return int(weights.nbytes - (0 if weights.head is weights.embedding else weights.embedding.nbytes))


class Pace:
    """How fast a decoder is: the time of Decoder.forward alone, no sampling and no text.

    Args:
        decode, prompt: tokens of one measurement.
    """

    WARM_UP = 2  # steps before the clock starts

    def __init__(self, decoder: Any, decode: int, prompt: int) -> None:
        self._decoder = decoder
        generator = torch.Generator().manual_seed(0)
        vocabulary = decoder.spec.vocab_size
        self._prompt = torch.randint(0, vocabulary, (1, prompt), generator=generator)
        self._steps = torch.randint(0, vocabulary, (1, self.WARM_UP + decode), generator=generator).split(1, dim=1)
        self._cache = decoder.new_cache(1, max(prompt, self.WARM_UP + decode))

    def decode(self) -> float:
        """Tokens per second, one at a time, from an empty context on."""
        self._cache.truncate(0)
        self._forward(*self._steps[: self.WARM_UP])
        return (len(self._steps) - self.WARM_UP) / self._forward(*self._steps[self.WARM_UP :])

    def prefill(self) -> float:
        """Tokens per second of a prompt, into an empty cache."""
        self._cache.truncate(0)
        return self._prompt.shape[1] / self._forward(self._prompt)

    def _forward(self, *passes: torch.Tensor) -> float:
        """Seconds of some passes, one after the other."""
        with torch.inference_mode():
            begin = perf_counter()
            for ids in passes:
                self._decoder.forward(ids, self._cache, last_only=True)
            return perf_counter() - begin
