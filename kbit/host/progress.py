"""How long work says how far it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

# What is being done, steps done, steps in all.
Progress: TypeAlias = Callable[[str, int, int], None]
