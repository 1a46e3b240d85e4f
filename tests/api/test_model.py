"""`kbit.load`: answers as the command line's, whoever asks at once, and what goes wrong."""

from __future__ import annotations

import asyncio
import gc
import json
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encoder_cases import model_of, saved
from error_cases import run_command
from serve_cases import with_template

import kbit

PROMPT = "She went to the"
SAMPLED: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "seed": 11}


@pytest.fixture(scope="module")
def folder(novels_folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(with_template(Path(novels_folder), tmp_path_factory.mktemp("api") / "novels-chat"))


@pytest.fixture(scope="module")
def model(folder: str) -> Iterator[kbit.Model]:
    with kbit.load(folder, threads=1) as model:
        yield model


def command(folder: str, flags: str) -> dict[str, Any]:
    code, out, error = run_command(["run", PROMPT, "--model", folder, "--threads", "1", "--json", *flags.split()])
    assert code == 0, error
    return dict(json.loads(out))


@pytest.mark.parametrize(
    ("settings", "flags"),
    [
        ({"max_tokens": 30}, "--max-tokens 30"),
        ({**SAMPLED, "max_tokens": 30}, "--temperature 0.9 --top-p 0.95 --seed 11 --max-tokens 30"),
        (
            {**SAMPLED, "top_k": 20, "min_p": 0.01, "repetition_penalty": 1.1, "frequency_penalty": 0.2, "stop": "."},
            "--temperature 0.9 --top-p 0.95 --seed 11 --top-k 20 --min-p 0.01 --repetition-penalty 1.1 "
            "--frequency-penalty 0.2 --stop .",
        ),
    ],
)
def test_answers_are_those_of_the_command(model: kbit.Model, folder: str, settings: dict[str, Any], flags: str) -> None:
    for more, ask in ((" --raw", model.generate), ("", model.chat)):
        told, answer = command(folder, flags + more), ask(PROMPT, **settings)
        assert answer.text == told["text"] == str(answer)
        assert answer.finish_reason == told["finish_reason"]
        assert answer.completion_tokens == told["completion_tokens"]
        assert answer.prompt_tokens == told["prompt_tokens"]
        assert answer.seed == told["seed"] or "seed" not in settings


def test_drafts_leave_a_seed_its_answer(model: kbit.Model, folder: str) -> None:
    flags = "--raw --speculate ngram --temperature 0.9 --top-p 0.95 --seed 11 --max-tokens 60"
    assert command(folder, flags)["text"] == model.generate(PROMPT, **SAMPLED, max_tokens=60).text


def test_many_at_once_are_each_as_alone(model: kbit.Model) -> None:
    prompts = [f"{PROMPT} {word}" for word in ("house", "sea", "door", "king", "old man", "church")]
    settings: dict[str, Any] = {**SAMPLED, "max_tokens": 25}
    alone = [model.generate(prompt, **settings) for prompt in prompts]
    together = model.generate(prompts, **settings)
    with ThreadPoolExecutor(len(prompts)) as threads:
        threaded = list(threads.map(lambda prompt: model.generate(prompt, **settings), prompts))

    async def ask() -> list[kbit.Completion]:
        singly = asyncio.gather(*(model.agenerate(prompt, **settings) for prompt in prompts))
        return [*await singly, *await model.agenerate(prompts, **settings)]

    asked = asyncio.run(ask())
    for others in (together, threaded, asked[: len(prompts)], asked[len(prompts) :]):
        assert [(each.text, each.tokens) for each in others] == [(each.text, each.tokens) for each in alone]
    assert len({each.text for each in alone}) == len(prompts)


def test_streams_say_what_answers_say(model: kbit.Model) -> None:
    whole = model.generate(PROMPT, **SAMPLED, max_tokens=20, logprobs=2)
    stream = model.stream(PROMPT, **SAMPLED, max_tokens=20, logprobs=2)
    pieces = list(stream)
    assert len(pieces) > 5
    assert "".join(pieces) == whole.text == stream.result.text
    assert stream.result.tokens == whole.tokens
    assert "".join(token.text for token in whole.tokens) == whole.text
    assert all(len(token.top) == 2 and token.logprob is not None for token in whole.tokens)

    async def read() -> tuple[list[str], kbit.Completion]:
        answer = model.astream_chat("Who are you?", max_tokens=8)
        return [piece async for piece in answer], answer.result

    found, result = asyncio.run(read())
    assert "".join(found) == result.text == model.chat("Who are you?", max_tokens=8).text


def test_who_leaves_a_stream_cancels_it(model: kbit.Model) -> None:
    assert model._runner is not None
    waiting = model._runner._thread

    def idle() -> bool:
        end = time.monotonic() + 60
        while waiting.active and time.monotonic() < end:
            time.sleep(0.002)
        return not waiting.active

    long: dict[str, Any] = {"max_tokens": 400, "temperature": 1.0, "allow_repetition": True}
    with model.stream(PROMPT, **long) as stream:
        next(stream)
    assert idle()
    assert stream.result.finish_reason == "cancelled"
    assert list(stream) == []
    dropped = model.stream(PROMPT, **long)
    next(dropped)
    del dropped
    gc.collect()
    assert idle()

    async def leave() -> None:
        task = asyncio.ensure_future(model.agenerate(PROMPT, **long))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(leave())
    assert idle()


def test_logprobs_are_those_of_the_logits(model: kbit.Model) -> None:
    tokens = model.logprobs("She went to the house.", top=3)
    ids = model.tokenizer.encode("She went to the house.")
    assert [token.id for token in tokens] == ids
    assert "".join(token.text for token in tokens) == "She went to the house."
    assert tokens[0].logprob is None
    assert tokens == model.logprobs(ids, top=3) == asyncio.run(model.alogprobs(ids, top=3))
    assert model._loaded is not None
    decoder = model._loaded.decoder
    logits = np.asarray(decoder.extend(ids, decoder.new_cache(1, 64), last_only=False), dtype=np.float64)
    for row, token in zip(logits, tokens[1:], strict=False):
        expected = row - np.log(np.exp(row - row.max()).sum()) - row.max()
        assert token.logprob == pytest.approx(expected[token.id], abs=1e-5)
        assert [each for each, _, _ in token.top] == np.argsort(-expected, kind="stable")[:3].tolist()


def test_an_encoder_embeds_as_the_command(tmp_path: Path) -> None:
    folder = str(saved(model_of("Bert"), tmp_path / "bert"))
    texts = ["the cat sat", "who ran far away ?"]
    code, out, error = run_command(["embed", *texts, "--model", folder, "--threads", "1", "--json"])
    assert code == 0, error
    with kbit.load(folder, threads=1) as model:
        found = model.embed(texts)
        assert found.vectors.tolist() == json.loads(out)["embeddings"]
        assert asyncio.run(model.aembed(texts[0])).vectors.tolist() == found.vectors[:1].tolist()
        with pytest.raises(kbit.UnsupportedError, match="predicts no next token"):
            model.generate("the cat")
        with pytest.raises(kbit.UsageError, match="no prompt named"):
            model.embed(texts, prompt_name="query")
        with pytest.raises(kbit.UsageError, match="none that is empty"):
            model.embed(["the cat", " "])


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"temprature": 1}, "temprature: there is no such setting; there are max_tokens, temperature"),
        ({"temperature": -1}, "--temperature -1: expected 0 \\(greedy\\)"),
        ({"temperature": "hot"}, "temperature 'hot': expected a number"),
        ({"max_tokens": 0}, "max_tokens 0: expected a whole number, at least 1"),
        ({"logprobs": -1}, "logprobs -1: expected a whole number from 0"),
        ({"logit_bias": {1 << 20: 1.0}}, "logit_bias: 1048576 is no token of this model"),
        ({"stop": ""}, "stop"),
    ],
)
def test_wrong_settings_are_named(model: kbit.Model, settings: Any, line: str) -> None:
    if settings == {"stop": ""}:  # (nothing to stop at)
        assert model.generate(PROMPT, max_tokens=2, **settings).completion_tokens == 2
        settings = {"stop": ["a", ""]}
    for ask in (model.generate, model.stream, model.chat):
        with pytest.raises(kbit.UsageError, match=line):
            ask(PROMPT, **settings)
    with pytest.raises(kbit.UsageError, match=line):
        asyncio.run(model.agenerate([PROMPT], **settings))


