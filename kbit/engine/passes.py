"""Which texts go through an encoder together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

# Tokens that are encoded at once, where a single text is not longer: bounds the memory of a pass.
PASS_TOKENS = 4096


def passes_of(lengths: Sequence[int], most: int | None = None) -> Iterator[list[int]]:
    """Indices of texts that go through a model together: the shortest first, at most PASS_TOKENS, but one at least.

    Args:
        lengths: tokens of each text.
        most: texts at once; None: any number.
    """
    group: list[int] = []
    tokens = 0
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        if group and (tokens + lengths[index] > PASS_TOKENS or len(group) == most):
            yield group
            group, tokens = [], 0
        group.append(index)
        tokens += lengths[index]
    if group:
        yield group
