"""How an encoder-decoder's texts are generated: generation_config.json, as transformers reads it, or config.json.

A folder from before generation_config.json has the same keys in config.json. Keys that change the result, and that
nothing here does, are refused unless their value is harmless.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kbit.checkpoint.source import CheckpointSource
from kbit.host.errors import CheckpointError, UnsupportedError, UsageError
from kbit.models.config_values import ConfigValues, shown
from kbit.text.added_tokens import read_json

GENERATION_CONFIG = "generation_config.json"
# New tokens at most, where no configuration says (transformers' default of 20 cuts most texts off).
DEFAULT_NEW_TOKENS = 256
MAX_BEAMS = 256
_MAX_TOKENS = 1 << 20
_MAX_SIZE = 1 << 16
_LONGEST_PENALTY = 1e3

_DEFAULTS: Mapping[str, Any] = {
    "num_beams": 1,
    "length_penalty": 1.0,
    "early_stopping": False,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "repetition_penalty": 1.0,
    "renormalize_logits": False,
}
# What changes the text and is not done here, with the values that change nothing.
_REFUSED: Mapping[str, tuple[Any, ...]] = {
    "constraints": (None,),
    "diversity_penalty": (None, 0),
    "do_sample": (None, False),
    "dola_layers": (None,),
    "encoder_repetition_penalty": (None, 1),
    "exponential_decay_length_penalty": (None,),
    "force_words_ids": (None,),
    "guidance_scale": (None, 1),
    "num_beam_groups": (None, 1),
    "penalty_alpha": (None, 0),
    "sequence_bias": (None,),
    "stop_strings": (None,),
    "watermarking_config": (None,),
}


@dataclass(frozen=True)
class GenerationSettings:
    """How to choose tokens.

    Attributes:
        start: the token that every text begins with.
        ends: tokens that end one.
        longest: tokens of a text at most, the first included.
        beams: how many are kept; 1: the best token is taken every time.
        length_penalty: p: beams are compared by the sum of their log probabilities over their length^p.
        early_stopping: whether to stop when there are as many finished texts as beams; else when no open one can
            become better, for which "never" believes less.
        forced_first, forced_last: what the second token is, and any of what the last one is where a text is cut off.
        shortest: tokens, the first included, before which no text ends.
        no_repeat, no_repeat_of_source: n-grams of this size that occurred in the text, or in its source, do not again;
            0: they may.
        repetition_penalty: makes tokens that occurred less likely; 1: they are not.
        bad_words: sequences of tokens that do not occur.
        suppressed, suppressed_first: tokens that do not occur; and not at the beginning.
        renormalized: scores become log probabilities again after all that.
    """

    start: int
    ends: tuple[int, ...] = ()
    longest: int = 1 + DEFAULT_NEW_TOKENS
    beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    forced_first: int | None = None
    forced_last: tuple[int, ...] = ()
    shortest: int = 0
    no_repeat: int = 0
    no_repeat_of_source: int = 0
    repetition_penalty: float = 1.0
    bad_words: tuple[tuple[int, ...], ...] = ()
    suppressed: tuple[int, ...] = ()
    suppressed_first: tuple[int, ...] = ()
    renormalized: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.beams <= MAX_BEAMS:
            raise UsageError(f"{self.beams} beams: from 1 to {MAX_BEAMS} can be kept")
        if self.longest < 2:
            raise UsageError("there must be room for at least 1 new token")


def read_settings(
    source: CheckpointSource, vocabulary: int, more: Mapping[str, Any] | None = None
) -> GenerationSettings:
    """The settings of a checkpoint.

    Args:
        source: the checkpoint.
        vocabulary: how many tokens there are.
        more: keys that stand before those of the files (of a task, `task_specific_params`).

    Raises:
        CheckpointError: a senseless value; no token to begin with.
        UnsupportedError: a key asks for what is not done here.
    """
    files, where = source.sidecar_files(), str(source.path)
    given: Mapping[str, Any] = source.config
    file = f"config of {where}"
    if GENERATION_CONFIG in files:
        file = f"{where}: {GENERATION_CONFIG}"
        ids = ("decoder_start_token_id", "bos_token_id", "eos_token_id")
        # (Old configurations' keys say "null" in many words.)
        known = {key: source.config[key] for key in ids if source.config.get(key) is not None}
        given = {**known, **{k: v for k, v in read_json(files, GENERATION_CONFIG, where).items() if v is not None}}
    values = ConfigValues({**given, **(more or {})}, _DEFAULTS, file)
    for key, harmless in _REFUSED.items():
        if values.raw(key) not in harmless:
            raise UnsupportedError(
                f"{file}: {key} {shown(values.raw(key))} is not supported; remove the key, or set it to "
                f"{harmless[-1]!r}"
            )
    reader = _Reader(values, vocabulary)
    start = reader.token("decoder_start_token_id")
    start = reader.token("bos_token_id") if start is None else start
    if start is None:
        raise CheckpointError(f"{file}: decoder_start_token_id is missing, so there is no token to begin a text with")
    longest, fewest = reader.longest(), values.optional_integer("min_new_tokens", 0, _MAX_TOKENS) or 0
    shortest = values.optional_integer("min_length", 0, _MAX_TOKENS) or 0
    return GenerationSettings(
        start=start,
        ends=reader.tokens("eos_token_id"),
        longest=longest,
        beams=values.integer("num_beams", 1, MAX_BEAMS),
        length_penalty=values.number("length_penalty", -_LONGEST_PENALTY, _LONGEST_PENALTY),
        early_stopping="never" if values.raw("early_stopping") == "never" else values.boolean("early_stopping"),
        forced_first=reader.forced_first(),
        forced_last=reader.tokens("forced_eos_token_id"),
        shortest=1 + fewest if fewest else shortest,
        no_repeat=values.integer("no_repeat_ngram_size", 0, _MAX_SIZE),
        no_repeat_of_source=values.integer("encoder_no_repeat_ngram_size", 0, _MAX_SIZE),
        repetition_penalty=values.number("repetition_penalty", 0.0, _LONGEST_PENALTY),
        bad_words=reader.sequences("bad_words_ids"),
        suppressed=reader.tokens("suppress_tokens"),
        suppressed_first=reader.tokens("begin_suppress_tokens"),
        renormalized=values.boolean("renormalize_logits"),
    )


@dataclass(frozen=True)
class _Reader:
    """Token ids of a configuration, which must exist."""

    values: ConfigValues
    vocabulary: int

    def token(self, key: str) -> int | None:
        return self.values.optional_integer(key, 0, self.vocabulary - 1)

    def tokens(self, key: str) -> tuple[int, ...]:
        value = self.values.raw(key)
        found = [] if value is None else value if isinstance(value, list) else [value]
        return self._checked(key, found)

    def sequences(self, key: str) -> tuple[tuple[int, ...], ...]:
        value = self.values.raw(key)
        if value is None:
            return ()
        if not isinstance(value, list) or not value or not all(isinstance(part, list) and part for part in value):
            raise self.values.error(key, "a list of lists of token ids")
        return tuple(self._checked(key, part) for part in value)

    def forced_first(self) -> int | None:
        """(Old configurations of BART say it in other words.)"""
        if (
            self.values.raw("forced_bos_token_id") is None
            and self.values.raw("force_bos_token_to_be_generated") is True
        ):
            return self.token("bos_token_id")
        return self.token("forced_bos_token_id")

    def longest(self) -> int:
        new = self.values.optional_integer("max_new_tokens", 1, _MAX_TOKENS)
        if new is not None:
            return 1 + new
        return self.values.optional_integer("max_length", 2, _MAX_TOKENS) or 1 + DEFAULT_NEW_TOKENS

    def _checked(self, key: str, found: Sequence[object]) -> tuple[int, ...]:
        ids = [token for token in found if type(token) is int and 0 <= token < self.vocabulary]
        if len(ids) != len(found):
            raise self.values.error(key, f"ids of tokens, from 0 to {self.vocabulary - 1}")
        return tuple(ids)
