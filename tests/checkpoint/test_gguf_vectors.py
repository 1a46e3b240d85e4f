"""llama.cpp's test vectors: the ids of its texts, for every vocabulary that it keeps.

They are where `KBIT_DATA` has a folder `tokenizers`, and, all of them, where `KBIT_VOCABULARIES` names llama.cpp's folder
`models` (vendor/llama.cpp/models in the source distribution of llama-cpp-python).
"""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pytest
import tokenizers

from kbit.checkpoint.gguf.header import read_header
from kbit.checkpoint.gguf.tokenizer import sidecars_from_header

BETWEEN = "\n__ggml_vocab_test__\n"
NAMES = (
    "bert-bge", "command-r", "deepseek-coder", "deepseek-llm", "falcon", "gemma-4", "gpt-2", "llama-bpe", "llama-spm",
    "mpt", "phi-3", "qwen2", "qwen35", "refact", "starcoder",
)  # fmt: skip


def vocabulary(name: str) -> Path:
    """The file, or a skip that says where it may be."""
    folders = [
        Path(os.environ[key]) / below
        for key, below in (("KBIT_DATA", "tokenizers"), ("KBIT_VOCABULARIES", ""))
        if os.environ.get(key)
    ]
    folders.append(Path(__file__).parents[2] / "shared" / "data" / "tokenizers")
    found = [folder / f"ggml-vocab-{name}.gguf" for folder in folders]
    path = next((path for path in found if path.is_file()), None)
    if path is None:
        pytest.skip(f"no ggml-vocab-{name}.gguf: set KBIT_VOCABULARIES to llama.cpp's folder models")
    return path


@pytest.mark.parametrize("name", NAMES)
def test_vectors(name: str) -> None:
    """All ids are equal. Qwen's own tokenizer.json brings text into normal form C first, and llama.cpp does not: texts
    that this changes (three of qwen35's) are cut without it, so that everything else is compared."""
    path = vocabulary(name)
    ours = tokenizers.Tokenizer.from_buffer(sidecars_from_header(read_header(path), 2048)["tokenizer.json"])
    texts = Path(f"{path}.inp").read_text(encoding="utf-8").split(BETWEEN)
    expected = [[int(word) for word in line.split()] for line in Path(f"{path}.out").read_text().splitlines()]
    assert len(texts) >= len(expected) >= 46
    plain = [unicodedata.is_normalized("NFC", text) for text in texts]
    qwen = name in ("qwen2", "qwen35")
    assert all(plain) or name == "qwen35"
    for text, ids, normal in zip(texts, expected, plain, strict=False):
        if normal or not qwen:
            assert ours.encode(text, add_special_tokens=False).ids == ids, text
    if qwen:
        assert ours.normalizer is not None
        ours.normalizer = None  # type: ignore[assignment]
        for text, ids in zip(texts, expected, strict=False):
            assert ours.encode(text, add_special_tokens=False).ids == ids, text
