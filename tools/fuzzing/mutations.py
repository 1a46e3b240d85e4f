"""Small changes of inputs, drawn from a generator: of bytes, and of values that JSON can hold."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from random import Random
from typing import Any

_BYTES = (b"\0", b"\xff", b"\x7f", b"\x80", b"\0" * 8, b"\xff" * 8, b"\xff" * 7 + b"\x7f", b"{", b"}", b'"', b"[", b"]")
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 64, 255, 1 << 16, 1 << 31, (1 << 31) - 1, 1 << 32, 1 << 62, 1 << 63),
    *(-(1 << 63), 1 << 64, 10**40, 0.0, -0.0, 0.5, -1.5, 1e-300, 1e300, float("inf"), float("-inf"), float("nan")),
    *("", " ", "a", "0", "-1", "\0", "\n", "\ud800", "\U0001f600", "a" * 300, "..", "/", "../x", "{{", "[1]"),
    *([], [[]], [None], [0], [-1], [""], {}, {"": None}, {"a": {}}),
)


def mutate_bytes(data: bytes, random: Random, words: Sequence[bytes] = ()) -> bytes:
    """One to a few changes: bits, bytes, numbers, runs cut out, doubled, put in."""
    out = bytearray(data)
    for _ in range(1 + int(random.expovariate(0.7))):
        at = random.randrange(len(out) + 1)
        kind = random.randrange(8)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << random.randrange(8)
        elif kind == 1 and at < len(out):
            out[at] = random.randrange(256)
        elif kind == 2:
            del out[at : at + random.choice((1, 2, 4, 8, 32, len(out)))]
        elif kind == 3:
            out[at:at] = random.choice((*_BYTES, *words))
        elif kind == 4:
            piece = random.choice((*_BYTES, *words))
            out[at : at + len(piece)] = piece
        elif kind == 5:
            start = random.randrange(len(out) + 1)
            out[at:at] = out[start : start + random.choice((1, 4, 16, 64))]
        elif kind == 6 and at + 4 <= len(out):
            number = int.from_bytes(out[at : at + 4], "little") + random.choice((-1, 1, -8, 8, 1 << 16))
            out[at : at + 4] = (number % (1 << 32)).to_bytes(4, "little")
        elif kind == 7:
            del out[random.choice((at, len(out) // 2, len(out) - 1 if out else 0)) :]
    return bytes(out)


def mutate_json(value: Any, random: Random, values: Sequence[Any] = ()) -> Any:
    """A copy with one change at one place of the tree."""
    value = copy.deepcopy(value)
    places = _places(value)
    if not places:
        return random.choice((*_VALUES, *values))
    parent, key = random.choice(places)
    kind = random.randrange(8)
    if kind <= 2:
        parent[key] = random.choice((*_VALUES, *values))
    elif kind == 3:
        parent[key] = _near(parent[key], random)
    elif kind == 4:
        del parent[key]
    elif kind == 5:  # what stands elsewhere
        other, place = random.choice(places)
        parent[key] = copy.deepcopy(other[place])
    elif kind == 6:
        parent[key] = [parent[key]] if random.random() < 0.5 else {"a": parent[key]}
    elif isinstance(parent, dict):
        other, place = random.choice(places)
        name = place if isinstance(place, str) else random.choice(("", "a", "0", "\n"))
        parent[name] = parent[key]
    else:
        parent.insert(key, copy.deepcopy(parent[key]))
    return value


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every container of a tree with every key that it has."""
    found: list[tuple[Any, Any]] = []
    stack = [value]
    while stack:
        node = stack.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for key in keys:
            found.append((node, key))
            stack.append(node[key])
    return found


def _near(value: Any, random: Random) -> Any:
    """A value that is nearly the same."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int):
        return random.choice((value + 1, value - 1, -value, value * 2, value // 2, float(value), str(value)))
    if isinstance(value, float):
        return random.choice((-value, value * 2, value / 3, str(value)))
    if isinstance(value, str):
        at = random.randrange(len(value) + 1)
        letter = random.choice(("", "_", "a", "\0", "é", "{%", "}}", "."))
        return value[:at] + letter + value[at + random.randrange(2) :]
    if isinstance(value, list):
        return random.choice((value[:-1], value * 2, value[::-1]))
    return list(value.values())
