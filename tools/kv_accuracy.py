"""What keys and values of fewer bits cost: KL divergence from the same model with a cache of float32.

    python tools/kv_accuracy.py smollm2-135m-instruct --windows 2 --results /tmp/kv-smollm2

Everything but the cache is computed in float32. Settings are those of --kv-bits, run by the native engine, and
llama.cpp's cache types, which torch emulates: blocks of 32 numbers with an fp16 scale, q4_0 with the scale
(signed largest) / -8, as they are or after llama.cpp's rotation, a Hadamard transform of the whole head. KL per token
is kept in --results, a file a setting: an interrupted run goes on where it stopped, and settings are compared on the
same tokens (paired bootstrap).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from kbit.backends.reference.backend import ReferenceBackend
from kbit.backends.reference.kv_cache import ReferencePages
from kbit.backends.select import select_backend
from kbit.evaluate.compare import compare
from kbit.evaluate.logits import StoredLogits
from kbit.evaluate.statistics import DRAWS, SEED, Clusters, bootstrap_interval, cluster
from kbit.graph.backend import Backend
from kbit.graph.pages import PagePool
from kbit.kernels import reference
from kbit.models.load import load_decoder
from kbit.models.opening import open_model
from kbit.text.datasets import resolve_data
from kbit.text.tokenizer import Tokenizer
from kbit.text.windows import Windows, make_windows

BLOCK = 32  # of llama.cpp's types
SETTINGS = ("16", "8", "8,4", "4", "3")
PEERS = ("q8_0 rotated", "q4_0 rotated", "q4_0")
PEER = "q4_0 rotated"  # what a setting of 4 bits is compared with

Rounding = Callable[[torch.Tensor], torch.Tensor]


def q8_0(x: torch.Tensor) -> torch.Tensor:
    """What llama.cpp's q8_0 makes of the last dimension: float32, the same shape."""
    blocks = x.unflatten(-1, (-1, BLOCK))
    scales = blocks.abs().amax(-1, keepdim=True) / 127.0
    inverse = torch.where(scales > 0, 1.0 / scales, 0.0)
    return ((blocks * inverse).round() * scales.half().float()).flatten(-2)


def q4_0(x: torch.Tensor) -> torch.Tensor:
    """What llama.cpp's q4_0 makes of the last dimension: float32, the same shape."""
    blocks = x.unflatten(-1, (-1, BLOCK))
    scales = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)) / -8.0
    inverse = torch.where(scales != 0, 1.0 / scales, 0.0)
    codes = (blocks * inverse + 8.5).floor().clamp(0, 15)
    return ((codes - 8.0) * scales.half().float()).flatten(-2)


def rotated(rounding: Rounding) -> Rounding:
    """The same after a Hadamard transform of the head (of the largest power of two that divides it), and back."""

    def apply(x: torch.Tensor) -> torch.Tensor:
        group = x.shape[-1] & -x.shape[-1]
        return reference.hadamard(rounding(reference.hadamard(x, group)), group)

    return apply


ROUNDINGS: dict[str, Rounding] = {"q8_0 rotated": rotated(q8_0), "q4_0 rotated": rotated(q4_0), "q4_0": q4_0}
PEER_BITS = {"q8_0 rotated": 8.5, "q4_0 rotated": 4.5, "q4_0": 4.5}


