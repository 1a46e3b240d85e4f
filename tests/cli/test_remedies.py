"""What an error tells the user to do is done here, and works.

Every case is a command that fails, what its line recommends, and the command with the recommendation followed. Remedies
that need a GPU, a network or another program (git-lfs) are not among them; those about downloads and prompts are in the
tests of these.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from error_cases import UP, check_line, edit_config, edit_tensors, run_command, split
from gguf_model_cases import Model
from safetensors.torch import load_file
from tokenizers import Tokenizer as Backend
from tokenizers import models
from transformers import AutoModelForCausalLM, AutoTokenizer

from kbit.checkpoint.resolve import open_model
from kbit.cli import main as cli
from kbit.text.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("no_network")

NORM = "model.norm.weight"
RTN = " --method rtn -o {out}"


class Case(NamedTuple):
    """A command, what its error recommends (a regular expression), and the command with that done.

    In `mended` "{0}", "{1}" stand for what the groups of `remedy` matched; None: `fails` with the words of group 1 added.
    """

    fails: str
    remedy: str
    mended: str | None = None


def huge(model: Path) -> None:
    edit_tensors(model, lambda tensors: tensors[UP].mul_(1e7))


def tiny(model: Path) -> None:
    edit_tensors(model, lambda tensors: tensors[UP].mul_(1e-8))


def minute(model: Path) -> None:
    edit_tensors(model, lambda tensors: tensors[UP].mul_(1e-38))


def huge_norm(model: Path) -> None:
    edit_tensors(model, lambda tensors: tensors[NORM].mul_(1e6))


def tiny_norm(model: Path) -> None:
    edit_tensors(model, lambda tensors: tensors[NORM].mul_(1e-6))


def pickled(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save(tensors, model / "pytorch_model.bin")


def bad_index(model: Path) -> None:
    (model / "model.safetensors").rename(model / "weights.safetensors")
    (model / "model.safetensors.index.json").write_text("{")


CASES: dict[str, tuple[Callable[[Path], object] | None, Case]] = {
    "scales too large": (huge, Case("quantize {model}" + RTN, r"use (--scale-dtype bf16)")),
    "scales too small": (tiny, Case("quantize {model}" + RTN, r"use (--scale-dtype bf16)")),
    "scales too small for any": (
        minute,
        Case(
            "quantize {model} --scale-dtype bf16" + RTN,
            r"error: (\S+): scales .*: (--override) NAME(=keep)",
            "quantize {model} --scale-dtype bf16 {1} {0}{2}" + RTN,
        ),
    ),
    "kept values too large": (
        huge_norm, Case(f"quantize {{model}} --override {NORM}=f16" + RTN, rf"keep it with (--override '{NORM}=f32')")
    ),
    "kept values too small": (
        tiny_norm, Case(f"quantize {{model}} --override {NORM}=f16" + RTN, rf"keep it with (--override '{NORM}=f32')")
    ),
    "matrices that another format has not": (
        None, Case("export {done} -o {out} --to compressed-tensors --data {text.txt} --max-tokens 64", "(--requantize int8-row)")
    ),
    "a finished output": (None, Case("quantize {good} -o {done} --method rtn --bits 3", "replace it with (--force)")),
    "a damaged output": (None, Case("quantize {good} -o {damaged} --method rtn", "anew with (--force)")),
    "texts of which one is too short": (
        None,
        Case(
            "quantize {good} --method gptq --inputs-only --calibration {text.txt} --calibration {longer.txt} "
            "--calibration-tokens 100000 -o {out}",
            r"use (--calibration-tokens 1280)",
        ),
    ),
    "too few bytes": (
        None,
        Case(
            "quantize {good} --size 2KB --calibration {text.txt} --calibration-tokens 256 -o {out}",
            r"use (--size [0-9.]+KB) or more",
            "quantize {good} {0} --calibration {text.txt} --calibration-tokens 256 -o {out}",
        ),
    ),
    "a method that does not calibrate": (
        None,
        Case(
            "quantize {good} --dry-run --calibration {text.txt} --calibration-tokens 256" + RTN,
            r"use (--method ldlq2)",
            "quantize {good} --dry-run --calibration {text.txt} --calibration-tokens 256 {0} -o {out}",
        ),
    ),
    "widths without gradients": (
        None,
        Case(
            "quantize {good} --dry-run --bits 3.5 --inputs-only --calibration {text.txt} --calibration-tokens 256 -o {out}",
            r"use (--method ldlq2), without (--inputs-only)",
            "quantize {good} --dry-run --bits 3.5 {0} --calibration {text.txt} --calibration-tokens 256 -o {out}",
        ),
    ),
    "an impossible block size": (
        None, Case("quantize {good} --block-size 17" + RTN, r"multiple of (16)", "quantize {good} --block-size {0}" + RTN)
    ),
    "an unknown data type": (
        None, Case("quantize {good} --dtype x" + RTN, r"use one of (\w+)", "quantize {good} --dtype {0}" + RTN)
    ),
    "text sampled from what?": (
        None,
        Case(
            "eval {done} --data sampled --max-tokens 128",
            r"name it with (--reference)",
            "eval {done} --data sampled --max-tokens 128 {0} {good}",
        ),
    ),
    "a context that is too long": (
        None,
        Case(
            "eval {good} --data {text.txt} --context 65",
            r"maximum of (64) tokens: lower it",
            "eval {good} --data {text.txt} --context {0}",
        ),
    ),
    "RoPE that depends on the length": (
        lambda m: edit_config(m, rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
        Case(
            "eval {model} --data {text.txt} --context 100",
            r"use (--context 64) or less",
            "eval {model} --data {text.txt} {0}",
        ),
    ),
    "heads too narrow for codes": (
        None, Case("run Hi -m {good} --kv-bits 3", r"use --kv-bits (16) or 32", "run Hi -m {good} --kv-bits {0}")
    ),
    "what the reference does not do": (
        None,
        Case(
            "run Hi -m {good} --backend reference --compute int8 --max-tokens 2",
            r"use (--backend native)",
            "run Hi -m {good} {0} --compute int8 --max-tokens 2",
        ),
    ),
    "a backend of the CPU": (
        None,
        Case(
            "run Hi -m {good} --backend native --device cuda --max-tokens 2",
            r"drop (--device cuda)",
            "run Hi -m {good} --backend native --max-tokens 2",
        ),
    ),
    "no GPU": (
        None,
        Case("run Hi -m {good} --device cuda --max-tokens 2", r"use (--device cpu)", "run Hi -m {good} {0} --max-tokens 2"),
    ),
    "a draft with other tokens": (
        lambda m: Backend(models.BPE({"a": 0}, [])).save(str(m / "tokenizer.json")),
        Case(
            "run Hi -m {good} --speculate {model} --max-tokens 2",
            r"or use (--speculate ngram)",
            "run Hi -m {good} {0} --max-tokens 2",
        ),
    ),
    "no chat template": (
        None, Case("run Hi -m {good} --chat --max-tokens 2", r"`kbit run` without (--chat)", "run Hi -m {good} --max-tokens 2")
    ),
    "a width of a model that has one": (
        None,
        Case(
            "run Hi -m {good} --bits 3 --max-tokens 2",
            r"drop (--bits), or make .* with kbit quantize (--nested 2..8)",
            "quantize {good} {1}" + RTN,
        ),
    ),
    "a draft of a model that has one width": (
        None,
        Case(
            "run Hi -m {good} --speculate self --max-tokens 2",
            r"or use (--speculate ngram)",
            "run Hi -m {good} {0} --max-tokens 2",
        ),
    ),
    "an anchor without widths": (
        None, Case("quantize {good} --anchor 5 --dry-run -o {out}", r"add (--nested 2..8)")
    ),
    "no picture": (None, Case("info {good} --bits 3", r"give (--plot) FILE", "info {good} --bits 3 {0} {picture.svg}")),
    "a pattern without a tensor": (
        None,
        Case("quantize {good} --override 'x*=keep'" + RTN, r"(kbit info) lists their names", "info {good} --tensors"),
    ),
    "a file in place of its folder": (
        None, Case("info {good}/model.safetensors", r"name the (folder) that holds it", "info {good}")
    ),
    "several GGUF files": (None, Case("info {ggufs}", r"name one, for example (\S+)", "info {0}")),
    "twice the same model": (
        None,
        Case(
            "scale {good} {good} --bits 4 --jobs 1 --data {text.txt} --context 32 --max-tokens 64 -o {out}",
            r"name it (once)",
            "scale {good} --bits 4 --jobs 1 --data {text.txt} --context 32 --max-tokens 64 -o {out}",
        ),
    ),
    "an index that is damaged": (
        bad_index,
        # What "download it again" gives.
        Case("info {model}", r"(model.safetensors.index.json): not valid JSON.*download it again", "info {indexed}"),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def menagerie(tmp_path_factory: pytest.TempPathFactory, zoo: Path, write_model: Callable[..., Path]) -> Path:
    """The zoo's models that are named here, and more. Cases change nothing but {model} and {out}."""
    folder = tmp_path_factory.mktemp("menagerie")
    for name, origin in (("good", "good"), ("done", "done"), ("damaged", "done")):
        shutil.copytree(zoo / origin, folder / name)
    (folder / "damaged" / "tokenizer.json").unlink()
    shutil.copy(zoo / "text.txt", folder)
    (folder / "longer.txt").write_text("It was a bright cold day in April. " * 40)
    (folder / "ggufs").mkdir()
    for name in "ab":
        Model().write(folder / "ggufs" / f"{name}.gguf")
    write_model(folder / "indexed", shards=2)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_the_remedy_works(name: str, menagerie: Path, tmp_path: Path, write_model: Callable[..., Path]) -> None:
    edit, case = CASES[name]
    folder = tmp_path / "cases"
    folder.mkdir()
    for path in menagerie.iterdir():
        (shutil.copytree if path.name in ("done", "damaged") else lambda a, b: b.symlink_to(a))(
            path, folder / path.name
        )
    if edit is not None:
        edit(write_model(folder / "model", dtype=torch.float32))
    code, _, stderr = run_command(split(case.fails, folder, folder / "new"))
    line = stderr.splitlines()[-1]
    assert code in (1, 2)
    assert line.startswith("kbit: error: ")
    found = re.search(case.remedy, line)
    assert found, line
    mended = f"{case.fails} {found[1]}" if case.mended is None else case.mended
    for index, text in enumerate(found.groups()):
        mended = mended.replace(f"{{{index}}}", text)
    code, _, stderr = run_command(split(mended, folder, folder / "new"))
    assert code == 0, stderr


