"""RoPE scaling: from GGUF metadata and the rope_freqs tensor to a Hugging Face `rope_scaling` dictionary.

llama.cpp's converter writes linear and yarn scaling as keys, but bakes llama3 scaling into a tensor: one divisor per
frequency. With wavelength w_i = 2 pi theta^(2i/D), original context c, and factors f (total), l (low), h (high), the
llama3 rule divides frequency i by 1 where w < c/h, by f where w > c/l, and in between by 1 / ((1 - s)/f + s) with
s = (c/w - l) / (h - l). `llama3_from_divisors` solves this for f, l, h and checks that the rule gives the tensor back.
Divisors of another rule are taken as they are: as LongRoPE's, the same for short and for long texts.
"""

from __future__ import annotations

import math
from typing import Any

from kbit.checkpoint.gguf.metadata import GGUFHeader
from kbit.host.errors import UnsupportedError

# Llama 3.1's own values; only the ratios c/l and c/h matter, so c can be chosen when the metadata does not state it.
_LLAMA3_CONTEXT = 8192
_LLAMA3_LOW_HIGH = (1.0, 4.0)


def rope_scaling(
    header: GGUFHeader,
    arch: str,
    head_dim: int,
    theta: float,
    context: int,
    divisors: list[float] | None,
    *,
    yarn_log_multiplier: bool = False,
) -> dict[str, Any] | None:
    """The `rope_scaling` entry of a Hugging Face config, or None for plain RoPE.

    Args:
        header: the file's header.
        arch: prefix of the metadata keys.
        head_dim: D, all of it rotated.
        theta: RoPE base.
        context: `context_length`.
        divisors: values of rope_freqs.weight (D/2), or None when the file has no such tensor.
        yarn_log_multiplier: whether the architecture reads this key, which is YaRN's mscale_all_dim, and mscale.

    Raises:
        CheckpointError: a value that no scaling can have.
        UnsupportedError: a scaling that Hugging Face's linear and yarn rules cannot express, or two at once.
    """
    scaling = _scaling_from_keys(header, arch, context, yarn_log_multiplier)
    if divisors is None:
        return scaling
    if len(divisors) != head_dim // 2:
        header.fail(f"tensor 'rope_freqs.weight' has {len(divisors)} values, expected {head_dim // 2} (head_dim / 2)")
    if not all(math.isfinite(value) and value > 0 for value in divisors):
        header.fail("tensor 'rope_freqs.weight' holds values that are not positive numbers")
    if all(value == 1.0 for value in divisors):
        return scaling  # dividing by one changes nothing
    if scaling is not None:
        raise UnsupportedError(
            f"{header.path}: both rope_freqs.weight and {arch}.rope.scaling.type={scaling['rope_type']} scale RoPE; "
            "kbit supports one scaling at a time"
        )
    original = _original_context(header, arch) or _LLAMA3_CONTEXT
    found = llama3_from_divisors(divisors, head_dim, theta, original)
    return found or {
        "rope_type": "longrope",
        "short_factor": divisors,
        "long_factor": divisors,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": context,
    }


