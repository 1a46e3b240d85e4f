"""What bits cost a model that hears: words that are wrong, and tokens that are others than those of the original.

    python tools/speech_accuracy.py whisper-tiny.en/ --speech pocketsphinx-5.1.1/test/data/librivox --bits 8,4,3,2

The folder of speech has a file that ends with "transcription", of lines "<s> what is said </s> (name)", and name.wav
beside it, as CMU Sphinx has them (the sdist of pocketsphinx on PyPI carries two such folders). The word error rate is
that of all words: substitutions, insertions and deletions over those that are said, both sides in lower case, without
punctuation. Of every width the linear layers are rounded into a temporary folder, which the engine of `kbit transcribe`
then runs.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kbit.audio.wav import RATE, read_wav
from kbit.backends.select import select_backend
from kbit.engine.transcribe import Transcriber
from kbit.formats.quant_format import QuantFormat
from kbit.models.opening import open_model
from kbit.quantizers.convert import convert
from kbit.quantizers.methods import get_method
from kbit.quantizers.plan import make_plan


@dataclass(frozen=True, eq=False)
class Result:
    """What a model heard: its stored bytes, and of each file words and tokens."""

    label: str
    nbytes: int
    words: list[list[str]]
    ids: list[tuple[int, ...]]


def words_of(text: str) -> list[str]:
    """Lower case, without punctuation; titles as they are said."""
    text = text.lower().replace("mr.", "mister").replace("-", " ")
    return re.findall(r"[a-z0-9']+", text)


def distance(one: Sequence[object], other: Sequence[object]) -> int:
    """Substitutions, insertions and deletions that make one of the other, at least (Levenshtein 1966)."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        before, row[0] = row[0], i
        for j, b in enumerate(other, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return row[-1]


def read_speech(folder: Path) -> list[tuple[NDArray[np.float32], list[str]]]:
    """The sounds of a folder, and the words that are said."""
    (file,) = folder.glob("*transcription")
    found = re.findall(r"<s>(.*?)</s>\s*\((.*?)\)", file.read_text())
    return [(read_wav(folder / f"{name}.wav"), words_of(text)) for text, name in found]


def measured(model: str, label: str, sounds: Sequence[NDArray[np.float32]], args: argparse.Namespace) -> Result:
    """What a model hears."""
    with open_model(model) as source:
        nbytes = sum(info.nbytes for info in source.tensors.values())
        backend = select_backend("cpu", threads=args.threads, compute=args.compute, kv_bits=32)
        ours = Transcriber(source, backend)
    found = [ours.transcribe(sound, language=args.language) for sound in sounds]
    ids = [tuple(id for part in text.segments for id in part.ids) for text in found]
    return Result(label, nbytes, [words_of(text.text) for text in found], ids)


def table(results: Sequence[Result], said: Sequence[Sequence[str]]) -> str:
    """The results as Markdown, the first being what the others are compared with."""
    lines = ["| weights | stored | wrong words | tokens other than the original's |", "|--|--|--|--|"]
    count, first = sum(map(len, said)), results[0]
    for r in results:
        wrong = sum(distance(one, other) for one, other in zip(said, r.words, strict=True))
        others = sum(distance(one, other) for one, other in zip(first.ids, r.ids, strict=True))
        lines.append(
            f"| {r.label} | {r.nbytes / 1e6:.1f} MB | {wrong} of {count} ({100 * wrong / count:.1f} %) | "
            f"{others} of {sum(map(len, first.ids))} |"
        )
    return "\n".join(lines)


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--speech", type=Path, required=True, action="append", help="may be given several times")
    parser.add_argument("--bits", default="8,4,3,2", help="widths, or formats such as nf4-b64")
    parser.add_argument("--method", default="rtn", help="methods: rtn, hqq")
    parser.add_argument("--compute", default=None)
    parser.add_argument("--language", default="en")
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args(given)
    speech = [pair for folder in args.speech for pair in read_speech(folder)]
    sounds, said = [sound for sound, _ in speech], [words for _, words in speech]
    print(f"{sum(map(len, sounds)) / RATE:.1f} seconds of speech, {sum(map(len, said))} words, {len(said)} files\n")
    results = [measured(args.model, "as published", sounds, args)]
    for bits in args.bits.split(","):
        format = QuantFormat.parse(bits if not bits.isdigit() else f"{'int' if bits == '8' else 'nf'}{bits}-b64")
        for method in args.method.split(","):
            with tempfile.TemporaryDirectory() as folder:
                with open_model(args.model) as source:
                    convert(source, make_plan(source, format, method=get_method(method)), Path(folder) / "out")
                results.append(measured(f"{folder}/out", f"{format} {method}", sounds, args))
    print(table(results, said))
    return 0


if __name__ == "__main__":
    sys.exit(main())
