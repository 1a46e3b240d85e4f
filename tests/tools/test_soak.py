"""tools/soak.py: a short soak of a real server, and that it notices what is wrong, lost or left behind."""

from __future__ import annotations

import asyncio
import itertools
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture(autouse=True)
def on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))
    pytest.importorskip("uvicorn")
    if sys.platform != "linux":
        pytest.skip("memory is read from /proc")


def test_a_short_soak(novels_folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing wrong, nothing lost, nothing left; memory is not judged in so short a time."""
    import soak

    code = soak.main(
        [novels_folder, "--minutes", "0.1", "--requests", "60", "--clients", "3", "--every", "2", "--checked", "1", "--prompts", "4",
         "--growth", "9"]
    )  # fmt: skip
    said = capsys.readouterr().out
    assert code == 0, said
    rows = re.findall(r"^(\w[\w ]*?) +(\d+) +(\d+) +(\d+) ", said, re.MULTILINE)
    assert len(rows) >= 2
    assert all((wrong, lost) == ("0", "0") for _, _, wrong, lost in rows)
    assert "; 0 left at the end" in said
    assert "resident memory" in said


def test_what_is_wrong_or_lost_is_counted() -> None:
    """A server that answers otherwise than before, breaks a stream off, takes bad JSON, and goes away."""
    from soaking.clients import Ask, Kind, Soak

    ask = Ask("It was", 0, 8, 0.0)
    answers = iter(["a", "b"])

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path != "/v1/completions":
            raise httpx.ConnectError("gone")
        if b'"stream": true' in request.content or b'"stream":true' in request.content:
            return httpx.Response(200, text='data: {"choices": [{"index": 0, "text": "a"}]}\n\n')
        if request.content.startswith(b'{"prompt"') and request.content.endswith(b"}"):
            return httpx.Response(200, json={"choices": [{"index": 0, "text": next(answers)}]})
        return httpx.Response(200, json={})

    async def all_of_it() -> None:
        import random

        tried = Soak("http://x", {ask: [{"index": 0, "text": "a"}]})
        chance = random.Random(0)
        async with httpx.AsyncClient(base_url="http://x", transport=httpx.MockTransport(answer)) as http:
            assert await tried.whole(http, chance) is None
            assert "'b'}] is not" in str(await tried.whole(http, chance))
            assert "the stream ended with" in str(await tried.streamed(http, chance))
            assert str(await tried.bad_json(http, chance)).startswith("200")
            with pytest.raises(httpx.ConnectError):
                await tried.no_route(http, chance)

    asyncio.run(all_of_it())
    kind = Kind()
    for problem, lost in ((None, False), ("other", False), ("gone", True)):
        kind.count(problem, lost, 1.0)
    assert (kind.right, kind.wrong, kind.lost, kind.examples) == (1, 1, 1, ["other", "gone"])


def test_requests_are_paced_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that only sleeping moves."""
    from soaking import clients

    now = [0.0]

    async def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(clients, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(clients, "asyncio", SimpleNamespace(sleep=sleep))

    async def turns(soak: clients.Soak, until: float) -> int:
        count = 0
        while await soak.turn(until):
            count += 1
        return count

    known: dict[clients.Ask, clients.Choices] = {clients.Ask("It was", 0, 8, 0.0): []}
    assert asyncio.run(turns(clients.Soak("http://x", known, rate=4.0), 10.0)) == 40
    assert asyncio.run(turns(clients.Soak("http://x", known, rate=4.0, most=7), 100.0)) == 7


def test_growth_is_counted_once_it_has_settled() -> None:
    import soak

    assert soak.growth([(0.0, 50), (30.0, 100), (60.0, 100), (100.0, 103)]) == pytest.approx(0.03)


def test_a_client_counts_what_a_dead_server_loses(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a hundred looks at a clock that ticks when it is looked at."""
    from soaking import clients

    ticks = itertools.count()
    monkeypatch.setattr(clients, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    tried = clients.Soak("http://127.0.0.1:9", {clients.Ask("It was", 0, 8, 0.0): []})
    asyncio.run(tried.client(0, 100.0))
    # (A body that is too large may end in a broken connection, which is all right.)
    assert sum(kind.lost for kind in tried.kinds.values()) > 0
    assert not any(kind.wrong for kind in tried.kinds.values())
