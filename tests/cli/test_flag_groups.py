"""Commands that take dataclasses of flags: defaults of their own, order, and a mistake that shows at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from kbit.cli.flag_groups import flag_groups


@dataclass(frozen=True)
class Sampling:
    temperature: Annotated[float, typer.Option("--temperature", help="Of the group.")] = 0.0
    seed: Annotated[int | None, typer.Option("--seed")] = None


@dataclass(frozen=True)
class Engine:
    device: Annotated[str, typer.Option("--device")]


def app_of(seen: list[object]) -> typer.Typer:
    app = typer.Typer()

    @app.command()
    @flag_groups(temperature=0.7)
    def chat(name: Annotated[str, typer.Argument()], *, sampling: Sampling, engine: Engine, loud: bool = False) -> None:
        """Says something."""
        seen.extend([name, sampling, engine, loud])

    return app


def test_a_command_is_called_with_its_groups() -> None:
    seen: list[object] = []
    result = CliRunner().invoke(app_of(seen), ["x", "--device", "cpu", "--seed", "3", "--loud"])
    assert result.exit_code == 0, result.output
    assert seen == ["x", Sampling(0.7, 3), Engine("cpu"), True]


def test_a_flag_without_default_is_required() -> None:
    assert CliRunner().invoke(app_of([]), ["x"]).exit_code == 2


def test_flags_stand_where_their_group_does() -> None:
    shown = CliRunner().invoke(app_of([]), ["--help"]).output
    places = [shown.index(flag) for flag in ("--temperature", "--seed", "--device", "--loud")]
    assert places == sorted(places)
    assert "Says something." in shown
    assert "Of the group." in shown


def test_a_default_for_no_flag_is_a_mistake() -> None:
    with pytest.raises(TypeError, match=r"takes no flag group with top_k"):

        @flag_groups(top_k=3)
        def chat(*, sampling: Sampling) -> None: ...
