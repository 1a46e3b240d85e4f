"""`kbit serve --speculate`: the answers of a server without it, and figures that say what held."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from error_cases import run_command
from serve_cases import error_of, serving

from kbit.host.notes import KbitNote

PROMPT = "The cat sat on the mat. The dog sat on the mat. The bird sat on"


def test_answers_are_those_without(novels_folder: str) -> None:
    bodies: list[dict[str, Any]] = [
        {"prompt": PROMPT * 2, "max_tokens": 40, "temperature": 0},
        {"prompt": PROMPT, "max_tokens": 40, "temperature": 0.5, "seed": 7, "n": 3, "logprobs": 2},
        {"prompt": "1", "max_tokens": 30, "temperature": 0, "regex": "1( 2 3 4){8}"},
    ]
    found: list[list[Any]] = []
    for speculate in (None, "ngram"):
        with serving(("novels", Path(novels_folder)), speculate=speculate) as client:
            answers = [client.post("/v1/completions", json={"model": "novels", **body}) for body in bodies]
            assert [answer.status_code for answer in answers] == [200, 200, 200]
            found.append([answer.json()["choices"] for answer in answers])
            metrics = client.get("/metrics").text
            drafted, accepted = (
                float(re.search(rf"kbit:spec_decode_num_{what}_tokens_total{{.*}} (.+)", metrics)[1])  # type: ignore[index]
                for what in ("draft", "accepted")
            )
            assert (drafted >= accepted > 0) == (speculate is not None)
    assert found[0] == found[1]


def test_widths_of_one_file_answer_as_alone_and_the_narrowest_without_guesses(
    novels_folder: str, tmp_path: Path
) -> None:
    """At once and under load; --speculate self leaves out who has no width below, and says so."""
    folder = tmp_path / "all"
    command = ["quantize", novels_folder, "--nested", "2..4", "--method", "rtn", "-o", str(folder)]
    assert run_command(command)[0] == 0
    named = [(name, Path(f"{folder}{width}")) for name, width in (("four", ""), ("three", ":3"), ("two", ":2"))]

    def body(name: str, place: int) -> dict[str, Any]:
        return {
            "model": name,
            "prompt": PROMPT[place:] + PROMPT,
            "max_tokens": 24,
            "temperature": 0.5 * (place % 2),
            "seed": 3,
        }

    asked = [body(name, place) for place in range(4) for name, _ in named]
    with serving(*named, ("nine", Path(f"{folder}:9"))) as client:
        wrong = error_of(client.post("/v1/completions", json=body("nine", 0)), 400)
        assert "serves 2 to 4 bits; choose one of these" in wrong["message"]
        alone = [client.post("/v1/completions", json=each).json()["choices"][0]["text"] for each in asked]
    assert len({alone[place] for place in range(3)}) == 3
    with serving(*named, speculate="self") as client, ThreadPoolExecutor(6) as pool:
        with pytest.warns(KbitNote, match="two is served without guesses: --speculate self: .* has no width below"):
            error = client.post("/v1/completions", json=asked[2])
        assert error.status_code == 200
        answers = pool.map(lambda each: client.post("/v1/completions", json=each), asked)
        assert [answer.json()["choices"][0]["text"] for answer in answers] == alone


def test_a_model_without_low_planes_is_refused(novels_folder: str) -> None:
    code, _, error = run_command(["serve", novels_folder, "--speculate", "self", "--port", "0", "--threads", "1"])
    assert code == 2
    assert "has no width below the one it runs at; make a model of several with kbit quantize --nested" in error
