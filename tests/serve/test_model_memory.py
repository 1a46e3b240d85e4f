"""Models that are loaded on demand, within the memory that there is for all: who makes room, and who does not."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from adapter_cases import shapes_of, write_adapter
from error_cases import run_command
from serve_cases import error_of, serving

from kbit.backends.select import select_backend
from kbit.engine.answers import Request
from kbit.engine.batch_engine import Live
from kbit.host.errors import KbitError
from kbit.serve.errors import ApiError
from kbit.serve.loading import LoadPlan, plan_load, planned_bytes
from kbit.serve.models import ModelOptions, Models, ServedModel

NAMES = ("novels-2m", "novels-0.7m", "novels-5m")
CACHE = 4 << 20


@pytest.fixture(scope="module")
def options(data_dir: Path) -> ModelOptions:
    return ModelOptions(select_backend(threads=1), cache_bytes=CACHE, seats=2)


@pytest.fixture(scope="module")
def named(data_dir: Path) -> list[tuple[str, str]]:
    return [(name, str(data_dir / "models" / name)) for name in NAMES]


@pytest.fixture(scope="module")
def plans(named: list[tuple[str, str]], options: ModelOptions) -> dict[str, LoadPlan]:
    asyncio.run(_load_all(Models(named, options)))  # so that all are prepared
    return {name: plan_load(ServedModel(name, path), options, None) for name, path in named}


async def _load_all(models: Models) -> None:
    for model in models:
        await models.ready(model.name)


def limited(options: ModelOptions, memory: int) -> ModelOptions:
    return ModelOptions(options.backend, cache_bytes=options.cache_bytes, seats=options.seats, memory=memory)


def for_two(plans: dict[str, LoadPlan]) -> int:
    """Enough for any two, and not for three."""
    sizes = [planned_bytes([plan]) for plan in plans.values()]
    assert sum(sizes) - min(sizes) < sum(sizes)
    return sum(sizes) - min(sizes)


def run(work: Callable[[], Awaitable[Any]]) -> Any:
    return asyncio.run(work())  # type: ignore[arg-type]


def test_what_is_planned_is_what_is_taken(named: list[tuple[str, str]], plans: dict[str, LoadPlan]) -> None:
    backend = select_backend(threads=1)
    for cache, memory in ((CACHE, None), (None, 40 << 20), (None, 1 << 40)):
        options = ModelOptions(backend, cache_bytes=cache, seats=2, memory=memory)
        models = Models(named[:1], options)
        model = run(lambda models=models: models.ready(None))  # type: ignore[misc]
        assert model.plan.weights == model.loaded.decoder.weights.nbytes == plans["novels-2m"].weights
        pool = model.engine.pool
        assert model.plan.cache - pool.store.page_bytes < pool.nbytes <= model.plan.cache
        assert memory is None or pool.nbytes <= memory / 4
    assert pool.count * 64 == 32768


def test_who_was_used_longest_ago_makes_room(
    named: list[tuple[str, str]], options: ModelOptions, plans: dict[str, LoadPlan]
) -> None:
    models = Models(named, limited(options, for_two(plans)))
    first, second, third = NAMES

    def states() -> list[str]:
        return [model.state for model in models]

    async def work() -> None:
        old = weakref.ref((await models.ready(first)).loaded.decoder)  # type: ignore[union-attr]
        await models.ready(second)
        await models.ready(third)
        assert states() == ["unloaded", "ready", "ready"]
        assert old() is None  # and its memory is free
        await models.ready(second)
        await models.ready(first)
        assert states() == ["ready", "ready", "unloaded"]

    run(work)
    assert models.evictions == 2


def test_another_rung_of_a_loaded_file_takes_no_second_memory(
    named: list[tuple[str, str]], options: ModelOptions
) -> None:
    """It stays as long as caches and buffers of both fit beside the weights, which are one memory."""
    path = named[0][1]
    whole, narrow = LoadPlan(path, None, 100, 10, 5, 100), LoadPlan(path, 3, 40, 10, 5, 40)
    assert planned_bytes([whole, narrow]) == 130
    for memory, evictions in ((130, 0), (129, 1)):
        models = Models([("whole", path), ("narrow", f"{path}:3")], limited(options, memory))
        first, second = models
        first.plan, first.state = whole, "ready"
        run(lambda models=models, second=second: models._make_room(second, narrow))  # type: ignore[misc]
        assert models.evictions == evictions
    # The other way round, what the wider one adds must fit.
    models = Models([("narrow", f"{path}:3"), ("whole", path)], limited(options, 130))
    first, second = models
    first.plan, first.state = narrow, "ready"
    run(lambda: models._make_room(second, whole))
    assert models.evictions == 0


def test_who_is_in_use_does_not(
    named: list[tuple[str, str]], options: ModelOptions, plans: dict[str, LoadPlan]
) -> None:
    models = Models(named, limited(options, for_two(plans)))
    first, second, third = NAMES

    async def work() -> None:
        held = [await models.ready(first), await models.ready(second)]
        engines = [model.engine for model in held]
        with pytest.raises(
            ApiError, match=f"{third} needs .* MB; {first}, {second}, which requests use, have"
        ) as found:
            await models.ready(third)
        assert (found.value.status, found.value.code) == (503, "no_memory")
        assert found.value.headers == {"Retry-After": "10"}
        assert [model.engine for model in models][:2] == engines
        engine = engines[0]
        assert engine is not None
        live = Live(Request((1, 2, 3)), engine.tokenizer)
        engine.add(live)
        held.clear()
        await models.ready(third)  # the second goes: nobody has it, and the first has a request under way
        assert [model.state for model in models] == ["ready", "unloaded", "ready"]
        engine.cancel(live)
        await models.ready(second)
        assert [model.state for model in models] == ["unloaded", "ready", "ready"]

    run(work)


def test_who_fits_never_is_told_so(
    named: list[tuple[str, str]], options: ModelOptions, plans: dict[str, LoadPlan]
) -> None:
    small, large = named[1], named[2]
    memory = planned_bytes([plans[large[0]]]) - 1
    assert planned_bytes([plans[small[0]]]) < memory
    models = Models([small, large], limited(options, memory))

    async def work() -> None:
        await models.ready(small[0])
        for _ in range(2):
            with pytest.raises(ApiError, match=r"novels-5m needs .* MB, of which .* \(--memory\): give more") as found:
                await models.ready(large[0])
            assert (found.value.status, found.value.code) == (503, "model_too_large")
        assert [model.state for model in models] == ["ready", "unloaded"]

    run(work)
    with pytest.raises(KbitError, match="novels-5m needs .* MB, of which keys"):
        asyncio.run(_load_all(Models([large], limited(options, memory))))
    code, _, error = run_command(["serve", large[1], "--memory", "1MB", "--port", "0"])
    assert code == 1
    assert "more than the 1 MB that there are for models (--memory): give more" in error


def test_widths_of_one_file_are_one_memory() -> None:
    plans = [LoadPlan("a", bits, weights, 5, 2, 0) for bits, weights in ((8, 100), (3, 40))]
    assert planned_bytes(plans) == 100 + 2 * 7
    assert planned_bytes([*plans, LoadPlan("b", None, 10, None, 1, 0)]) == 100 + 2 * 7 + 11


def test_over_http_an_answer_is_the_same_after_a_return(
    named: list[tuple[str, str]], plans: dict[str, LoadPlan], tmp_path: Path
) -> None:
    base = Path(named[0][1])
    lora = write_adapter(tmp_path / "lora", base, shapes_of(base), 1, size=0.3)
    memory = (
        max(planned_bytes([plan]) for plan in plans.values())
        + lora.joinpath("adapter_model.safetensors").stat().st_size
    )
    served = [(name, Path(path)) for name, path in named]
    with serving(*served, adapters={"lora": lora}, cache_bytes=CACHE, seats=2, memory=memory) as client:

        def ask(name: str) -> tuple[str, str]:
            body = {"model": name, "prompt": "It was", "temperature": 0, "max_tokens": 8}
            response = client.post("/v1/completions", json=body)
            assert response.status_code == 200, response.text
            return response.json()["choices"][0]["text"], response.json()["system_fingerprint"]

        order = [*NAMES, "lora"]
        first = {name: ask(name) for name in order}
        assert len(set(first.values())) == 4
        states = {model["id"]: model["state"] for model in client.get("/v1/models").json()["data"]}
        assert states == {**dict.fromkeys(NAMES, "unloaded"), NAMES[0]: "ready", "lora": "ready"}
        engine = weakref.ref(client.app.state.server.models.first.engine)  # type: ignore[attr-defined]
        assert {name: ask(name) for name in reversed(order)} == first
        ask(NAMES[1])
        assert engine() is None
        error_of(client.post("/v1/completions", json={"model": "none", "prompt": "a"}), 404)
