"""Conversions that are interrupted: nothing half-written loads, nothing finished is lost, a rerun ends with the same bytes.

Interrupted runs are real ones: processes that SIGKILL ends. They are started from a fork server that has torch loaded,
so that dying at every single system call of a conversion takes seconds.
"""

from __future__ import annotations

import ast
import json
import multiprocessing
import os
import shutil
import signal
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conversion_cases import assert_not_loadable, check_exact, files_of, quantize, rerun, stop_after

from kbit.checkpoint.readers.kbit_folder import MANIFEST_NAME, KbitFolder
from kbit.checkpoint.writer import CheckpointWriter
from kbit.host.errors import KbitError, UsageError

# --- interrupted runs ------------------------------------------------------------------------------------------------

# Runs one conversion and dies at the Nth call that writes, renames, removes or creates something. 0: never; then the
# numbers of the calls before which the disk had changed are written to `log`, and that of all calls.
VICTIM = """
import os, signal, sys
from pathlib import Path
import torch
from kbit.checkpoint.resolve import open_model
from kbit.formats.quant_format import QuantFormat
from kbit.quantizers.convert import convert
from kbit.quantizers.plan import make_plan

torch.set_num_threads(1)
os.fsync = int  # killing a process loses nothing that the system has; what a power cut loses is another test's matter
names = {"write", "flush", "truncate", "close", "rename", "replace", "unlink", "rmdir", "mkdir", "open"}
calls, changed, before = 0, [], None

def disk():
    places = sorted(path for top in Path(out).parent.glob(f"{Path(out).name}*") for path in (top, *top.rglob("*")))
    return [(str(path), path.read_bytes() if path.is_file() else None) for path in places]

def watch(frame, event, function):
    global calls, before
    if event == "c_call" and getattr(function, "__name__", "") in names:
        calls += 1
        if calls == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if not die_at and before != (before := disk()):
            changed.append(calls)

with open_model(model) as source:
    plan = make_plan(source, QuantFormat.parse("int3-b32-asym-dq"), shard_bytes=1200)
    sys.setprofile(watch)
    convert(source, plan, Path(out), **options)
    sys.setprofile(None)
Path(log).write_text(repr((changed, calls)))
"""