def _scaling_from_keys(header: GGUFHeader, arch: str, context: int, log_multiplier: bool) -> dict[str, Any] | None:
    def unsupported(key: str, value: object) -> UnsupportedError:
        return UnsupportedError(
            f"{header.path}: {key}={value} is a RoPE scaling kbit cannot express; "
            "supported are none, linear, yarn and llama3 (rope_freqs.weight)"
        )

    prefix = f"{arch}.rope.scaling."
    # llama.cpp: without a type, a factor means linear; `rope.scale_linear` is the old name of the factor.
    kind = header.string(prefix + "type") or "linear"
    factor = header.number(prefix + "factor") or header.number(f"{arch}.rope.scale_linear") or 1.0
    if not (math.isfinite(factor) and factor > 0):
        header.fail(f"metadata key '{prefix}factor' is {factor}, expected a positive number")
    if kind not in ("none", "linear", "yarn"):
        raise unsupported(prefix + "type", repr(kind[:40]))
    attention = header.number(prefix + "yarn_attn_factor") or header.number(prefix + "attn_factor") or 1.0
    if not (math.isfinite(attention) and attention > 0):
        header.fail(f"metadata key '{prefix}attn_factor' is {attention}, expected a positive number")
    if attention != 1.0 and kind != "yarn":
        raise unsupported(prefix + "attn_factor", attention)
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    for key, neutral in (("yarn_log_multiplier", 0.0), ("yarn_ext_factor", 1.0)):
        value = header.number(prefix + key)
        if value is not None and value != neutral and not (log_multiplier and key == "yarn_log_multiplier"):
            raise unsupported(prefix + key, value)
    original = _original_context(header, arch) or context
    scaling: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
    }
    multiplier = header.number(prefix + "yarn_log_multiplier")
    if log_multiplier and multiplier:
        scaling["mscale"] = scaling["mscale_all_dim"] = multiplier
    for name in ("beta_fast", "beta_slow"):
        value = header.number(f"{prefix}yarn_{name}")
        if value is not None:
            if not (math.isfinite(value) and value > 0):
                header.fail(f"metadata key '{prefix}yarn_{name}' is {value}, expected a positive number")
            scaling[name] = value
    if attention != 1.0:
        # llama.cpp multiplies yarn's own 0.1 ln(factor) + 1; Hugging Face's attention_factor replaces it.
        scaling["attention_factor"] = attention * (0.1 * math.log(factor) + 1.0)
    return scaling


def _original_context(header: GGUFHeader, arch: str) -> int | None:
    key = f"{arch}.rope.scaling.original_context_length"
    value = header.integer(key)
    if value is not None and not 0 <= value < 1 << 32:
        header.fail(f"metadata key '{key}' is {value}, expected a positive number")
    return value or None


def llama3_divisors(head_dim: int, theta: float, factor: float, low: float, high: float, original: int) -> list[float]:
    """The divisor of each of the head_dim/2 frequencies under the llama3 rule (see the module's docstring)."""
    result = []
    for index in range(head_dim // 2):
        turns = original / (2 * math.pi * theta ** (2 * index / head_dim))  # c / w
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        result.append(1.0 / ((1.0 - smooth) / factor + smooth))
    return result


def llama3_from_divisors(divisors: list[float], head_dim: int, theta: float, original: int) -> dict[str, Any] | None:
    """The llama3 scaling that gives these divisors, or None when there is none.

    The divisors were computed in float32: theta^(2i/D) carries a relative error of about ln(theta) eps (exponent
    rounding), s at most 4/3 of it, and the divisor `factor` times that; hence a tolerance of 64 eps times the factor.
    """
    factor = max(divisors)
    if factor <= 1.0:
        return None
    rounded = round(factor, 4)
    factor = rounded if abs(rounded - factor) <= 1e-6 * factor else factor
    tolerance = 64 * 2.0**-23 * factor

    candidates = [_LLAMA3_LOW_HIGH]
    # In the transition s is linear in c/w: s = a (c/w) - b with a = 1/(h - l), b = l/(h - l). Its two outermost
    # points give a and b.
    points = []
    for index, value in enumerate(divisors):
        if 1.0 + tolerance < value < factor * (1.0 - tolerance):
            turns = original / (2 * math.pi * theta ** (2 * index / head_dim))
            points.append((turns, (1.0 / value - 1.0 / factor) / (1.0 - 1.0 / factor)))
    if len(points) >= 2 and points[0][0] != points[-1][0]:
        (x0, s0), (x1, s1) = points[0], points[-1]
        slope = (s1 - s0) / (x1 - x0)
        if slope > 0:
            low = x0 - s0 / slope
            fitted = (low, low + 1.0 / slope)
            candidates += [(round(fitted[0], 3), round(fitted[1], 3)), fitted]
    for low, high in candidates:
        if not 0 < low < high:
            continue
        expected = llama3_divisors(head_dim, theta, factor, low, high, original)
        if all(abs(a - b) <= tolerance * b for a, b in zip(divisors, expected, strict=True)):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    return None
