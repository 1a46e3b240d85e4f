"""Commands started by torchrun: they say once what one process says, or refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import pytest
from conversion_cases import quantize
from error_cases import run_command
from generation_cases import CHATML
from tensor_parallel_cases import (
    WORLD,
    run_all,
)

from kbit.cli.main import COMMANDS as MAIN_COMMANDS
from kbit.evaluate.evaluation import _check_same_windows
from kbit.host.errors import KbitError
from kbit.text.windows import Windows

pytestmark = pytest.mark.usefixtures("one_thread")

COMMANDS = list(MAIN_COMMANDS)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> str:
    """A quantized model of two key heads."""
    out = tmp_path_factory.mktemp("quantized") / "out"
    quantize(tiny_model, out, "nf4-b16")
    return str(out)


class TestCommand:
    def test_torchrun_gives_the_text_of_one_process_once(self, model: str) -> None:
        flags = ["-m", model, "--backend", "reference", "--max-tokens", "12"]
        flags += ["--temperature", "0.8", "--seed", "3", "--speculate", "ngram"]
        code, alone, error = run_command(["run", "Once upon a time", *flags])
        assert code == 0, error
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORLD)]
        both = subprocess.run(
            [*launcher, "-m", "kbit", "run", "-", *flags],
            input="Once upon a time\n",
            capture_output=True,
            encoding="utf-8",
            timeout=300,
            check=False,
        )
        assert (both.returncode, both.stdout) == (0, alone), both.stderr
        assert len(alone) > 4
        assert both.stderr.count("prompt tokens in") == 1
        assert both.stderr.rstrip().endswith("quantized weights expanded, 2 processes")

    def test_a_fresh_seed_is_shared_and_one_object_printed(self, model: str) -> None:
        flags = ["run", "Once upon", "-m", model, "--backend", "reference", "--max-tokens", "12", "--temperature", "2"]
        (code, stdout, error), other = run_all("-m", "kbit", *flags, "--json")
        assert code == 0, error
        assert other[:2] == (0, "")
        report = json.loads(stdout)
        again = run_command([*flags, "--json", "--seed", str(report["seed"])])[1]
        assert json.loads(again)["text"] == report["text"]

    def test_the_native_backend_refuses_once(self, model: str) -> None:
        first, second = run_all("-m", "kbit", "run", "x", "-m", model)
        assert first[:2] == (1, "")
        assert "kbit: error: the native backend runs a model in one process" in first[2]
        assert second == (1, "", "")

    def test_a_conversation_is_read_and_shown_by_the_first(
        self, tmp_path: Path, write_model: Callable[..., Path]
    ) -> None:
        """Answers of one process; a message that is too long ends all, and is told once."""
        folder = write_model(tmp_path / "m", max_position_embeddings=150)
        (folder / "chat_template.jinja").write_text(CHATML)
        flags = ["-m", str(folder), "--backend", "reference", "--max-tokens", "6", "--speculate", "ngram"]
        (code, said, notes), other = run_all(
            "-m", "kbit", "chat", *flags, "--seed", "5", stdin="Hello\n\nAgain\n/reset\nHello\n" + "x" * 150 + "\n"
        )
        assert code == 2
        assert notes.count("stopped after 6 tokens") == 3
        assert notes.count("conversation forgotten") == 1
        assert notes.count("kbit: error: the conversation has") == 1
        assert other == (1, "", "")
        sampling = ["--temperature", "0.7", "--top-k", "40", "--top-p", "0.95", "--min-p", "0.05", "--seed", "5"]
        alone = json.loads(run_command(["run", "Hello", "--chat", *flags, *sampling, "--json"])[1])
        assert said.startswith(alone["text"] + "\n")
        assert len(said) > 2 * len(alone["text"])

    def test_an_evaluation_is_that_of_one_process(self, model: str, tiny_model: Path, tmp_path: Path) -> None:
        text = tmp_path / "text.txt"
        text.write_text("It was a dark and stormy night. " * 20)
        flags = ["eval", model, "--reference", str(tiny_model), "--data", str(text), "--context", "32"]
        flags += ["--backend", "reference", "--json"]
        alone = json.loads(run_command(flags)[1])
        (code, stdout, error), other = run_all("-m", "kbit", *flags)
        assert code == 0, error
        assert other == (0, "", "")
        report = json.loads(stdout)
        for backend in ("backend", "reference_backend"):
            assert report[backend].endswith(", 2 processes")
        same = ("tokens", "windows", "data_sha256", "reference")
        assert [report[key] for key in same] == [alone[key] for key in same]
        # Sums are formed in another order: logits of size 1 differ by some float32 roundings.
        for key in ("mean_nll", "kl_mean", "kl_max", "delta_nll"):
            assert report[key] == pytest.approx(alone[key], abs=1e-5), key
        assert alone["kl_mean"] > 1e-3

    def test_processes_with_other_texts_do_not_go_on(self) -> None:
        class Other:
            def decided_by_first(self, work: object) -> str:
                return "of another text"

            def together(self) -> AbstractContextManager[None]:
                return nullcontext()

        windows = Windows("gptq", np.zeros((1, 4), np.int64), 0, 4)
        with pytest.raises(KbitError, match="has another text or another tokenizer than the first"):
            _check_same_windows(windows, Other())  # type: ignore[arg-type]

    @pytest.mark.parametrize("command", [command for command in COMMANDS if command not in ("run", "chat", "eval")])
    def test_what_one_process_does_alone_is_refused(
        self, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Before its arguments are looked at. The first process of a machine tells why."""
        monkeypatch.chdir(tmp_path)
        for name, value in {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}.items():
            monkeypatch.setenv(name, value)
        refusal = f"kbit: error: kbit {command} runs as one process: start it without torchrun, or unset RANK"
        code, stdout, error = run_command([command, "--no-such-flag"])
        assert (code, stdout, error.startswith(refusal)) == (2, "", True), error
        monkeypatch.setenv("LOCAL_RANK", "1")
        assert run_command([command, "--no-such-flag"]) == (2, "", "")
        monkeypatch.delenv("LOCAL_RANK")
        assert run_command([command, "--no-such-flag"])[2].startswith(refusal)
        monkeypatch.setenv("WORLD_SIZE", "1")
        assert "--no-such-flag" in run_command([command, "--no-such-flag"])[2]
        assert not list(tmp_path.iterdir())

    def test_tasks_are_refused_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "2")
        code, stdout, error = run_command(["eval", "no/such/model", "--tasks", "piqa", "--items", "items.jsonl"])
        assert (code, stdout) == (2, "")
        assert error.startswith("kbit: error: kbit eval --tasks runs as one process: start it without torchrun")

    def test_after_an_error_no_thread_of_a_group_outlives_the_interpreter(self) -> None:
        """Which now and then ended a run with an abort: what Python runs at its end is not run, what it wrote is."""
        script = (
            "import atexit, torch.distributed as d; from kbit.cli.processes import end\n"
            "d.init_process_group('gloo', store=d.HashStore(), rank=0, world_size=1)\n"
            "atexit.register(print, 'too late'); print('said'); end(3)"
        )
        assert run_all("-c", script)[0] == (3, "said\n", "")
