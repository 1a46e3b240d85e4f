"""Finding stop strings in text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence

from kbit.host.errors import UsageError


class StopMatcher:
    """Passes text through up to the first stop string, and never any part of that string.

    Text that may turn out to be the beginning of a stop string is held back until it is clear. Each stop string is a
    Knuth-Morris-Pratt automaton, so a character costs the same however long the strings are, and where pieces are cut
    makes no difference. The first stop string to be complete wins; of two complete at the same character the longer.

    Attributes:
        matched: the stop string found, or None. Once it is set, further text is dropped.

    Raises:
        UsageError: a stop string is empty.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        if any(not stop for stop in stops):
            raise UsageError("--stop '': a stop string needs at least one character")
        # Longest first: of several that end at one character, the first checked begins earliest.
        self._stops = sorted(set(stops), key=len, reverse=True)
        self._failures = [_failure_function(stop) for stop in self._stops]
        self._states = [0] * len(self._stops)  # characters of each stop string the text now ends with
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """The part of the text so far that can be shown now."""
        if self.matched is not None:
            return ""
        if not self._stops:
            return text
        buffer = self._held + text
        for position in range(len(self._held), len(buffer)):
            char = buffer[position]
            for i, (stop, failure) in enumerate(zip(self._stops, self._failures, strict=True)):
                state = self._states[i]
                while state and stop[state] != char:
                    state = failure[state - 1]
                state += stop[state] == char
                if state == len(stop):
                    self.matched = stop
                    self._held = ""
                    return buffer[: position + 1 - len(stop)]
                self._states[i] = state
        # The longest beginning of any stop string is what must wait. Its start never moves backwards, so everything
        # before it has either been shown or is shown now.
        cut = len(buffer) - max(self._states)
        self._held = buffer[cut:]
        return buffer[:cut]

    def finish(self) -> str:
        """What was held back, now that no more text comes; "" after a match."""
        held, self._held = self._held, ""
        return held


def _failure_function(pattern: str) -> list[int]:
    """For every prefix of the pattern, the length of its longest proper prefix that is also its suffix."""
    failure = [0] * len(pattern)
    length = 0
    for i in range(1, len(pattern)):
        while length and pattern[length] != pattern[i]:
            length = failure[length - 1]
        length += pattern[length] == pattern[i]
        failure[i] = length
    return failure
