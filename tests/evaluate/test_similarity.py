"""`kbit eval --tasks stsb`: the correlation is scipy's, errors are those of what varies, and mistakes are said."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import encoder_cases as cases
import numpy as np
import pytest
import transformers
from error_cases import run_command
from numpy.typing import NDArray

from kbit.evaluate import similarity
from kbit.evaluate.similarity import correlation, find_pairs, read_pairs, spearman
from kbit.host.errors import UsageError

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = ["the cat sat", "a dog ran", "who ?", "far away on the mat", "the dogs sat far away ."]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cases.saved(cases.model_of("Bert"), tmp_path_factory.mktemp("similarity") / "model")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [f"g\tf\ty\t{i}\t{i % 4}.5\t{WORDS[i % 5]}\t{WORDS[i * 3 % 5]}\tmore" for i in range(40)]
    file = tmp_path_factory.mktemp("pairs") / "sts-test.csv"
    file.write_text("\n".join(rows) + "\n")
    return file


def test_spearman_is_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(3)
    for values in (generator.normal(size=(2, 50)), generator.integers(0, 5, (2, 200)).astype(float)):
        assert spearman(*values) == pytest.approx(stats.spearmanr(*values).statistic, abs=1e-12)
    assert spearman(np.ones(5), np.arange(5.0)) == 0.0


def drawn(seed: int, noise: float, count: int = 400) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    generator = np.random.default_rng(seed)
    scores = generator.normal(size=count)
    return scores + noise * generator.normal(size=count), scores


def test_errors_are_the_spread_over_samples() -> None:
    """Of normal numbers: the spread of the estimate over 300 samples is what one sample's bootstrap says (a standard
    deviation from 300 values is known to 4 %, and the bootstrap's own error varies by about a tenth)."""
    values = [spearman(*drawn(seed, 1.0)) for seed in range(300)]
    errors = [correlation(*drawn(seed, 1.0)).stderr for seed in range(5)]
    assert float(np.mean(errors)) == pytest.approx(float(np.std(values)), rel=0.2)
    found = correlation(*drawn(7, 1.0))
    assert found.interval[0] < found.value < found.interval[1]
    assert found.interval[1] - found.interval[0] == pytest.approx(2 * 1.96 * found.stderr, rel=0.1)


def test_a_difference_is_on_the_same_draws() -> None:
    """Two models that say nearly the same differ by little, though each by itself is uncertain."""
    cosines, scores = drawn(1, 1.0)
    near = cosines + 0.01 * np.random.default_rng(2).normal(size=len(cosines))
    one, less = correlation(cosines, scores), correlation(near, scores, cosines)
    assert less.value == spearman(near, scores) - one.value
    assert less.stderr < 0.1 * one.stderr
    same = correlation(cosines, scores, cosines)
    assert (same.value, same.stderr, same.interval) == (0.0, 0.0, (0.0, 0.0))


def test_the_vectors_are_those_of_transformers(model: Path, pairs: Path) -> None:
    """Mean pooling by hand, cosines, and scipy."""
    stats = pytest.importorskip("scipy.stats")
    torch = pytest.importorskip("torch")
    code, out, err = run_command(
        ["eval", str(model), "--tasks", "stsb", "--task-data", str(pairs), "--compute", "fp32", "--json"]
    )
    assert code == 0, err
    found = json.loads(out)
    theirs = transformers.AutoModel.from_pretrained(model).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    read = read_pairs(pairs)

    def vector(text: str) -> NDArray[np.float64]:
        with torch.no_grad():
            return np.asarray(theirs(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0).double())

    both = [(vector(one), vector(other)) for one, other in zip(read.one, read.other, strict=True)]
    cosines = np.array([a @ b / np.sqrt((a @ a) * (b @ b)) for a, b in both])
    # Equal texts have a cosine of 1 but for rounding, by which no ranks should differ.
    judge = stats.spearmanr(np.round(cosines, 5), read.scores).statistic
    ours = similarity.spearman(np.round(np.array(_cosines(model, pairs)), 5), read.scores)
    assert ours == pytest.approx(judge, abs=1e-9)
    assert found["spearman"] == pytest.approx(judge, abs=0.05)
    assert (found["pairs"], found["data"], found["task"]) == (40, str(pairs), "stsb")


def _cosines(model: Path, pairs: Path) -> NDArray[np.float64]:
    from kbit.backends.cpu.backend import NativeBackend

    backend = NativeBackend(1, compute="fp32", kv="fp32")
    return similarity.embedded(str(model), backend, read_pairs(pairs)).cosines


