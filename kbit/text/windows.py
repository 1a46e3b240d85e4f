"""A text as windows of tokens, in the two conventions in which people report perplexity.

`gptq`, the convention of the GPTQ, AWQ, QuIP# and QTIP papers. The rows of the data set are joined with two
newlines and tokenised once (a tokenizer that adds BOS adds it once, at the start of the stream); the stream is cut
into windows of `context` tokens (2048 unless a paper says otherwise) that do not overlap, the tail is dropped, and
in each window every token but the first is predicted. All windows weigh the same, so the mean of window losses is
the mean over tokens.

`llamacpp`, the convention of llama.cpp's perplexity tool. The file is tokenised as it stands (less one final
newline) and cut into chunks of `context` tokens (512 by default). If the tokenizer adds BOS, BOS overwrites the first
token of every chunk. With n = context, only the logits at positions n/2 .. n-2 are scored, so that every scored token
has at least n/2 tokens before it. (llama.cpp also refuses texts shorter than two chunks; one suffices here.)

Numbers of the two conventions, or of one at two context lengths, never compare.

What a text's rows are: for a WikiText file (recognised by its first line, an article title), its lines in the
form of the Hugging Face data set, where a line keeps its newline and a blank line is an empty string, which gives
"\\n\\n = Robert Boulter = \\n\\n\\n\\n\\n Robert Boulter is ..." (287,644 GPT-2 tokens for WikiText-2's test split, the
published count). Any other text is one row and enters the stream unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from kbit.host.errors import UsageError
from kbit.text.datasets import TextData
from kbit.text.wikitext import wikitext_rows

Convention = Literal["gptq", "llamacpp"]
CONVENTIONS: tuple[Convention, ...] = get_args(Convention)
DEFAULT_CONTEXT: dict[Convention, int] = {"gptq": 2048, "llamacpp": 512}


class TextEncoder(Protocol):
    """What windows need of a tokenizer (kbit.text.tokenizer.Tokenizer)."""

    bos_id: int | None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows of equal length over one token stream.

    Attributes:
        convention: how they were made.
        ids: token ids, int64 (W, n).
        first_scored: the first position whose logits count; the last one is n-2 (it predicts token n-1).
        stream_tokens: length of the whole stream, dropped tail and unused part included.
    """

    convention: Convention
    ids: NDArray[np.int64]
    first_scored: int
    stream_tokens: int

    @property
    def count(self) -> int:
        """W."""
        return int(self.ids.shape[0])

    @property
    def context(self) -> int:
        """n."""
        return int(self.ids.shape[1])

    @property
    def scored_per_window(self) -> int:
        """S: predictions in each window that count."""
        return self.context - 1 - self.first_scored

    @property
    def scored(self) -> int:
        """Predictions that count in all windows, W * S."""
        return self.count * self.scored_per_window


def stream_text(data: TextData, convention: Convention) -> str:
    """The text that is tokenised (see the module's description)."""
    if convention == "llamacpp":
        return data.text.removesuffix("\n")
    return "\n\n".join(wikitext_rows(data.text)) if data.layout == "wikitext" else data.text


def adds_bos(tokenizer: TextEncoder) -> bool:
    """Whether the tokenizer puts BOS before a text."""
    return tokenizer.bos_id is not None and tokenizer.encode("")[:1] == [tokenizer.bos_id]


def choose_context(convention: Convention, context: int | None, model_max: int | None) -> int:
    """The window length: the one asked for, or the convention's default, reduced to what the model can take.

    Raises:
        UsageError: an explicit length above the model's maximum or too short to score anything.
    """
    shortest = 3 if convention == "llamacpp" else 2
    if context is None:
        default = DEFAULT_CONTEXT[convention]
        return default if model_max is None else min(default, model_max)
    if context < shortest:
        raise UsageError(f"--context {context} is too short: the {convention} convention needs at least {shortest}")
    if model_max is not None and context > model_max:
        raise UsageError(f"--context {context} exceeds the model's maximum of {model_max} tokens: lower it")
    return context


def make_windows(
    data: TextData,
    tokenizer: TextEncoder,
    convention: Convention,
    context: int,
    max_tokens: int | None = None,
) -> Windows:
    """Tokenise a text once and cut it into windows.

    Args:
        context: tokens per window (see choose_context).
        max_tokens: use at most so many tokens of the text, rounded down to whole windows.

    Raises:
        UsageError: fewer tokens than one window.
    """
    ids = tokenizer.encode(stream_text(data, convention))
    bos = tokenizer.bos_id if adds_bos(tokenizer) else None
    return cut_windows(ids, convention, context, bos, max_tokens, name=data.name)


def cut_windows(
    ids: list[int],
    convention: Convention,
    context: int,
    bos_id: int | None = None,
    max_tokens: int | None = None,
    name: str = "the text",
) -> Windows:
    """Windows over a token stream.

    Args:
        ids: the stream, with BOS in front where the tokenizer adds it.
        bos_id: BOS where the tokenizer adds it, else None; only `llamacpp` writes it into every window.
    """
    if convention not in CONVENTIONS:
        raise UsageError(f"--convention {convention}: choose one of {', '.join(CONVENTIONS)}")
    if max_tokens is not None and max_tokens < context:
        raise UsageError(f"--max-tokens {max_tokens} is less than one window of {context} tokens: raise it")
    count = (len(ids) if max_tokens is None else min(len(ids), max_tokens)) // context
    if count == 0:
        raise UsageError(
            f"{name} has {len(ids)} tokens, one window needs {context}: use a longer text or a smaller --context"
        )
    windows = np.array(ids[: count * context], dtype=np.int64).reshape(count, context)
    first_scored = 0
    if convention == "llamacpp":
        first_scored = context // 2
        if bos_id is not None:
            windows[:, 0] = bos_id
    return Windows(convention, windows, first_scored, len(ids))
