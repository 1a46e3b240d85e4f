"""Tiny models on the Triton backend and on the reference."""

from __future__ import annotations

from typing import Any

from decoder_cases import DictSource, quantized, tame_tensors, tiny_config

from kbit.backends.reference.backend import ReferenceBackend
from kbit.models.decoder import Decoder
from kbit.models.load import load_decoder


def source_of(name: str, format: str | None = None, **changes: Any) -> DictSource:
    """A tiny model with heads of 16 features: the kernels' pages hold multiples of 16."""
    config = {**tiny_config(name), "head_dim": 16, **changes}
    if "kv_lora_rank" in config:
        config |= {"qk_nope_head_dim": 12, "qk_rope_head_dim": 4}
    tensors = tame_tensors(config)
    return DictSource(config, tensors if format is None else quantized(tensors, format))


def on(device: str, source: DictSource, **options: Any) -> Decoder:
    from kbit.backends.triton.backend import TritonBackend  # only once triton is known to interpret

    return load_decoder(source, TritonBackend(device, **options))


def reference(source: DictSource) -> Decoder:
    return load_decoder(source, ReferenceBackend())