def test_what_stands_in_for_a_sweep(model: Path, pairs: Path, tmp_path: Path) -> None:
    """kbit scale refuses an encoder, and what it says to run instead runs."""
    code, _, err = run_command(["scale", str(model), "--data", str(pairs), "-o", str(tmp_path / "study")])
    assert code == 1
    line = err.strip().splitlines()[-1]
    assert "a bert model does not go on with texts; kbit scale measures by predictions of the next token" in line
    commands = [shlex.split(command) for command in re.findall(r"kbit ((?:quantize|eval) [^,]*)", line)]
    assert [command[0] for command in commands] == ["quantize", "eval"]
    words = {"N": "3", "OUT": str(tmp_path / "out")}
    for command in commands:
        filled = [words.get(word, word) for word in command]
        own = ["--task-data", str(pairs), "--json"] if filled[0] == "eval" else ["--block-size", "16"]
        code, out, err = run_command([*filled, *own])
        assert code == 0, err
    assert json.loads(out)["pairs"] == 40


def test_beside_a_reference(model: Path, pairs: Path, tmp_path: Path) -> None:
    code, _, err = run_command(
        ["quantize", str(model), "--method", "rtn", "--dtype", "nf", "--bits", "2", "--block-size", "16"]
        + ["-o", str(tmp_path / "out")]
    )
    assert code == 0, err
    flags = ["--tasks", "stsb", "--task-data", str(pairs), "--reference", str(model)]
    code, out, err = run_command(["eval", str(tmp_path / "out"), *flags, "--json"])
    assert code == 0, err
    found = json.loads(out)
    assert found["difference"] == pytest.approx(found["spearman"] - found["reference_spearman"], abs=1e-12)
    assert found["difference_interval"][0] <= found["difference"] <= found["difference_interval"][1]
    assert 0.0 < found["cosine_with_reference"] < 0.999
    code, out, err = run_command(["eval", str(tmp_path / "out"), *flags, "--limit", "9"])
    assert code == 0, err
    assert "9 of" in out
    assert "cosine with reference" in out


def test_at_a_width_of_a_nested_model(model: Path, pairs: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "all")
    flags = ["--method", "rtn", "--nested", "2..8", "--block-size", "16", "-o", out]
    assert run_command(["quantize", str(model), *flags])[0] == 0
    asked = ["eval", out, "--tasks", "stsb", "--task-data", str(pairs), "--reference", str(model), "--json"]
    wide, narrow = (
        json.loads(run_command([*asked, *more])[1])["cosine_with_reference"] for more in ([], ["--bits", "2"])
    )
    assert narrow < wide
    assert run_command([*asked, "--bits", "9"])[0] == 2


def test_three_columns(tmp_path: Path) -> None:
    (tmp_path / "own.tsv").write_text("1\ta cat\ta dog\r\n\n3.5\tthe mat\ta mat\r\n2\tx\ty")
    found = find_pairs(str(tmp_path / "own.tsv"))
    assert (found.one, found.other, found.scores.tolist()) == (
        ["a cat", "the mat", "x"],
        ["a dog", "a mat", "y"],
        [1, 3.5, 2],
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("1\ta\n", "line 1 is no score and two texts"),
        ("1\ta\tb\nx\ta\tb\n", "line 2 is no score and two texts"),
        ("1\ta\tb\n1\t\tb\n", "line 2 is no score and two texts"),
        ("nan\ta\tb\n", "line 1 is no score"),
        ("1\ta\tb\n1\tc\td\n", "no two pairs with different scores"),
        ("", "no two pairs with different scores"),
        ("1\t\ud8ff", "not UTF-8 at byte 2"),
    ],
)
def test_bad_files(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "own.tsv").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(UsageError, match=message):
        find_pairs(str(tmp_path / "own.tsv"))


def test_mistakes(model: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for flags, message in (
        (["--tasks", "stsb,piqa"], "stsb is of embedding models, the others are not: ask for it alone"),
        (["--tasks", "stsb", "--context", "9"], "--context does not go with --tasks stsb"),
        (["--tasks", "stsb", "--task-data", str(tmp_path)], "has no stsb/sts-test.csv"),
        (["--tasks", "stsb", "--task-data", str(pairs), "--limit", "2"], "at least 3 pairs"),
        (["--tasks", "stsb", "--task-data", str(pairs), "--prompt-name", "q"], "no prompt named 'q'"),
        (["--tasks", "piqa", "--prompt-name", "q"], "--prompt-name goes with --tasks stsb"),
        (["--prompt-name", "q"], "--prompt-name goes with --tasks"),
    ):
        code, _, err = run_command(["eval", str(model), *flags])
        assert code == 2
        assert message in err
    monkeypatch.delenv("KBIT_DATA", raising=False)
    with pytest.raises(UsageError, match="name a file with --task-data"):
        find_pairs(None)
    code, _, err = run_command(["eval", str(model)])
    assert code == 1
    assert "use kbit embed, and kbit eval --tasks stsb" in err


def test_the_benchmark(data_dir: Path) -> None:
    if not (data_dir / "stsb" / "sts-test.csv").is_file():
        pytest.skip("no stsb/sts-test.csv in KBIT_DATA")
    found = find_pairs(str(data_dir))
    assert len(found.scores) == 1379
    assert (found.scores.min(), found.scores.max()) == (0.0, 5.0)
