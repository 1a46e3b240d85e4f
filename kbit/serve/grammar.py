"""Structured output: which tokens may come next, by llguidance (MIT), which compiles JSON schemas, regular expressions
and Lark grammars. What it cannot enforce is refused before anything is generated.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kbit.engine.answers import ConstraintMaker
from kbit.host.errors import KbitError, UnsupportedError, one_line
from kbit.serve.errors import bad_request

if TYPE_CHECKING:
    import llguidance
    from llguidance._lib import JsonCompileOptions

    from kbit.text.tokenizer import Tokenizer

# JSON as models write it: white space where it is usual, and nowhere else, since some would never end it.
JSON_STYLE: JsonCompileOptions = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "lenient": False,
}
_MOST_GRAMMAR_CHARACTERS = 1 << 18


class GrammarCompiler:
    """Makes constraints for one model. For several threads.

    Args:
        tokenizer: the model's.
        vocabulary: V, the width of its logits.
    """

    def __init__(self, tokenizer: Tokenizer, vocabulary: int) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._lock = threading.Lock()
        self._tokens: llguidance.LLTokenizer | None = None
        self._compiled = lru_cache(maxsize=64)(self._compile)

    def json_schema(self, schema: Mapping[str, Any] | bool, param: str = "response_format") -> ConstraintMaker:
        """Answers that are JSON by a schema.

        Raises:
            ApiError: a schema that is not one, or with keywords that would not be enforced.
        """
        from llguidance import LLMatcher

        text = json.dumps(schema)
        try:
            grammar = LLMatcher.grammar_from_json_schema(text, overrides=JSON_STYLE)
        except ValueError as error:
            raise bad_request(f"{param}: the schema cannot be enforced: {one_line(error)}", param) from None
        return self._maker(grammar, param)

    def json_object(self) -> ConstraintMaker:
        """Answers that are any JSON object."""
        return self.json_schema({"type": "object"})

    def regex(self, pattern: str, param: str = "regex") -> ConstraintMaker:
        """Answers that a regular expression matches whole.

        Raises:
            ApiError: it is not one, or uses what automata cannot do (look-around, references).
        """
        from llguidance import LLMatcher

        return self._maker(LLMatcher.grammar_from_regex(pattern), param)

    def lark(self, grammar: str, param: str = "grammar") -> ConstraintMaker:
        """Answers by a Lark grammar, or by one in llama.cpp's GBNF, which has `::=`.

        Raises:
            ApiError: it is not one.
        """
        from llguidance import LLMatcher
        from llguidance.gbnf_to_lark import gbnf_to_lark

        try:
            text = gbnf_to_lark(grammar) if "::=" in grammar else grammar
        except Exception as error:  # the translation raises what its parser does
            raise bad_request(f"{param}: {one_line(error)}", param) from None
        return self._maker(LLMatcher.grammar_from_lark(text), param)

    def _maker(self, grammar: str, param: str) -> ConstraintMaker:
        if len(grammar) > _MOST_GRAMMAR_CHARACTERS:
            raise bad_request(f"{param}: longer than {_MOST_GRAMMAR_CHARACTERS} characters: make it simpler", param)
        matcher = self._compiled(grammar)
        if matcher.is_error():
            raise bad_request(f"{param}: cannot be enforced: {one_line(matcher.get_error(), 500)}", param)
        warnings = matcher.get_grammar_warnings()
        if warnings:
            raise bad_request(f"{param}: cannot be enforced: {one_line(warnings[0], 500)}", param)
        width = max(self._vocabulary, self._tokenizer.vocab_size)
        return lambda: _Matching(matcher.deep_copy(), width)

    def _compile(self, grammar: str) -> llguidance.LLMatcher:
        import llguidance

        with self._lock:
            if self._tokens is None:
                # (A configuration may name ids that no token has.)
                ends = [end for end in sorted(self._tokenizer.eos_ids) if self._tokenizer.token_name(end) is not None]
                if not ends:
                    raise UnsupportedError("this model has no end-of-sequence token, which structured output needs")
                width = max(self._vocabulary, self._tokenizer.vocab_size)
                try:
                    self._tokens = llguidance.LLTokenizer(self._tokenizer.library_json(), n_vocab=width, eos_token=ends)
                except ValueError as error:
                    raise UnsupportedError(
                        f"this model's tokenizer is none that structured output works with: {one_line(error)}"
                    ) from None
        return llguidance.LLMatcher(self._tokens, grammar, log_level=0)


class _Matching:
    """A `Constraint` by an llguidance matcher."""

    def __init__(self, matcher: llguidance.LLMatcher, width: int) -> None:
        self._matcher = matcher
        self._bits = np.zeros((width + 31) // 32, dtype=np.int32)
        self._width = width

    def mask(self) -> NDArray[np.bool_]:
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        if self._matcher.is_error():
            raise KbitError(f"the grammar became too complex: {one_line(self._matcher.get_error(), 500)}")
        bits = np.unpackbits(self._bits.view(np.uint8), bitorder="little", count=self._width)
        return bits.view(np.bool_)

    def accept(self, token: int) -> None:
        if not self._matcher.consume_token(token):
            raise KbitError(f"the grammar does not take token {token}: {one_line(self._matcher.get_error(), 500)}")

    @property
    def stopped(self) -> bool:
        return bool(self._matcher.is_stopped())
