"""Step 2: whole models, greedy tokens and logits beside the reference's, with and without CUDA graphs, by cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kbit.backends.reference.backend import ReferenceBackend
from kbit.backends.reference.kv_cache import ReferencePages
from kbit.checkpoint.source import CheckpointSource, TensorInfo
from kbit.formats.blockwise import quantize_blockwise
from kbit.formats.quant_format import QuantFormat
from kbit.formats.quant_tensor import QuantTensor
from kbit.gpu_check.place import DRY, Place, Row
from kbit.gpu_check.synthetic import TINY, RandomModel
from kbit.graph.pages import PagePool, PerLayer
from kbit.host.errors import one_line
from kbit.kernels import reference
from kbit.models.decoder import Decoder
from kbit.models.load import load_decoder
from kbit.models.opening import open_model

FORMAT = "nf4-b64"
KV = {DRY: ("16", "4")}
TOKENS = {DRY: 4}
PROMPT = 12
UNIT = 2.0**-11  # of fp16
SYNTHETIC = "random 2-layer Llama"


class RoundedPages(ReferencePages):
    """The reference's pages, holding what a cache of codes would: keys and values rounded when they come."""

    bits: int | None = None

    def append(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None) -> None:
        if self.bits is not None:
            k = self._rounded(k, self.bits)
            v = None if v is None else self._rounded(v, self.bits)
        super().append(layer, slots, k, v)

    @staticmethod
    def _rounded(part: torch.Tensor, bits: int) -> torch.Tensor:
        return reference.dequantize_kv(*reference.quantize_kv(part, bits))


class RoundingReference(ReferenceBackend):
    """The reference with a cache of codes of some bits; None: of floats."""

    def __init__(self, bits: int | None) -> None:
        super().__init__()
        self._bits = bits

    def new_pool(
        self, layers: int, kv_heads: PerLayer, head_dim: PerLayer, pages: int, *, latent: bool = False
    ) -> PagePool:
        store = RoundedPages(layers, kv_heads, head_dim, pages, latent=latent)
        store.bits = self._bits
        return PagePool(store)


class Changed(CheckpointSource):
    """A checkpoint whose matrices are quantized as they are read, or already are; or moved by a rounding.

    Args:
        source: of floats, or quantized.
        step: None, or the relative change of every weight of a matrix, up or down at random.
    """

    def __init__(self, source: CheckpointSource, step: float | None = None) -> None:
        self.path, self.config, self._source, self._step = source.path, source.config, source, step

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._source.tensors

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        weight = self.read_weight(name)
        return (weight.dequantize() if isinstance(weight, QuantTensor) else weight)[start:stop]

    def read_weight(self, name: str) -> torch.Tensor | QuantTensor:
        weight = self._source.read_weight(name)
        if not isinstance(weight, QuantTensor) and weight.ndim == 2 and weight.shape[1] % 16 == 0:
            weight = quantize_blockwise(weight, QuantFormat.parse(FORMAT))
        if self._step is None or not isinstance(weight, QuantTensor):
            return weight
        dense = weight.dequantize()
        signs = torch.randint(0, 2, dense.shape, generator=torch.Generator().manual_seed(3)) * 2.0 - 1.0
        return dense * (1.0 + self._step * signs)

    def sidecar_files(self) -> Mapping[str, bytes]:
        return self._source.sidecar_files()

    def fingerprint(self) -> str:
        return self._source.fingerprint()


def items(place: Place) -> Sequence[str]:
    """Model, cache and graph of each comparison."""
    graphs = ("no graph",) if not place.timed else ("graph", "no graph")
    kinds = KV.get(place.scale, ("16", "8", "4"))
    return [f"{model} | KV {kv} | {graph}" for model in names(place) for kv in kinds for graph in graphs]


def names(place: Place) -> list[str]:
    """The models: those that were named, and a synthetic one."""
    return [*place.models, SYNTHETIC]


