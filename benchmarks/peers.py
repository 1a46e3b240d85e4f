"""The peers that tools/peers/install.py has installed, and how to run each of them.

A peer that is not there is a MissingPeer, whose text says what installs it: benchmarks name it in their report.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

RUNNERS = Path(__file__).resolve().parent / "runners"
PATIENCE = 600  # seconds that one request to a runner may take


class MissingPeer(Exception):
    """A peer that is not installed, in one line with the command that installs it."""

    def __init__(self, peer: str, why: str = "not installed") -> None:
        super().__init__(f"{peer}: {why}; to install it: python tools/peers/install.py {peer}")


class Peers:
    """What peers.json records."""

    def __init__(self) -> None:
        from kbit.host.cache_folder import cache_dir

        named = os.environ.get("KBIT_PEERS")
        self.folder = Path(named).expanduser().absolute() if named else cache_dir() / "peers"
        record = self.folder / "peers.json"
        self._peers: dict[str, dict[str, Any]] = json.loads(record.read_text()) if record.is_file() else {}

    def path(self, peer: str, name: str) -> Path:
        """A file or folder of a peer.

        Raises:
            MissingPeer: it is not recorded, or gone.
        """
        if peer not in self._peers:
            raise MissingPeer(peer)
        path = self._peers[peer]["paths"].get(name)
        if path is None or not Path(path).exists():
            raise MissingPeer(peer, f"has no {name}")
        return Path(path)

    def version(self, peer: str) -> str:
        return str(self._peers.get(peer, {}).get("version", "missing"))

    def gguf(self, name: str | Path) -> Path:
        """The default model as a GGUF file: F16, Q4_0, Q8_0, Q2_K, Q3_K_M or Q4_0-pure; or a file as it is."""
        return name if isinstance(name, Path) else self.path("gguf", name)

    def tool(self, name: str, variant: str = "native") -> Path:
        """A program of llama.cpp, built natively or ("no-amx") without AMX."""
        return self.path("llama.cpp", variant) / name

    def openvino(self, gguf: str | Path, threads: int) -> Worker:
        """OpenVINO GenAI with a GGUF file."""
        python, model = self.path("openvino", "python"), self.gguf(gguf)
        return Worker([python, RUNNERS / "openvino_runner.py", model, "--threads", threads])

    def onnxruntime(self, bits: int, threads: int) -> Worker:
        """onnxruntime-genai with the ONNX model of 4 or 8 bits."""
        python, model = self.path("onnxruntime", "python"), self.path("onnxruntime", f"int{bits}")
        return Worker([python, RUNNERS / "onnxruntime_runner.py", model, "--threads", threads])

    def requantized(self, gguf: Path, kind: str) -> Path:
        """A GGUF file in another of llama.cpp's formats ("Q4_0"), made by llama-quantize and kept with the peers."""
        size = gguf.stat().st_size
        out = self.folder / "gguf" / f"{gguf.stem}-{size}-{kind}.gguf"
        if not out.is_file():
            quantize = self.tool("llama-quantize")
            out.parent.mkdir(parents=True, exist_ok=True)
            partial = out.with_suffix(".partial")
            _output([quantize, "--allow-requantize", gguf, partial, kind])
            partial.replace(out)
        return out

    def llama_bench(self, gguf: str | Path, threads: int, *options: str, variant: str = "native") -> dict[str, Any]:
        """One run of llama-bench for one test: its JSON object, `avg_ts` in tokens per second among it.

        Args:
            gguf: name of the file, or the file.
            threads: for prompt and decoding.
            options: what to test, for example "-p", "512", "-n", "0".
            variant: which build.

        Raises:
            RuntimeError: it failed, or ran several tests.
        """
        command = [self.tool("llama-bench", variant), "-m", self.gguf(gguf), "-t", threads, "-o", "json", *options]
        results = json.loads(_output(command)[0])
        if len(results) != 1:
            raise RuntimeError(f"{_words(command)}: gave {len(results)} results where one was asked for")
        return dict(results[0])

    def llama_batched_bench(
        self, gguf: str | Path, threads: int, batches: Sequence[int], tokens: int
    ) -> dict[int, float]:
        """Tokens per second of decoding several sequences at once, by their number (llama-batched-bench)."""
        sizes = ["-c", max(batches) * (tokens + 8) + 64, "-npp", 8, "-ntg", tokens, "-npl", ",".join(map(str, batches))]
        command = [self.tool("llama-batched-bench"), "-m", self.gguf(gguf), "-t", threads, "-tb", threads, *sizes]
        lines = _output([*command, "--output-format", "jsonl"])[0].splitlines()
        rows = [json.loads(line) for line in lines if line.startswith("{")]
        return {int(row["pl"]): float(row["speed_tg"]) for row in rows}

    def llama_first_token(self, gguf: str | Path, threads: int, prompt: str) -> dict[str, float]:
        """Seconds from a cold process to its first token: `process` in all, `inside` from opening the model on."""
        options = ["-n", 1, "-no-cnv", "--no-warmup", "--simple-io", "--temp", 0, "-c", 512, "-p", prompt]
        command = [self.tool("llama-completion"), "-m", self.gguf(gguf), "-t", threads, *options]
        begin = perf_counter()
        _, log, _ = _output(command)
        seconds = perf_counter() - begin
        # Its own load time counts from after the loading; the stamps of its log lines do not.
        stamps = [_stamp(log, text) for text in ("load the model", "sampling time")]
        return {"process": seconds, "inside": stamps[1] - stamps[0]}

    def llama_memory(self, gguf: str | Path, threads: int, prompt: int, tokens: int) -> int:
        """Peak resident bytes of llama-bench running a prompt and then decoding; mapped file pages count."""
        options = ["-p", "0", "-n", "0", "-pg", f"{prompt},{tokens}", "-r", "1", "-o", "json"]
        return _output([self.tool("llama-bench"), "-m", self.gguf(gguf), "-t", threads, *options], peak=True)[2]