class RoundingPages(ReferencePages):
    """Pages of float32 numbers that were rounded when they came."""

    def __init__(self, layers: int, kv_heads: int, head_dim: int, pages: int, rounding: Rounding) -> None:
        super().__init__(layers, kv_heads, head_dim, pages)
        self._rounding = rounding

    def append(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        super().append(layer, slots, self._rounding(k), self._rounding(v))


class RoundingBackend(ReferenceBackend):
    """The reference with a cache that rounds."""

    def __init__(self, rounding: Rounding) -> None:
        super().__init__()
        self._rounding = rounding

    def new_pool(self, layers: int, kv_heads: int, head_dim: int, pages: int) -> PagePool:
        return PagePool(RoundingPages(layers, kv_heads, head_dim, pages, self._rounding))


@dataclass(frozen=True, eq=False)
class Result:
    """One setting's KL.

    Attributes:
        name: of the setting.
        bits: per number in the cache, scales included.
        kl: float64 (W, S), nats.
    """

    name: str
    bits: float
    kl: NDArray[np.float64]


def bits_of(setting: str) -> float:
    """Bits per number of a setting."""
    if setting in PEER_BITS:
        return PEER_BITS[setting]
    widths = [float(width) for width in setting.split(",")]
    return sum(width if width >= 16 else width + 16 / BLOCK for width in widths) / len(widths)


def backend_of(setting: str) -> Backend:
    """Who runs a setting."""
    if setting in ROUNDINGS:
        return RoundingBackend(ROUNDINGS[setting])
    return select_backend("cpu", compute="fp32", kv_bits=setting)


def measure(model: str, data: str, context: int, count: int, settings: Sequence[str], results: Path) -> list[Result]:
    """KL of every setting, from files of earlier runs where there are any.

    Args:
        model, data: as for `kbit eval`.
        context: tokens of a window.
        count: windows.
        settings: values of --kv-bits, or keys of ROUNDINGS.
        results: a folder for one model and text.
    """
    results.mkdir(parents=True, exist_ok=True)
    paths = {setting: results / f"{setting.replace(' ', '-')}-{context}x{count}.npy" for setting in settings}
    missing = [setting for setting in settings if not paths[setting].exists()]
    if missing:
        with open_model(model) as source:
            text, tokenizer = resolve_data(data), Tokenizer.from_source(source)
            windows: Windows = make_windows(text, tokenizer, "gptq", context, context * count)
            with StoredLogits(load_decoder(source, backend_of("32")), windows) as exact:
                for setting in missing:
                    found = compare(load_decoder(source, backend_of(setting)), exact, windows)
                    np.save(paths[setting], found.kl)
                    print(f"{setting}: {found.kl_mean:.5f}", file=sys.stderr, flush=True)
    return [Result(setting, bits_of(setting), np.load(paths[setting])) for setting in settings]


def ratio_interval(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> tuple[float, float]:
    """Bootstrap interval (95 %) of the ratio of two means over the same tokens, drawn together by clusters."""
    first, second = cluster(ours), cluster(theirs)
    generator = np.random.default_rng(SEED)
    times = generator.multinomial(first.count, np.full(first.count, 1.0 / first.count), size=DRAWS)
    low, high = np.percentile((times @ first.sums) / (times @ second.sums), [2.5, 97.5])
    return float(low), float(high)


def table(results: Sequence[Result]) -> str:
    """Markdown: a row per setting."""
    peer = next((result for result in results if result.name == PEER), None)
    lines = [
        f"| keys and values | bits per number | KL mean (95 %) | 99.9 % | over llama.cpp's {PEER} (95 %) |",
        "|--|--|--|--|--|",
    ]
    for result in results:
        clusters: Clusters = cluster(result.kl)
        interval = bootstrap_interval(clusters)
        spread = "" if interval is None else f" ({interval[0]:.5f} to {interval[1]:.5f})"
        against = ""
        if peer is not None and peer is not result:
            low, high = ratio_interval(result.kl, peer.kl)
            against = f"{result.kl.mean() / peer.kl.mean():.3f} ({low:.3f} to {high:.3f})"
        lines.append(
            f"| {result.name} | {result.bits:g} | {result.kl.mean():.5f}{spread} | "
            f"{np.percentile(result.kl, 99.9):.4f} | {against} |"
        )
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="KL divergence of quantized KV caches.")
    parser.add_argument("model", help="as for kbit eval")
    parser.add_argument("--data", default="wikitext2", help="as for kbit eval")
    parser.add_argument("--context", type=int, default=4096, help="tokens of a window")
    parser.add_argument("--windows", type=int, default=2, help="how many")
    parser.add_argument("--settings", nargs="+", default=[*SETTINGS, *PEERS], help="values of --kv-bits, or peers")
    parser.add_argument("--results", type=Path, required=True, help="a folder for this model and text")
    asked = parser.parse_args()
    results = measure(asked.model, asked.data, asked.context, asked.windows, asked.settings, asked.results)
    print(table(results))


if __name__ == "__main__":
    main()
