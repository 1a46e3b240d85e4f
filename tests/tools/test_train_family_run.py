"""tools/train_family.py: runs that learn, stop, go on, and what stands in their way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock

# Before the rest of ours: it puts tools/ where Python looks.
from train_family_cases import losses, never, run, silent
from train_family_cases import make_job as make_job
from train_family_cases import texts as texts
from train_family_cases import tokens as tokens

# isort: split
import train.run
from train.corpus import Tokens
from train.model import Llama
from train.run import Interrupted, Job, Machine, Step
from train.settings import best_precision, default_rate
from train.shapes import PRESETS

from kbit.host.errors import KbitError, UsageError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_learns(make_job: Callable[..., Job], tokens: Tokens, precision: str) -> None:
    job = make_job(precision=precision, steps=80)
    steps: list[Step] = []
    record = train.run.train(job, Machine(torch.device("cpu")), silent, steps.append, never)
    loss = losses(job.folder)
    assert loss == [step.loss for step in steps]
    assert loss[0] == pytest.approx(np.log(tokens.vocabulary), abs=0.15)
    # Sentences of five words each, of which three are one of five, cost ln 125 nats by 16 tokens when learnt.
    assert np.mean(loss[-5:]) < 0.45 * loss[0]
    assert record["heldout_nll_per_token"] < 0.45 * loss[0]
    measured = [step.heldout for step in steps if step.heldout is not None]
    assert len(measured) == 9
    assert measured[-1] < measured[0]
    assert record["training_tokens"] == 80 * 4 * 32
    assert not job.partial.exists()


def test_the_rate_rises_and_falls(make_job: Callable[..., Job]) -> None:
    settings = make_job(steps=1000, learning_rate=1e-2).settings
    rates = [settings.rate(step) for step in range(1000)]
    assert rates[0] == pytest.approx(1e-2 / 20)
    assert int(np.argmax(rates)) in (19, 20)
    assert max(rates) == pytest.approx(1e-2)
    assert rates[-1] == pytest.approx(1e-3, rel=0.01)
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert default_rate(PRESETS["5m"]) < default_rate(PRESETS["0.7m"])


def test_parts_of_a_batch_add_up(make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = make_job("whole"), make_job("parts")
    run(whole)
    monkeypatch.setattr(train.run, "LOGITS_BYTES", 3 * 8 * 32 * whole.tokens.vocabulary)  # three windows, then one
    run(parts)
    np.testing.assert_allclose(losses(parts.folder), losses(whole.folder), rtol=1e-4)


def test_stopped_again_and_again(make_job: Callable[..., Job]) -> None:
    """A run that stops after every seventh step leaves the same bytes as one that never does."""
    whole, broken = make_job("whole"), make_job("broken")
    run(whole)
    heard: list[str] = []
    for _ in range(10):
        steps: list[Step] = []
        machine = Machine(torch.device("cpu"))
        try:
            train.run.train(broken, machine, heard.append, steps.append, lambda now=steps: len(now) == 7)
            break
        except Interrupted as error:
            assert "the same command goes on" in str(error)
    assert [line.split("after ")[1] for line in heard] == [f"step {step} of 24" for step in (7, 14, 21)]
    for name in (train.run.LOG, "model.safetensors", "config.json"):
        assert (broken.folder / name).read_bytes() == (whole.folder / name).read_bytes()


def test_without_a_compiler(make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch.compile fails, that is said, and the run is the one without it."""

    def broken(function: Any, **_: Any) -> Any:
        def call(*_: Any) -> Any:
            raise RuntimeError("no C++ compiler found")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    heard: list[str] = []
    plain, failed = make_job("plain"), make_job("failed")
    run(plain)
    run(failed, Machine(torch.device("cpu"), compile=True), heard.append)
    assert heard == ["torch.compile does not work here, training without it: no C++ compiler found"]
    assert losses(failed.folder) == losses(plain.folder)


def test_compiled_is_used(make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever torch.compile returns computes the losses (compiling itself takes half a minute)."""
    calls: list[int] = []

    def counting(function: Any, **_: Any) -> Any:
        def call(windows: torch.Tensor) -> Any:
            calls.append(len(windows))
            return function(windows)

        return call

    monkeypatch.setattr(torch, "compile", counting)
    plain, compiled = make_job("plain"), make_job("compiled")
    run(plain)
    run(compiled, Machine(torch.device("cpu"), compile=True))
    assert calls == [4] * (1 + 24)
    assert losses(compiled.folder) == losses(plain.folder)


def test_a_loss_that_is_not_finite(make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job()
    monkeypatch.setattr(Llama, "loss", lambda self, windows: self(windows[:, :-1]).mean() * float("inf"))
    with pytest.raises(KbitError, match="the loss is (nan|-?inf) at step 1: .*--learning-rate below 0.006"):
        run(job)
    assert not job.folder.exists()


def test_one_process_at_a_time(make_job: Callable[..., Job]) -> None:
    job = make_job()
    with FileLock(f"{job.partial}.lock"), pytest.raises(KbitError, match="another process is training this"):
        run(job)


def test_another_run_in_the_way(make_job: Callable[..., Job]) -> None:
    """Neither continued nor written over, neither finished nor half done."""
    with pytest.raises(Interrupted):
        train.run.train(make_job(), Machine(torch.device("cpu")), silent, silent, lambda: True)
    with pytest.raises(UsageError, match=r"model\.partial is another run's: seed 2 \(there: 1\): give those"):
        run(make_job(seed=2))
    run(make_job())
    before = (make_job().folder / "model.safetensors").read_bytes()
    with pytest.raises(UsageError, match=r"model is another run's: batch 2 \(there: 4\): use another"):
        run(make_job(batch=2))
    run(make_job())  # finished: nothing to do
    assert (make_job().folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("damage", ["checkpoint", "log", "no log"])
def test_damaged_work(make_job: Callable[..., Job], damage: str) -> None:
    job = make_job()
    with pytest.raises(Interrupted):
        train.run.train(job, Machine(torch.device("cpu")), silent, silent, lambda: True)
    checkpoint, log = job.partial / train.run.CHECKPOINT, job.partial / train.run.LOG
    if damage == "checkpoint":
        checkpoint.write_bytes(checkpoint.read_bytes()[:5000])
    elif damage == "log":
        log.write_bytes(b"")
    else:
        log.unlink()
    with pytest.raises(KbitError, match=r"checkpoint\.pt.* to begin again"):
        run(job)
    checkpoint.unlink()
    run(job)
    assert len(losses(job.folder)) == 24


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk(make_job: Callable[..., Job]) -> None:
    job = make_job()
    job.partial.mkdir()
    (job.partial / "checkpoint.pt.tmp").symlink_to("/dev/full")
    with pytest.raises(KbitError, match=r"checkpoint\.pt: cannot be written"):
        run(job, Machine(torch.device("cpu"), checkpoint_seconds=0))
    run(job)


def test_bf16_where_it_is_multiplied() -> None:
    assert best_precision(torch.device("cpu")) in ("fp32", "bf16")
