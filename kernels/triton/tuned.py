"""Configurations found by timing on a GPU, which the table's choices (configs.py, attention_configs.py) give way to.

Only a table in memory: `kbit.tuning.stored` reads it from the user's cache and writes it there, `kbit tune` finds what
belongs in it. Nothing here touches a file or a GPU, and without entries a lookup is one test of an empty dictionary.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from functools import lru_cache, wraps
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

# What tuning times; and at most so many tokens are told apart, as a product of more is cut into tiles of these anyway.
PRODUCT_TOKENS = (1, 4, 16, 64, 256, 1024)

# (kernel, arch, what else the chooser is given) -> configuration
Key = tuple[str, str, tuple[Hashable, ...]]
_table: dict[Key, Any] = {}


def install(arch: str, entries: Mapping[tuple[str, tuple[Hashable, ...]], Any]) -> None:
    """Replaces what is known of an architecture.

    Args:
        arch: of current_arch().
        entries: (kernel, the chooser's arguments after arch) -> configuration, which must be one that the kernel takes.
    """
    for key in [key for key in _table if key[1] == arch]:
        del _table[key]
    _table.update({(kernel, arch, problem): config for (kernel, problem), config in entries.items()})
    _find.cache_clear()


def preferred(kernel: str) -> Callable[[F], F]:
    """Makes a chooser f(arch, ...) answer with the installed configuration for the same arguments, where there is one.

    A `Problem` is the same up to its tokens, rounded up to a power of two; and where that was not timed but the next
    one was, its configuration is taken unless its tiles would be half empty. Without timings the chooser decides.
    """

    def decorate(choose: F) -> F:
        @wraps(choose)
        def chosen(arch: str, *problem: Hashable) -> Any:
            found = _find(kernel, arch, problem) if _table else None
            return choose(arch, *problem) if found is None else found

        return chosen  # type: ignore[return-value]

    return decorate


@lru_cache(maxsize=4096)
def _find(kernel: str, arch: str, problem: tuple[Any, ...]) -> Any:
    tokens = getattr(problem[0], "tokens", None)
    if tokens is None:
        return _table.get((kernel, arch, problem))
    rounded = min(1 << (tokens - 1).bit_length(), PRODUCT_TOKENS[-1])
    for timed in (rounded, 2 * rounded):
        config = _table.get((kernel, arch, (replace(problem[0], tokens=timed), *problem[1:])))
        if config is not None and (timed == rounded or getattr(config, "tokens", 0) <= max(16, rounded)):
            return config
    return None
