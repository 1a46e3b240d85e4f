"""What is typed in `kbit chat`: commands, messages of several lines, a history."""

from __future__ import annotations

import json
import os
import select
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_cases import in_process
from serve_cases import PATIENCE, with_template

from kbit.cli.chat_input import _typed
from kbit.engine.loader import load_model

# Of a template that shows which words went in: "system: ...", "user: ...".
FLAGS = ["--temperature", "0", "--max-tokens", "9", "--threads", "1"]


@pytest.fixture(scope="module")
def chatty(novels_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_template(Path(novels_folder), tmp_path_factory.mktemp("chatty") / "novels")


@pytest.fixture(scope="module")
def other(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_template(data_dir / "models" / "novels-0.7m", tmp_path_factory.mktemp("other") / "small")


def chat(model: Path, lines: str, monkeypatch: pytest.MonkeyPatch, *more: str) -> tuple[int, str, str]:
    """(exit code, answers, what was said beside them)."""
    code, out, error = in_process(["chat", "--model", str(model), *FLAGS, *more], monkeypatch, lines.encode())
    return code, out, error


def test_a_system_message_from_here_on(chatty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "talk.json"
    lines = f"/system\n/system It was a dark night in London.\n/system\nHello there\n/system off\n/save {file}\n"
    code, answers, said = chat(chatty, lines, monkeypatch, "--system", "Sing.")
    assert code == 0
    assert "Sing." in said.splitlines()
    assert "It was a dark night in London." in said.splitlines()
    _, fresh, _ = chat(chatty, "Hello there\n", monkeypatch, "--system", "It was a dark night in London.")
    _, sung, _ = chat(chatty, "Hello there\n", monkeypatch, "--system", "Sing.")
    assert answers == fresh
    assert answers != sung
    saved = json.loads(file.read_text())
    assert saved["model"] == str(chatty)
    user = {"role": "user", "content": "Hello there"}
    assert saved["messages"] == [user, {"role": "assistant", "content": fresh.removesuffix("\n")}]


def test_another_model_reads_what_was_said(
    chatty: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "talk.json"
    code, answers, said = chat(chatty, f"Hello\n/model {other}\n/model\nAnd you?\n/save {file}\n", monkeypatch)
    assert code == 0
    assert said.count(f"{other} · native: ") == 2
    saved = json.loads(file.read_text())
    assert saved["model"] == str(other)
    said_by_models = [message["content"] for message in saved["messages"][1::2]]
    assert "".join(f"{text}\n" for text in said_by_models) == answers
    # The second answer is what that model says to the whole conversation.
    from kbit.engine.conversation import chat_prompt
    from kbit.engine.generate import generate

    loaded = load_model(str(other), threads=1)
    ids = chat_prompt(loaded.tokenizer, saved["messages"][:3], "M")
    expected = generate(loaded.decoder, loaded.tokenizer, ids, max_tokens=9, continues_prompt=False).run().text
    assert said_by_models[1] == expected


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("/model nothing-there", "nothing-there: no such folder or file"),
        ("/model {plain}", "has no chat template"),
        ("/save", "/save: name a file"),
        ("/save {taken}", "is there already: name another file"),
        ("/save no/such/folder", "cannot be written (No such file or directory)"),
        ("/bits x", "/bits x: write a number"),
        ("/bits nan", "/bits nan: write a number"),
        ("/bits 3.5", "has one width; drop --bits"),
    ],
)
def test_a_command_that_fails_ends_a_script(
    chatty: Path, novels_folder: str, tmp_path: Path, command: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = tmp_path / "taken.json"
    taken.write_text("mine")
    lines = command.format(plain=novels_folder, taken=taken) + "\nHello\n"
    code, answers, error = chat(chatty, lines, monkeypatch)
    assert code in (1, 2)
    assert answers == ""
    assert message in error.splitlines()[-1]
    assert taken.read_text() == "mine"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["plain"], "plain"),
        (["a\\", "b\\", "c"], "a\nb\nc"),
        (['"""a', "b\\", '"""'], "a\nb\\"),
        (['"""', "  indented", "", 'end"""'], "  indented\n\nend"),
        (['"""one line"""'], "one line"),
        (["it's"], "it's"),
    ],
)
def test_messages_of_several_lines(lines: list[str], message: str) -> None:
    left: Iterator[str] = iter(lines)
    assert _typed(lambda prompt: next(left)) == message
    assert list(left) == []


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_in_a_terminal(chatty: Path, tmp_path: Path) -> None:
    """Failures are said and the chat goes on; what was typed is there the next time, for nobody else to read."""
    import pty

    history = tmp_path / "history"
    history.write_text("What I said before\n")
    history.chmod(0o600)
    environment = {**os.environ, "KBIT_HISTORY": str(history), "TERM": "dumb"}
    controller, terminal = pty.openpty()
    command = [sys.executable, "-m", "kbit", "chat", "--model", str(chatty), *FLAGS]
    process = subprocess.Popen(
        command, stdin=terminal, stdout=terminal, stderr=terminal, env=environment, cwd=tmp_path, close_fds=True
    )
    os.close(terminal)
    try:
        shown = ""
        for typed in ("one \\\r", "two\r", "/save\r", "\x10\x10\x10\x10\r", "/save talk.json\r", "/exit\r"):
            shown += _until_asked(controller)
            os.write(controller, typed.encode())
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.wait()
        os.close(controller)
    assert "/save: name a file" in shown
    messages = json.loads((tmp_path / "talk.json").read_text())["messages"]
    # Four lines back, past "/save", "two" and "one", is what was said in an earlier chat.
    assert [message["content"] for message in messages[::2]] == ["one \ntwo", "What I said before"]
    lines = history.read_text().splitlines()
    assert lines == ["What I said before", "one \\", "two", "/save", "What I said before", "/save talk.json", "/exit"]
    assert stat.S_IMODE(history.stat().st_mode) == 0o600


def _until_asked(controller: int) -> str:
    """What is shown up to the next prompt, "> " or ". " at the beginning of a line."""
    shown, deadline = "", time.monotonic() + PATIENCE
    while not shown.endswith(("\n> ", "\n. ", "\r> ", "\r. ")):
        assert time.monotonic() < deadline, shown
        if select.select([controller], [], [], 1)[0]:
            shown += os.read(controller, 4096).decode()
    return shown
