"""`kbit serve --speculate`: the answers of a server without it, and figures that say what held."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from error_cases import run_command
from serve_cases import serving

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


def test_a_model_without_low_planes_is_refused(novels_folder: str) -> None:
    code, _, error = run_command(["serve", novels_folder, "--speculate", "self", "--port", "0", "--threads", "1"])
    assert code == 2
    assert "has no width below the one it runs at; make a model of several with kbit quantize --nested" in error
