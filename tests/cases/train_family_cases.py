"""What the tests of tools/train_family.py share: the tool's modules, texts, and a run that takes a second."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

TOOLS = Path(__file__).resolve().parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

import train.run  # noqa: E402
from train.corpus import Tokens, open_corpus, tokenize, train_tokenizer  # noqa: E402
from train.run import Job, Machine  # noqa: E402
from train.settings import Settings  # noqa: E402
from train.shapes import Shape  # noqa: E402

SMALL = Shape("small", 64, 96, 2)
# English of which every model learns something, the same on every machine.
SENTENCES = [
    f"The {animal} {verb} over the {thing} and {verb} again.\n"
    for animal in ("fox", "hound", "lark", "mouse", "heron")
    for verb in ("jumped", "ran", "looked", "flew", "climbed")
    for thing in ("wall", "river", "moor", "garden", "lighthouse")
]


def silent(_: Any) -> None:
    """Hears nothing."""


def never() -> bool:
    """Never asks to stop."""
    return False


def write_texts(folder: Path, documents: int = 5) -> Path:
    """Documents of the sentences in different orders."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for number in range(documents):
        text = "".join(SENTENCES[index] for index in generator.permutation(len(SENTENCES)))
        (folder / f"text{number}.txt").write_text(text)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def tokens(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    corpus = open_corpus(texts, [], 0.1)
    return tokenize(corpus, train_tokenizer(corpus.training(), 300), tmp_path_factory.mktemp("tokens"), silent)


@pytest.fixture
def make_job(tokens: Tokens, tmp_path: Path) -> Callable[..., Job]:
    """A run of 24 steps; keyword arguments change its settings."""

    def make(folder: str = "model", **changed: Any) -> Job:
        values: dict[str, Any] = {"context": 32, "batch": 4, "steps": 24, "learning_rate": 6e-3, "seed": 1}
        values |= {"shape": SMALL, "corpus": tokens.digest, "precision": "fp32"} | changed
        return Job(Settings(**values), tokens, "texts", tmp_path / folder)

    return make


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / train.run.LOG).read_text().splitlines()]


def run(job: Job, machine: Machine | None = None, say: Callable[[str], None] = silent) -> dict[str, Any]:
    """Train to the end, where nothing else is asked."""
    return train.run.train(job, machine or Machine(torch.device("cpu")), say, silent, never)
