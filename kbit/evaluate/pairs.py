"""Texts that an encoder-decoder writes, beside references: BLEU, chrF (sacrebleu) and ROUGE (rouge-score).

Papineni et al. 2002; Popović 2015; Lin 2004; how sacrebleu computes the first two is said by its signature (Post 2018,
arXiv:1804.08771), without which such numbers compare with none.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from kbit.host.errors import UsageError
from kbit.host.utf8 import decode

if TYPE_CHECKING:
    from kbit.engine.generation_settings import GenerationSettings
    from kbit.engine.text_to_text import Long, TextToText

_MAX_BYTES = 64 << 20
_ROUGE = ("rouge1", "rouge2", "rougeL")


@dataclass(frozen=True)
class Pair:
    """A text and what it should become.

    Attributes:
        source: what the model reads.
        references: what a person wrote, at least one.
    """

    source: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class PairsEvaluation:
    """What was measured.

    Attributes:
        pairs: how many.
        texts: what the model wrote.
        bleu, chrf: of the corpus, in percent; None: sacrebleu is not installed.
        signatures: how they were computed, by metric.
        rouge: mean F-measures in percent, by kind; empty: rouge-score is not installed.
        missing: what is not installed, and what to do.
        unfinished: texts that were cut off.
        seconds: for all texts.
    """

    pairs: int
    texts: tuple[str, ...]
    bleu: float | None
    chrf: float | None
    signatures: dict[str, str]
    rouge: dict[str, float]
    missing: tuple[str, ...]
    unfinished: int
    seconds: float


@dataclass
class _Scores:
    bleu: float | None = None
    chrf: float | None = None
    signatures: dict[str, str] = field(default_factory=dict)
    rouge: dict[str, float] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)


def read_pairs(file: Path, limit: int | None = None) -> list[Pair]:
    """Pairs of a file.

    Args:
        file: .tsv: a line a pair, source and references between tabs; .jsonl: an object a line, with "source" and
            "reference" (or "references", a list).
        limit: the first so many; None: all.

    Raises:
        UsageError: it cannot be read, or a line is no pair.
    """
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UsageError(f"{file}: cannot be read ({error.strerror}); give a .tsv or .jsonl file of pairs") from None
    if len(data) > _MAX_BYTES:
        raise UsageError(f"{file} is larger than {_MAX_BYTES >> 20} MiB: split it")
    lines = decode(data, str(file)).split("\n")
    read = _json_pair if file.suffix == ".jsonl" else _tab_pair
    pairs: list[Pair] = []
    for number, line in enumerate(lines, 1):
        if line.strip() and (limit is None or len(pairs) < limit):
            pair = read(line.rstrip("\r"))
            if pair is None:
                wanted = (
                    '{"source": ..., "reference": ...}' if read is _json_pair else "a source, a tab and a reference"
                )
                raise UsageError(f"{file}: line {number} is not {wanted}")
            pairs.append(pair)
    if not pairs:
        raise UsageError(f"{file} has no pairs: give a line for each")
    return pairs


def evaluate_pairs(
    model: TextToText, pairs: Sequence[Pair], settings: GenerationSettings, long: Long = "refuse"
) -> PairsEvaluation:
    """Lets a model write a text for each source, and scores them.

    Args:
        model: the model.
        pairs: what it reads, and what it should write.
        settings: how it writes.
        long: see `TextToText.answer`.

    Raises:
        UsageError: neither sacrebleu nor rouge-score is installed; a source that cannot be read.
    """
    missing = not_installed()
    if len(missing) == 2:
        raise UsageError(f"nothing to score texts with: {missing[0]}")
    start = perf_counter()
    answers = model.answer([pair.source for pair in pairs], settings, long)
    seconds, texts = perf_counter() - start, tuple(answer.text for answer in answers)
    scores = score(texts, [pair.references for pair in pairs])
    unfinished = sum(not answer.finished for answer in answers)
    return PairsEvaluation(
        len(pairs), texts, scores.bleu, scores.chrf, scores.signatures, scores.rouge, missing, unfinished, seconds
    )


def not_installed() -> tuple[str, ...]:
    """What texts cannot be scored by, and what to do."""
    from importlib.util import find_spec

    names = {"sacrebleu": "BLEU and chrF", "rouge_score": "ROUGE"}
    return tuple(
        f"{name} is not installed, so there is no {what}: pip install 'kbit[text]'"
        for name, what in names.items()
        if find_spec(name) is None
    )


def score(texts: Sequence[str], references: Sequence[Sequence[str]]) -> _Scores:
    """Scores of texts against one or more references each, by what is installed."""
    scores, missing = _Scores(), " ".join(not_installed())
    if "sacrebleu" not in missing:
        from sacrebleu.metrics import BLEU, CHRF

        # The first references, the second ones, ...: None where a text has fewer.
        most = max(len(each) for each in references)
        columns = [[each[at] if at < len(each) else None for each in references] for at in range(most)]
        for name, metric in (("bleu", BLEU()), ("chrf", CHRF())):
            setattr(scores, name, float(metric.corpus_score(list(texts), columns).score))
            scores.signatures[name] = str(metric.get_signature())
    if "rouge_score" not in missing:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(list(_ROUGE), use_stemmer=True)
        found = [scorer.score_multi(list(each), text) for text, each in zip(texts, references, strict=True)]
        scores.rouge = {kind: 100.0 * sum(each[kind].fmeasure for each in found) / len(found) for kind in _ROUGE}
        scores.signatures["rouge"] = "rouge-score, stemmed, mean of F-measures, the best reference of each"
    return scores


def _tab_pair(line: str) -> Pair | None:
    source, *references = line.split("\t")
    return Pair(source, tuple(references)) if source.strip() and any(r.strip() for r in references) else None


def _json_pair(line: str) -> Pair | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    source, references = value.get("source"), value.get("references", value.get("reference"))
    references = [references] if isinstance(references, str) else references
    if not isinstance(source, str) or not source.strip() or not isinstance(references, list) or not references:
        return None
    return Pair(source, tuple(references)) if all(isinstance(r, str) for r in references) else None
