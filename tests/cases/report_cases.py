"""Points and laws made on the spot for the tests of pictures and pages."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

import numpy as np

from kbit.scaling.points import ORIGINAL, Point


def make_point(model: str = "models/small", format: str = "nf4-b64", **changes: Any) -> Point:
    """A row as a sweep would write it: 12 clusters of 100 tokens, KL 0.01 times a spread that depends on the format."""
    parameters = changes.pop("linear_parameters", 1_000_000)
    kl, nll = changes.pop("kl", 0.01), changes.pop("nll", 3.0)
    original = format == ORIGINAL
    name = format.split("-")[0]
    bits = changes.pop("bits", 16 if original else int(name[-1]))
    block = changes.pop("block_size", 0 if original else int(format.rsplit("b", 1)[-1]))
    overhead = 0.0 if not block else 16 / block
    generator = np.random.default_rng(sum(map(ord, format)))
    spread = generator.uniform(0.6, 1.4, 12)
    spread /= spread.mean()
    row: dict[str, Any] = {
        "key": f"{model} {format} {sorted(changes.items())}",
        "model": model,
        "model_id": f"id of {PurePath(model).name}",
        "tokenizer": "t",
        "method": ORIGINAL if original else "rtn",
        "format": format,
        "dtype": ORIGINAL if original else name[:-1],
        "bits": bits,
        "block_size": block,
        "linear_parameters": parameters,
        "parameters": 2 * parameters,
        "linear_bits": int(parameters * (bits + overhead)),
        "total_bits": int(parameters * (bits + overhead + 16)),
        "training_tokens": 10**9,
        "data": "book.txt",
        "data_sha256": "d" * 64,
        "convention": "gptq",
        "context": 101,
        "tokens": 1200,
        "text_bytes": 4800,
        "backend": "native: avx2 kernels, 1 thread, fp32 compute, fp32 KV cache",
        "nll": nll,
        "kl": 0.0 if original else kl,
        "top1": 0.95,
        "weight_error": 0.0 if original else 4.0**-bits,
        "cluster_tokens": (100.0,) * 12,
        "cluster_nll": tuple(100 * nll * spread),
        "cluster_kl": (0.0,) * 12 if original else tuple(100 * kl * spread),
        "quantize_seconds": 1.0,
        "evaluate_seconds": 2.0,
        "created": "2026-01-01T00:00:00+00:00",
    }
    return Point(**{**row, **changes})


def make_sweep(
    models: tuple[tuple[str, int], ...] = (("small", 10**6), ("medium", 4 * 10**6), ("large", 16 * 10**6)),
    widths: tuple[int, ...] = (2, 3, 4, 8),
    dtypes: tuple[str, ...] = ("nf", "int"),
    blocks: tuple[int, ...] = (64, 128),
    **changes: Any,
) -> list[Point]:
    """A sweep whose losses fall with size and rise as 4^-bits, a little more for int and for large blocks."""
    points = []
    for name, parameters in models:
        loss = 2.0 + 20.0 * parameters**-0.25
        common = {"linear_parameters": parameters, **changes}
        points.append(make_point(name, ORIGINAL, nll=loss, **common))
        for bits in widths:
            for dtype in dtypes:
                for block in blocks:
                    kl = 3.0 * 4.0**-bits * (1.3 if dtype == "int" else 1.0) * (1.1 if block > 64 else 1.0)
                    points.append(make_point(name, f"{dtype}{bits}-b{block}", kl=kl, nll=loss + kl, **common))
    return points
