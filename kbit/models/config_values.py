"""Typed reads from a configuration dictionary that nobody has checked yet."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kbit.host.errors import CheckpointError


def shown(value: object) -> str:
    """A value of unknown origin for a one-line message: quoted, line breaks escaped, at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


@dataclass(frozen=True)
class ConfigValues:
    """A configuration (config.json, or an object inside it) with defaults for the keys it leaves out.

    A key that is absent takes its default; a key that is null counts as absent only where its reader says so. Every
    complaint is a CheckpointError that names the file, the key and the value.

    Attributes:
        values: the dictionary.
        defaults: values of absent keys.
        where: what to call the file in errors.
        prefix: put before a key in errors, for a nested object ("rope_parameters.").
        asked: the keys that were asked for.
        names: other names of keys that are asked for, which stand before these.
    """

    values: Mapping[str, Any]
    defaults: Mapping[str, Any]
    where: str
    prefix: str = ""
    asked: set[str] = field(default_factory=set, compare=False)
    names: Mapping[str, str] = field(default_factory=dict)

    def raw(self, key: str) -> Any:
        """The value as it is, the default where absent, None where there is neither."""
        asked, key = key, self._name(key)
        self.asked.add(key)
        return self.values.get(key, self.defaults.get(key, self.defaults.get(asked)))

    def _name(self, key: str) -> str:
        other = self.names.get(key, key)
        return key if key in self.values and other not in self.values else other

    def error(self, key: str, wanted: str) -> CheckpointError:
        """The complaint about a key: what it holds and what it should hold."""
        value, key = self.raw(key), self._name(key)
        if key not in self.values and value is None:
            return CheckpointError(f"{self.where}: {self.prefix}{key} is missing; it should be {wanted}")
        return CheckpointError(f"{self.where}: {self.prefix}{key} is {shown(value)}; it should be {wanted}")

    def integer(self, key: str, low: int, high: int) -> int:
        """A whole number in [low, high]."""
        value = self.raw(key)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(key, f"a whole number from {low} to {high}")
        return value

    def optional_integer(self, key: str, low: int, high: int) -> int | None:
        """A whole number in [low, high], or None where the key is null (or absent without default)."""
        return None if self.raw(key) is None else self.integer(key, low, high)

    def number(self, key: str, above: float, below: float = math.inf) -> float:
        """A finite number with above < value < below."""
        value = self.raw(key)
        wanted = f"a number above {above:g}" if math.isinf(below) else f"a number above {above:g} and below {below:g}"
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(key, wanted)
        try:
            number = float(value)
        except OverflowError:  # a whole number beyond float's range
            raise self.error(key, wanted) from None
        if not above < number < below:  # false for NaN, and for infinity as `below` is at most that
            raise self.error(key, wanted)
        return number

    def optional_number(self, key: str, above: float, below: float = math.inf) -> float | None:
        """The same, or None where the key is null (or absent without default)."""
        return None if self.raw(key) is None else self.number(key, above, below)

    def boolean(self, key: str) -> bool:
        """true or false."""
        value = self.raw(key)
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def choice(self, key: str, choices: Mapping[str, str]) -> str:
        """One of the known names, translated."""
        value = self.raw(key)
        if not isinstance(value, str) or value not in choices:
            raise self.error(key, f"one of {', '.join(choices)}")
        return choices[value]
