"""Holds structured output against JSONSchemaBench's real schemas: what is valid must be written, what is not must not.

    git clone --depth 1 https://github.com/guidance-ai/jsonschemabench
    python tools/judges/json_schemas.py jsonschemabench/maskbench/data --count 300

(Geng et al. 2025, arXiv:2501.10868; its MaskBench part has instances for every schema.) Every n-th schema that has
instances is compiled as `kbit serve` does it, and each instance is written as kbit writes JSON and given to the
constraint token by token. A schema that cannot be enforced whole must be refused, with the reason: so an invalid
instance that is accepted is a keyword that was ignored. Exit code 1: there is one, or fewer than 99 % of the valid ones
pass.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from kbit.checkpoint.resolve import open_model
from kbit.engine.answers import ConstraintMaker
from kbit.host.errors import KbitError
from kbit.serve.errors import ApiError
from kbit.serve.grammar import JSON_STYLE, GrammarCompiler
from kbit.text.tokenizer import Tokenizer


def main() -> int:
    """Runs them; prints the counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="maskbench/data of a checkout")
    parser.add_argument("--count", type=int, default=300, help="schemas")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="whose tokenizer is used")
    parser.add_argument("--verbose", action="store_true", help="name what fails")
    given = parser.parse_args()
    tokenizer = _tokenizer(given.model)
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size)
    compiler.json_object()  # the first one reads the vocabulary
    counts: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    times: list[float] = []
    wrong = []
    for name, schema, tests in _schemas(given.folder, given.count):
        start = time.perf_counter()
        try:
            made = compiler.json_schema(schema)
            made()
        except ApiError as error:
            refused[_reason(error.message)] += 1
            continue
        finally:
            times.append(time.perf_counter() - start)
        counts["schemas enforced"] += 1
        for index, test in enumerate(tests):
            accepted = accepts(made, tokenizer, test["data"])
            kind = "valid" if test["valid"] else "invalid"
            counts[f"{kind} instances"] += 1
            counts[f"{kind} {'accepted' if accepted else 'rejected'}"] += 1
            if accepted != test["valid"]:
                wrong.append(f"{name} #{index}: {kind}, {'accepted' if accepted else 'rejected'}")
    for what, count in counts.items():
        print(f"{count:6d} {what}")
    print(f"{sum(refused.values()):6d} schemas refused before anything is generated, of which")
    for reason, count in refused.most_common(None if given.verbose else 12):
        print(f"{count:6d}   {reason}")
    print(f"a schema takes {1e3 * np.median(times):.1f} ms (median), {1e3 * np.percentile(times, 99):.1f} ms (99 %)")
    if given.verbose:
        print(*wrong, sep="\n")
    ignored = counts["invalid accepted"] > 0
    return int(ignored or counts["valid accepted"] < 0.99 * counts["valid instances"] or not counts["valid instances"])


def accepts(made: ConstraintMaker, tokenizer: Tokenizer, data: Any) -> bool:
    """Whether an answer may be these data, and end there."""
    separators = (JSON_STYLE["item_separator"], JSON_STYLE["key_separator"])
    text = json.dumps(data, ensure_ascii=False, separators=separators)
    constraint = made()
    try:
        for token in tokenizer.encode(text, add_special_tokens=False):
            if constraint.stopped:
                return False
            constraint.accept(token)
        return constraint.stopped or any(constraint.mask()[end] for end in tokenizer.eos_ids)
    except KbitError:
        return False


def _tokenizer(model: str) -> Tokenizer:
    with open_model(model) as source:
        return Tokenizer.from_source(source)


def _schemas(folder: Path, count: int) -> list[tuple[str, Any, list[dict[str, Any]]]]:
    """(file, schema, instances), every n-th that has any."""
    files = sorted(folder.glob("*.json"))
    if not files:
        sys.exit(f"json_schemas.py: {folder} has no .json files: name maskbench/data of a checkout")
    tested = []
    for file in files:
        held = json.loads(file.read_text())
        if held.get("tests"):
            tested.append((file.stem, held["schema"], held["tests"]))
    return [tested[i * len(tested) // count] for i in range(min(count, len(tested)))]


def _reason(message: str) -> str:
    """What several schemas are refused for, without their names and numbers."""
    return message.partition("enforced: ")[2].partition(" (")[0][:90]


if __name__ == "__main__":
    sys.exit(main())
