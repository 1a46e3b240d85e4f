"""Finding stop strings in text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from kbit.host.errors import UsageError


class StopMatcher:
    """Passes text through up to the first stop string, and never any part of that string.

    Text that may turn out to be the beginning of a stop string is held back until it is clear. Each stop string is a
    Knuth-Morris-Pratt automaton, so a character costs the same however long the strings are, and where pieces are cut
    makes no difference. The first stop string to be complete wins; of two complete at the same character the longer.

    A stop string with a special token in it is looked for in the text with all its special tokens, which are never
    shown; any other in the text as it is shown.

    Args:
        stops: the stop strings.
        special_tokens: texts of the tokens that are not shown.

    Attributes:
        matched: the stop string found, or None. Once it is set, further text is dropped.

    Raises:
        UsageError: a stop string is empty.
    """

    def __init__(self, stops: Sequence[str] = (), special_tokens: Collection[str] = ()) -> None:
        if any(not stop for stop in stops):
            raise UsageError("--stop '': a stop string needs at least one character")
        # Longest first: of several that end at one character, the first checked begins earliest.
        self._stops = sorted(set(stops), key=len, reverse=True)
        self._sees_special = [any(token in stop for token in special_tokens) for stop in self._stops]
        self._failures = [_failure_function(stop) for stop in self._stops]
        self._states = [0] * len(self._stops)  # characters of each stop string the text now ends with
        self._held: list[str] = []  # characters; special ones as ""
        self._first = 0  # the number of the first held character
        self._shown: list[int] = []  # the numbers of the held characters that are shown
        self.matched: str | None = None

    def push(self, text: str, *, special: bool = False) -> str:
        """The part of the text so far that can be shown now.

        Args:
            text: what follows.
            special: it is a special token, which is not shown itself.
        """
        if self.matched is not None:
            return ""
        if special and not any(self._sees_special):
            return ""
        if not self._stops:
            return text
        for char in text:
            if not special:
                self._shown.append(self._first + len(self._held))
            self._held.append("" if special else char)
            stop = self._advance(char, special)
            if stop is not None:
                self.matched = self._stops[stop]
                found = self._take(self._begin(stop))
                self._held = []
                return found
        # The longest beginning of any stop string is what must wait. Its start never moves backwards, so everything
        # before it has either been shown or is shown now.
        return self._take(min(map(self._begin, range(len(self._stops)))))

    def finish(self) -> str:
        """What was held back, now that no more text comes; "" after a match."""
        return self._take(self._first + len(self._held))

    def _advance(self, char: str, special: bool) -> int | None:
        """One more character; the stop string that it completes."""
        for i, (stop, failure) in enumerate(zip(self._stops, self._failures, strict=True)):
            if special and not self._sees_special[i]:
                continue
            state = self._states[i]
            while state and stop[state] != char:
                state = failure[state - 1]
            state += stop[state] == char
            self._states[i] = state
            if state == len(stop):
                return i
        return None

    def _begin(self, stop: int) -> int:
        """The number of the character with which the beginning of a stop string begins that the text now ends with."""
        state = self._states[stop]
        if state and not self._sees_special[stop]:
            return self._shown[-state]
        return self._first + len(self._held) - state

    def _take(self, end: int) -> str:
        """What is held and shown of the characters before number `end`, which are held no longer."""
        count = end - self._first
        taken = "".join(self._held[:count])
        del self._held[:count]
        del self._shown[: len(taken)]
        self._first = end
        return taken


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
