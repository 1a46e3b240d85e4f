"""How long conversion takes and how much memory, beside reading and writing the same file once.

    pytest benchmarks/test_convert.py -s

The model is the default one (without it, novels-5m of the data folder). Time is of opening, planning, quantizing,
writing, hashing and moving into place; memory is the peak of a whole `kbit quantize` process, torch included (some 350
MB of it are the interpreter and libraries).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
from measuring import ROUNDS, Contestant, report, take_turns
from peers import wait_for

FORMATS = ("int4-b64", "nf4-b64", "int8-b64", "lloyd4-b64")
BITS = (4, 8)


def files_of(path: Path) -> list[Path]:
    """The weights of a model: its file, or the files of its folder."""
    return [path] if path.is_file() else sorted(path.glob("*.safetensors"))


def test_speed(benchmark: Any, subject: tuple[str, Path], tmp_path: Path) -> None:
    """Seconds of a conversion to each format, in turns with a copy of the file."""
    from kbit.formats.quant_format import QuantFormat
    from kbit.models.opening import open_model
    from kbit.quantizers.convert import convert
    from kbit.quantizers.plan import make_plan

    name, path = subject
    out = tmp_path / "out"

    def copy() -> float:
        begin = perf_counter()
        for file in files_of(path):
            shutil.copyfile(file, tmp_path / "copy")
        return perf_counter() - begin

    def conversion(format: str) -> float:
        shutil.rmtree(out, ignore_errors=True)
        begin = perf_counter()
        with open_model(str(path)) as source:
            convert(source, make_plan(source, QuantFormat.parse(format)), out)
        return perf_counter() - begin

    with open_model(str(path)) as source:
        plan = make_plan(source, QuantFormat.parse(FORMATS[0]))
        weights = sum(tensor.source.numel for tensor in plan.tensors if tensor.format)
    contestants = [
        Contestant("kbit", f"to {format}", lambda format=format: conversion(format), {"format": format}, format)
        for format in FORMATS
    ]
    control = Contestant("file", "copying the file", copy)
    take_turns(benchmark, [control, *contestants], min(ROUNDS, 2), warm_up=False)
    for contestant in contestants:
        contestant.about["million_weights_per_s"] = weights / contestant.median / 1e6
    report(
        benchmark,
        "conversion",
        "seconds",
        contestants,
        higher_is_better=False,
        columns={"million_weights_per_s": ".0f"},
        controls=[control],
        model=name,
        file_MB=sum(file.stat().st_size for file in files_of(path)) / 1e6,
        million_weights=weights / 1e6,
    )


@pytest.mark.skipif(not hasattr(os, "wait4"), reason="this system does not tell a process's peak memory")
def test_memory(benchmark: Any, subject: tuple[str, Path], tmp_path: Path) -> None:
    """Peak resident memory and time of the whole command, in a process of its own."""
    name, path = subject
    seconds: dict[int, float] = {}

    def command(bits: int) -> float:
        words = [
            "-m",
            "kbit.cli.main",
            "quantize",
            str(path),
            "--bits",
            str(bits),
            "--method",
            "rtn",
            "-o",
            str(tmp_path / "out"),
        ]
        begin = perf_counter()
        with tempfile.TemporaryFile("w+") as errors:
            # cwd: a checkout's own kbit/ must not shadow the installed package.
            process = subprocess.Popen(
                [sys.executable, *words, "--force"], stdout=subprocess.DEVNULL, stderr=errors, cwd=tmp_path
            )
            peak = wait_for(process, peak=True)
            errors.seek(0)
            assert process.returncode == 0, errors.read()
        seconds[bits] = perf_counter() - begin
        return peak / 1e6

    contestants = [
        Contestant("kbit", f"kbit quantize --bits {bits}", lambda bits=bits: command(bits), {"bits": bits}, str(bits))
        for bits in BITS
    ]
    take_turns(benchmark, contestants, 1, warm_up=False)
    for contestant in contestants:
        contestant.about["seconds"] = seconds[contestant.about["bits"]]
    report(
        benchmark,
        "memory of conversion",
        "MB at the peak",
        contestants,
        higher_is_better=False,
        columns={"seconds": ".1f"},
        goal="about half a gigabyte, whatever the model's size",
        model=name,
    )