def test_prompts_that_cannot_be_answered(model: kbit.Model, novels_folder: str) -> None:
    with pytest.raises(kbit.UsageError, match=f"context size of {model.context}"):
        model.generate([PROMPT, PROMPT * model.context])
    with pytest.raises(kbit.UsageError, match="a prompt is a text, and this is a int"):
        model.generate([1, 2])  # type: ignore[list-item]
    with pytest.raises(kbit.UsageError, match="--device tpu"):
        kbit.load("no-such-model", device="tpu")
    with (
        kbit.load(novels_folder, threads=1, cache_bytes=1 << 20) as plain,
        pytest.raises(kbit.UsageError, match="no chat template"),
    ):
        plain.chat("Hello")
    assert model.generate(PROMPT, max_tokens=1).completion_tokens == 1  # nothing was left behind


def test_a_closed_model_says_so(folder: str) -> None:
    model = kbit.load(folder, threads=1, cache_bytes=1 << 22)
    stream = model.stream(PROMPT, max_tokens=300, temperature=1.0, allow_repetition=True)
    next(stream)
    model.close()
    with pytest.raises(kbit.UsageError, match="closed before this was answered"):
        list(stream)
    for ask in (model.generate, model.chat, model.logprobs, model.embed):
        with pytest.raises(kbit.UsageError, match="this model was closed: load it again"):
            ask(PROMPT)
    model.close()
    others = threading.active_count()
    for _ in range(2):  # dropped, not closed
        kbit.load(folder, threads=1, cache_bytes=1 << 22)
    gc.collect()
    assert threading.active_count() == others


