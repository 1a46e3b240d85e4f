"""Generation through `kbit run` and `kbit chat`: output, input, usage errors and interrupts."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_cases import in_process
from generation_cases import CHATML

from kbit.text.tokenizer import Tokenizer


def kbit(*arguments: str, stdin: str = "", check: int = 0) -> subprocess.CompletedProcess[str]:
    """The command, in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, "-m", "kbit.cli.main", *arguments],
        input=stdin,
        capture_output=True,
        encoding="utf-8",
        env=environment,
        timeout=300,
        check=False,
    )
    assert done.returncode == check, done.stderr
    return done


class TestCommands:
    def test_run_json(self, novels_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
        code, stdout, stderr = in_process(
            ["run", "Once upon", "-m", novels_folder, "--max-tokens", "5", "--json"], monkeypatch
        )
        report = json.loads(stdout)
        assert (code, stdout.count("\n"), stderr) == (0, 1, "")
        assert set(report) >= {
            *("text", "prompt_tokens", "completion_tokens", "prefill_tokens_per_second", "decode_tokens_per_second"),
            *("time_to_first_token_s", "load_s", "peak_rss_bytes", "backend", "finish_reason", "model"),
        }
        assert (report["completion_tokens"], report["finish_reason"]) == (5, "length")
        assert report["peak_rss_bytes"] > 50e6
        assert report["text"]

    def test_run_streams_text_to_stdout_and_figures_to_stderr(
        self, novels_folder: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        flags = ["-m", novels_folder, "--max-tokens", "6", "--temperature", "0.9", "--seed", "4", "--stop", "\x01"]
        done = kbit("run", "-", *flags, "--threads", "1", stdin="Once upon\n")
        report = json.loads(in_process(["run", "Once upon", *flags, "--json"], monkeypatch)[1])
        assert done.stdout == report["text"] + "\n"
        assert done.stderr.strip().endswith(" 1 thread, int8 compute, fp16 KV cache")
        assert f"{report['prompt_tokens']} prompt tokens in " in done.stderr
        assert " · 6 tokens at " in done.stderr

    def test_commands_import_nothing_heavy(self) -> None:
        """`kbit --help` imports every command: it must not pay for torch, jinja2 or tokenizers."""
        code = (
            "import sys, kbit.cli.run, kbit.cli.chat; print(sorted({'torch', 'jinja2', 'tokenizers'} & {*sys.modules}))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout == "[]\n"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((" ",), "the prompt is empty"),
            (("-",), "the prompt from standard input is empty"),
            (("x", "--top-p", "1.5"), "--top-p 1.5: expected a probability"),
            (("x", "--temperature", "-1"), "--temperature -1.0: expected"),
            (("x", "--max-tokens", "0"), "--max-tokens 0: expected at least 1"),
            (("x", "--threads", "0"), "--threads 0: expected at least 1"),
            (("x", "--stop", ""), "--stop '': a stop string needs"),
            (("x", "--system", "s"), "has no chat template, and a text to continue no system message"),
            (("x", "--raw", "--system", "s"), "--system goes with an answer"),
            (("x", "--raw", "--chat"), "--raw and --chat: a text is continued or answered"),
            (("x", "--chat"), "no chat template; `kbit run` without --chat"),
            (("word " * 300,), "tokens and the model's context is 256, answer included: shorten"),
            (("x", "--device", "abacus"), "--device abacus"),
            (("x", "--backend", "abacus"), "--backend abacus: use one of auto, native, triton, reference"),
            (("x", "--compute", "int4"), "--compute int4: use one of int8, fp8, fp16, bf16, fp32"),
            (("x", "--kv-bits", "5"), "--kv-bits 5: use one of 2, 3, 4, 8, 16, 32"),
            (("x", "--backend", "reference", "--compute", "int8"), "--compute int8: the reference backend has only"),
        ],
    )
    def test_run_usage_errors(
        self, novels_folder: str, arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """In this process, through the command's entry, which is where errors become a line and exit code 2."""
        code, stdout, stderr = in_process(["run", "-m", novels_folder, *arguments], monkeypatch)
        assert (code, stdout) == (2, "")
        assert message in stderr
        assert stderr.count("\n") == 1

    def test_a_prompt_too_long_is_refused_before_weights_are_read(
        self, novels_folder: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def load(*_: object) -> None:
            pytest.fail("weights were read")

        monkeypatch.setattr("kbit.models.load.load_decoder", load)
        code, _, stderr = in_process(["run", "-", "-m", novels_folder], monkeypatch, b"word " * 300)
        assert (code, "tokens and the model's context is 256, answer included: shorten" in stderr) == (2, True)

    def test_a_prompt_is_encoded_once(self, novels_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
        texts = []
        encode = Tokenizer.encode

        def noting(self: Tokenizer, text: str, *options: bool) -> list[int]:
            texts.append(text)
            return encode(self, text, *options)

        monkeypatch.setattr(Tokenizer, "encode", noting)
        assert in_process(["run", "Once upon", "-m", novels_folder, "--max-tokens", "1"], monkeypatch)[0] == 0
        assert texts == ["Once upon"]

    def test_prompt_that_is_not_utf8(self, monkeypatch: pytest.MonkeyPatch) -> None:
        code, _, stderr = in_process(["run", "-"], monkeypatch, stdin=b"ab\xff")
        assert (code, "not UTF-8 at byte 2" in stderr) == (2, True)
        code, _, stderr = in_process(["run", "ab\udcff"], monkeypatch)
        assert (code, "not valid UTF-8 at character 2" in stderr) == (2, True)

    def test_chat_with_piped_input(self, novels_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        # The small model has no chat template: give it one.
        folder = tmp_path / "chatty"
        folder.mkdir()
        for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
            (folder / name).symlink_to(Path(novels_folder) / name)
        (folder / "chat_template.jinja").write_text(CHATML)
        lines = "/help\nHello there\n\n/etc/hosts holds what?\n/reset\nHello there\r\n/exit\nnever read\n"
        flags = ["-m", str(folder), "--system", "S", "--temperature", "0", "--max-tokens", "6"]
        code, stdout, stderr = in_process(["chat", *flags], monkeypatch, lines.encode())
        assert code == 0
        assert "/reset        forget the conversation" in stderr
        assert "conversation forgotten" in stderr
        assert stderr.count("stopped after 6 tokens") == 3
        report = json.loads(in_process(["run", "Hello there", "--chat", *flags, "--json"], monkeypatch)[1])
        by_default = json.loads(in_process(["run", "Hello there", *flags, "--json"], monkeypatch)[1])
        assert (by_default["text"], by_default["prompt_tokens"]) == (report["text"], report["prompt_tokens"])
        raw = ["run", "Hello there", "--raw", "-m", str(folder), "--max-tokens", "2", "--json"]
        assert json.loads(in_process(raw, monkeypatch)[1])["prompt_tokens"] < report["prompt_tokens"]
        answer = report["text"] + "\n"
        # The answer to a first message is that of `kbit run --chat`; after /reset nothing earlier is left.
        assert stdout.startswith(answer)
        assert stdout.endswith(answer)
        assert len(stdout) > 2 * len(answer)
        code, _, stderr = in_process(["chat", *flags], monkeypatch, b"ab\xff\n")
        assert (code, "a message from standard input is not UTF-8 at byte 2" in stderr) == (2, True)
        with monkeypatch.context() as patch:  # endless lines are not read to their end, which never comes
            patch.setattr("kbit.cli.chat_input.MAX_PROMPT_BYTES", 1 << 20)
            code, _, stderr = in_process(["chat", *flags], patch, b"x" * ((1 << 20) + 1))
            assert (code, "a message from standard input is longer than 1 MiB" in stderr) == (2, True)
        # A message that does not fit ends a script with a usage error.
        code, _, stderr = in_process(["chat", *flags], monkeypatch, b"word " * 400)
        assert code == 2
        assert "the model's context is 256: shorten the message" in stderr

    def test_chat_without_template(self, novels_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
        code, _, stderr = in_process(["chat", "-m", novels_folder], monkeypatch)
        assert (code, "has no chat template" in stderr) == (2, True)

    def test_ctrl_c_ends_a_script_with_what_there_is(self, novels_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
        from kbit.cli import run as command

        shown = []

        def interrupted_show(text: str) -> None:
            shown.append(text)
            if len(shown) == 3:
                raise KeyboardInterrupt

        monkeypatch.setattr(command, "show", interrupted_show)
        code, _, stderr = in_process(["run", "Once upon", "-m", novels_folder], monkeypatch)
        assert code == 130
        assert shown[-1] == "\n"
        assert "interrupted · native: " in stderr

    def test_terminal_gets_no_control_characters(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from kbit.cli.options import show

        class Terminal(io.StringIO):
            def isatty(self) -> bool:
                return True

        for stream, expected in [(Terminal(), "a\ufffd[31m\n\tb\u4f60"), (io.StringIO(), "a\x1b[31m\n\tb\r\u4f60")]:
            monkeypatch.setattr(sys, "stdout", stream)
            show("a\x1b[31m\n\tb\r\u4f60")
            assert stream.getvalue() == expected