def test_a_mended_source_is_not_taken_for_an_interrupted_run(tmp_path: Path, write_model: Callable[..., Path]) -> None:
    """ "mend the source" is what the error says; the same command then starts over by itself."""
    model = write_model(tmp_path / "model")
    edit_tensors(model, lambda tensors: tensors[NORM].view(-1)[:2].fill_(float("nan")))
    arguments = ["quantize", str(model), "--method", "rtn", "-o", str(tmp_path / "out")]
    code, stdout, stderr = run_command(arguments)
    assert code == 1
    assert "mend the source" in check_line(stdout, stderr)
    edit_tensors(model, lambda tensors: tensors[NORM].view(-1)[:2].fill_(1.0))
    code, _, stderr = run_command(arguments)
    assert (code, stderr.splitlines()) == (
        0,
        [f"kbit: note: {tmp_path}/out.partial: removed what a run that failed had left there"],
    )


def test_pickles_are_converted_by_the_line_that_is_printed(tmp_path: Path, write_model: Callable[..., Path]) -> None:
    model = write_model(tmp_path / "model", dtype=torch.float32)
    expected = load_file(model / "model.safetensors")
    pickled(model)
    commands = set()
    for asked in (model, model / "pytorch_model.bin"):
        code, stdout, stderr = run_command(["info", str(asked)])
        assert code == 1
        command = re.search(r"with transformers: (python -c '.*')$", check_line(stdout, stderr))
        assert command
        commands.add(command[1])
    words = shlex.split(commands.pop())
    assert not commands  # the same for both
    subprocess.run([sys.executable, *words[1:]], check=True, capture_output=True, timeout=300)
    code, stdout, _ = run_command(["info", str(model), "--json"])
    assert code == 0
    assert json.loads(stdout)["cannot_run"] is None
    found = load_file(model / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_an_older_tokenizer_is_converted_by_the_line_that_is_printed(
    tmp_path: Path, write_model: Callable[..., Path]
) -> None:
    """vocab.json and merges.txt, as GPT-2's kin had them."""
    model = write_model(tmp_path / "model")
    vocab = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    (model / "tokenizer.json").unlink()
    (model / "vocab.json").write_text(json.dumps({**vocab, "th": 256, "the": 257, "<|endoftext|>": 258}))
    (model / "merges.txt").write_text("#version: 0.2\nt h\nth e\n")
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    code, stdout, stderr = run_command(["run", "the thing", "-m", str(model), "--max-tokens", "2"])
    assert code == 1
    command = re.search(r"once with transformers: (python -c '.*')$", check_line(stdout, stderr))
    assert command
    words = shlex.split(command[1])
    subprocess.run([sys.executable, *words[1:]], check=True, capture_output=True, timeout=300)
    assert run_command(["run", "the thing", "-m", str(model), "--max-tokens", "2"])[0] == 0
    with open_model(str(model)) as source:
        ids = Tokenizer.from_source(source).encode("the thing")
    assert ids == AutoTokenizer.from_pretrained(model).encode("the thing")
    assert ids[0] == 257


def test_an_adapter_is_merged_by_the_line_that_is_printed(tmp_path: Path, write_model: Callable[..., Path]) -> None:
    peft = pytest.importorskip("peft")
    base = write_model(tmp_path / "base", dtype=torch.float32)
    settings = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False, use_dora=True)
    wrapped = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings)
    wrapped.save_pretrained(tmp_path / "adapter")
    code, stdout, stderr = run_command(["info", str(tmp_path / "adapter")])
    assert code == 1
    line = check_line(stdout, stderr)
    call = re.search(r"with peft: (AutoPeftModel.*\.save_pretrained\(\"OUT\"\))", line)
    assert call
    code_text = "from peft import AutoPeftModelForCausalLM; " + call[1].replace("OUT", str(tmp_path / "out"))
    subprocess.run([sys.executable, "-c", code_text], check=True, capture_output=True, timeout=300)
    code, stdout, _ = run_command(["info", str(tmp_path / "out"), "--json"])
    assert (code, json.loads(stdout)["cannot_run"]) == (0, None)


def test_bugs_say_how_to_report_them(monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    def bug(*_: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("kbit.cli.model_summary.summarise", bug)
    code, _, stderr = run_command(["info", str(tiny_model)])
    assert code == 1
    assert "--debug" in stderr
    arguments, debug = cli._take_debug(["info", str(tiny_model), "--debug"])
    assert "Traceback" in run_command(arguments, debug)[2]
