"""What the compared speeds cost in accuracy: KL divergence from the 16-bit model, of kbit's 4 bits and of llama.cpp's.

    pytest benchmarks/test_cpu_fidelity.py -s            # a few minutes

All files are read and run by kbit: the difference is the weights, and the arithmetic named in the row. The text is
WikiText-2, 4,096 tokens of it in windows of 512.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from peers import MissingPeer, Peers

pytestmark = pytest.mark.full  # not of a plain `pytest benchmarks/`

TOKENS, CONTEXT = 4096, 512


class Judge:
    """The reference's logits on the text, kept on disk, and what compares a model with them."""

    def __init__(self, reference: str, text: Path) -> None:
        from kbit.engine.loader import load_model
        from kbit.evaluate.logits import StoredLogits
        from kbit.text.datasets import resolve_data
        from kbit.text.windows import make_windows

        model = load_model(reference, device="cpu", compute="fp32")
        self.windows = make_windows(resolve_data(str(text)), model.tokenizer, "gptq", CONTEXT, TOKENS)
        self.logits = StoredLogits(model.decoder, self.windows)

    def row(self, name: str, model: str | Path, compute: str) -> dict[str, Any]:
        """KL(reference || model), with the arithmetic `compute`."""
        from kbit.engine.loader import load_model
        from kbit.evaluate.compare import compare

        loaded = load_model(str(model), device="cpu", compute=compute)
        result = compare(loaded.decoder, self.logits, self.windows)
        return {
            "name": name,
            "compute": compute,
            "kl": result.kl_mean,
            "stderr": result.kl_stderr or 0.0,
            "top1": result.top1_agreement,
            "perplexity": result.model.perplexity,
        }


@pytest.fixture(scope="module")
def reference() -> str:
    """The default model in 16 bits, which both sides quantize."""
    try:
        return str(Peers().gguf("F16"))
    except MissingPeer as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="module")
def judge(reference: str, data_dir: Path) -> Iterator[Judge]:
    judge = Judge(reference, data_dir / "wikitext2" / "wiki.test.raw")
    with judge.logits:
        yield judge


def tell(benchmark: Any, case: str, rows: list[dict[str, Any]], **about: Any) -> None:
    benchmark.extra_info.update({"case": case, "rows": rows, **about})
    print(f"\n\n{case}: KL divergence in nats per token, {TOKENS} tokens of WikiText-2 in windows of {CONTEXT}")
    for row in rows:
        line = f"  {row['name']:<34}{row['compute']:<6}{row['kl']:.5f} ± {row['stderr']:.5f}"
        print(f"{line}  top-1 {row['top1']:.2%}  perplexity {row['perplexity']:.3f}")
    for name, value in about.items():
        print(f"  {name.replace('_', ' ')}: {value}")


def test_four_bits_beside_q4_0(benchmark: Any, judge: Judge, converted: Callable[..., Path]) -> None:
    """The 4-bit files of the speed comparison, and llama.cpp's at the other widths for orientation."""
    rows: list[dict[str, Any]] = []

    def measure() -> None:
        for head in (8, 4):
            name, model = f"kbit 4 bits, head {head}", converted(4, head)
            rows.extend(judge.row(name, model, compute) for compute in ("fp32", "int8"))
        rows.extend(judge.row(f"llama.cpp {name}", Peers().gguf(name), "fp32") for name in ("Q4_0", "Q4_0-pure"))

    benchmark.pedantic(measure, rounds=1)
    tell(benchmark, "4 bits beside Q4_0", rows, goal="no higher than Q4_0's")


def test_int8_activations(benchmark: Any, judge: Judge, converted: Callable[..., Path]) -> None:
    """What int8 activations add to the quantization's own divergence, at every width."""
    rows: list[dict[str, Any]] = []
    added: dict[str, float] = {}

    def measure() -> None:
        for bits in range(2, 9):
            exact, fast = (judge.row(f"kbit {bits} bits", converted(bits, 8), compute) for compute in ("fp32", "int8"))
            rows.extend((exact, fast))
            added[f"{bits} bits"] = fast["kl"] - exact["kl"]

    benchmark.pedantic(measure, rounds=1)
    own = next(row["kl"] for row in rows if row["name"] == "kbit 4 bits" and row["compute"] == "fp32")
    shown = ", ".join(f"{name} {value:+.5f} ({value / own:+.1%} of 4 bits' own)" for name, value in added.items())
    tell(benchmark, "int8 activations", rows, added=shown, goal=f"below {0.05 * own:.5f}, 5 % of 4 bits' own")