def test_widths(tmp_path: Path, novels_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a nested model the one that is asked for; of plain floats what `kbit serve MODEL:3` runs."""
    monkeypatch.setenv("KBIT_CACHE", str(tmp_path / "cache"))
    with kbit.load(novels_folder, bits=3, threads=1, cache_bytes=1 << 22) as rounded:
        made = kbit.quantize(novels_folder, tmp_path / "three", format="nf3-b64", method="rtn")
        with kbit.load(str(made.path), threads=1, cache_bytes=1 << 22) as three:
            expected = three.generate(PROMPT, max_tokens=20).text
            assert rounded.generate(PROMPT, max_tokens=20).text == expected
        with pytest.raises(kbit.UsageError, match="has one width"):
            kbit.load(str(made.path), bits=2)
    with pytest.raises(kbit.UsageError, match="at 9 bits: it is rounded to a whole number, 2 to 8"):
        kbit.load(novels_folder, bits=9)
    with pytest.raises(kbit.UsageError, match=r"at 3.5 bits: it is rounded to a whole number, .* \(--bits 3.5\)"):
        kbit.load(novels_folder, bits=3.5)
    kbit.quantize(novels_folder, tmp_path / "all", nested="2..4", method="rtn")
    told = command(str(tmp_path / "all"), "--raw --bits 3 --max-tokens 20")
    with kbit.load(str(tmp_path / "all"), bits=3, threads=1, cache_bytes=1 << 22) as narrow:
        assert (narrow.widths, narrow.bits) == ((4, 3, 2), 3)
        assert narrow.generate(PROMPT, max_tokens=20).text == told["text"]


def test_recommended_settings(tmp_path: Path, folder: str) -> None:
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    (copy / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.6, "top_k": 9}')
    with kbit.load(str(copy), threads=1, cache_bytes=1 << 22) as model:
        assert model.recommended == {"temperature": 0.6, "top_k": 9}
        assert model.chat("Hello", max_tokens=4, seed=1, **model.recommended).seed == 1
