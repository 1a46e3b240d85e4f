"""One training run, from the first step to the folder, killed in between as often as it may be.

Work happens in NAME.partial/: `checkpoint.pt` (parameters, optimizer, step, seconds so far, length of the log) and
`losses.jsonl`, a line for every step. A checkpoint replaces the one before it in a single rename, after the log has
reached the disk, so at any moment there is a whole one. A resumed run cuts the log back to the checkpoint and goes on
as if nothing had been: the only randomness is the initial weights and the order of windows, and the latter is a
function of the seed and the step. On a CPU with the same number of threads (and with torch.compile or without, as
before) the losses are the same to the last bit; on a GPU, up to the order in which its kernels add.

The finished folder appears by a rename. It is Hugging Face's layout in float16, with `training.json` and the losses.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from safetensors.torch import save
from torch.nn import functional

from kbit.host.errors import KbitError, UsageError, one_line
from kbit.host.files import fsync_folder, read_json_object, write_durably
from train.corpus import Tokens, WindowOrder
from train.model import Llama, exported
from train.settings import Settings, differences

LOG = "losses.jsonl"
CHECKPOINT = "checkpoint.pt"
TRAINING = "training.json"
# Logits of one pass in float32 and their gradient; a batch is cut into parts that stay below this.
LOGITS_BYTES = 256 << 20
# The held-out loss is measured this many times on the way, on so many windows spread over the texts.
HELDOUT_TIMES = 10
HELDOUT_WINDOWS = 64


class Interrupted(KbitError):
    """Asked to stop; a checkpoint is written. Exit code 130, as of a program ended by Ctrl-C."""

    exit_code = 130


@dataclass(frozen=True)
class Machine:
    """Where and how often, which do not change what is computed but for rounding.

    Attributes:
        device: cpu or cuda.
        compile: whether to run the loss through torch.compile.
        checkpoint_seconds: time between checkpoints.
    """

    device: torch.device
    compile: bool = False
    checkpoint_seconds: float = 60.0


@dataclass(frozen=True)
class Step:
    """A finished step: its number from 1, loss in nats, seconds of training so far, held-out loss where measured."""

    number: int
    loss: float
    seconds: float
    heldout: float | None


@dataclass(frozen=True, eq=False)
class Job:
    """A run and where it goes.

    Attributes:
        settings: what to train.
        tokens: on what.
        corpus_name: for training.json.
        folder: of the finished model; the work is beside it in FOLDER.partial.
    """

    settings: Settings
    tokens: Tokens
    corpus_name: str
    folder: Path

    @property
    def partial(self) -> Path:
        """The folder of an unfinished run."""
        return self.folder.with_name(self.folder.name + ".partial")


def finished(job: Job) -> dict[str, Any] | None:
    """training.json of a folder that is there already; None where there is none.

    Raises:
        UsageError: it was trained with other settings.
        KbitError: the folder is something else.
    """
    if not job.folder.exists():
        return None
    record = read_json_object(job.folder / TRAINING)
    differ = differences(job.settings.to_dict(), record.get("settings"))
    if differ:
        raise UsageError(f"{job.folder} is another run's: {differ}: use another --out or --name, or delete it")
    return record


def train(
    job: Job, machine: Machine, say: Callable[[str], None], progress: Callable[[Step], None], stop: Callable[[], bool]
) -> dict[str, Any]:
    """Train a model, or what is left to train of it; returns the content of training.json.

    Args:
        say: told in a line what is unusual: resuming, torch.compile failing.
        progress: called after every step.
        stop: asked after every step; once it says yes, a checkpoint is written and Interrupted raised.

    Raises:
        UsageError: the folder holds a run of other settings, or the texts are too short.
        KbitError: the loss is not finite, a file cannot be read or written, or another process trains this.
    """
    with _errors_of(job.partial), _lock(job.partial):
        record = finished(job)
        if record is None:
            record = _Run(job, machine, say).train(progress, stop)
        # Also what a run left that was killed just after its folder had appeared.
        shutil.rmtree(job.partial, ignore_errors=True)
    return record


class _Run:
    def __init__(self, job: Job, machine: Machine, say: Callable[[str], None]) -> None:
        settings = job.settings
        self.job, self.settings, self.machine, self.say = job, settings, machine, say
        self.order = WindowOrder(job.tokens.training, settings.context, settings.seed)
        self.model = Llama(settings.shape, job.tokens.vocabulary, settings.context, settings.seed)
        self.model.to(machine.device)
        # GPT-3's settings but for the rate; norms are not decayed.
        matrices = [parameter for parameter in self.model.parameters() if parameter.dim() == 2]
        vectors = [parameter for parameter in self.model.parameters() if parameter.dim() < 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95), fused=True)
        self.step, self.seconds, self.log_bytes = 0, 0.0, 0
        self._resume()
        self.loss = self._compiled() if machine.compile else self.model.loss

    def train(self, progress: Callable[[Step], None], stop: Callable[[], bool]) -> dict[str, Any]:
        settings = self.settings
        spread = heldout_windows(self.job.tokens.heldout, settings.context, HELDOUT_WINDOWS)
        measured = {round(settings.steps * (index + 1) / HELDOUT_TIMES) for index in range(HELDOUT_TIMES - 1)}
        with open(self.job.partial / LOG, "ab") as log:
            log.truncate(self.log_bytes)
            resumed, started = self.seconds, time.monotonic()
            saved = started
            while self.step < settings.steps:
                rate = settings.rate(self.step)
                loss = self._update(rate)
                self.step += 1
                if not math.isfinite(loss):
                    raise KbitError(
                        f"the loss is {loss} at step {self.step}: delete {self.job.partial} and begin again with a "
                        f"--learning-rate below {settings.learning_rate}"
                    )
                row: dict[str, float] = {"step": self.step, "loss": loss, "learning_rate": rate}
                heldout = None
                if self.step in measured:
                    heldout = row["heldout"] = heldout_loss(self.model, spread, settings.batch)
                log.write(json.dumps(row).encode() + b"\n")
                now = time.monotonic()
                self.seconds = resumed + now - started
                progress(Step(self.step, loss, self.seconds, heldout))
                asked = stop()
                if asked or now - saved >= self.machine.checkpoint_seconds:
                    self._save(log)
                    saved = time.monotonic()
                if asked and self.step < settings.steps:
                    raise Interrupted(f"stopped after step {self.step}: the same command goes on from there")
            self._flush(log)
        return self._finish()

    def _update(self, rate: float) -> float:
        """One optimizer step; returns the loss before it."""
        settings = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = torch.from_numpy(self.order.windows(self.step * settings.batch, settings.batch))
        batch = batch.to(self.machine.device)
        total = torch.zeros((), device=self.machine.device)
        for part in torch.split(batch, self._rows_at_once()):
            loss = self._autocast_loss(part) * (len(part) / len(batch))
            torch.autograd.backward(loss)
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total.item()

    def _autocast_loss(self, windows: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.machine.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16"):
            return self.loss(windows)

    def _rows_at_once(self) -> int:
        return max(1, LOGITS_BYTES // (8 * self.settings.context * self.job.tokens.vocabulary))

    def _compiled(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """The compiled loss, tried on one batch; the plain one where it does not compile here, which is said."""
        compiled: Callable[[torch.Tensor], torch.Tensor] = torch.compile(self.model.loss, dynamic=False)
        self.loss = compiled
        rows = min(self.settings.batch, self._rows_at_once())
        try:
            windows = torch.from_numpy(self.order.windows(0, rows)).to(self.machine.device)
            torch.autograd.backward(self._autocast_loss(windows))
        except Exception as error:  # of many kinds: no compiler, no Triton, an operation it does not know
            reason = str(error).strip().partition("\n\n")[0]  # then come hints for those who debug torch
            self.say(f"torch.compile does not work here, training without it: {one_line(reason or error)}")
            return self.model.loss
        finally:
            self.optimizer.zero_grad()
        return compiled

    def _resume(self) -> None:
        path = self.job.partial / CHECKPOINT
        if not path.exists():
            return
        try:
            state = torch.load(path, map_location=self.machine.device, weights_only=True)
        except Exception as error:  # whatever a damaged file makes of unpickling
            raise KbitError(f"{path} cannot be read ({one_line(error)}): delete it to begin again") from None
        differ = differences(self.settings.to_dict(), state.get("settings") if isinstance(state, dict) else None)
        if differ:
            raise UsageError(f"{self.job.partial} is another run's: {differ}: give those, or delete it")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.log_bytes = state["step"], state["seconds"], state["log_bytes"]
        log = self.job.partial / LOG
        if not log.exists() or log.stat().st_size < self.log_bytes:
            raise KbitError(f"{log} is shorter than when {path.name} was written: delete {path} to begin again")
        self.say(f"{self.job.folder.name}: going on after step {self.step} of {self.settings.steps}")

    def _flush(self, log: IO[bytes]) -> None:
        log.flush()
        os.fsync(log.fileno())
        self.log_bytes = log.tell()

    def _save(self, log: IO[bytes]) -> None:
        self._flush(log)
        state = {
            "settings": self.settings.to_dict(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "log_bytes": self.log_bytes,
        }
        path = self.job.partial / CHECKPOINT
        temporary = path.with_name(path.name + ".tmp")
        try:
            with temporary.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:  # torch's writer may raise either for a full disk
            temporary.unlink(missing_ok=True)
            raise KbitError(
                f"{path}: cannot be written: {one_line(error)}; the one before it is still there"
            ) from error
        os.replace(temporary, path)
        fsync_folder(path.parent)

    def _finish(self) -> dict[str, Any]:
        job, settings = self.job, self.settings
        tensors = exported(self.model.state_dict(), settings.shape.layers)
        for name, tensor in tensors.items():
            if not bool(torch.isfinite(tensor).all()):
                raise KbitError(f"{name} has values beyond float16: train again with a lower --learning-rate")
        self.model.half().float()  # the held-out loss is that of the weights as stored
        every = heldout_windows(job.tokens.heldout, settings.context, None)
        record = {
            "non_embedding_parameters": settings.shape.non_embedding_parameters,
            "training_tokens": settings.tokens,
            "heldout_nll_per_token": heldout_loss(self.model, every, settings.batch),
            "heldout_tokens": every.shape[0] * (settings.context - 1),
            "heldout": list(job.tokens.heldout_names),
            "corpus": job.corpus_name,
            "corpus_tokens": len(job.tokens.training),
            "context": settings.context,
            "minutes": self.seconds / 60,
            "device": self.machine.device.type,
            "torch": torch.__version__,
            "settings": settings.to_dict(),
        }
        tokenizer_config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": job.tokens.separator,
            "eos_token": job.tokens.separator,
            "model_max_length": settings.context,
        }
        config = settings.shape.config(job.tokens.vocabulary, settings.context, job.tokens.separator_id)
        model = job.partial / "model"
        shutil.rmtree(model, ignore_errors=True)
        model.mkdir()
        write_durably(model / "model.safetensors", save(tensors, metadata={"format": "pt"}))
        write_durably(model / "tokenizer.json", job.tokens.tokenizer_json)
        write_durably(model / "tokenizer_config.json", _json(tokenizer_config))
        write_durably(model / LOG, (job.partial / LOG).read_bytes())
        write_durably(model / TRAINING, _json(record))
        write_durably(model / "config.json", _json(config))
        fsync_folder(model)
        os.rename(model, job.folder)
        fsync_folder(job.folder.parent)
        return record


def heldout_windows(texts: tuple[NDArray[np.int64], ...], context: int, most: int | None) -> NDArray[np.int64]:
    """Windows as `kbit eval --convention gptq` cuts them: of `context` tokens, not overlapping; int64 (W, context).

    Args:
        texts: each cut by itself, its tail dropped.
        most: take so many, evenly spread; None for all.

    Raises:
        UsageError: every text is shorter than a window.
    """
    windows = [text[start : start + context] for text in texts for start in range(0, len(text) - context + 1, context)]
    if not windows or context < 2:
        raise UsageError(f"the held-out text is shorter than a window of {max(2, context)} tokens: hold out more of it")
    if most is not None and len(windows) > most:
        windows = [windows[index] for index in np.linspace(0, len(windows) - 1, most).round().astype(int)]
    return np.stack(windows)


@torch.no_grad()
def heldout_loss(model: Llama, windows: NDArray[np.int64], batch: int) -> float:
    """Mean loss in nats per token, each predicted from those before it in its window, in float32."""
    device = model.embedding.weight.device
    total = 0.0
    for part in torch.split(torch.from_numpy(windows).to(device), batch):
        losses = functional.cross_entropy(model(part[:, :-1]).flatten(0, 1), part[:, 1:].flatten(), reduction="none")
        total += losses.double().sum().item()
    return total / float(windows[:, 1:].size)


@contextmanager
def _lock(partial: Path) -> Iterator[None]:
    """Keep a second process from training the same model."""
    partial.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{partial}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise KbitError(f"{partial}: another process is training this: wait for it or stop it") from None
    try:
        yield
    finally:
        # Removed while still held: afterwards it could be another process's. (Windows removes it on release.)
        with suppress(OSError):
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


@contextmanager
def _errors_of(folder: Path) -> Iterator[None]:
    """What the system refuses (a full disk, no permission), as an error a user can act on."""
    try:
        yield
    except OSError as error:
        raise KbitError(f"{error.filename or folder}: {error.strerror or error}") from error


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=1).encode()
