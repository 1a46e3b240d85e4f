"""Step 1: every kernel at every width and codec against the reference, a seed and the worst error for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch

from kbit.gpu_check.bounds import TooFarError
from kbit.gpu_check.place import DRY, SHORT, Place, Row
from kbit.host.errors import UnsupportedError, one_line

# Of so many checks, one is taken where a place asks for fewer. Every kernel is in what is left.
STRIDES = {SHORT: 3, DRY: 29}


def items(place: Place) -> Sequence[str]:
    """Names of the checks; the first word is the kernel's."""
    names = list(_cases(place.seed))
    stride = STRIDES.get(place.scale, 1)
    first = {name.split()[0]: name for name in reversed(names)}
    return [name for index, name in enumerate(names) if index % stride == 0 or name in first.values()]


def run(place: Place, item: str) -> list[Row]:
    """One check: {"case", "seed", "worst"}; where it failed "error", where the GPU lacks what it takes "refused"."""
    row: Row = {"case": item, "seed": place.seed, "worst": None}
    try:
        row["worst"] = _cases(place.seed)[item](place.device)
    except TooFarError as error:
        row |= {"worst": error.worst, "error": one_line(error)}
    except UnsupportedError as error:
        row["refused"] = one_line(error)
    except Exception as error:  # of the compiler or the driver, of any kind: the other checks go on
        row["error"] = f"{type(error).__name__}: {one_line(error)}"
        place.survive(error)
    return [row]


@lru_cache(maxsize=2)
def _cases(seed: int) -> dict[str, Callable[[str], float]]:
    from kbit.gpu_check import products, rows

    return products.cases(seed) | _attention_cases(seed) | rows.cases(seed) | _recurrent_cases()


def _attention_cases(seed: int) -> dict[str, Callable[[str], float]]:
    from kbit.gpu_check.attention import Cache, Mask, check_append, check_decode, check_packed, check_paged

    found: dict[str, Callable[[str], float]] = {}

    def decode(kinds: tuple[str, str], dim: int, tokens: int, lengths: list[int], mask: Mask, what: str = "") -> None:
        def check(device: str) -> float:
            return check_decode(device, Cache(kinds, 2, dim, lengths, seed=seed), 8, tokens, mask)

        found[f"attention_decode k{kinds[0]}-v{kinds[1]} {dim}x{lengths[0]}x{tokens}{what}"] = check

    def paged(kinds: tuple[str, str], dim: int, new: list[int], mask: Mask, what: str = "") -> None:
        def check(device: str) -> float:
            lengths = [count + 70 for count in new]
            return check_paged(device, Cache(kinds, 2, dim, lengths, seed=seed), 8, new, mask)

        found[f"attention_prefill_paged k{kinds[0]}-v{kinds[1]} {dim}x{new[0]}{what}"] = check

    kinds = [(kind, kind) for kind in ("fp16", "bf16", "8", "4", "3", "2")] + [("8", "4"), ("4", "3"), ("fp16", "2")]
    for pair in kinds:
        for dim in (64, 80, 128, 256):
            decode(pair, dim, 1, [1100, 4], Mask())
            paged(pair, dim, [37, 1], Mask())
            found[f"kv_append k{pair[0]}-v{pair[1]} {dim}"] = partial(check_append, kinds=pair, heads=(6, 3, dim))
        decode(pair, 128, 4, [300, 17], Mask())
    for pair in (("fp16", "fp16"), ("4", "4")):
        decode(pair, 64, 3, [131, 30], Mask(window=20, soft_cap=10.0), " window, cap")
        decode(pair, 64, 1, [131, 30], Mask(sinks=torch.linspace(-40, 3, 8)), " sinks")
        decode(pair, 64, 3, [131, 30], Mask(window=20, chunked=True), " chunks")
        decode(pair, 512, 1, [200], Mask(), " wide")
        paged(pair, 64, [50, 9], Mask(window=20, soft_cap=10.0), " window, cap")
        paged(pair, 64, [50, 9], Mask(window=20, chunked=True), " chunks")
        paged(pair, 512, [20], Mask(), " wide")
    for dtype in (torch.float16, torch.bfloat16):
        for dim in (64, 128, 256):
            name = f"attention_prefill {str(dtype).removeprefix('torch.')} {dim}"
            found[name] = partial(check_packed, heads=(4, 2, dim), queries=[130, 1], dtype=dtype)
    return found


def _recurrent_cases() -> dict[str, Callable[[str], float]]:
    from kbit.gpu_check.recurrent import batch_of, check_convolution, check_delta, check_space

    found: dict[str, Callable[[str], float]] = {}
    checks: list[tuple[str, Any]] = [("gated_delta", check_delta), ("state_space", check_space)]
    for name, check in checks:
        for chunked in (False, True):
            counts = (1, 67, 0, 5) if chunked else (1, 4, 0, 2)
            for dtype in (torch.float32, torch.float16):
                label = f"{name} {'chunks' if chunked else 'tokens'} {str(dtype).removeprefix('torch.')}"
                found[label] = partial(check, batch=batch_of(*counts), dtype=dtype, chunked=chunked)
    for width, columns, bias in ((2, 1, False), (4, 130, True), (5, 48, False)):
        found[f"short_convolution {width}x{columns}"] = partial(
            check_convolution, width=width, columns=columns, bias=bias, counts=(3, 40, 0, 2)
        )
    return found
