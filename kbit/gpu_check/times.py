"""Step 3: what the GPU can do, and what products and attention take of it.

Products are of random codes in the sizes of an 8B model, weights rotated through more memory than any cache holds,
launches replayed from a CUDA graph; each result is checked before it is timed. `lint` names the case of
tools/triton_lint that estimates the same launch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from kbit.formats.trellis import TrellisFormat
from kbit.gpu_check.measuring import Rotation, assert_product, bandwidth, peak, roofline, rotated
from kbit.gpu_check.place import DRY, SHORT, Place, Row
from kbit.gpu_check.synthetic import random_codes
from kbit.host.errors import one_line

HEADS = (32, 8, 128)  # query heads, key heads, features: Llama 3 8B's
KV_KINDS = ("fp16", "8", "4", "3", "2")
NO_TIME = "not timed"


@dataclass(frozen=True)
class Sizes:
    """What is timed.

    Attributes:
        shapes: (N, K) of the products with one token.
        formats: of these.
        tokens: of the products with several, on the first shape.
        many: formats of these.
        contexts: cached tokens that one new one attends to.
        prompts: tokens of a prompt that attends to itself.
        kinds: of caches.
        heads: (query heads, key heads, features).
    """

    shapes: Sequence[tuple[int, int]]
    formats: Sequence[str]
    tokens: Sequence[int]
    many: Sequence[str]
    contexts: Sequence[int]
    prompts: Sequence[int]
    kinds: Sequence[str] = KV_KINDS
    heads: tuple[int, int, int] = HEADS


_WIDTHS = ("int2-b64", "lloyd2-b64", "int3-b64", "nf3-b64", "int4-b64", "nf4-b64", "lloyd5-b64", "lloyd6-b64")
_NESTED = ("nested2..2-b64", "nested2..3-b64", "nested2..4-b64", "nested2..8-b64")
_ALL = (*_WIDTHS, "int7-b64", "int8-b64", *_NESTED, "trellis2", "trellis3", "trellis4")
SIZES = {
    SHORT: Sizes(((4096, 4096),), ("int2-b64", "nf3-b64", "nf4-b64", "int8-b64"), (256,), ("nf4-b64",), (4096,), ()),
    DRY: Sizes(((64, 256),), ("nf3-b64",), (16,), ("int4-b64",), (80,), (20,), ("4",), (4, 2, 32)),
}
FULL_SIZES = Sizes(
    ((4096, 4096), (14336, 4096)), _ALL, (16, 64, 256, 4096),
    ("int4-b64", "nf4-b64", "nf3-b64", "int8-b64", "nested2..4-b64"),
    (4096, 32768), (2048, 8192),
)  # fmt: skip


def sizes(place: Place) -> Sizes:
    return SIZES.get(place.scale, FULL_SIZES)


def items(place: Place) -> Sequence[str]:
    """What is measured, the most telling first."""
    of = sizes(place)
    found = ["limits"]
    for rows, columns in of.shapes:
        found += [f"product {text} 1x{rows}x{columns}" for text in of.formats]
    rows, columns = of.shapes[0]
    found += [f"decode {kind} {held}" for held in of.contexts for kind in of.kinds]
    found += [f"product {text} {tokens}x{rows}x{columns}" for tokens in of.tokens for text in of.many]
    return found + [f"prefill {kind} {new}" for new in of.prompts for kind in of.kinds if kind != "2"]


def run(place: Place, item: str) -> list[Row]:
    """{"case", "us", "bytes", "operations", "GB/s", "TFLOP/s", "share"}: microseconds, and the share of the roofline
    that was measured on this GPU; or "error"."""
    row: Row = {"case": item, "us": None}
    try:
        if item == "limits":
            return [row | limits(place)]
        kind, *rest = item.split()
        seconds, nbytes, operations, about = (
            _product(place, *rest) if kind == "product" else _attention(place, kind, *rest)
        )
        row |= {"bytes": nbytes, "operations": operations, **about}
        if seconds is None:
            return [row | {"why": NO_TIME}]
        row |= {"us": seconds * 1e6, "GB/s": nbytes / seconds / 1e9, "TFLOP/s": operations / seconds / 1e12}
        row["share"] = roofline(nbytes, operations) / seconds
    except Exception as error:  # of the compiler or the driver, of any kind
        row["error"] = f"{type(error).__name__}: {one_line(error)}"
        place.survive(error)
    return [row]


def limits(place: Place) -> Row:
    """What the GPU does at best."""
    if not place.timed:
        return {"why": NO_TIME}
    return {
        "copy_GB_per_s": bandwidth() / 1e9,
        "fp16_TFLOP_per_s": peak() / 1e12,
        "bf16_TFLOP_per_s": peak(torch.bfloat16) / 1e12,
    }


def _product(place: Place, text: str, shape: str) -> tuple[float | None, float, float, Row]:
    """Seconds, bytes, operations and what else there is to say of one product."""
    from kbit.kernels.triton.codecs.layout import prepare_weight
    from kbit.kernels.triton.product.matmul import describe, matmul

    tokens, rows, columns = map(int, shape.split("x"))
    quantized = random_codes(text, rows, columns, place.seed, place.device)
    weight = prepare_weight(quantized, place.device)
    generator = torch.Generator(place.device).manual_seed(place.seed + 1)
    x = torch.randn((tokens, columns), generator=generator, device=place.device).half()
    kernel = describe(weight, tokens)
    about: Row = {"kernel": kernel, "bits_per_weight": weight.nbytes * 8 / (rows * columns)}
    if not isinstance(quantized.format, TrellisFormat):  # a trellis rotates the tokens: step 1 knows its bound
        about["error_of_result"] = assert_product(matmul(x, weight), x, quantized.dequantize())
        if rows == columns:
            about["lint"] = f"{kernel}/{text}/{tokens}x{columns}x{columns}"
    nbytes, operations = weight.nbytes + 2 * tokens * (rows + columns), 2 * tokens * rows * columns
    del quantized
    if not place.timed:
        matmul(x, weight)
        return None, nbytes, operations, about
    rotation = Rotation([partial(matmul, x, copy) for copy in rotated(weight)])
    return rotation.seconds(), nbytes, operations, about | {"graph": rotation.graph}


def _attention(place: Place, what: str, kind: str, tokens: str) -> tuple[float | None, float, float, Row]:
    """As _product, of a new token over a cache or of a prompt over itself."""
    job = attention_job(place, what, kind, int(tokens))
    from kbit.tuning.timing import GpuTimer

    heads, kv_heads, dim = sizes(place).heads
    held, new = int(tokens), 1 if what == "decode" else int(tokens)
    (trial,) = job.prepare()
    if trial.is_wrong(trial.launch(None)):
        raise AssertionError(f"{job.label}: wrong")
    bits = job_bits(kind, dim)
    nbytes = held * kv_heads * dim * bits / 8 * 2 + 2 * 2 * new * heads * dim
    operations = 4 * heads * dim * (new * held - new * (new - 1) // 2)
    names = {"decode": f"attention_decode/k{kind}-v{kind}/{dim}x{held}x1", "prefill": f"paged/{kind}/{dim}x{held}"}
    about: Row = {"kernel": f"attention_{what}", "bits_per_value": bits, "lint": names[what]}
    launch: Callable[[], object] = partial(trial.launch, None)
    return (GpuTimer(torch.device(place.device))(launch) if place.timed else None), nbytes, operations, about


def attention_job(place: Place, what: str, kind: str, tokens: int) -> Any:
    """What `kbit tune` times of attention, with one context."""
    from kbit.tuning.jobs import Heads

    heads, kv_heads, dim = sizes(place).heads
    model = Heads(heads, kv_heads, dim, dim**-0.5, None, kind, torch.float16, torch.device(place.device))
    return model.decode_job(1, [tokens]) if what == "decode" else model.prefill_job([(tokens, tokens)])


def job_bits(kind: str, dim: int) -> float:
    """Stored bits of a cached value."""
    from kbit.kernels.triton.attention.kv_layout import KVFormat

    return KVFormat(kind, dim).bits_per_value


def product_job(place: Place, text: str, shape: str) -> Any:
    """What `kbit tune` times of a product."""
    from kbit.kernels.triton.codecs.layout import prepare_weight
    from kbit.tuning.jobs import Product, product_jobs

    tokens, rows, columns = map(int, shape.split("x"))
    weight = prepare_weight(random_codes(text, rows, columns, place.seed, place.device), place.device)
    (job,) = product_jobs(Product(weight), tokens)
    return job
