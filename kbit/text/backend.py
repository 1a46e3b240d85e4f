"""What kbit's tokenizer needs of the library beneath it, and the library's own class behind that interface."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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


def load_backend(data: bytes, name: str) -> tokenizers.Tokenizer:
    """The library's tokenizer of a tokenizer.json.

    Raises:
        CheckpointError: the library does not like it; the error begins with `name`.
    """
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_buffer(data)
    except Exception as error:  # the library raises plain Exception for everything it does not like
        raise CheckpointError(f"{name} is not a tokenizer ({one_line(error)}); download it again") from None
    except BaseException as error:
        # A panic in the library's Rust code (an inconsistent vocabulary, for example) is no subclass of Exception.
        if type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{name} is inconsistent ({one_line(error)}); download it again") from None
