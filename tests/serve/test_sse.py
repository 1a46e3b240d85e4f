"""Streams of events over a stand-in for the network: what is written at once, and readers that leave or take nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from kbit.host.errors import UsageError
from kbit.serve import sse
from kbit.serve.sse import EventStream


class Reader:
    """One end of a connection.

    Attributes:
        bodies: what was written, piece by piece.
        left: the reader is gone.
        takes: whether it takes what is written.
    """

    def __init__(self, *, takes: bool = True) -> None:
        self.bodies: list[bytes] = []
        self.complete = False
        self.left = asyncio.Event()
        self.takes = takes

    async def receive(self) -> dict[str, Any]:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.body":
            if not self.takes:
                await asyncio.Event().wait()
            self.bodies.append(message["body"])
            self.complete = not message["more_body"]

    async def read(self, stream: EventStream) -> None:
        await stream({"type": "http"}, self.receive, self.send)


class Steps:
    """Objects that come in steps, each when it is let; whether they were closed."""

    def __init__(self, *steps: list[int]) -> None:
        self.steps = steps
        self.next = asyncio.Semaphore(0)
        self.closed = False

    async def objects(self) -> AsyncIterator[dict[str, Any]]:
        try:
            for step in self.steps:
                await self.next.acquire()
                for each in step:
                    yield {"n": each}
        finally:
            self.closed = True


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_a_step_is_one_write() -> None:
    async def run() -> None:
        steps, reader = Steps([1, 2, 3], [4]), Reader()
        reading = asyncio.ensure_future(reader.read(EventStream(steps.objects())))
        for _ in range(2):
            steps.next.release()
            await settled()
        await reading
        assert reader.bodies[0] == b'data: {"n":1}\n\ndata: {"n":2}\n\ndata: {"n":3}\n\n'
        assert b"".join(reader.bodies[1:]) == b'data: {"n":4}\n\ndata: [DONE]\n\n'
        assert reader.complete
        assert steps.closed

    asyncio.run(run())


def test_who_leaves_is_noticed_between_steps() -> None:
    async def run() -> None:
        steps, reader = Steps([1], [2]), Reader()
        reading = asyncio.ensure_future(reader.read(EventStream(steps.objects())))
        steps.next.release()
        await settled()
        reader.left.set()
        await settled()
        assert reading.done()
        assert steps.closed
        assert reader.bodies == [b'data: {"n":1}\n\n']

    asyncio.run(run())


def test_who_takes_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "_SLOWEST_SECONDS", 0.01)

    async def run() -> None:
        steps, reader = Steps([1], [2]), Reader(takes=False)
        steps.next.release()
        await reader.read(EventStream(steps.objects()))
        assert steps.closed
        assert not reader.complete

    asyncio.run(run())


def test_who_is_far_behind_is_left_sooner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "_MOST_WAITING", 30)
    monkeypatch.setattr(sse, "_SLOW_SECONDS", 0.0)

    async def run(size: int) -> tuple[bool, bool]:
        steps, reader = Steps([1], [2] * size, [3]), Reader(takes=False)
        reading = asyncio.ensure_future(reader.read(EventStream(steps.objects())))
        for _ in range(2):
            steps.next.release()
            await settled()
            await asyncio.sleep(0.001)
        left = reading.done(), steps.closed
        reading.cancel()
        await asyncio.wait([reading])
        return left

    assert asyncio.run(run(1)) == (False, False)  # 13 bytes wait
    assert asyncio.run(run(4)) == (True, True)


def test_what_is_large_is_written_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a reader who takes it slowly is seen to take it."""
    monkeypatch.setattr(sse, "_WRITE", 16)

    async def run() -> None:
        steps, reader = Steps([1, 2, 3]), Reader()
        steps.next.release()
        await reader.read(EventStream(steps.objects()))
        assert all(0 < len(body) <= 16 for body in reader.bodies)
        assert b"".join(reader.bodies).endswith(b'data: {"n":3}\n\ndata: [DONE]\n\n')
        assert reader.complete

    asyncio.run(run())


def test_a_failure_is_the_last_event() -> None:
    async def objects() -> AsyncIterator[dict[str, Any]]:
        yield {"n": 1}
        raise UsageError("--seed -1: expected a whole number")

    async def run() -> None:
        reader = Reader()
        await reader.read(EventStream(objects()))
        text = b"".join(reader.bodies).decode()
        assert text.startswith('data: {"n":1}\n\ndata: {"error":{"message":"seed -1: expected a whole number"')
        assert text.endswith("data: [DONE]\n\n")
        assert reader.complete

    asyncio.run(run())