@pytest.fixture
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of conversions wait for no disk."""
    monkeypatch.setattr(os, "fsync", int)


@pytest.fixture(scope="module")
def forkserver() -> Any:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("no fork server on this system")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "kbit.quantizers.convert", "kbit.checkpoint.resolve"])
    return context


def start(context: Any, code: str, variables: dict[str, Any]) -> Any:
    """Run a piece of code in a new process of the fork server."""
    process = context.Process(target=exec, args=(code, variables))
    with pytest.MonkeyPatch.context() as patch:
        # Else each process would first import what started this one: pytest.
        patch.setitem(sys.modules, "__main__", types.ModuleType("__main__"))
        process.start()
    return process


def run_victim(context: Any, model: Path, out: Path, die_at: int, **options: Any) -> None:
    """Convert in another process that dies at its Nth call."""
    log = out.with_name(f"log-{out.name}")
    variables = {"model": str(model), "out": str(out), "die_at": die_at, "options": options, "log": str(log)}
    process = start(context, VICTIM, variables)
    process.join(300)
    assert process.exitcode == (-signal.SIGKILL if die_at else 0)


def calls_that_matter(context: Any, model: Path, out: Path, **options: Any) -> tuple[list[int], int]:
    """A conversion that lives. Returns the calls at which dying leaves the disk in another state than dying one call
    earlier would, and the number of all calls.
    """
    run_victim(context, model, out, 0, **options)
    changed, total = ast.literal_eval(out.with_name(f"log-{out.name}").read_text())
    return changed, total


@pytest.mark.usefixtures("no_fsync")
def test_killed_at_every_call(
    forkserver: Any, tmp_path: Path, small_model: Path, undisturbed: dict[str, bytes]
) -> None:
    """Dead after any prefix of its system calls: nothing to load, and a rerun ends with the same bytes.

    A call that changes nothing on the disk leaves what the one before it left, so one death for each state is enough.
    """
    deaths, total = calls_that_matter(forkserver, small_model, tmp_path / "whole")
    assert files_of(tmp_path / "whole") == undisturbed
    assert total > 100
    assert len(deaths) > 50
    resumed = set()
    for die_at in deaths:
        out = tmp_path / str(die_at)
        run_victim(forkserver, small_model, out, die_at)
        if out.exists():  # only complete
            KbitFolder(out).close()
        elif (out.with_name(f"{die_at}.partial") / "config.json").exists():  # complete, but not yet in place
            KbitFolder(out.with_name(f"{die_at}.partial")).close()
        else:
            assert_not_loadable(out.with_name(f"{die_at}.partial"))
        resumed.add(rerun(small_model, out).resumed)
        assert files_of(out) == undisturbed, f"killed at call {die_at} of {total}"
        assert {path.name for path in tmp_path.glob(f"{die_at}.*")} <= {f"{die_at}.partial.lock"}
        shutil.rmtree(out)
    assert resumed == set(range(12))  # from nothing to everything: 11 tensors


@pytest.mark.usefixtures("no_fsync")
def test_killed_while_replacing(
    forkserver: Any, tmp_path: Path, small_model: Path, tiny_model: Path, undisturbed: dict[str, bytes]
) -> None:
    """With --force: at any moment either the old or the new model is there in full, and a rerun finishes."""
    rerun(small_model, tmp_path / "new")
    quantize(tiny_model, tmp_path / "old", "nf4-b64")
    old = files_of(tmp_path / "old")
    shutil.copytree(tmp_path / "old", tmp_path / "count")
    deaths, total = calls_that_matter(forkserver, small_model, tmp_path / "count", overwrite=True)
    assert files_of(tmp_path / "count") == undisturbed
    states = set()
    for die_at in [call for call in deaths if call >= total - 40]:
        out, partial = tmp_path / "out", tmp_path / "out.partial"
        shutil.copytree(tmp_path / "old", out)
        run_victim(forkserver, small_model, out, die_at, overwrite=True)
        if not out.exists():
            states.add("between")  # the instant between two renames: both are complete in the partial folder
            assert files_of(partial / ".replaced") == old
            KbitFolder(partial).close()
        else:
            content = files_of(out)
            states.add("old" if content == old else "new")
            assert content == old or undisturbed.items() <= content.items()
        rerun(small_model, out, overwrite=True)
        assert files_of(out) == undisturbed
        assert {path.name for path in tmp_path.glob("out.*")} <= {"out.partial.lock"}
        shutil.rmtree(out)
    assert states == {"old", "between", "new"}


def test_leftovers_of_a_run_killed_after_the_last_rename(
    tmp_path: Path, small_model: Path, undisturbed: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    rerun(small_model, out)
    (out / "journal.jsonl").write_text("{}")
    (out / ".replaced").mkdir()
    (out / ".replaced" / "model.safetensors").write_text("old")
    assert rerun(small_model, out).written == 0
    assert files_of(out) == undisturbed


def test_a_stopped_run_is_continued(
    interrupted: tuple[Path, Path], small_model: Path, undisturbed: dict[str, bytes]
) -> None:
    out, partial = interrupted
    assert not out.exists()
    assert_not_loadable(partial)
    seen: list[Any] = []
    result = rerun(small_model, out, on_tensor=seen.append)
    assert (result.written, result.resumed, len(seen)) == (5, 6, 11)
    assert files_of(out) == undisturbed
    assert not partial.exists()


def journal_lines(partial: Path) -> list[str]:
    return (partial / "journal.jsonl").read_text().splitlines(keepends=True)


def damage_torn_line(partial: Path) -> None:
    (partial / "journal.jsonl").write_text("".join(journal_lines(partial))[:-20])


def damage_garbage_line(partial: Path) -> None:
    with (partial / "journal.jsonl").open("ab") as file:
        file.write(b'\xff\x00{"done": 3}\n{"done": "x", "sha256": 3}\n[]\nnull')


def damage_data(partial: Path) -> None:
    """One byte of a finished tensor: a page that a power cut lost."""
    name, digests = (lambda r: (r["done"], r["sha256"]))(json.loads(journal_lines(partial)[3]))
    assert name
    for shard in partial.glob("*.safetensors"):
        content = bytearray(shard.read_bytes())
        length = int.from_bytes(content[:8], "little")
        entry = json.loads(content[8 : 8 + length]).get(next(iter(digests)))
        if entry:
            content[8 + length + entry["data_offsets"][0]] ^= 1
            shard.write_bytes(content)


def damage_truncate(partial: Path) -> None:
    shard = sorted(partial.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-3])


def damage_header(partial: Path) -> None:
    shard = sorted(partial.glob("*.safetensors"))[0]
    content = bytearray(shard.read_bytes())
    content[12] ^= 4
    shard.write_bytes(content)


def damage_missing_shard(partial: Path) -> None:
    sorted(partial.glob("*.safetensors"))[0].unlink()


def damage_lying_journal(partial: Path) -> None:
    """The journal says that everything is done, with wrong digests and unknown names."""
    lines = journal_lines(partial)
    for line in lines[1:4]:
        record = json.loads(line)
        lines.append(json.dumps({**record, "sha256": dict.fromkeys(record["sha256"], "0" * 64)}) + "\n")
        lines.append(json.dumps({"done": "ghost", "sha256": record["sha256"]}) + "\n")
        lines.append(json.dumps({"done": record["done"], "sha256": {}}) + "\n")
    (partial / "journal.jsonl").write_text("".join(lines))


def damage_early_config(partial: Path) -> None:
    """As a run leaves it that dies at the very end; here with the work not done."""
    (partial / "config.json").write_text("{}")
    (partial / MANIFEST_NAME).write_text("{}")


DAMAGE = (
    damage_torn_line,
    damage_garbage_line,
    damage_data,
    damage_truncate,
    damage_header,
    damage_missing_shard,
    damage_lying_journal,
    damage_early_config,
)


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__.removeprefix("damage_"))
def test_a_damaged_partial_folder_is_mended(
    interrupted: tuple[Path, Path], small_model: Path, undisturbed: dict[str, bytes], damage: Callable[[Path], None]
) -> None:
    out, partial = interrupted
    damage(partial)
    result = rerun(small_model, out)
    assert result.resumed <= 6
    assert result.resumed + result.written == 11
    assert files_of(out) == undisturbed


def test_a_run_that_starts_resuming_hides_an_early_config_at_once(
    interrupted: tuple[Path, Path], small_model: Path
) -> None:
    out, partial = interrupted
    damage_early_config(partial)
    stop_after(small_model, out, 8)
    assert not (partial / "config.json").exists()
    assert_not_loadable(partial)


def test_another_plan_does_not_continue_a_partial_folder(
    interrupted: tuple[Path, Path], small_model: Path, tiny_model: Path, undisturbed: dict[str, bytes]
) -> None:
    out, partial = interrupted
    before = files_of(partial)
    for model, format in ((small_model, "nf4-b64"), (tiny_model, "int3-b32-asym-dq")):
        with pytest.raises(UsageError, match=r"out\.partial: an interrupted run with another .* --no-resume"):
            quantize(model, out, format)
        assert files_of(partial) == before
    quantize(small_model, out, "nf4-b64", resume=False)
    check_exact(small_model, out, "nf4-b64")
    assert not partial.exists()


def test_no_resume_starts_over(
    interrupted: tuple[Path, Path], small_model: Path, undisturbed: dict[str, bytes]
) -> None:
    out, _ = interrupted
    result = rerun(small_model, out, resume=False)
    assert (result.written, result.resumed) == (11, 0)
    assert files_of(out) == undisturbed


@pytest.mark.parametrize("resume", [True, False])
def test_a_partial_folder_that_is_not_kbit_s_is_left_alone(tmp_path: Path, small_model: Path, resume: bool) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match=r"out\.partial: in the way, and not an interrupted run of kbit's; move it"):
        rerun(small_model, tmp_path / "out", resume=resume)
    assert files_of(partial) == {"thesis.tex": b"years of work"}
    shutil.rmtree(partial)
    partial.write_text("a file")
    with pytest.raises(UsageError, match="in the way"):
        rerun(small_model, tmp_path / "out", resume=resume)
    assert partial.read_text() == "a file"


# --- two at once -----------------------------------------------------------------------------------------------------


def test_two_at_once(interrupted: tuple[Path, Path], small_model: Path, undisturbed: dict[str, bytes]) -> None:
    out, partial = interrupted
    errors: list[str] = []

    def on_tensor(tensor: Any) -> None:
        before = files_of(partial)
        for resume in (True, False):
            with pytest.raises(KbitError, match=r"out\.partial: another kbit process is writing there") as caught:
                rerun(small_model, out, resume=resume)
            errors.append(str(caught.value))
        assert files_of(partial) == before

    rerun(small_model, out, on_tensor=on_tensor)
    assert len(errors) == 22
    assert files_of(out) == undisturbed
    assert not partial.with_name("out.partial.lock").exists()


def test_two_processes_at_once(
    forkserver: Any, tmp_path: Path, small_model: Path, undisturbed: dict[str, bytes]
) -> None:
    """A run in another process is noticed, and once it is killed its lock counts no longer."""
    out = tmp_path / "out"
    started = forkserver.Event()
    code = VICTIM.replace("**options)", "on_tensor=lambda tensor: (started.set(), __import__('time').sleep(3600)))")
    variables = {
        "model": str(small_model),
        "out": str(out),
        "die_at": 0,
        "log": str(tmp_path / "n"),
        "started": started,
    }
    process = start(forkserver, code, variables)
    try:
        assert started.wait(300)
        with pytest.raises(KbitError, match="another kbit process is writing there"):
            rerun(small_model, out)
    finally:
        process.kill()
        process.join(300)
    assert rerun(small_model, out).resumed == 1
    assert files_of(out) == undisturbed


def test_closing_twice_does_not_remove_another_one_s_lock(tmp_path: Path) -> None:
    first = CheckpointWriter(tmp_path / "out", [], "plan")
    first.close()
    second = CheckpointWriter(tmp_path / "out", [], "plan")
    first.close()
    with pytest.raises(KbitError, match="another kbit process"):
        CheckpointWriter(tmp_path / "out", [], "plan")
    second.close()
    CheckpointWriter(tmp_path / "out", [], "plan").close()
