"""tools/accuracy_frontier.py: its GGUF files, its rows, and what it makes of them. No peer is run here."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

from frontier.gguf_file import write_gguf  # noqa: E402
from frontier.llama_cpp import LlamaCpp  # noqa: E402
from frontier.measure import Frontier, named_method, named_plan  # noqa: E402
from frontier.show import draw, latest, ratio_interval, tables  # noqa: E402
from frontier.subjects import calibration_text, subjects  # noqa: E402

from kbit.backends.select import select_backend  # noqa: E402
from kbit.calibration.request import CalibrationRequest  # noqa: E402
from kbit.checkpoint.resolve import open_model  # noqa: E402
from kbit.host.errors import KbitError, UnsupportedError, UsageError  # noqa: E402
from kbit.models.load import load_decoder  # noqa: E402
from kbit.quantizers.calibrated import CalibratedRounding  # noqa: E402
from kbit.quantizers.methods import METHODS  # noqa: E402
from kbit.text.tokenizer import Tokenizer  # noqa: E402


@pytest.fixture(autouse=True)
def data_where_the_tool_looks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """KBIT_DATA names the folder of those tests that need it, as users of the tool name it."""
    if "data_dir" in request.fixturenames:
        monkeypatch.setenv("KBIT_DATA", str(request.getfixturevalue("data_dir")))


def row(tool: str, method: str, format: str, bits: float, kl: float, **more: Any) -> dict[str, Any]:
    clusters = (kl * np.linspace(0.5, 1.5, 20) * 100).tolist()
    figures = {"model": "m", "data": "text", "context": 64, "tokens": 2000, "original_perplexity": 20.0}
    counted = {"linear_bits": bits, "all_bits": bits + 1, "kl": kl, "kl_stderr": kl / 10, "kl_p99.9": 9 * kl}
    rest = {"perplexity": 21.0, "top1": 0.9, "cluster_tokens": 100, "cluster_kl": clusters}
    return {"tool": tool, "method": method, "format": format, **figures, **counted, **rest, **more}


def test_a_method_is_calibrated_on_the_text_that_its_name_has(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("It was a dark and stormy night.")
    sampled, named = named_method("ldlq2"), named_method(f"ldlq2:{text}")
    assert isinstance(sampled, CalibratedRounding)
    assert isinstance(named, CalibratedRounding)
    assert sampled.request.texts == ()
    assert [each.text for each in named.request.texts] == [text.read_text()]
    assert (named.name, named.rounding) == (sampled.name, sampled.rounding)
    assert named_method(f"rtn:{text}") is None  # which reads none
    assert named_method("no-such") is None
    with pytest.raises(KbitError, match=r"no-such.txt"):
        named_method("ldlq2:no-such.txt")


def test_a_gguf_file_is_the_model_it_was_made_from(novels_folder: str, tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    write_gguf(novels_folder, out)
    backend = select_backend("cpu", compute="fp32", threads=1)
    text = "The hound of the moor, she said; 'twas  1902.\n"
    found = []
    for path in (novels_folder, str(out)):
        with open_model(path) as source:
            ids = Tokenizer.from_source(source).encode(text)
            decoder = load_decoder(source, backend)
            found.append((ids, decoder.extend(ids, decoder.new_cache(1, 64))))
    assert found[0][0] == found[1][0]
    assert (found[0][1] == found[1][1]).all()


def test_what_cannot_be_written_is_refused(tmp_path: Path, write_model: Any) -> None:
    folder = write_model(tmp_path / "qwen", architectures=["Qwen2ForCausalLM"], model_type="qwen2")
    with pytest.raises(UnsupportedError, match="only Llama"):
        write_gguf(str(folder), tmp_path / "model.gguf")


def test_rows_are_kept_and_not_measured_again(novels_folder: str, data_dir: Path, tmp_path: Path) -> None:
    (subject,) = subjects(["novels-2m"], {})
    subject = replace(subject, tokens=2 * 256)
    said: list[str] = []
    pairs = [("rtn", "nf4-b64"), ("hqq", "int4-b64-asym"), ("hqq", "nf4-b64"), ("nearest", "nf4-b64")]
    rows = tmp_path / "rows.jsonl"
    Frontier(rows).measure(subject, pairs, None, (), said.append)
    assert [line.split(":")[1].strip() for line in said[:2]] == ["kbit rtn nf4-b64", "kbit hqq int4-b64-asym"]
    assert "-asym" in said[2]  # a format that the method has no use for
    assert said[3] == "there is no method nearest: passed over"
    kept = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [found["linear_bits"] for found in kept] == pytest.approx([4.25, 4.5])
    assert all(0 < found["kl"] < 0.1 and found["kl_p99.9"] > found["kl"] for found in kept)
    said.clear()
    again = Frontier(rows)
    again.measure(subject, pairs[:2], None, (), said.append)
    assert not said
    assert again.rows == kept


def test_widths_are_mixed_in_the_formats_of_fast(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KBIT_CALIBRATION", str(tmp_path))
    method = METHODS["trellis"]
    assert isinstance(method, CalibratedRounding)
    method = method.calibrated_on(CalibrationRequest(tokens=256))
    with open_model(str(tiny_model)) as source:
        plan = named_plan(source, "mixed3.5-fast", method)
    linear = [tensor for tensor in plan.tensors if tensor.role == "linear"]
    formats = {str(tensor.format) for tensor in linear}
    assert len(formats) > 1
    assert all(format.endswith("-l12") or format in ("trellis7", "trellis8") for format in formats)
    bits = 8 * sum(tensor.nbytes for tensor in linear) / sum(tensor.source.numel for tensor in linear)
    assert 3.2 < bits <= 3.5


def test_calibration_text_is_not_held_out(data_dir: Path) -> None:
    (subject,) = subjects(["novels-2m"], {})
    text = calibration_text(subject, 20_000)
    assert len(text) >= 20_000
    held_out = Path(subject.data).read_text(encoding="utf-8")
    assert text[:200] not in held_out


def test_the_table_compares_at_no_more_bits() -> None:
    ours = [row("kbit", "rtn", "nf3-b64", 3.25, 0.04), row("kbit", "ldlq2", "nf3-b64", 3.25, 0.02)]
    ours.append(row("kbit", "rtn", "nf4-b64", 4.25, 0.01))
    peers = [row("llama.cpp", "imatrix", "IQ3_S", 3.44, 0.025), row("llama.cpp", "imatrix", "IQ2_S", 2.5, 0.1)]
    shown = tables(ours + peers)
    assert "| llama.cpp IQ3_S | 3.44 | ldlq2 nf3-b64 | 3.25 | 0.80 (0.80 to 0.80) | 0.33 |" in shown
    assert "| IQ2_S | 2.50" not in shown  # nothing of kbit's is as small
    assert "**m** (compared with its file as it is), 2,000 tokens of text in windows of 64" in shown


def test_the_table_compares_with_types_of_almost_a_bit_more() -> None:
    ours = [row("kbit", "trellis", "mixed2.54", 2.53, 0.02), row("kbit", "trellis", "mixed2.4", 2.4, 0.03)]
    ours.append(row("kbit", "ldlq2", "mixed2.6", 2.6, 0.001))  # more than is asked for
    peers = [row("llama.cpp", "imatrix", name, bits, 0.025) for name, bits in (("IQ3_S", 3.44), ("Q3_K_M", 3.9))]
    shown = tables(ours + peers).split("0.9 ± 0.15 more")[1]
    assert "| 2.55 | trellis mixed2.54 | 2.53 | 0.0200 | IQ3_S | 3.44 | 0.0250 | 0.80 (0.80 to 0.80) |" in shown
    assert "Q3_K_M" not in shown
    assert "0.9 ± 0.15 more" not in tables([*ours, row("HQQ", "hqq", "int3-g64", 3.44, 0.025)])  # another peer


def test_intervals_are_paired() -> None:
    """Two models that differ by a factor everywhere: the ratio is certain, however uneven the text."""
    one, other = row("kbit", "rtn", "a", 4, 0.03), row("llama.cpp", "imatrix", "b", 4, 0.06)
    assert ratio_interval(one, other) == pytest.approx((0.5, 0.5))
    noisy = {**one, "cluster_kl": (np.array(one["cluster_kl"]) * np.linspace(1.4, 0.6, 20)).tolist()}
    low, high = ratio_interval(noisy, other)
    assert low < sum(noisy["cluster_kl"]) / sum(other["cluster_kl"]) < high


def test_the_figure_is_the_same_each_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [row("kbit", "rtn", "nf3-b64", 3.25, 0.04), row("llama.cpp", "imatrix", "IQ3_S", 3.44, 0.03)]
    for name in ("one.svg", "two.svg"):
        draw(rows, tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    changed = row("kbit", "rtn", "nf3-b64", 3.25, 0.05)
    assert latest([*rows, changed]) == [changed, rows[1]]


def test_what_is_missing_is_said(tmp_path: Path, data_dir: Path) -> None:
    with pytest.raises(UsageError, match="--path other=FILE"):
        subjects(["other"], {})
    (subject,) = subjects(["novels-2m"], {})
    with pytest.raises(KbitError, match="llama-quantize, llama-imatrix: python tools/peers/install.py"):
        LlamaCpp(tmp_path, tmp_path, subject)
