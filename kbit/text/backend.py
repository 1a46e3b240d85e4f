"""What kbit's tokenizer needs of the library beneath it, and the library's own class behind that interface."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from kbit.host.errors import CheckpointError, KbitError, one_line

if TYPE_CHECKING:
    import tokenizers


class EncodedText(Protocol):
    """The result of encoding a text."""

    @property
    def ids(self) -> list[int]: ...


class TokenizerBackend(Protocol):
    """The part of `tokenizers.Tokenizer` that kbit uses. `kbit.text.table_tokenizer` has a second implementation."""

    @property
    def decoder(self) -> Any: ...
    def encode(self, sequence: str, *, add_special_tokens: bool = True) -> EncodedText: ...
    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...
    def token_to_id(self, token: str) -> int | None: ...
    def id_to_token(self, id: int) -> str | None: ...
    def get_vocab_size(self, with_added_tokens: bool = True) -> int: ...
    def get_vocab(self, with_added_tokens: bool = True) -> dict[str, int]: ...
    def get_added_tokens_decoder(self) -> Mapping[int, Any]: ...
    def no_truncation(self) -> None: ...
    def no_padding(self) -> None: ...
    def to_str(self) -> str: ...


LoadBackend = Callable[[], "tokenizers.Tokenizer"]


def library_error(error: BaseException, what: str, remedy: str = "; download it again") -> BaseException:
    """The CheckpointError of what the library raised, "{what}: {its words}{remedy}"; what it did not raise, as it is.

    It raises plain Exception for everything that it does not like, and a panic of its Rust code (an inconsistent
    vocabulary, for example) is no subclass of Exception.
    """
    if isinstance(error, KbitError) or not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
        return error
    return CheckpointError(f"{what}: {one_line(error)}{remedy}")


@contextmanager
def library_errors(what: str, remedy: str = "; download it again") -> Iterator[None]:
    """Raises `library_error` for what is raised."""
    try:
        yield
    except BaseException as error:
        raise library_error(error, what, remedy) from None


def decode(backend: TokenizerBackend, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
    """Text of token ids.

    Raises:
        CheckpointError: the tokenizer's decoder cannot do it.
    """
    try:
        return backend.decode(ids, skip_special_tokens=skip_special_tokens)
    except BaseException as error:
        raise library_error(error, "tokenizer.json cannot decode these tokens", "") from None


def load_backend(data: bytes, name: str) -> tokenizers.Tokenizer:
    """The library's tokenizer of a tokenizer.json.

    Raises:
        CheckpointError: the library does not like it; the error begins with `name`.
    """
    import tokenizers

    with library_errors(f"{name} is not a tokenizer, or is inconsistent"):
        return tokenizers.Tokenizer.from_buffer(data.removeprefix(codecs.BOM_UTF8))
