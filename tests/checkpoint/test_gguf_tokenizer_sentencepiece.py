"""SentencePiece tokenizers rebuilt from GGUF metadata, against the published algorithm and transformers."""

from __future__ import annotations

import heapq
import struct
from pathlib import Path

import pytest
from gguf_tokenizer_cases import TRICKY, Metadata, our_ids, random_texts, their_ids, through_transformers

# transformers adds the leading space only at the start of the text, kbit and llama.cpp (and Llama 2's own tokenizer.json)
# before every stretch of text between special tokens.


def sentencepiece_ids(tokens: list[str], scores: list[float], types: list[int], text: str) -> list[int]:
    """SentencePiece's BPE as published (and as llama.cpp runs it): join the adjacent pair whose joined token scores
    highest, leftmost first on ties; what is no token in the end becomes bytes. `text` has no special tokens."""
    ids = {token: index for index, token in enumerate(tokens) if types[index] in (1, 4, 5)}
    symbols = list("▁" + text.replace(" ", "▁")) if text else []
    after: list[int | None] = [index + 1 for index in range(len(symbols))]
    before: list[int | None] = [index - 1 for index in range(len(symbols))]
    if symbols:
        after[-1] = before[0] = None
    queue: list[tuple[float, int, int, int]] = []

    def offer(left: int | None, right: int | None) -> None:
        if left is not None and right is not None and symbols[left] + symbols[right] in ids:
            joined = symbols[left] + symbols[right]
            heapq.heappush(queue, (-scores[ids[joined]], left, right, len(joined)))

    for index in range(1, len(symbols)):
        offer(index - 1, index)
    while queue:
        _, left, right, size = heapq.heappop(queue)
        if not symbols[left] or not symbols[right] or len(symbols[left] + symbols[right]) != size:
            continue
        symbols[left], symbols[right] = symbols[left] + symbols[right], ""
        after[left] = after[right]
        following = after[left]
        if following is not None:
            before[following] = left
        offer(before[left], left)
        offer(left, following)
    result = []
    for symbol in filter(None, symbols):
        if symbol in ids:
            result.append(ids[symbol])
        else:
            result += [tokens.index(f"<0x{byte:02X}>") for byte in symbol.encode()]
    return result


@pytest.fixture(scope="module")
def tinystories(data_dir: Path) -> Metadata:
    """stories260K's SentencePiece vocabulary of 512 tokens (llama2.c's tok512.bin) as GGUF metadata."""
    raw = (data_dir / "models" / "stories260K" / "tok512.bin").read_bytes()
    position, tokens, scores = 4, [], []
    while position < len(raw):
        score, size = struct.unpack_from("<fi", raw, position)
        tokens.append(raw[position + 8 : position + 8 + size].decode("utf-8"))
        scores.append(score)
        position += 8 + size
    # llama2.c writes spaces for SentencePiece's visible space, and line breaks around the control tokens.
    tokens = [token.replace(" ", "▁") for token in tokens]
    tokens[1], tokens[2] = "<s>", "</s>"
    types = [2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)]
    keys = {"scores": scores, "token_type": types}
    return Metadata("llama", tokens, **keys, bos_token_id=1, eos_token_id=2, unknown_token_id=0)


def test_sentencepiece_equals_the_algorithm(tinystories: Metadata, data_dir: Path, tmp_path: Path) -> None:
    ours = tinystories.tokenizer(tmp_path)
    keys = tinystories.keys
    stories = (data_dir / "tinystories" / "sample.txt").read_text(encoding="utf-8")[:60_000]
    texts = [*stories.split("\n\n"), *TRICKY, *(text.replace("</s>", "") for text in random_texts(300)), "aaaa" * 9]
    for text in texts:
        expected = sentencepiece_ids(keys["tokens"], keys["scores"], keys["token_type"], text)
        assert our_ids(ours, text) == expected, repr(text[:80])
        assert ours.decode(expected) == text


def test_sentencepiece_equals_transformers(tinystories: Metadata, data_dir: Path, tmp_path: Path) -> None:
    """On text without special tokens; texts that start with a space are left to the test above, since transformers'
    Metaspace adds no second one."""
    path = tinystories.write(tmp_path / "t.gguf")
    theirs = through_transformers(path)
    ours = tinystories.tokenizer(tmp_path)
    stories = (data_dir / "tinystories" / "sample.txt").read_text(encoding="utf-8")[:30_000]
    for text in [stories, *TRICKY]:
        if not text.startswith(" "):
            assert our_ids(ours, text) == their_ids(theirs, text), repr(text[:80])


def test_sentencepiece_special_tokens(tinystories: Metadata, tmp_path: Path) -> None:
    """BOS by default; a space before each stretch of text; bytes and the unknown token's text stay text."""
    ours = tinystories.tokenizer(tmp_path)
    assert ours.encode("the").ids[0] == 1
    between = ours.encode("the</s>the", add_special_tokens=False)
    assert between.tokens == ["▁the", "</s>", "▁the"]
    spelled = ours.encode("<0x0A>", add_special_tokens=False)
    assert tinystories.keys["tokens"].index("<0x0A>") not in spelled.ids
    assert our_ids(ours, "\n")[-1] == tinystories.keys["tokens"].index("<0x0A>")


def test_sentencepiece_without_space_prefix(tinystories: Metadata, tmp_path: Path) -> None:
    metadata = Metadata("llama", tinystories.keys["tokens"], **{
        name: value for name, value in tinystories.keys.items() if name not in ("model", "tokens")
    }, add_space_prefix=False, add_bos_token=False)  # fmt: skip
    ours = metadata.tokenizer(tmp_path)
    assert ours.encode("the dog").tokens[0] != "▁the"
    assert ours.decode(ours.encode("the dog").ids) == "the dog"
    assert ours.decode(ours.encode(" the").ids) == " the"
