"""What a nested model gains by drafting for itself, on prose, code and chats, greedy.

    python benchmarks/self_speculation.py --model FOLDER --bits 8,5,4 --threads 2

Every text is written without drafts and with each way of drafting in turns, so that what else the machine does meets
both; a new drafter each time, as `kbit run` has it. Printed are medians of the pairs' ratios, of the clock's time and
of the processor's, from the first piece of the answer to its end, and how many guesses held. Without --model,
SmolLM2-135M is converted (`kbit quantize smollm2-135m-instruct --nested 2..8 --method rtn`).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

TEXTS = {
    "prose": (
        "It was a cold evening in November, and the old harbour town lay silent under the fog. The fishermen",
        "The history of the potato begins high in the Andes, where farmers",
        "She had not opened the letter for three days. When at last she sat down at the kitchen table and",
        "A good night's sleep matters more than most people think. During the night the brain",
    ),
    "code": (
        "import json\nfrom pathlib import Path\n\n\n"
        'def load_config(path):\n    """Read a JSON file and check its keys."""\n',
        'class Stack:\n    """A stack of items, last in, first out."""\n\n    def __init__(self):\n',
        "#include <stdio.h>\n#include <stdlib.h>\n\n// Reads a file into memory and counts its lines.\n"
        "int count_lines(const char *path) {\n",
        "// Returns the shortest path between two nodes of a weighted graph.\nfunction dijkstra(graph, start, end) {\n",
    ),
    "chat": (
        "Explain in a few sentences how a bicycle stays upright.",
        "What should I pack for a week of hiking in the mountains?",
        "Describe how bread is baked, from the flour to the loaf, step by step.",
        "Write a Python class for a bank account with deposits and withdrawals, and explain each method.",
    ),
}


@dataclass
class Measured:
    """Of one text and one way of drafting.

    Attributes:
        clock, processor: how many times as fast as without drafts, of each round.
        per_second: tokens per second by the clock, of each round.
        drafted, accepted, tokens: of the last round.
        same: whether every round's text was that without drafts.
    """

    clock: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    per_second: list[float] = field(default_factory=list)
    drafted: int = 0
    accepted: int = 0
    tokens: int = 0
    same: bool = True


def write(
    loaded: Any, ids: list[int], tokens: int, chat: bool, bits: int | None, drafts: bool
) -> tuple[Any, float, float]:
    """An answer, and the seconds it took after its first piece, by the clock and of the processor."""
    from kbit.engine.generate import generate
    from kbit.engine.self_speculation import SelfDrafter
    from kbit.engine.speculative import Speculation

    generation = generate(
        loaded.decoder,
        loaded.tokenizer,
        ids,
        max_tokens=tokens,
        continues_prompt=not chat,
        speculation=Speculation(SelfDrafter(loaded, bits)) if drafts else None,
    )
    next(generation)
    clock, processor = perf_counter(), process_time()
    for _ in generation:
        pass
    return generation.result, perf_counter() - clock, process_time() - processor


def measure(loaded: Any, kind: str, text: str, ways: Sequence[str], tokens: int, rounds: int) -> dict[str, Measured]:
    """One text, without drafts and in every way, in turns."""
    from kbit.engine.conversation import chat_prompt
    from kbit.engine.draft_widths import draft_bits

    chat = kind == "chat"
    ids = (
        chat_prompt(loaded.tokenizer, [{"role": "user", "content": text}], loaded.name)
        if chat
        else loaded.tokenizer.encode(text)
    )
    found = {way: Measured() for way in ways}
    write(loaded, ids, 8, chat, None, drafts=False)  # warm-up
    for _ in range(rounds):
        plain, clock, processor = write(loaded, ids, tokens, chat, None, drafts=False)
        for way, of in found.items():
            sped, its_clock, its_processor = write(loaded, ids, tokens, chat, draft_bits(way), drafts=True)
            of.clock.append(clock / its_clock)
            of.processor.append(processor / its_processor)
            of.per_second.append((len(sped.ids) - 1) / its_clock)
            of.drafted, of.accepted = sped.speculation.drafted, sped.speculation.accepted
            of.tokens = len(sped.ids)
            of.same &= sped.ids == plain.ids
    return found


def line(name: str, of: list[Measured]) -> str:
    """A row of the table: of a kind's texts together, ratios of each text in brackets."""
    each = " ".join(f"{median(text.processor):.2f}" for text in of)
    drafted, accepted = sum(text.drafted for text in of), sum(text.accepted for text in of)
    held = f"{accepted / drafted:.0%} of {drafted} held" if drafted else "no drafts"
    tokens = sum(text.tokens for text in of)
    return (
        f"| {name} | {median([ratio for text in of for ratio in text.clock]):.2f} | "
        f"{median([median(text.processor) for text in of]):.2f} ({each}) | "
        f"{median([rate for text in of for rate in text.per_second]):.1f} | {held}, {tokens} tokens | "
        f"{'the same' if all(text.same for text in of) else 'ANOTHER TEXT'} |"
    )


def nested_smollm2(folder: Path) -> str:
    """SmolLM2-135M at 2 to 8 bits."""
    from typer.testing import CliRunner

    from kbit.cli.main import build

    arguments = ["quantize", "smollm2-135m-instruct", "--nested", "2..8", "--method", "rtn", "-o", str(folder)]
    result = CliRunner().invoke(build([]), arguments)
    if result.exit_code:
        sys.exit(result.output)
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder of kbit quantize --nested")
    parser.add_argument("--bits", default="8", help="widths that check, for example 8,5,4")
    parser.add_argument("--ways", default="self", help="for example self,self:3,self:4")
    parser.add_argument("--kinds", default=",".join(TEXTS))
    parser.add_argument("--texts", type=int, default=4, help="of each kind at most")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, help="a file for every figure")
    arguments = parser.parse_args()

    from kbit.engine.loader import load_model

    figures = []
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or nested_smollm2(Path(folder) / "nested")
        loaded = load_model(model, threads=arguments.threads)
        ways = arguments.ways.split(",")
        print("| bits, drafts, texts | times as fast, clock | processor (each text) | tokens/s | guesses | text |")
        print("|--|--|--|--|--|--|")
        for bits in map(int, arguments.bits.split(",")):
            at = loaded.at_width(bits)
            for kind in arguments.kinds.split(","):
                found = [
                    measure(at, kind, text, ways, arguments.tokens, arguments.rounds)
                    for text in TEXTS[kind][: arguments.texts]
                ]
                for way in ways:
                    print(line(f"{bits}, {way}, {kind}", [text[way] for text in found]), flush=True)
                    figures += [{"bits": bits, "way": way, "kind": kind, **vars(text[way])} for text in found]
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
