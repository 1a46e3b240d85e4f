"""What a cache of latent vectors saves and costs beside keys and values of every head: bytes, decoding, prompts.

    python benchmarks/latent_cache.py v2-lite --kv fp16 --context 4096
    python benchmarks/latent_cache.py v3 --kv 8

Attention layers of DeepSeek's sizes with random weights at 4 bits, and next to no MLP between them; both caches in
turns, medians and quartiles. Bytes are of all layers of the real model. With --threads 1 the times are processor time,
which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from time import perf_counter, process_time
from typing import Any

import numpy as np
import torch

from kbit.backends.cpu.backend import NativeBackend
from kbit.checkpoint.source import CANONICAL, CheckpointSource, TensorInfo
from kbit.formats.blockwise import quantize_blockwise
from kbit.formats.quant_format import QuantFormat
from kbit.formats.quant_tensor import QuantTensor
from kbit.models.decoder import Decoder
from kbit.models.families import spec_from_config
from kbit.models.latent import with_latents
from kbit.models.load import load_decoder
from kbit.models.spec import ModelSpec
from kbit.planner.memory import cache_bytes

_COMMON = {
    "model_type": "deepseek_v3",
    CANONICAL: True,
    "vocab_size": 256,
    "intermediate_size": 64,
    "first_k_dense_replace": 99,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "max_position_embeddings": 32768,
}
# Sizes of attention, and how many layers the model has.
SHAPES: dict[str, tuple[dict[str, Any], int]] = {
    "v2-lite": ({**_COMMON, "hidden_size": 2048, "num_attention_heads": 16, "q_lora_rank": None}, 27),
    "v3": ({**_COMMON, "hidden_size": 7168, "num_attention_heads": 128, "q_lora_rank": 1536}, 61),
}
REPEATS = 15


class RandomSource(CheckpointSource):
    """A model of random matrices at 4 bits, made when they are asked for."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.path, self.config = Path("random"), config
        shapes = spec_from_config(config).expected_tensors()
        self._infos = {n: TensorInfo(n, s, "F32", 4 * int(np.prod(s)), self.path) for n, s in shapes.items()}
        self._kept: dict[str, torch.Tensor | QuantTensor] = {}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return torch.ones(self._infos[name].shape)[start:stop]

    def read_weight(self, name: str) -> torch.Tensor | QuantTensor:
        if name not in self._kept:
            rows, columns = self._infos[name].shape
            generator = torch.Generator().manual_seed(len(self._kept))
            values = torch.randn(rows, columns, generator=generator) / columns**0.5
            quantized = "embed" not in name and "lm_head" not in name
            self._kept[name] = quantize_blockwise(values, QuantFormat.parse("int4-b64")) if quantized else values
        return self._kept[name]

    def sidecar_files(self) -> Mapping[str, bytes]:
        return {}

    def fingerprint(self) -> str:
        return "random"


@dataclass
class Run:
    """One kind of cache, filled.

    Attributes:
        name, decoder: of it.
        decode, prompt: seconds.
    """

    name: str
    decoder: Decoder
    decode: list[float]
    prompt: list[float]


def _time(function: Any, threads: int) -> float:
    clock = process_time if threads == 1 else perf_counter
    begin = clock()
    function()
    return clock() - begin


def _bytes(spec: ModelSpec, kv: str, latent: bool) -> int:
    return cache_bytes(spec, 64, kv=kv, backend="native") // 64 if latent else _expanded_bytes(spec, kv)


def _expanded_bytes(spec: ModelSpec, kv: str) -> int:
    from kbit import _native

    return spec.layers * int(_native.kv_page_bytes(1, spec.kv_heads, spec.head_dim, kv)) // 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--kv", default="fp16")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    config, layers = SHAPES[options.shape]
    whole = spec_from_config(
        {**config, "num_hidden_layers": layers, "num_key_value_heads": config["num_attention_heads"]}
    )
    assert with_latents(whole).keeps_latents
    source = RandomSource(
        {**config, "num_hidden_layers": options.layers, "num_key_value_heads": config["num_attention_heads"]}
    )
    runs = []
    for name, latent in (("every head", False), ("latents", True)):
        backend = NativeBackend(options.threads, kv=options.kv)
        backend.keeps_latents = latent
        runs.append(Run(name, load_decoder(source, backend), [], []))
    ids = torch.randint(0, 256, (1, options.context))
    caches = [run.decoder.new_cache(1, options.context + REPEATS + 1) for run in runs]
    for run, cache in zip(runs, caches, strict=True):
        run.prompt.append(
            _time(lambda run=run, cache=cache: run.decoder.forward(ids, cache, last_only=True), options.threads)
        )
    for _ in range(REPEATS):
        for run, cache in zip(runs, caches, strict=True):
            run.decode.append(_time(lambda run=run, cache=cache: run.decoder.extend([7], cache), options.threads))
    print(f"{options.shape}, {options.layers} of {layers} layers, {options.kv} cache, {options.context} tokens")
    for run in runs:
        low, middle, high = quantiles(run.decode, n=4)
        print(
            f"{run.name:<11} {_bytes(whole, options.kv, run.name == 'latents'):>9,} bytes a token; decoding "
            f"{1e3 * middle / options.layers:.2f} ms a layer ({1e3 * low / options.layers:.2f} to "
            f"{1e3 * high / options.layers:.2f}); the prompt {run.prompt[0] / options.layers:.2f} s a layer"
        )


if __name__ == "__main__":
    main()
