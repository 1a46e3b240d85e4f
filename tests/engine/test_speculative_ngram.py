"""Prompt lookup: what is proposed after which text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from speculative_cases import TOKENIZER

from kbit.engine.ngram import NgramDrafter
from kbit.engine.sampler import Sampler, SamplingParams


class TestNgrams:
    @staticmethod
    def proposals(text: str, most: int = 8, end: str = "", pieces: int = 1) -> str:
        """What is proposed after a text that arrives in so many pieces."""
        ids = TOKENIZER.encode(text)
        drafter, sampler = NgramDrafter(), Sampler(SamplingParams())
        drafter.start(ids[: len(ids) // pieces], room=100, end_ids=TOKENIZER.encode(end) if end else (), vocab_size=257)
        for piece in range(1, pieces + 1):
            guesses = drafter.propose(ids[: len(ids) * piece // pieces], most, sampler)
        assert all(proposal is None for _, proposal in guesses)
        return TOKENIZER.decode([token for token, _ in guesses])

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("", ""),
            ("a", ""),
            ("abcd", ""),
            ("abcdab", "cd"),  # as many tokens as matched
            ("xabcdefgh1abc", "def"),
            ("abc1abc2abc", "2ab"),  # the latest of equally long matches
            ("zabc1abc2zabc", "1abc"),  # a longer one before it
            ("aaaa", "aaa"),  # the match overlaps the end: the text goes round
            ("abababab", "ababab"),
            ("0123456789 0123", "4567"),
        ],
    )
    def test_what_followed_the_longest_match(self, text: str, expected: str) -> None:
        for pieces in (1, 2, 3, max(1, len(text))):
            assert self.proposals(text, pieces=pieces) == expected

    def test_limits(self) -> None:
        assert self.proposals("abcdefgh abcdefgh", most=3) == " ab"
        assert self.proposals("abcdefgh abcdefgh", most=30) == " abcdefgh"[:8]
        assert self.proposals("abcdef|gh abcdef", end="|") == "|"

    @settings(max_examples=200, deadline=None)
    @given(text=st.text("ab", max_size=40), most=st.integers(1, 20))
    def test_against_searching_everything(self, text: str, most: int) -> None:
        """With few places there is nothing that the limits of the search could miss."""
        matches = [
            (length, place)
            for length in range(2, 17)
            for place in range(length, len(text))
            if text[place - length : place] == text[len(text) - length :]
        ]
        if sum(text[place - 2 : place] == text[-2:] for place in range(2, len(text))) > 16:
            return
        expected = ""
        if matches:
            length, place = max(matches)
            for _ in range(min(most, length)):
                expected += (text + expected)[place + len(expected)]
        assert self.proposals(text, most) == expected

    def test_a_new_text_forgets_the_old_one(self) -> None:
        drafter, sampler = NgramDrafter(), Sampler(SamplingParams())
        for text, expected in (("abcdab", 2), ("xxyyab", 0), ("ab", 0)):
            ids = TOKENIZER.encode(text)
            drafter.start(ids, room=9, end_ids=(), vocab_size=257)
            assert len(drafter.propose(ids, 8, sampler)) == expected
