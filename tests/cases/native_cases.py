"""Tiny models on the native backend, for the tests that compare it with the reference and with itself."""

from __future__ import annotations

from typing import Any

import torch
from decoder_cases import TINY, DictSource, quantized, tame_tensors, tiny_config

from kbit import _native
from kbit.backends.cpu.backend import NativeBackend
from kbit.backends.reference.backend import ReferenceBackend
from kbit.models.decoder import Decoder
from kbit.models.load import load_decoder

# float32 on both sides, summed in other orders; see test_decoder_parity.py.
RELATIVE = 1e-4

ISAS = _native.instruction_sets()
VOCABULARY = TINY["vocab_size"]


def random_ids(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def source_of(name: str, format: str | None = None) -> DictSource:
    config = tiny_config(name)
    tensors = tame_tensors(config)
    return DictSource(config, tensors if format is None else quantized(tensors, format))


def native(source: DictSource, **options: Any) -> Decoder:
    return load_decoder(source, NativeBackend(options.pop("threads", 2), **options))


def exact(source: DictSource, **options: Any) -> Decoder:
    return native(source, compute="fp32", kv="fp32", **options)


def reference(source: DictSource) -> Decoder:
    return load_decoder(source, ReferenceBackend())


def computes(isa: str) -> list[str]:
    return ["int8", "fp32"] + ["bf16"] * _native.Context(isa, 1).has_bf16


def assert_close(found: torch.Tensor, expected: torch.Tensor, bound: float = RELATIVE) -> None:
    assert found.shape == expected.shape
    assert found.dtype == torch.float32
    worst = float((found - expected).abs().max() / expected.abs().max())
    assert worst <= bound, f"logits differ by {worst:.2e} of the largest"
