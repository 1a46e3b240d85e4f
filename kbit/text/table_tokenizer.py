"""A tokenizer that works off a token table: the library's results, without parsing tokenizer.json.

The library splits a text and gives each byte of a word its id, by a tokenizer of bytes and added tokens (its `Encoding`
says which ids belong to one word); the merges within each word are made on the mapped table. What that cannot do is
done by the library's own tokenizer, loaded at that moment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from kbit.host.errors import CheckpointError, one_line
from kbit.text.backend import LoadBackend, load_backend
from kbit.text.token_table import TokenTable

if TYPE_CHECKING:
    import tokenizers

T = TypeVar("T")

# A text's bytes, not yet merged, take about 200 bytes of memory each while it is encoded; beyond this many characters
# parsing tokenizer.json takes less memory and little more time than encoding does anyway.
_MOST_CHARACTERS = 500_000


@dataclass(frozen=True)
class Encoded:
    """An encoded text."""

    ids: list[int]


class TableTokenizer:
    """`kbit.text.backend.TokenizerBackend` on a token table.

    Args:
        table: the opened table.
        load: gives the library's whole tokenizer (parses tokenizer.json); called at most once, and only if needed.
    """

    def __init__(self, table: TokenTable, load: LoadBackend) -> None:
        self._pairs = table.pairs
        self._load = load
        self._whole: tokenizers.Tokenizer | None = None
        self._small = load_backend(table.small, "the tokenizer in the token table")
        added = self._small.get_added_tokens_decoder()
        self._added_ids = {token.content: token_id for token_id, token in added.items()}
        # Asked rather than read off the tokens: the library shows some normalized, and skips by a set of its own.
        self._added = {token_id: self._small.id_to_token(token_id) for token_id in added}
        self._special = frozenset(i for i in self._added if self._small.decode([i], skip_special_tokens=True) == "")

    @property
    def decoder(self) -> Any:
        return self._small.decoder

    def encode(self, sequence: str, *, add_special_tokens: bool = True) -> Encoded:
        """Token ids of a text; see tokenizers.Tokenizer.encode.

        Raises:
            CheckpointError: the table was changed since it was opened.
        """
        if self._whole is None and len(sequence) > _MOST_CHARACTERS:
            self._load_whole()
        if self._whole is not None:
            return Encoded(self._whole.encode(sequence, add_special_tokens=add_special_tokens).ids)
        split = self._small.encode(sequence, add_special_tokens=add_special_tokens)
        return Encoded(_checked(lambda: self._pairs.encode(split.ids, split.word_ids)))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ids; those that no token has give nothing."""
        skipped: frozenset[int] = self._special if skip_special_tokens else frozenset()
        added, own = self._added.get, self._pairs.id_to_token
        tokens = _checked(lambda: [added(i) or own(i) for i in ids if i not in skipped])
        return str(self._small.decoder.decode([token for token in tokens if token is not None]))

    def token_to_id(self, token: str) -> int | None:
        added = self._added_ids.get(token)
        return added if added is not None else _checked(lambda: self._pairs.token_to_id(token))

    def id_to_token(self, id: int) -> str | None:
        added = self._added.get(id)
        return added if added is not None else _checked(lambda: self._pairs.id_to_token(id))

    def get_vocab_size(self, with_added_tokens: bool = True) -> int:
        own = len(self._pairs)
        if not with_added_tokens:
            return own
        return own + _checked(lambda: sum(self._pairs.token_to_id(token) is None for token in self._added_ids))

    def get_vocab(self, with_added_tokens: bool = True) -> dict[str, int]:
        tokens = (self._pairs.id_to_token(i) for i in range(len(self._pairs)))
        vocab = _checked(lambda: {token: i for i, token in enumerate(tokens) if token is not None})
        return {**vocab, **self._added_ids} if with_added_tokens else vocab

    def get_added_tokens_decoder(self) -> dict[int, Any]:
        return dict(self._small.get_added_tokens_decoder())

    def no_truncation(self) -> None:
        """There is none."""

    def no_padding(self) -> None:
        """There is none."""

    def to_str(self) -> str:
        """The whole tokenizer.json."""
        return self._load().to_str()

    def _load_whole(self) -> None:
        whole = self._load()
        whole.no_truncation()
        whole.no_padding()
        self._whole = whole


def _checked(read: Callable[[], T]) -> T:
    """The result of reading a table that was sound when it was opened."""
    try:
        return read()
    except (RuntimeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"the token table changed while it was in use: {one_line(error)}") from None
