"""POST /v1/chat/completions: answers in a conversation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from kbit.engine.answers import Done, Piece, Progress, TokenInfo
from kbit.serve.bridge import collect, while_connected
from kbit.serve.conversation import Prepared, prepare_chat
from kbit.serve.message_parser import Called, Part, Said, joined
from kbit.serve.models import ServedModel
from kbit.serve.schemas import ChatBody
from kbit.serve.sse import EventStream, started
from kbit.serve.state import Server, finish_reason, head, meter_of, new_id, server_of, timings, usage_dict
from kbit.serve.tool_calls import Arguments, CallBegun
from kbit.text.token_text import token_bytes, token_text

router = APIRouter()


@router.post("/v1/chat/completions")
@router.post("/chat/completions", include_in_schema=False)
async def chat_completions(body: ChatBody, http: HttpRequest) -> Response:
    """Answers a conversation."""
    server = server_of(http)
    model = await server.models.ready(body.model)
    prepared = await asyncio.to_thread(prepare_chat, body, model)
    model.generating().check(prepared.request)
    if body.stream:
        return EventStream(await started(_stream(server, model, body, prepared)))
    work = collect(server.run(model, prepared.request), prepared.request.choices)
    answer = await while_connected(http, work)
    choices = []
    for index, whole in enumerate(answer.choices):
        message, calls = message_of(prepared, whole.text)
        choices.append(
            {
                "index": index,
                "message": message,
                "logprobs": _logprobs(model, whole.tokens) if body.logprobs else None,
                "finish_reason": "tool_calls" if calls and whole.finish == "stop" else finish_reason(whole.finish),
            }
        )
    found = {
        **head("chatcmpl-", "chat.completion", model),
        "choices": choices,
        "usage": usage_dict([answer.usage]),
        "timings": timings([answer.usage]),
    }
    if body.verbose if body.verbose is not None else model.options is not None and model.options.verbose:
        shown = model.tokenizer.decode(prepared.request.prompt, skip_special_tokens=False)
        found["__verbose"] = {"prompt": shown, "content": [whole.text for whole in answer.choices]}
    return JSONResponse(found)


@router.post("/v1/chat/completions/input_tokens")
@router.post("/chat/completions/input_tokens", include_in_schema=False)
async def input_tokens(body: ChatBody, http: HttpRequest) -> Response:
    """How many tokens a conversation has."""
    model = await server_of(http).models.ready(body.model)
    prepared = await asyncio.to_thread(prepare_chat, body, model)
    return JSONResponse({"input_tokens": len(prepared.request.prompt)})


def message_of(prepared: Prepared, text: str) -> tuple[dict[str, Any], list[Called]]:
    """(the message that a text is, the calls in it)."""
    parser = prepared.parser()
    parts = joined([*parser.push(text), *parser.finish()])
    said = "".join(part.text for part in parts if isinstance(part, Said) and not part.thought)
    thought = "".join(part.text for part in parts if isinstance(part, Said) and part.thought)
    calls = [part for part in parts if isinstance(part, Called)]
    message: dict[str, Any] = {"role": "assistant", "content": said or (None if calls else ""), "refusal": None}
    if thought:
        message["reasoning_content"] = thought.strip("\n")
    if calls:
        message["tool_calls"] = [call_dict(call.name, call.arguments) for call in calls]
    return message, calls


def call_dict(name: str, arguments: str) -> dict[str, Any]:
    """A call as the API has it."""
    return {"id": new_id("call_"), "type": "function", "function": {"name": name, "arguments": arguments}}


async def _stream(
    server: Server, model: ServedModel, body: ChatBody, prepared: Prepared
) -> AsyncIterator[dict[str, Any]]:
    first = head("chatcmpl-", "chat.completion.chunk", model)
    with_usage = bool(body.stream_options and body.stream_options.include_usage)
    extra: dict[str, Any] = {"usage": None} if with_usage else {}
    parsers = [prepared.parser() for _ in range(prepared.request.choices)]
    calls = [0] * len(parsers)
    begun: set[int] = set()
    meter = meter_of(body)

    def chunk(index: int, delta: dict[str, Any], finish: str | None = None, logprobs: Any = None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        times = {} if "role" in delta else meter.timings()
        return {**first, **extra, "choices": [choice], **times}

    async with aclosing(server.run(model, prepared.request)) as events:  # type: ignore[type-var]
        async for event in events:
            meter.see(event)
            if isinstance(event, Progress) and (progress := meter.progress()) is not None:
                yield {**first, **extra, "choices": [], **progress}
            elif isinstance(event, Piece):
                index = event.choice
                if index not in begun:
                    begun.add(index)
                    yield chunk(index, {"role": "assistant", "content": None})
                parts = parsers[index].push(event.text)
                if event.finish is not None:
                    parts += parsers[index].finish()
                logprobs = _logprobs(model, event.tokens) if body.logprobs and event.tokens else None
                for part in parts:
                    calls[index] += isinstance(part, CallBegun)
                    delta = _delta(part, calls[index] - 1)
                    yield chunk(index, delta, logprobs=logprobs)
                    logprobs = None
                if logprobs is not None:
                    yield chunk(index, {}, logprobs=logprobs)
                if event.finish is not None:
                    called = calls[index] and event.finish == "stop"
                    yield chunk(index, {}, "tool_calls" if called else finish_reason(event.finish))
            elif isinstance(event, Done) and with_usage:
                yield {**first, "choices": [], "usage": usage_dict([event.usage]), "timings": timings([event.usage])}


def _delta(part: Part, call: int) -> dict[str, Any]:
    """What a part adds; `call`: which call it is about, if it is."""
    if isinstance(part, CallBegun):
        return {"tool_calls": [{"index": call, **call_dict(part.name, "")}]}
    if isinstance(part, Arguments):
        return {"tool_calls": [{"index": call, "function": {"arguments": part.text}}]}
    return {"reasoning_content": part.text} if part.thought else {"content": part.text}


def _logprobs(model: ServedModel, tokens: Sequence[TokenInfo]) -> dict[str, Any]:
    def each(token: int, logprob: float | None) -> dict[str, Any]:
        data = token_bytes(model.tokenizer, token)
        return {"token": token_text(model.tokenizer, token), "logprob": logprob, "bytes": list(data)}

    content = [
        {**each(info.id, info.logprob), "top_logprobs": [each(token, value) for token, value in info.top]}
        for info in tokens
    ]
    return {"content": content, "refusal": None}
