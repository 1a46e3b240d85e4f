"""Checked access to the metadata keys of one architecture."""

from __future__ import annotations

import math
import struct

from kbit.checkpoint.gguf.delta_nets import DELTA_KEYS
from kbit.checkpoint.gguf.experts import EXPERT_KEYS
from kbit.checkpoint.gguf.metadata import GGUFHeader, quoted
from kbit.checkpoint.gguf.names import Architecture
from kbit.host.errors import UnsupportedError

_MAX_SIZE = 1 << 31  # of any dimension or count: far above every real model, small enough for safe products

# Metadata keys (after the architecture prefix) that config.py reads or that describe without computing.
_KNOWN_KEYS = frozenset(
    {
        "vocab_size", "context_length", "embedding_length", "block_count", "feed_forward_length",
        "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
        "attention.layer_norm_rms_epsilon", "attention.sliding_window",
        "rope.freq_base", "rope.dimension_count", "rope.scale_linear",
        "rope.scaling.type", "rope.scaling.factor", "rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor",
        "rope.scaling.original_context_length", "rope.scaling.finetuned", "rope.scaling.yarn_log_multiplier",
        "rope.scaling.yarn_ext_factor", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
        "tensor_data_layout", "expert_count", "expert_used_count",
    }
)  # fmt: skip


# Those of latent attention.
LATENT_KEYS = frozenset(
    {
        "attention.q_lora_rank", "attention.kv_lora_rank", "attention.key_length_mla", "attention.value_length_mla",
    }
)  # fmt: skip


def short_float(value: float) -> float:
    """The shortest decimal that rounds to the same float32, so that 9.99999975e-06 becomes the config's 1e-05."""
    try:
        packed = struct.pack("<f", value)
    except OverflowError:
        return value
    if struct.unpack("<f", packed)[0] != value:
        return value  # stored as float64: leave it alone
    for digits in range(1, 10):
        short = float(f"{value:.{digits}g}")
        try:
            if struct.pack("<f", short) == packed:
                return short
        except OverflowError:
            continue
    return value


class Keys:
    """Checked access to the keys of one architecture.

    Attributes:
        biases: the layer parts that have one, once they are known.
        divisors: the values of rope_freqs.weight, where that tensor exists, once they are known.
        tensors: names of the tensors there are, likewise.
    """

    def __init__(self, header: GGUFHeader, architecture: Architecture) -> None:
        self.header = header
        self.architecture = architecture
        self.arch = architecture.name
        self.biases: tuple[str, ...] = ()
        self.divisors: list[float] | None = None
        self.tensors: frozenset[str] = frozenset()

    def size(self, name: str, default: int | None = None) -> int:
        """A positive integer; a per-layer array counts if all its values are equal."""
        key = f"{self.arch}.{name}"
        if key not in self.header:
            if default is None:
                self.header.fail(f"metadata key '{key}' is missing", "convert the model again")
            return default
        if self.header.count(key):
            values = set(self.header.integers(key) or [])
            if len(values) > 1:
                raise UnsupportedError(
                    f"{self.header.path}: '{key}' differs from layer to layer, which is not supported"
                )
            value: int | None = values.pop()
        else:
            value = self.header.integer(key)
        if value is None or not 1 <= value < _MAX_SIZE:
            self.header.fail(f"metadata key '{key}' is {value}, expected 1 to {_MAX_SIZE - 1}")
        return value

    def sizes(self, name: str, layers: int, default: int | None = None) -> list[int]:
        """A positive integer for each layer; one for all counts for each.

        Raises:
            CheckpointError: another number of them, or one that is not positive.
        """
        key = f"{self.arch}.{name}"
        if not self.header.count(key):
            return [self.size(name, default)] * layers
        values = self.header.integers(key) or []
        if len(values) != layers or not all(1 <= value < _MAX_SIZE for value in values):
            self.header.fail(f"metadata key '{key}' is not {layers} positive numbers, one for each layer")
        return values

    def count(self, name: str) -> int:
        """A non-negative integer, 0 when absent."""
        key = f"{self.arch}.{name}"
        value = self.header.integer(key) or 0
        if not 0 <= value < _MAX_SIZE:
            self.header.fail(f"metadata key '{key}' is {value}, expected 0 to {_MAX_SIZE - 1}")
        return value

    def real(self, name: str, default: float | None = None) -> float:
        key = f"{self.arch}.{name}"
        value = self.header.number(key)
        if value is None:
            if default is None:
                self.header.fail(f"metadata key '{key}' is missing", "convert the model again")
            return default
        if not math.isfinite(value):
            self.header.fail(f"metadata key '{key}' is {value}, expected a finite number")
        return short_float(value)

    def flags(self, name: str, layers: int) -> list[bool] | None:
        """A boolean for each layer, or None where the key is absent.

        Raises:
            CheckpointError: another number of them.
        """
        key = f"{self.arch}.{name}"
        if key not in self.header:
            return None
        values = self.header.value(key)
        if not isinstance(values, list) or len(values) != layers or not all(isinstance(flag, bool) for flag in values):
            self.header.fail(f"metadata key '{key}' is not {layers} booleans, one for each layer")
        return values

    def refuse_unknown(self) -> None:
        prefix = self.arch + "."
        for key in self.header:
            name = key.removeprefix(prefix)
            more = frozenset() if self.architecture.experts is None else EXPERT_KEYS
            more |= frozenset() if self.architecture.delta is None else DELTA_KEYS
            known = _KNOWN_KEYS | self.architecture.keys | self.architecture.numbers.keys() | more
            known |= {self.architecture.epsilon[0]}
            known |= LATENT_KEYS if self.architecture.latent else frozenset()
            if name != key and name not in known:
                raise UnsupportedError(
                    f"{self.header.path}: metadata key {quoted(key)} is unknown to kbit and may change the model; "
                    "use a plain file of the architecture, or the original safetensors folder"
                )
        for name in ("expert_count", "expert_used_count"):
            if self.architecture.experts is None and name not in self.architecture.keys and self.count(name):
                raise UnsupportedError(
                    f"{self.header.path}: '{self.arch}.{name}' says that there are experts, which kbit does not "
                    "support for this architecture"
                )
        layout = self.header.string(prefix + "tensor_data_layout")
        if layout not in (None, self.architecture.layout):
            raise UnsupportedError(f"{self.header.path}: tensor_data_layout {quoted(layout)} is not supported")