class Worker:
    """An engine in a process of its own (runners/protocol.py), stopped whenever it is not asked anything.

    Several of them take turns in one run. Stopping (SIGSTOP) makes sure that waiting threads of one, which may spin,
    take nothing from another.

    Attributes:
        ready: what it announced.
    """

    def __init__(self, command: Sequence[object], env: dict[str, str] | None = None) -> None:
        self._words = _words(command)
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed in close)
        # Away from the checkout: its kbit/ has no compiled module and would shadow the installed package.
        self._process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=tempfile.gettempdir(),
            env={**_environment(), **(env or {})},
        )
        self.ready = self._answer()
        self._process.send_signal(signal.SIGSTOP)

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Have it do something.

        Raises:
            RuntimeError: it failed, died, or took longer than PATIENCE.
        """
        self._process.send_signal(signal.SIGCONT)
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        self._process.send_signal(signal.SIGSTOP)
        if "error" in answer:
            raise RuntimeError(f"{self._words}: {do}: {answer['error']}")
        return answer

    def rate(self, do: str, **arguments: Any) -> float:
        """Tokens per second of an action."""
        answer = self.ask(do, **arguments)
        return float(answer["tokens"]) / float(answer["seconds"])

    def close(self) -> None:
        self._process.kill()  # it holds nothing worth saving, and may be stopped
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                stream.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        readable, _, _ = select.select([self._process.stdout], [], [], PATIENCE)
        line = self._process.stdout.readline() if readable else ""
        if line:
            return dict(json.loads(line))
        self._errors.seek(0)
        why = self._errors.read()[-1500:] if readable else f"no answer in {PATIENCE} s"
        self.close()
        raise RuntimeError(f"{self._words}: {why}")


@contextmanager
def busy_process() -> Iterator[None]:
    """One other process that never rests, for as long as the context lasts."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def _environment() -> dict[str, str]:
    """This process's environment, without what would make another Python look for packages here."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}


def wait_for(process: subprocess.Popen[Any], *, peak: bool = False) -> int:
    """Wait for a process to end; its peak resident bytes where they are asked for, else 0.

    On Linux it is asked every 20 ms while it runs. What the system keeps of an ended process (ru_maxrss) begins with
    the size of the process that started it, which here may be the larger.
    """
    most = 0
    status = Path(f"/proc/{process.pid}/status")
    if not peak or not status.exists():
        _, code, usage = os.wait4(process.pid, 0)
        # Linux counts in KiB, macOS in bytes.
        most = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) if peak else 0
        process.returncode = os.waitstatus_to_exitcode(code)
        return most
    while process.poll() is None:
        try:
            found = re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.MULTILINE)
        except OSError:  # ended meanwhile
            break
        most = max(most, int(found[1]) * 1024 if found else 0)
        sleep(0.02)
    process.wait()
    return most


def _output(command: Sequence[object], *, peak: bool = False) -> tuple[str, str, int]:
    """Run a program to its end: standard output, standard error, and (where asked for) its peak resident bytes.

    Raises:
        RuntimeError: it failed.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        words = [str(word) for word in command]
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=out, stderr=errors, env=_environment())
        most = wait_for(process, peak=peak)
        out.seek(0)
        errors.seek(0)
        text, complaints = out.read(), errors.read()
    if process.returncode != 0:
        raise RuntimeError(f"{_words(command)}: exit code {process.returncode}:\n{complaints[-1500:]}")
    return text, complaints, most


def _stamp(log: str, text: str) -> float:
    """Seconds at which llama.cpp logged a line: "0.00.275.677 I ..." is minutes, seconds, milli- and microseconds.

    Raises:
        RuntimeError: there is no such line.
    """
    match = re.search(rf"^(\d+)\.(\d+)\.(\d+)\.(\d+) .*{text}", log, re.MULTILINE)
    if match is None:
        raise RuntimeError(f"llama.cpp logged no line with {text!r}; the end of its log:\n{log[-500:]}")
    minutes, seconds, milli, micro = (int(part) for part in match.groups())
    return 60 * minutes + seconds + milli / 1e3 + micro / 1e6


def _words(command: Sequence[object]) -> str:
    return " ".join(Path(str(word)).name if isinstance(word, Path) else str(word) for word in command)
