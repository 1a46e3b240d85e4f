"""What tuning has found: who prefers it, and the file that keeps it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tune_cases import ARCH, DECODE, MANY, PREFILL, SQUARE, TARGET, other_than_default
from tune_cases import own_cache as own_cache

from kbit.host.errors import KbitError
from kbit.kernels.triton.attention import configs as attention_configs
from kbit.kernels.triton.product import configs
from kbit.kernels.triton.product.configs import GemmConfig
from kbit.tuning.stored import MAX_BYTES, DecodeProblem, Entry, choices, default_config, install, load, save, target_of

pytestmark = pytest.mark.usefixtures("one_thread")

PROBLEMS = {"gemv": SQUARE, "gemm": MANY, "decode": DECODE, "prefill": PREFILL}


def entries_for(problems: dict[str, Any] = PROBLEMS) -> dict[Any, Entry]:
    return {
        (kernel, problem): Entry(kernel, problem, other_than_default(kernel, problem), 1e-5, 2e-5)
        for kernel, problem in problems.items()
    }


class TestChoosers:
    def test_prefer_what_is_installed(self) -> None:
        before = configs.gemv_config(ARCH, SQUARE), configs.gemm_config(ARCH, MANY)
        install(TARGET, entries_for())
        assert configs.gemv_config(ARCH, SQUARE) == other_than_default("gemv", SQUARE) != before[0]
        assert configs.gemm_config(ARCH, MANY) == other_than_default("gemm", MANY) != before[1]
        assert attention_configs.decode_config(ARCH, 128, 4, 4, 16) == other_than_default("decode", DECODE)
        assert attention_configs.prefill_config(ARCH, 128, 4, 4) == other_than_default("prefill", PREFILL)

    def test_fall_back_to_the_table(self) -> None:
        """Another architecture, size, format, element, or gating is another problem."""
        install(TARGET, entries_for())
        for changes in ({"rows": 2048}, {"format": "int4-b64"}, {"element_size": 4}, {"gated": True}):
            problem = replace(SQUARE, **changes)
            assert configs.gemv_config(ARCH, problem) == default_config("gemv", ARCH, problem)
        assert configs.gemv_config("sm_80", SQUARE) == default_config("gemv", "sm_80", SQUARE)
        assert attention_configs.decode_config(ARCH, 64, 4, 4, 16) == default_config(
            "decode", ARCH, DecodeProblem(64, 4, 4, 16)
        )

    def test_tokens_are_rounded_up(self) -> None:
        few, many = GemmConfig(4, 16, 64, 1, 4, 2), GemmConfig(8, 256, 64, 1, 8, 4)
        assert {few, many} <= {*choices("gemm", ARCH, replace(MANY, tokens=1024))}
        at = {16: few, 64: few, 256: many, 1024: many}
        problems = {("gemm", replace(MANY, tokens=tokens)): config for tokens, config in at.items()}
        install(TARGET, {key: Entry(*key, config, 1e-5, None) for key, config in problems.items()})

        def chosen(tokens: int) -> GemmConfig:
            config: GemmConfig = configs.gemm_config(ARCH, replace(MANY, tokens=tokens))
            return config

        assert chosen(9) == chosen(16) == few
        assert chosen(5) == few  # 16 tokens are the smallest tile there is
        assert chosen(20) == few  # as for 64, whose tile is not too large
        assert chosen(129) == chosen(256) == chosen(5000) == many
        # 128 tokens were not timed, and the tile of 256 would be half empty.
        assert chosen(100) == default_config("gemm", ARCH, replace(MANY, tokens=100)) != many

    def test_the_default_is_not_what_is_installed(self) -> None:
        before = choices("decode", ARCH, DECODE)
        install(TARGET, entries_for())
        assert choices("decode", ARCH, DECODE) == before
        assert default_config("gemv", ARCH, SQUARE) != configs.gemv_config(ARCH, SQUARE)

    def test_installing_again_replaces(self) -> None:
        install(TARGET, entries_for())
        install(TARGET, {})
        assert configs.gemv_config(ARCH, SQUARE) == default_config("gemv", ARCH, SQUARE)

    @pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx90a", "gfx942", "gfx1100", "gfx1201"])
    def test_choices_keep_what_accuracy_needs(self, arch: str) -> None:
        for kernel, problem in (("decode", replace(DECODE, rows=32)), ("prefill", PREFILL)):
            default, *others = choices(kernel, arch, problem)
            assert default == default_config(kernel, arch, problem)
            assert {(config.p_log2, config.scale_tiles, config.waves) for config in others} == {
                (default.p_log2, default.scale_tiles, default.waves)
            }
        assert {config.warps for config in choices("decode", arch, replace(DECODE, rows=32))} == {2}
        assert {config.split for config in choices("gemm", arch, replace(MANY, tokens=16, gated=True))} == {1}


class TestFile:
    def test_round_trip(self) -> None:
        entries = entries_for()
        path = save(TARGET, entries)
        assert path == TARGET.path
        assert path.name == "NVIDIA-H100-80GB-HBM3-sm_90-triton-3.7.1-abababababab.json"
        assert load(TARGET) == entries
        assert [item.name for item in path.parent.iterdir()] == [path.name]  # nothing half-written

    def test_no_file_says_nothing(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert load(TARGET) == {}
        assert capsys.readouterr().err == ""

    def test_names_stay_in_the_folder(self, own_cache: Path) -> None:
        for name in ("../../../etc/x", "a/b\\c\0d", "", "." * 300, "Größe"):
            assert replace(TARGET, gpu=name).path.parent == own_cache / "tuned"
            assert len(replace(TARGET, gpu=name).path.name) < 200

    def test_the_kernels_are_part_of_the_name(self, device: str) -> None:
        target = target_of(torch.device(device))
        assert len(target.kernels) == 64
        assert target.kernels[:12] in target.path.name

    @pytest.mark.parametrize(
        ("damage", "reason"),
        [
            (lambda content: "", "Expecting value"),
            (lambda content: json.dumps(content)[:-20], "delimiter|Expecting|Unterminated"),
            (lambda content: "\ufffe", "Expecting value"),
            (lambda content: "[" * 100_000, "recursion|nest|Expecting"),
            (lambda content: " " * (MAX_BYTES + 1), "more than 4 MiB"),
            (lambda content: "[]", "object was expected"),
            (lambda content: json.dumps({**content, "version": 2}), "it is for version 2, not 1"),
            (lambda content: json.dumps({**content, "gpu": "other\x1b[2J"}), "it is for gpu other"),
            (lambda content: json.dumps({**content, "kernels": "00"}), "it is for kernels 00"),
            (lambda content: json.dumps({"version": 1}), "no 'gpu'"),
            (lambda content: json.dumps({**content, "entries": {}}), "a list of at most"),
            (lambda content: json.dumps({**content, "entries": [0] * 10_001}), "a list of at most"),
            (lambda content: json.dumps({**content, "entries": [[]]}), "no known kernel"),
            (lambda content: json.dumps({**content, "entries": [{"kernel": "os.system"}]}), "no known kernel"),
            (lambda content: json.dumps({**content, "entries": [{"kernel": []}]}), "unhashable|no known kernel"),
        ],
    )
    def test_damage_is_ignored_with_one_warning(
        self, capsys: pytest.CaptureFixture[str], damage: Callable[[dict[str, Any]], str], reason: str
    ) -> None:
        path = save(TARGET, entries_for())
        path.write_text(damage(json.loads(path.read_text())), encoding="utf-8")
        self.assert_ignored(path, reason, capsys)

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("config.warps", 3),
            ("config.warps", "4"),
            ("config.warps", True),
            ("config.split", 10**30),
            ("config.columns", -64),
            ("config.columns", 1 << 20),
            ("config.num_ctas", 2),
            ("problem.tokens", 0),
            ("problem.columns", 65),
            ("problem.rows", 1e9),
            ("problem.bits", 9),
            ("problem.format", "x" * 1000),
            ("problem.gated", 1),
            ("problem", []),
            ("seconds", float("nan")),
            ("seconds", -1),
            ("default_seconds", "soon"),
        ],
    )
    def test_hostile_values_are_ignored(self, capsys: pytest.CaptureFixture[str], field: str, value: object) -> None:
        path = save(TARGET, entries_for({"gemv": SQUARE}))
        content = json.loads(path.read_text())
        place, *rest = field.split(".")
        if rest:
            content["entries"][0][place][rest[0]] = value
        else:
            content["entries"][0][place] = value
        path.write_text(json.dumps(content))
        self.assert_ignored(path, "", capsys)

    def test_a_folder_in_its_place(self, capsys: pytest.CaptureFixture[str]) -> None:
        TARGET.path.mkdir(parents=True)
        self.assert_ignored(TARGET.path, "directory|denied", capsys)

    def test_no_cache_folder(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def none() -> Path:
            raise KbitError("there is no home folder")

        monkeypatch.setattr("kbit.tuning.stored.cache_dir", none)
        assert load(TARGET) == {}

    @staticmethod
    def assert_ignored(path: Path, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
        import re

        assert load(TARGET) == {}
        error = capsys.readouterr().err
        assert error.startswith(f"kbit: warning: {path} is ignored: ")
        assert error.count("\n") == 1
        assert "\x1b" not in error.replace(str(path), "")
        assert len(error) < 600
        assert re.search(reason, error), error
