"""What kbit's tokenizer needs of the library beneath it, and the library's own class behind that interface."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from kbit.host.errors import CheckpointError, one_line

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


@contextmanager
def library_errors(what: str, remedy: str = "; download it again") -> Iterator[None]:
    """Makes a CheckpointError of whatever the library raises: "{what}: {its words}{remedy}".

    It raises plain Exception for everything that it does not like, and a panic of its Rust code (an inconsistent
    vocabulary, for example) is no subclass of Exception.
    """
    try:
        yield
    except Exception as error:
        raise CheckpointError(f"{what}: {one_line(error)}{remedy}") from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{what}: {one_line(error)}{remedy}") from None


def load_backend(data: bytes, name: str) -> tokenizers.Tokenizer:
    """The library's tokenizer of a tokenizer.json.

    Raises:
        CheckpointError: the library does not like it; the error begins with `name`.
    """
    import tokenizers

    with library_errors(f"{name} is not a tokenizer, or is inconsistent"):
        return tokenizers.Tokenizer.from_buffer(data)