def run(place: Place, item: str) -> list[Row]:
    """{"case", "tokens", "equal", "worst"} of one comparison.

    `equal` counts the greedy tokens before the first that differs. `worst` is the larger of two: the logits' largest
    error, fed the reference's tokens, in units of its bound; and, where a token differs, the reference's own distance
    between the two tokens in units of twice that error.
    """
    from kbit.backends.triton.backend import TritonBackend

    model, kv, graph = (part.strip() for part in item.split("|"))
    bits, count = kv.split()[1], TOKENS.get(place.scale, 64)
    row: Row = {"case": item, "seed": place.seed, "tokens": count, "worst": None}
    try:
        expected = _expected(model, None if bits == "16" else int(bits), count, place.seed)
        backend = TritonBackend(place.device, kv=bits, graphs=graph == "graph")
        ours = _decoder(model, backend, None, place.seed)
        found = greedy(ours, expected.prompt, count)[0]
        fed = follow(ours, expected.prompt, expected.tokens)
    except Exception as error:  # of the compiler or the driver, of any kind
        row["error"] = f"{type(error).__name__}: {one_line(error)}"
        place.survive(error)
        return [row]
    off = float(np.abs(fed - expected.logits).max())
    same = next((at for at in range(count) if found[at] != expected.tokens[at]), count)
    row |= {"equal": same, "logit_error": off, "bound": expected.bound, "worst": off / expected.bound}
    if same < count:
        logits = expected.logits[same]
        gap = float(logits[expected.tokens[same]] - logits[found[same]])
        row |= {"gap": gap, "worst": max(row["worst"], gap / (2 * expected.bound))}
    if not row["worst"] <= 1:  # nor is a NaN
        row["error"] = f"logits are {off:.3g} off, at most {expected.bound:.3g} expected; {same} of {count} tokens"
    return [row]


class Expected:
    """What the reference says of a model.

    Args:
        prompt, tokens: ids of the prompt, and those that follow.
        logits: (tokens, V), before each of them.
        bound: how far logits may be from these: four times what moving every weight by a unit of half precision does.
            Kernels round weights and activations (as much again), and the largest of many deviations is twice the
            typical.
    """

    def __init__(self, prompt: list[int], tokens: list[int], logits: Any, bound: float) -> None:
        self.prompt, self.tokens, self.logits, self.bound = prompt, tokens, logits, bound


@lru_cache(maxsize=4)
def _expected(model: str, bits: int | None, count: int, seed: int) -> Expected:
    plain = _decoder(model, RoundingReference(bits), None, seed)
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(0, plain.spec.vocab_size, (PROMPT,), generator=generator).tolist()
    tokens, logits = greedy(plain, prompt, count)
    moved = follow(_decoder(model, RoundingReference(bits), UNIT, seed), prompt, tokens)
    return Expected(prompt, tokens, logits, 4 * float(np.abs(moved - logits).max()))


@lru_cache(maxsize=2)
def _decoder(model: str, backend: Any, step: float | None, seed: int) -> Decoder:
    if model == SYNTHETIC:
        return load_decoder(Changed(RandomModel(TINY, FORMAT, "cpu", seed), step), backend)
    with open_model(str(Path(model).expanduser())) as source:
        return load_decoder(Changed(source, step), backend)


def greedy(decoder: Decoder, prompt: list[int], count: int) -> tuple[list[int], Any]:
    """The likeliest tokens one after the other, and the logits (count, V) that they are the largest of."""
    cache = decoder.new_cache(1, len(prompt) + count)
    tokens, rows, given = [], [], prompt
    for _ in range(count):
        rows.append(decoder.extend(given, cache)[0])
        tokens.append(int(rows[-1].argmax()))
        given = tokens[-1:]
    return tokens, np.stack(rows)


def follow(decoder: Decoder, prompt: list[int], tokens: list[int]) -> Any:
    """Logits (tokens, V) before each of some tokens, given those before it, one pass a token as in decoding."""
    cache = decoder.new_cache(1, len(prompt) + len(tokens))
    rows = [decoder.extend(prompt, cache)[0]]
    rows += [decoder.extend([token], cache)[0] for token in tokens[:-1]]
    return np.stack(rows)
