"""Prompt lookup: what followed these words the last time they stood in the text is a good guess at what follows now.

Answers that quote, summarise or edit their prompt repeat long runs of it, and finding them costs microseconds
(Saxena 2023, "Prompt Lookup Decoding").
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from kbit.engine.sampler import Guess, Sampler

# Earlier places with the same last two tokens that are compared, the latest first, and the tokens compared at each.
# More of either was no better on any prompt of benchmarks/test_speculative.py.
_PLACES = 16
_LONGEST = 16


class NgramDrafter:
    """Continues a text as it went on after the longest earlier occurrence of its last tokens.

    Of equally long ones the latest counts. Places are found as LZ77 compressors find them (hash chains): a dictionary
    from each pair of tokens to the latest place behind it, and from each place a link to the one before. A match of
    length n is trusted for n tokens.
    """

    name = "ngram"
    context = None

    def __init__(self) -> None:
        self.start((), room=0, end_ids=(), vocab_size=0)

    def start(self, prompt_ids: Sequence[int], *, room: int, end_ids: Collection[int], vocab_size: int) -> None:
        """Forgets the last text."""
        self._end_ids = end_ids
        self._latest: dict[tuple[int, int], int] = {}  # pair of tokens -> index of the token after its last occurrence
        self._before: dict[int, int] = {}  # such an index -> the one of the occurrence before
        self._indexed = 2  # pairs that end before this index are in the dictionaries

    def propose(self, text: Sequence[int], most: int, sampler: Sampler) -> list[Guess]:
        return [(token, None) for token in self.find(text, most)]

    def find(self, text: Sequence[int], most: int) -> list[int]:
        """At most `most` tokens that followed the longest match; none without a match of two tokens or more."""
        size = len(text)
        for index in range(self._indexed, size):
            pair = (text[index - 2], text[index - 1])
            if pair in self._latest:
                self._before[index] = self._latest[pair]
            self._latest[pair] = index
        self._indexed = max(self._indexed, size)
        place, length = self._longest_match(text) if size >= 2 else (0, 0)
        guesses: list[int] = []
        for step in range(min(most, length)):
            # Where the match overlaps the end of the text, the text is going round: so does the draft.
            token = text[place + step % (size - place)]
            guesses.append(token)
            if token in self._end_ids:
                break
        return guesses

    def _longest_match(self, text: Sequence[int]) -> tuple[int, int]:
        """(index after the match, its length); the length is 0 without one."""
        size = len(text)
        best = longest = 0
        place = self._latest.get((text[-2], text[-1]))
        for _ in range(_PLACES):
            if place is None:
                break
            length = 2
            while length < min(_LONGEST, place) and text[place - length - 1] == text[size - length - 1]:
                length += 1
            if length > longest:
                best, longest = place, length
            place = self._before.get(place)
        return best, longest
