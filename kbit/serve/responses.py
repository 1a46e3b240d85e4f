"""POST /v1/responses: OpenAI's newer API over the same chats. Nothing is stored: a request brings its whole input."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from time import time
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from kbit.engine.answers import Done, Finish, Piece, Progress, Usage
from kbit.serve.bridge import collect, while_connected
from kbit.serve.conversation import Prepared, prepare_chat
from kbit.serve.errors import ApiError, bad_request
from kbit.serve.message_parser import Called, Part, Said, joined
from kbit.serve.models import ServedModel
from kbit.serve.schemas import Body, ChatBody
from kbit.serve.sse import EventStream, started
from kbit.serve.state import Meter, Server, new_id, server_of, timings
from kbit.serve.tool_calls import Arguments, CallBegun

router = APIRouter()
_Event = tuple[str, dict[str, Any]]


class InputBody(Body):
    """What both routes take."""

    model: str | None = None
    input: str | list[dict[str, Any]] | None = None
    instructions: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    truncation: str | None = None
    # What would need a store, and is refused where it is asked for.
    previous_response_id: str | None = None
    conversation: str | dict[str, Any] | None = None
    prompt: dict[str, Any] | None = None


class ResponsesBody(InputBody):
    """POST /v1/responses."""

    temperature: float | None = None
    top_p: float | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    seed: int | None = None
    background: bool | None = None
    # Accepted, as they change no answer: accounting and hints.
    store: bool | None = None
    metadata: dict[str, Any] | None = None
    include: list[str] | None = None
    max_tool_calls: int | None = None
    service_tier: str | None = None
    stream_options: dict[str, Any] | None = None
    # llama.cpp's.
    timings_per_token: bool = False
    return_progress: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    moderation: dict[str, Any] | None = None
    context_management: list[dict[str, Any]] | None = None


@router.post("/v1/responses")
@router.post("/responses", include_in_schema=False)
async def responses(body: ResponsesBody, http: HttpRequest) -> Response:
    """Answers an input."""
    server = server_of(http)
    model = await server.models.ready(body.model)
    if body.background:
        raise bad_request("background: nothing is stored here, so the answer could not be fetched", "background")
    if body.top_logprobs:
        raise bad_request("top_logprobs: use /v1/chat/completions, which has them", "top_logprobs")
    prepared = await asyncio.to_thread(lambda: prepare_chat(_chat(body), model))
    model.generating().check(prepared.request)
    if body.stream:
        return EventStream(await started(_stream(server, model, body, prepared)), None, _failure)
    answer = await while_connected(http, collect(server.run(model, prepared.request), 1))
    (whole,) = answer.choices
    parser = prepared.parser()
    parts = joined([*parser.push(whole.text), *parser.finish()])
    return JSONResponse(_response(body, model, new_id("resp_"), whole.finish, _items(parts), answer.usage))


@router.post("/v1/responses/input_tokens")
async def input_tokens(body: InputBody, http: HttpRequest) -> Response:
    """How many tokens an input has."""
    model = await server_of(http).models.ready(body.model)
    prepared = await asyncio.to_thread(lambda: prepare_chat(_chat(body), model))
    return JSONResponse({"object": "response.input_tokens", "input_tokens": len(prepared.request.prompt)})


def _chat(body: InputBody) -> ChatBody:
    """The same request as a chat.

    Raises:
        ApiError: what needs a store, or is none of text and functions.
    """
    for name in ("previous_response_id", "conversation", "prompt"):
        if getattr(body, name) is not None:
            raise bad_request(f"{name}: this server stores nothing: send the whole input", name)
    messages = _system(body.instructions)
    if isinstance(body.input, str):
        messages.append({"role": "user", "content": body.input})
    else:
        messages += [message for index, item in enumerate(body.input or []) for message in _message(item, index)]
    if not messages:
        raise bad_request("input: there is none: give text or a list of messages", "input")
    given: dict[str, Any] = {"model": body.model, "messages": messages}
    if body.tools:
        given["tools"] = [_tool(tool, index) for index, tool in enumerate(body.tools)]
    choice = body.tool_choice
    if choice is not None and not (choice == "auto" and not body.tools):
        given["tool_choice"] = choice
    form = (body.text or {}).get("format") or {}
    if form.get("type") == "json_schema":
        given["response_format"] = {"type": "json_schema", "json_schema": {"schema": form.get("schema", True)}}
    elif form:
        given["response_format"] = form
    if isinstance(body, ResponsesBody):
        given.update(temperature=body.temperature, top_p=body.top_p, seed=body.seed, max_tokens=body.max_output_tokens)
        given.update(stream=body.stream, timings_per_token=body.timings_per_token, return_progress=body.return_progress)
    return ChatBody.model_validate(given)


def _system(instructions: str | list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    if isinstance(instructions, list):
        return [message for index, item in enumerate(instructions) for message in _message(item, index)]
    return [{"role": "system", "content": instructions}] if instructions else []


def _message(item: dict[str, Any], index: int) -> list[dict[str, Any]]:
    kind = item.get("type", "message")
    if kind == "message":
        return [{"role": item.get("role"), "content": item.get("content")}]
    if kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments", "{}")}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        return [{"role": "assistant", "content": None, "tool_calls": [call]}]
    if kind == "function_call_output":
        return [{"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")}]
    if kind == "reasoning":
        return []
    raise bad_request(f"input[{index}].type {kind!r}: this server reads messages and function calls", "input")


def _tool(tool: dict[str, Any], index: int) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise bad_request(f"tools[{index}].type {tool.get('type')!r}: this server offers functions only", "tools")
    return {"type": "function", "function": {key: tool.get(key) for key in ("name", "description", "parameters")}}


def _items(parts: list[Said | Called]) -> list[dict[str, Any]]:
    """Output items: what was thought, what is said, what is called."""
    items: list[dict[str, Any]] = []
    for part in parts:
        items.append(_item(CallBegun(part.name) if isinstance(part, Called) else part))
        if isinstance(part, Said):
            items[-1]["content"][0]["text"] = part.text
        else:
            items[-1]["arguments"] = part.arguments
    return items


def _kind(part: Part) -> str:
    return ("reasoning" if part.thought else "message") if isinstance(part, Said) else "function_call"


def _item(part: Said | CallBegun) -> dict[str, Any]:
    """An item without its text or arguments yet."""
    if isinstance(part, CallBegun):
        return {
            "type": "function_call",
            "id": new_id("fc_"),
            "call_id": new_id("call_"),
            "name": part.name,
            "arguments": "",
            "status": "completed",
        }
    if part.thought:
        content: list[dict[str, Any]] = [{"type": "reasoning_text", "text": ""}]
        return {"type": "reasoning", "id": new_id("rs_"), "summary": [], "content": content, "status": "completed"}
    content = [{"type": "output_text", "text": "", "annotations": [], "logprobs": []}]
    return {"type": "message", "id": new_id("msg_"), "role": "assistant", "content": content, "status": "completed"}


def _response(
    body: ResponsesBody,
    model: ServedModel,
    name: str,
    finish: Finish | None,
    items: list[dict[str, Any]],
    usage: Usage | None,
) -> dict[str, Any]:
    """The response object; `finish` None: it is under way."""
    assert model.defaults is not None
    defaults = model.defaults.params
    status = "in_progress" if finish is None else "completed" if finish == "stop" else "incomplete"
    found: dict[str, Any] = {
        "id": name,
        "object": "response",
        "created_at": int(time()),
        "status": status,
        "background": False,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "model": model.name,
        "output": items,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "store": False,
        "temperature": defaults.temperature if body.temperature is None else body.temperature,
        "text": {"format": (body.text or {}).get("format") or {"type": "text"}},
        "tool_choice": body.tool_choice or "auto",
        "tools": body.tools or [],
        "top_p": defaults.top_p if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "metadata": body.metadata or {},
    }
    if usage is not None:
        found["usage"] = {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }
    return found


def _failure(error: ApiError) -> _Event:
    return "error", {
        "type": "error",
        "code": error.code,
        "message": error.message,
        "param": error.param,
        "sequence_number": 0,
    }


async def _stream(server: Server, model: ServedModel, body: ResponsesBody, prepared: Prepared) -> AsyncIterator[_Event]:
    number, name, parser = 0, new_id("resp_"), prepared.parser()
    items: list[dict[str, Any]] = []
    finish: Finish = "stop"

    def event(kind: str, **more: Any) -> _Event:
        nonlocal number
        number += 1
        return kind, {"type": kind, "sequence_number": number - 1, **more}

    def closing() -> list[_Event]:
        """The last item's text, or its arguments, and itself are whole."""
        if not items:
            return []
        item, place = items[-1], {"item_id": items[-1]["id"], "output_index": len(items) - 1}
        if item["type"] == "function_call":
            done = {"name": item["name"], "arguments": item["arguments"]}
            return [
                event("response.function_call_arguments.done", **place, **done),
                event("response.output_item.done", output_index=len(items) - 1, item=item),
            ]
        part = item["content"][0]
        said = item["type"] == "message"
        what = "output_text" if said else "reasoning_text"
        more: dict[str, Any] = {"logprobs": []} if said else {}
        found = [event(f"response.{what}.done", **place, content_index=0, text=part["text"], **more)]
        if said:
            found.append(event("response.content_part.done", **place, content_index=0, part=part))
        found.append(event("response.output_item.done", output_index=len(items) - 1, item=item))
        return found

    begun, meter = False, Meter(progress=body.return_progress, timings=body.timings_per_token)
    async with aclosing(server.run(model, prepared.request)) as events:  # type: ignore[type-var]
        async for each in events:
            if not begun:
                begun = True
                empty = _response(body, model, name, None, [], None)
                yield event("response.created", response=empty)
                yield event("response.in_progress", response=empty)
            meter.see(each)
            if isinstance(each, Progress) and (progress := meter.progress()) is not None:
                yield event("response.in_progress", response=empty, **progress)
            if isinstance(each, Piece):
                parts = parser.push(each.text)
                if each.finish is not None:
                    parts += parser.finish()
                    finish = each.finish
                for part in parts:
                    kind = _kind(part)
                    if not isinstance(part, Arguments) and (
                        isinstance(part, CallBegun) or not items or items[-1]["type"] != kind
                    ):
                        for closed in closing():
                            yield closed
                        items.append(_item(part))
                        shown = {**items[-1], "status": "in_progress"}
                        index = len(items) - 1
                        if kind == "message":
                            shown["content"] = []
                        yield event("response.output_item.added", output_index=index, item=shown)
                        if kind == "message":
                            place = {"item_id": shown["id"], "output_index": index, "content_index": 0}
                            yield event("response.content_part.added", **place, part=dict(items[-1]["content"][0]))
                    place = {"item_id": items[-1]["id"], "output_index": len(items) - 1}
                    if isinstance(part, Arguments):
                        items[-1]["arguments"] += part.text
                        yield event("response.function_call_arguments.delta", **place, delta=part.text)
                    elif isinstance(part, Said):
                        items[-1]["content"][0]["text"] += part.text
                        what = "reasoning_text" if part.thought else "output_text"
                        more: dict[str, Any] = {**({} if part.thought else {"logprobs": []}), **meter.timings()}
                        yield event(f"response.{what}.delta", **place, content_index=0, delta=part.text, **more)
            elif isinstance(each, Done):
                for closed in closing():
                    yield closed
                whole = _response(body, model, name, finish, items, each.usage)
                times = {"timings": timings([each.usage])} if body.timings_per_token else {}
                kind = "response.completed" if finish == "stop" else "response.incomplete"
                yield event(kind, response=whole, **times)
