"""Step 3 of tools/gpu_day.py, the others: torch in half precision, and other libraries where they are installed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from kbit.gpu_check import times
from kbit.gpu_check.measuring import Rotation, copies_for, relative_error, roofline
from kbit.gpu_check.place import Place, Row
from kbit.host.errors import one_line

MOST_ERROR = 0.3  # of a 4-bit product, relative; about 0.1 is usual


def items(place: Place) -> Sequence[str]:
    """Products of every installed library, then torch's attention."""
    from gpu_peers import PEERS, absent

    of = times.sizes(place)
    shapes = [(1, *shape) for shape in of.shapes] + [(tokens, *of.shapes[0]) for tokens in of.tokens]
    names = [peer.name for peer in PEERS if absent(peer) is None]
    names = names if place.timed else names[:1]
    found = [f"{name} | {tokens}x{rows}x{columns}" for tokens, rows, columns in shapes for name in names]
    found += [f"torch sdpa fp16 | decode {held}" for held in of.contexts]
    return found + [f"torch sdpa fp16 | prefill {new}" for new in of.prompts]


def run(place: Place, item: str) -> list[Row]:
    """{"case", "us", "share"}, or "why" not: another library's error is no failure of kbit's."""
    row: Row = {"case": item, "us": None}
    name, _, what = item.partition(" | ")
    try:
        attends = what.startswith(("decode", "prefill"))
        launches, nbytes, operations = _attention(place, what) if attends else _product(place, name, what)
        if not place.timed:
            launches[0]()
            return [row | {"why": times.NO_TIME}]
        seconds = Rotation(launches).seconds()
        row |= {"us": seconds * 1e6, "share": roofline(nbytes, operations) / seconds}
    except Exception as error:  # another library's, of any kind
        row["why"] = f"{type(error).__name__}: {one_line(error)}"
        place.survive(error)
    return [row]


def _product(place: Place, name: str, shape: str) -> tuple[list[Any], float, float]:
    from gpu_peers import PEERS

    tokens, rows, columns = map(int, shape.split("x"))
    peer = next(peer for peer in PEERS if peer.name == name)
    generator = torch.Generator(place.device).manual_seed(place.seed)
    weight = torch.randn((rows, columns), generator=generator, device=place.device).half() * columns**-0.5
    copies = copies_for(weight.numel() // 2) if place.timed else 1
    layers = [peer.make(weight) for _ in range(copies)]
    x = torch.randn((tokens, columns), generator=generator, device=place.device).to(layers[0].dtype)
    error = relative_error(layers[0].run(x), x.double() @ weight.double().T)
    if not error < MOST_ERROR:
        raise AssertionError(f"its result is {error:.0%} off")
    nbytes = layers[0].nbytes + 2 * tokens * (rows + columns)
    return [partial(layer.run, x) for layer in layers], nbytes, 2 * tokens * rows * columns


def _attention(place: Place, what: str) -> tuple[list[Any], float, float]:
    heads, kv_heads, dim = times.sizes(place).heads
    kind, size = what.split()
    held, new = int(size), 1 if kind == "decode" else int(size)
    q = torch.randn((1, heads, new, dim), device=place.device).half()
    k, v = (torch.randn((1, kv_heads, held, dim), device=place.device).half() for _ in range(2))
    attend = partial(torch.nn.functional.scaled_dot_product_attention, q, k, v, is_causal=new > 1, enable_gqa=True)
    operations = 4 * heads * dim * (new * held - new * (new - 1) // 2)
    return [attend] * 2, 4 * held * kv_heads * dim + 4 * new * heads * dim, operations
