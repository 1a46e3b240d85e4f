"""What speculation gains on real prompts: texts that repeat their prompt, and texts that do not.

    pytest benchmarks/test_speculative.py -s

The default model answers each prompt without speculation and with prompt lookup, and a small model of novels continues
a page with and without a seven times smaller one as its draft model. Both ways run in turn, A B A B, in one process;
figures are medians. Times are those of decoding: the draft model's reading of the prompt counts, the model's own does
not.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

import pytest

pytestmark = pytest.mark.full  # not of a plain `pytest benchmarks/`

TOKENS, ROUNDS = 96, 5

PASSAGE = """\
The harbour of Port Ellery was built in 1821 by the engineer Thomas Wray, who had the stone for its two piers brought \
from the quarries of Saltby, nine miles up the coast. The northern pier is 340 metres long and carries a lighthouse; \
the southern pier is shorter and was rebuilt after the storm of 1894. In its best years the harbour handled four \
hundred ships a month, most of them carrying coal and slate. When the railway reached Saltby in 1873 the slate trade \
moved there, and the harbour of Port Ellery was slowly given over to fishing boats. Today the northern pier is a \
listed monument, the lighthouse is a museum, and the harbour is used by about sixty pleasure boats."""

CODE = """\
def total_price(items, tax_rate):
    total = 0
    for item in items:
        price = item["price"]
        quantity = item["quantity"]
        total = total + price * quantity
    tax = total * tax_rate
    total = total + tax
    return total


def average_price(items):
    total = 0
    count = 0
    for item in items:
        total = total + item["price"]
        count = count + 1
    return total / count
"""

PROMPTS = {
    "quoting": f"Copy this text word for word:\n\n{PASSAGE}",
    "summarising": f"Summarize this text in a few sentences:\n\n{PASSAGE}",
    "editing code": f"Add a docstring to each function of this Python program and print the whole program:\n\n{CODE}",
    "free text": "Write a short story about a fox who learns to read.",
    "explaining": "Explain why the sky is blue and why sunsets are red.",
}


@pytest.fixture(scope="module")
def loaded(smollm2: Path) -> Any:
    from kbit.engine.loader import load_model

    return load_model(str(smollm2))


def compare(benchmark: Any, title: str, loaded: Any, ids: list[int], temperature: float, drafter: Any) -> None:
    """Generates with and without, in turn, and prints what it gains."""
    from kbit.engine.generate import generate
    from kbit.engine.sampler import SamplingParams
    from kbit.engine.speculative import Speculation

    params = SamplingParams(temperature=temperature, top_p=0.95, seed=1)
    results: dict[str, list[Any]] = {"plain": [], "sped": []}

    def in_turn() -> None:
        for way, speculation in (("plain", None), ("sped", Speculation(drafter))):
            generation = generate(
                loaded.decoder, loaded.tokenizer, ids, params, max_tokens=TOKENS, speculation=speculation
            )
            results[way].append(generation.run())

    benchmark.pedantic(in_turn, rounds=ROUNDS, warmup_rounds=1)
    for found in results.values():
        del found[0]  # warm-up
    plain, sped = (results[way][0] for way in ("plain", "sped"))
    rates = {way: [result.decode_tokens_per_second for result in found] for way, found in results.items()}
    report = sped.speculation
    steps = len(sped.ids) - 1
    figures = {
        "speed_up": median(rates["sped"]) / median(rates["plain"]),
        "tokens_per_second": median(rates["sped"]),
        "plain_tokens_per_second": median(rates["plain"]),
        "acceptance_rate": report.acceptance_rate,
        "tokens_per_pass": steps / (steps - report.accepted),
        "same_text": sped.ids == plain.ids,
    }
    benchmark.extra_info.update(figures)
    spread = {way: f"{median(found):.1f} ({min(found):.1f} to {max(found):.1f})" for way, found in rates.items()}
    accepted = "nothing drafted" if report.acceptance_rate is None else f"{report.acceptance_rate:.0%} accepted"
    print(
        f"\n{title}, temperature {temperature:g}, {loaded.backend_name}: {figures['speed_up']:.2f}x; "
        f"tokens/s {spread['plain']} plain, {spread['sped']} with {Path(report.drafter).name}; {accepted}, "
        f"{figures['tokens_per_pass']:.2f} tokens a pass, {'the same' if figures['same_text'] else 'another'} text"
    )


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_prompt_lookup(benchmark: Any, loaded: Any, prompt: str, temperature: float) -> None:
    from kbit.engine.conversation import chat_prompt
    from kbit.engine.ngram import NgramDrafter

    ids = chat_prompt(loaded.tokenizer, [{"role": "user", "content": PROMPTS[prompt]}], "the default model")
    compare(benchmark, prompt, loaded, ids, temperature, NgramDrafter())


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_draft_model(benchmark: Any, data_dir: Path, temperature: float) -> None:
    from kbit.engine.loader import load_model
    from kbit.engine.speculative import load_drafter

    folder = data_dir / "models"
    if not folder.is_dir():
        pytest.skip(f"no small models at {folder}")
    model = load_model(str(folder / "novels-5m"))

    def load(name: str, **options: Any) -> Any:
        return load_model(name, backend=model.decoder.backend, **options)

    drafter = load_drafter(str(folder / "novels-0.7m"), model.name, model.tokenizer, load)
    text = next(iter(sorted((data_dir / "novels" / "heldout").iterdir()))).read_text(encoding="utf-8")
    ids = model.tokenizer.encode(text[20_000:21_000])[:128]
    compare(benchmark, "a novel", model, ids, temperature, drafter)
