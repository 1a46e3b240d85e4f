"""POST /v1/completions: texts that go on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from kbit.engine.answers import Done, Event, Piece, Progress, PromptScored, Request, TokenInfo, Usage
from kbit.serve.bridge import collect, together, while_connected
from kbit.serve.errors import bad_request
from kbit.serve.models import ServedModel
from kbit.serve.requests import request_of
from kbit.serve.schemas import CompletionBody
from kbit.serve.sse import EventStream, started
from kbit.serve.state import Server, finish_reason, head, meter_of, server_of, timings, usage_dict
from kbit.text.token_text import offsets, token_text

router = APIRouter()
_DEFAULT_TOKENS = 16  # OpenAI's
_MOST_PROMPTS = 256


@dataclass(frozen=True)
class _Prompt:
    """A prompt, and what it is echoed as."""

    ids: list[int]
    text: str


@router.post("/v1/completions")
async def completions(body: CompletionBody, http: HttpRequest) -> Response:
    """Goes on with one prompt or several."""
    server = server_of(http)
    model = await server.models.ready(body.model)
    prompts, requests = await asyncio.to_thread(_prepare, body, model)
    for request in requests:
        model.generating().check(request)
    if body.stream:
        return EventStream(await started(_stream(server, model, body, prompts, requests)))
    runs = [collect(server.run(model, request), request.choices) for request in requests]
    answers = await while_connected(http, together(runs))
    choices = []
    for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        shown = prompt.text if body.echo else ""
        for number, choice in enumerate(answer.choices):
            logprobs = None
            if body.logprobs is not None:
                tokens = list(choice.tokens)
                if body.echo:
                    tokens = [*_placed(model, answer.prompt), *_moved(choice.tokens, len(shown))]
                logprobs = _logprobs(model, tokens)
            choices.append(
                {
                    "index": index * len(answer.choices) + number,
                    "text": shown + choice.text,
                    "logprobs": logprobs,
                    "finish_reason": finish_reason(choice.finish),
                }
            )
    usages = [answer.usage for answer in answers]
    return JSONResponse(
        {
            **head("cmpl-", "text_completion", model),
            "choices": choices,
            "usage": usage_dict(usages),
            "timings": timings(usages),
        }
    )


def _prepare(body: CompletionBody, model: ServedModel) -> tuple[list[_Prompt], list[Request]]:
    """Prompts and requests of a body. Not on the event loop: long texts take a while."""
    if body.suffix:
        raise bad_request("suffix: this server does not fill in texts: leave it out", "suffix")
    if body.best_of is not None and body.best_of > (body.n or 1):
        raise bad_request(f"best_of: {body.best_of} is more than n ({body.n or 1}): all answers are shown", "best_of")
    prompts = _prompts(body, model)
    tokens = model.most_tokens(body.most_tokens, _DEFAULT_TOKENS)
    if tokens == 0 and not body.echo:
        raise bad_request("max_tokens: 0 generates nothing: give at least 1, or echo the prompt", "max_tokens")
    # A prompt that was not sent (the token that texts begin with) is not echoed.
    scored = body.logprobs if body.echo and body.prompt is not None else None
    requests = [
        request_of(body, model, prompt.ids, max_tokens=tokens, logprobs=body.logprobs, prompt_logprobs=scored)
        for prompt in prompts
    ]
    return prompts, requests


def _prompts(body: CompletionBody, model: ServedModel) -> list[_Prompt]:
    tokenizer = model.tokenizer
    given = body.prompt
    if given is None:
        start = [tokenizer.bos_id] if tokenizer.bos_id is not None else sorted(tokenizer.eos_ids)[:1]
        return [_Prompt(start, "")]
    if isinstance(given, str):
        parts: Sequence[str | list[int]] = [given]
    elif given and all(isinstance(each, int) for each in given):
        parts = [[each for each in given if isinstance(each, int)]]
    else:
        parts = [each for each in given if not isinstance(each, int)]
    if not parts or len(parts) > _MOST_PROMPTS:
        raise bad_request(f"prompt: {len(parts)} prompts: give 1 to {_MOST_PROMPTS}", "prompt")
    prompts = []
    for part in parts:
        ids = tokenizer.encode(part) if isinstance(part, str) else part
        if not ids:
            raise bad_request(
                "prompt: a prompt is empty, and this model has no token to begin with: give text", "prompt"
            )
        text = part if isinstance(part, str) else tokenizer.decode([i for i in ids if i < 1 << 31], False)
        prompts.append(_Prompt(ids, text))
    return prompts


async def _stream(
    server: Server, model: ServedModel, body: CompletionBody, prompts: list[_Prompt], requests: list[Request]
) -> AsyncIterator[dict[str, Any]]:
    first = head("cmpl-", "text_completion", model)
    with_usage = bool(body.stream_options and body.stream_options.include_usage)
    extra: dict[str, Any] = {"usage": None} if with_usage else {}
    usages: list[Usage | None] = []
    begun: set[int] = set()
    meters = [meter_of(body) for _ in requests]
    async with aclosing(_merged(server, model, requests)) as events:  # type: ignore[type-var]
        async for index, event in events:
            meters[index].see(event)
            if isinstance(event, Done):
                usages.append(event.usage)
            elif isinstance(event, Progress) and (progress := meters[index].progress()) is not None:
                yield {**first, **extra, "choices": [], **progress}
            elif isinstance(event, PromptScored):
                for number in range(requests[index].choices):
                    begun.add(index * requests[index].choices + number)
                    tokens = _placed(model, event.tokens)
                    logprobs = _logprobs(model, tokens)
                    yield {
                        **first,
                        **extra,
                        "choices": [_chunk(index, number, requests, prompts[index].text, logprobs)],
                    }
            elif isinstance(event, Piece):
                place = index * requests[index].choices + event.choice
                text, shift = event.text, 0
                if body.echo:
                    shift = len(prompts[index].text)
                    if place not in begun:
                        text = prompts[index].text + text
                begun.add(place)
                logprobs = None
                if body.logprobs is not None:
                    logprobs = _logprobs(model, _moved(event.tokens, shift))
                if text or event.tokens or event.finish:
                    chunk = _chunk(index, event.choice, requests, text, logprobs, finish_reason(event.finish))
                    yield {**first, **extra, "choices": [chunk], **meters[index].timings()}
    if with_usage:
        yield {**first, "choices": [], "usage": usage_dict(usages), "timings": timings(usages)}


def _chunk(
    index: int, number: int, requests: list[Request], text: str, logprobs: Any, finish: str | None = None
) -> dict[str, Any]:
    place = index * requests[index].choices + number
    return {"index": place, "text": text, "logprobs": logprobs, "finish_reason": finish}


async def _merged(server: Server, model: ServedModel, requests: list[Request]) -> AsyncIterator[tuple[int, Event]]:
    """(request, event) of all requests, as they come."""
    queue: asyncio.Queue[tuple[int, Event | None, Exception | None]] = asyncio.Queue()

    async def read(index: int, request: Request) -> None:
        try:
            async with aclosing(server.run(model, request)) as events:  # type: ignore[type-var]
                async for event in events:
                    queue.put_nowait((index, event, None))
        except Exception as error:
            queue.put_nowait((index, None, error))
        else:
            queue.put_nowait((index, None, None))

    tasks = [asyncio.ensure_future(read(index, request)) for index, request in enumerate(requests)]
    try:
        left = len(tasks)
        while left:
            index, event, error = await queue.get()
            if error is not None:
                raise error
            if event is None:
                left -= 1
            else:
                yield index, event
    finally:
        for task in tasks:
            task.cancel()


def _placed(model: ServedModel, tokens: Sequence[TokenInfo]) -> list[TokenInfo]:
    """Tokens of a prompt, with their places in it."""
    places = offsets(model.tokenizer, [info.id for info in tokens])
    return [TokenInfo(info.id, at, info.logprob, info.top) for info, at in zip(tokens, places, strict=True)]


def _moved(tokens: Sequence[TokenInfo], by: int) -> list[TokenInfo]:
    return [TokenInfo(info.id, info.start + by, info.logprob, info.top) for info in tokens]


def _logprobs(model: ServedModel, tokens: Sequence[TokenInfo]) -> dict[str, Any]:
    """Log-probabilities as /v1/completions has always told them."""
    tokenizer = model.tokenizer

    def top(info: TokenInfo) -> dict[str, float] | None:
        if info.logprob is None:
            return None
        named = {token_text(tokenizer, token): value for token, value in reversed(info.top)}
        return {**named, token_text(tokenizer, info.id): info.logprob}

    return {
        "tokens": [token_text(tokenizer, info.id) for info in tokens],
        "token_logprobs": [info.logprob for info in tokens],
        "top_logprobs": [top(info) for info in tokens],
        "text_offset": [info.start for info in tokens],
    }
