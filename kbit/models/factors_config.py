"""What a configuration says of the factors in a model: on embeddings, scores, residuals and logits, and of caps."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from kbit.models.config_values import ConfigValues
from kbit.models.mixer_specs import Multipliers

if TYPE_CHECKING:
    from kbit.models.family import Family

# The square root of the hidden size, as a family's embedding multiplier.
ROOT_OF_WIDTH = "sqrt(hidden_size)"

# Bounds that keep multipliers, caps and their inverses finite in float32.
_MIN_FACTOR, _MAX_FACTOR = FACTORS = 1e-9, 1e9


def factor(key: str | None, values: ConfigValues) -> float:
    """A multiplier or divisor; 1 where the family has none."""
    return 1.0 if key is None else values.number(key, above=_MIN_FACTOR, below=_MAX_FACTOR)


def cap(key: str | None, values: ConfigValues) -> float | None:
    """Of scores or logits; None where there is none."""
    return None if key is None else values.optional_number(key, above=_MIN_FACTOR, below=_MAX_FACTOR)


def score_scale(family: Family, values: ConfigValues) -> float | None:
    """The factor on dot products; None: D^-0.5."""
    if family.score_width is not None:
        return float(values.number(family.score_width, above=_MIN_FACTOR, below=_MAX_FACTOR) ** -0.5)
    if family.score_scale is None or isinstance(family.score_scale, float):
        return family.score_scale
    return factor(family.score_scale, values)


def numbers(values: ConfigValues, key: str, count: int) -> tuple[float, ...]:
    """A list of factors; where there is none, they are 1.

    Raises:
        CheckpointError: no list of so many numbers.
    """
    found = values.raw(key)
    if found is None:
        return (1.0,) * count
    numeric = isinstance(found, list | tuple) and all(type(one) in (int, float) for one in found)
    if not numeric or len(found) != count or not all(_MIN_FACTOR < one < _MAX_FACTOR for one in found):
        raise values.error(key, f"a list of {count} numbers above {_MIN_FACTOR:g} and below {_MAX_FACTOR:g}")
    return tuple(float(one) for one in found)


def multipliers(values: ConfigValues) -> Multipliers:
    """Falcon-H1's factors inside of layers. That on what attention reads is on what it makes, as values are made of
    that alone; its part in scores is in `multiplied_scores`."""
    gate, down = numbers(values, "mlp_multipliers", 2)
    output = factor("attention_in_multiplier", values) * factor("attention_out_multiplier", values)
    return Multipliers(output, gate, down)


def multiplied_scores(values: ConfigValues, head_dim: int) -> float:
    """Falcon-H1's factor on dot products: on queries and keys, as they read the same, and on keys."""
    into = factor("attention_in_multiplier", values)
    return float(into**2 * factor("key_multiplier", values) * head_dim**-0.5)


def residual_multiplier(family: Family, values: ConfigValues, layers: int) -> float:
    """The factor on what a block adds."""
    if family.depth_scale is not None and values.raw(family.depth_scale) is not None:
        return float(factor(family.depth_scale, values) / float(layers) ** 0.5)
    return factor(family.residual_multiplier, values)


def embedding_multiplier(family: Family, values: ConfigValues, hidden: int) -> float:
    """The factor on embeddings."""
    if family.scaled_embedding is not None:
        return float(hidden**0.5) if values.boolean(family.scaled_embedding) else 1.0
    if family.embedding_multiplier != ROOT_OF_WIDTH:
        return factor(family.embedding_multiplier, values)
    return root(values, hidden)


def root(values: ConfigValues, width: int) -> float:
    """The square root of a width, rounded to the type of the weights, as transformers rounds it and as models were
    trained with it."""
    exact, dtype = width**0.5, values.raw("dtype") or values.raw("torch_dtype")
    if dtype == "float16":
        return float(struct.unpack("<e", struct.pack("<e", exact))[0])
    bits = int(struct.unpack("<I", struct.pack("<f", exact))[0])
    if dtype == "bfloat16":
        bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


def logit_multiplier(family: Family, values: ConfigValues, hidden: int) -> float:
    """The factor on logits: of T5 the inverse root of the width, where the head is tied or a key says so."""
    if family.scaled_logits is not None:
        says = values.raw(family.scaled_logits)
        scaled = values.boolean("tie_word_embeddings" if says is None else family.scaled_logits)
        return float(hidden**-0.5) if scaled else 1.0
    if family.logit_width is not None and values.raw(family.logit_width) is not None:
        return factor(family.logit_width, values) / hidden
    return factor(family.logit_factor, values) / factor(family.logit_divisor, values)
