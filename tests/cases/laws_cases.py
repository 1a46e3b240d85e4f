"""A world whose laws are known, measured as kbit scale would: for tests of what is fitted to it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from kbit.formats.quant_format import QuantFormat
from kbit.scaling.laws.forms import target
from kbit.scaling.laws.gaussian import gaussian_rounding
from kbit.scaling.points import ORIGINAL, Point

CLUSTERS = 40
CLUSTER_TOKENS = 255.0
FORMATS = tuple(f"{dtype}{bits}-b{block}" for bits in (3, 4, 5, 6, 8) for dtype in ("nf", "int") for block in (64, 128))


@dataclass(frozen=True)
class Size:
    """A model of the world: linear parameters, training tokens, loss as it is, ln of its divergence per error."""

    name: str
    linear: int
    tokens: int | None
    loss: float
    constant: float


FAMILY = (
    Size("small", 1_000_000, 10_000_000, 4.2, 0.4),
    Size("middle", 3_000_000, 30_000_000, 3.8, 0.1),
    Size("large", 9_000_000, 90_000_000, 3.5, -0.2),
)


def measure(
    family: Sequence[Size] = FAMILY,
    formats: Sequence[str] = FORMATS,
    *,
    log_kl: Callable[[Size, str], float] | None = None,
    noise: float = 0.1,
    loss_per_kl: float = 1.0,
    seed: int = 0,
    embedding: int = 500_000,
    method: str = "rtn",
    tokenizer: str = "t",
    data: str = "text.txt",
    originals: bool = True,
    gradients: bool = False,
) -> list[Point]:
    """Rows of every model as it is and in every format.

    Args:
        log_kl: the law: ln of the mean divergence. By default constant + ln(the noise's share on normal weights).
        noise: standard deviation of the logarithm of a cluster's divergence; the mean over the clusters scatters with it.
        loss_per_kl: how the loss follows the divergence, on average.
        gradients: whether rows say what their errors cost to second order: exp(constant) times the error.
    """
    law = log_kl or (lambda size, format: size.constant + math.log(gaussian_rounding(format).noise))
    generator = np.random.default_rng(seed)
    hardness = 1 + 0.15 * generator.standard_normal(CLUSTERS)  # of the text: the same for all models
    hardness /= hardness.mean()
    tokens = np.full(CLUSTERS, CLUSTER_TOKENS)
    points = []
    for size in family:
        base = size.loss * hardness
        if originals:
            points.append(_point(size, ORIGINAL, method, base, 0 * base, tokens, embedding, tokenizer, data))
        for format in formats:
            factor = np.exp(noise * generator.standard_normal(CLUSTERS) - noise**2 / 2)
            kl = math.exp(law(size, format)) * factor
            step = noise * np.sqrt(kl) * 0.1 * generator.standard_normal(CLUSTERS)
            nll = base + loss_per_kl * kl + step
            point = _point(size, format, method, nll, kl, tokens, embedding, tokenizer, data)
            if gradients:
                point = replace(point, expected_kl=math.exp(size.constant) * point.weight_error)
            points.append(point)
    return points


def _point(
    size: Size,
    format: str,
    method: str,
    nll: np.ndarray,
    kl: np.ndarray,
    tokens: np.ndarray,
    embedding: int,
    tokenizer: str,
    data: str,
) -> Point:
    original = format == ORIGINAL
    seen = None if original else target(format, method)
    per_weight = 16.0 if seen is None else seen.bits_per_weight
    linear_bits = round(per_weight * size.linear)
    identity = hashlib.sha256(size.name.encode()).hexdigest()
    return Point(
        key=hashlib.sha256(f"{identity} {method} {format} {tokenizer} {data}".encode()).hexdigest(),
        model=size.name,
        model_id=identity,
        tokenizer=tokenizer,
        method=ORIGINAL if original else method,
        format=format,
        dtype=ORIGINAL if seen is None else seen.dtype,
        bits=16 if seen is None else seen.bits,
        block_size=0 if original else QuantFormat.parse(format).block_size,
        linear_parameters=size.linear,
        parameters=size.linear + embedding,
        linear_bits=linear_bits,
        total_bits=linear_bits + 16 * embedding,
        training_tokens=size.tokens,
        data=data,
        data_sha256=hashlib.sha256(data.encode()).hexdigest(),
        convention="gptq",
        context=256,
        tokens=int(tokens.sum()),
        text_bytes=3 * int(tokens.sum()),
        backend="native: avx2 kernels, 1 thread, fp32 compute, fp32 KV cache",
        nll=float((nll * tokens).sum() / tokens.sum()),
        kl=float((kl * tokens).sum() / tokens.sum()),
        top1=1.0,
        weight_error=0.0 if original else gaussian_rounding(format).error,
        cluster_tokens=tuple(tokens.tolist()),
        cluster_nll=tuple((nll * tokens).tolist()),
        cluster_kl=tuple((kl * tokens).tolist()),
        quantize_seconds=0.1,
        evaluate_seconds=0.2,
        created="2026-01-01T00:00:00+00:00",
    )
