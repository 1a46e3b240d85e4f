"""`kbit.quantize`: the bytes of `kbit quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conversion_cases import files_of
from encoder_cases import model_of, saved
from error_cases import run_command

import kbit


@pytest.mark.parametrize(
    ("settings", "flags"),
    [
        ({"method": "rtn", "bits": 3}, ["--method", "rtn", "--bits", "3"]),
        (
            {"format": "int4-b16", "method": "rtn", "override": {"*.down_proj.weight": "nf3-b16"}},
            ["--format", "int4-b16", "--method", "rtn", "--override", "*.down_proj.weight=nf3-b16"],
        ),
        (
            {"bits": 3.5, "calibration_tokens": 2048, "embedding_bits": 8},
            ["--bits", "3.5", "--calibration-tokens", "2048", "--embedding-bits", "8", "--no-measure"],
        ),
    ],
)
def test_the_bytes_are_those_of_the_command(
    tmp_path: Path, small_model: Path, settings: dict[str, Any], flags: list[str]
) -> None:
    code, _, error = run_command(["quantize", str(small_model), "-o", str(tmp_path / "told"), *flags])
    assert code == 0, error
    steps: list[tuple[str, int, int]] = []
    made = kbit.quantize(small_model, tmp_path / "made", progress=lambda *step: steps.append(step), **settings)
    assert files_of(made.path) == files_of(tmp_path / "told")
    assert made.nbytes == sum(path.stat().st_size for path in made.path.glob("*.safetensors"))
    assert {"quantizing"} <= {what for what, _, _ in steps}
    assert made.formats
    assert not made.already_complete
    assert kbit.quantize(small_model, tmp_path / "made", **settings).already_complete


def test_what_is_in_the_way_or_wrong(tmp_path: Path, small_model: Path) -> None:
    kbit.quantize(small_model, tmp_path / "out", bits=4, method="rtn")
    with pytest.raises(kbit.UsageError, match="already holds a finished model"):
        kbit.quantize(small_model, tmp_path / "out", bits=3, method="rtn")
    assert kbit.quantize(small_model, tmp_path / "out", bits=3, method="rtn", force=True).formats
    with pytest.raises(kbit.UsageError, match="already quantized by kbit"):
        kbit.quantize(tmp_path / "out", tmp_path / "again", method="rtn")
    with pytest.raises(kbit.UsageError, match="--bits 9.5: use 2 to 8"):
        kbit.quantize(small_model, tmp_path / "again", bits=9.5)


def test_the_loss_is_measured_where_asked(tmp_path: Path, small_model: Path) -> None:
    made = kbit.quantize(
        small_model, tmp_path / "out", bits=3, uniform=True, calibration_tokens=2048, measure=True, threads=1
    )
    assert made.method == "ldlq2"
    assert made.measured is not None
    assert made.measured.kl_mean > 0


def test_an_encoder_is_rounded(tmp_path: Path) -> None:
    folder = saved(model_of("Bert"), tmp_path / "bert")
    with pytest.warns(UserWarning, match="an encoder writes no text to calibrate on: method rtn"):
        made = kbit.quantize(folder, tmp_path / "out", bits=8)
    assert made.method == "rtn"
    with kbit.load(folder) as plain, kbit.load(made.path) as small:
        one, other = (each.embed("the cat sat").vectors for each in (plain, small))
    assert 0 < abs(one - other).max() < 0.1 * abs(one).max()
