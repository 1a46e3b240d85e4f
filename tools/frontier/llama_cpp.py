"""llama.cpp's types as points of the frontier: quantized with an importance matrix, and dequantized again by itself.

The same evaluator runs them as runs kbit's models, on their dequantized weights in float32: what is compared is the
rounding, not the arithmetic. Embedding and head stay as they are, as in kbit's points.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from frontier.gguf_file import write_gguf
from frontier.subjects import Subject, calibration_text
from kbit.host.errors import KbitError
from kbit.models.opening import open_model

TYPES = ("IQ2_XXS", "IQ2_S", "Q2_K", "IQ3_XXS", "IQ3_S", "Q3_K_M", "IQ4_XS", "Q4_K_S", "Q4_K_M", "Q5_K_M", "Q6_K")
_CHARACTERS = 400_000
_TOOLS = ("llama-quantize", "llama-imatrix")


class LlamaCpp:
    """The tools, and a model's files.

    Args:
        tools: folder of the programs.
        work: folder for files; they are kept, and made again only where they are missing.
        subject: the model.

    Raises:
        KbitError: a program is missing.
    """

    def __init__(self, tools: Path, work: Path, subject: Subject) -> None:
        missing = [tool for tool in _TOOLS if not (tools / tool).is_file()]
        if missing:
            raise KbitError(f"{tools} has no {', '.join(missing)}: python tools/peers/install.py llama.cpp builds them")
        self._tools, self._subject = tools, subject
        self._folder = work / subject.name
        self._folder.mkdir(parents=True, exist_ok=True)

    def original(self) -> Path:
        """The model as it is, in float32: what all types are made from."""
        out = self._folder / "original-F32.gguf"
        if not out.is_file():
            if Path(self._subject.path).is_dir():
                write_gguf(self._subject.path, out)
            else:
                with open_model(self._subject.path) as source:
                    path = source.path
                self._quantize([], path, out, "F32")
        return out

    def quantized(self, kind: str) -> Path:
        """The model in a type, with its importance matrix."""
        out = self._folder / f"{kind}.gguf"
        if not out.is_file():
            keep = ["--token-embedding-type", "f32", "--output-tensor-type", "f32"]
            self._quantize(["--imatrix", str(self._importance()), *keep], self.original(), out, kind)
        return out

    def dequantized(self, kind: str) -> Path:
        """The same weights in float32."""
        out = self._folder / f"{kind}-F32.gguf"
        if not out.is_file():
            self._quantize([], self.quantized(kind), out, "F32")
        return out

    def linear_bits(self, kind: str) -> tuple[int, dict[str, int]]:
        """Bits that the linear layers take, and how many are of which type: llama.cpp mixes types, and falls back."""
        import gguf

        bits, kinds = 0, dict[str, int]()
        for tensor in gguf.GGUFReader(self.quantized(kind)).tensors:
            if tensor.name.startswith("blk.") and len([size for size in tensor.shape if size > 1]) == 2:
                bits += 8 * int(tensor.n_bytes)
                kinds[tensor.tensor_type.name] = kinds.get(tensor.tensor_type.name, 0) + 1
        return bits, kinds

    def _importance(self) -> Path:
        out = self._folder / "imatrix.gguf"
        if not out.is_file():
            text = self._folder / "calibration.txt"
            text.write_text(calibration_text(self._subject, _CHARACTERS))
            context = min(512, self._subject.context)
            words = [
                "-m",
                self.original(),
                "-f",
                text,
                "-o",
                out,
                "-c",
                context,
                "--chunks",
                self._subject.chunks,
                "--no-ppl",
            ]
            self._run("llama-imatrix", words)
        return out

    def _quantize(self, options: list[str], given: Path, out: Path, kind: str) -> None:
        partial = out.with_suffix(".partial")
        self._run("llama-quantize", ["--allow-requantize", *options, given, partial, kind])
        partial.replace(out)

    def _run(self, tool: str, words: list[Any]) -> None:
        """
        Raises:
            KbitError: it failed; with the end of what it said.
        """
        done = subprocess.run([str(self._tools / tool), *map(str, words)], capture_output=True, text=True, check=False)
        (self._folder / f"{tool}.log").write_text(done.stdout + done.stderr)
        if done.returncode:
            tail = "\n    ".join((done.stdout + done.stderr).splitlines()[-8:])
            raise KbitError(f"{tool} failed with exit code {done.returncode}:\n    {tail}")
