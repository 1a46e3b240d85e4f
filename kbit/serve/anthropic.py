"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API over the same chats."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from kbit.engine.answers import Done, Finish, Piece, Usage
from kbit.serve.bridge import collect, while_connected
from kbit.serve.conversation import Prepared, prepare_chat
from kbit.serve.errors import ApiError, bad_request
from kbit.serve.message_parser import Called, Said, joined
from kbit.serve.models import ServedModel
from kbit.serve.schemas import Body, ChatBody
from kbit.serve.sse import EventStream, started
from kbit.serve.state import Server, new_id, server_of
from kbit.serve.tool_calls import Arguments, CallBegun

router = APIRouter()
# A line that Claude Code puts before its prompts, other each time: it says nothing, and no page behind it could be
# shared.
_BILLING = "x-anthropic-billing-header"
_Event = tuple[str, dict[str, Any]]


class AnthropicTool(BaseModel):
    """A function that a model may call."""

    name: str
    description: str | None = None
    input_schema: dict[str, Any] = Field(default_factory=lambda: {"type": "object"})
    type: Literal["custom"] | None = None


class CountBody(Body):
    """POST /v1/messages/count_tokens."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    model: str | None = None
    system: str | list[dict[str, Any]] | None = None
    tools: list[AnthropicTool] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None
    cache_control: dict[str, Any] | None = None  # caching needs no hints here


class MessagesBody(CountBody):
    """POST /v1/messages."""

    max_tokens: Annotated[int, Field(ge=1)]
    temperature: float | None = None
    top_p: float | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    # Accepted, as they change no answer: accounting.
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    inference_geo: str | None = None
    context_management: dict[str, Any] | None = None


@router.post("/v1/messages")
async def messages(body: MessagesBody, http: HttpRequest) -> Response:
    """Answers a conversation."""
    server = server_of(http)
    model = await server.models.ready(body.model)
    prepared = await asyncio.to_thread(lambda: prepare_chat(_chat(body), model))
    model.generating().check(prepared.request)
    if body.stream:
        return EventStream(
            await started(_stream(server, model, prepared)), None, lambda error: ("error", ApiError.anthropic(error))
        )
    answer = await while_connected(http, collect(server.run(model, prepared.request), 1))
    (whole,) = answer.choices
    parser = prepared.parser()
    parts = joined([*parser.push(whole.text), *parser.finish()])
    called = any(isinstance(part, Called) for part in parts)
    return JSONResponse(
        {
            "id": new_id("msg_"),
            "type": "message",
            "role": "assistant",
            "model": model.name,
            "content": _blocks(parts),
            "stop_reason": _reason(whole.finish, whole.stop, called),
            "stop_sequence": whole.stop,
            "usage": _usage(answer.usage),
        }
    )


@router.post("/v1/messages/count_tokens")
async def count_tokens(body: CountBody, http: HttpRequest) -> Response:
    """How many tokens a conversation has."""
    model = await server_of(http).models.ready(body.model)
    prepared = await asyncio.to_thread(lambda: prepare_chat(_chat(body), model))
    return JSONResponse({"input_tokens": len(prepared.request.prompt)})


def _chat(body: CountBody) -> ChatBody:
    """The same request in OpenAI's words.

    Raises:
        ApiError: a block that is none of text and tools.
    """
    given: dict[str, Any] = {"model": body.model, "messages": _messages(body)}
    if body.tools:
        given["tools"] = [
            {
                "type": "function",
                "function": {"name": t.name, "description": t.description, "parameters": t.input_schema},
            }
            for t in body.tools
        ]
    if body.tool_choice is not None:
        kind = body.tool_choice.get("type")
        words = {"auto": "auto", "any": "required", "none": "none"}
        if kind == "tool":
            given["tool_choice"] = {"type": "function", "function": {"name": body.tool_choice.get("name")}}
        elif kind in words:
            given["tool_choice"] = words[kind]
        else:
            raise bad_request(f"tool_choice.type {kind!r}: use auto, any, tool or none", "tool_choice")
    if body.thinking is not None:
        given["chat_template_kwargs"] = {"enable_thinking": body.thinking.get("type") != "disabled"}
    form = (body.output_config or {}).get("format")
    if form is not None:
        given["response_format"] = {"type": "json_schema", "json_schema": {"schema": form.get("schema", True)}}
    if isinstance(body, MessagesBody):
        given.update(max_tokens=body.max_tokens, stop=body.stop_sequences)
        given.update({key: getattr(body, key) for key in ("temperature", "top_p", "top_k")})
    return ChatBody.model_validate(given)


def _messages(body: CountBody) -> list[dict[str, Any]]:
    plain: list[dict[str, Any]] = []
    if body.system is not None:
        blocks = [{"type": "text", "text": body.system}] if isinstance(body.system, str) else body.system
        text = "\n".join(t for block in blocks if not (t := str(block.get("text", ""))).startswith(_BILLING))
        plain.append({"role": "system", "content": text})
    for index, message in enumerate(body.messages):
        content, role = message.get("content"), message.get("role")
        if role not in ("user", "assistant"):
            raise bad_request(f"messages[{index}].role {role!r}: use user or assistant", "messages")
        if isinstance(content, str):
            plain.append({"role": role, "content": content})
        elif isinstance(content, list):
            plain += _turn(role, content, f"messages[{index}]")
        else:
            raise bad_request(f"messages[{index}].content: expected text or a list of blocks", "messages")
    return plain


def _turn(role: str, blocks: list[Any], where: str) -> list[dict[str, Any]]:
    """The messages of one turn: results of tools stand before what the user says."""
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for block in blocks:
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "text":
            texts.append(str(block.get("text", "")))
        elif kind == "tool_use" and isinstance(block.get("name"), str):
            function = {"name": block["name"], "arguments": json.dumps(block.get("input", {}))}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind == "tool_result":
            content = block.get("content") or ""
            if isinstance(content, list):
                kinds = [part.get("type") if isinstance(part, dict) else None for part in content]
                if set(kinds) - {"text"}:
                    other = next(each for each in kinds if each != "text")
                    raise bad_request(
                        f"{where}.content: a result with a part of type {other!r}: this server reads text only",
                        "messages",
                    )
                content = "".join(str(part.get("text", "")) for part in content)
            results.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": str(content)})
        elif kind == "thinking":  # whether it is shown to the model again is for the template to say
            thoughts.append(str(block.get("thinking", "")))
        elif kind != "redacted_thinking":
            raise bad_request(
                f"{where}.content: a block of type {kind!r}: this server reads text and tools", "messages"
            )
    turn = list(results)
    if texts or calls or not results:
        more: dict[str, Any] = {"tool_calls": calls} if calls else {}
        if thoughts:
            more["reasoning_content"] = "".join(thoughts)
        turn.append({"role": role, "content": "".join(texts), **more})
    return turn


def _blocks(parts: list[Said | Called]) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    for part in parts:
        if isinstance(part, Called):
            blocks.append(_tool_use(part.name, _input(part.arguments)))
        else:
            kind = "thinking" if part.thought else "text"
            blocks.append(_empty(kind) | {kind: part.text})
    return blocks


def _empty(kind: str) -> dict[str, Any]:
    return {"type": "thinking", "thinking": "", "signature": ""} if kind == "thinking" else {"type": "text", "text": ""}


def _tool_use(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"type": "tool_use", "id": new_id("toolu_"), "name": name, "input": arguments}


def _input(arguments: str) -> dict[str, Any]:
    """Arguments as an object; of an answer that was cut, the text, under the name that Anthropic gives it."""
    try:
        found = json.loads(arguments)
    except ValueError:
        return {"INVALID_JSON": arguments}
    return found if isinstance(found, dict) else {"value": found}


def _reason(finish: Finish, stop: str | None, called: bool) -> str:
    if finish != "stop":
        return "max_tokens"
    return "stop_sequence" if stop is not None else "tool_use" if called else "end_turn"


def _usage(usage: Usage | None) -> dict[str, Any]:
    if usage is None:
        return {"input_tokens": 0, "output_tokens": 0}
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_read_input_tokens": usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.completion_tokens,
    }


async def _stream(server: Server, model: ServedModel, prepared: Prepared) -> AsyncIterator[_Event]:
    parser, index, open_kind, called = prepared.parser(), -1, "", False
    finish: Finish = "stop"
    stop: str | None = None
    message: dict[str, Any] = {
        "id": new_id("msg_"),
        "type": "message",
        "role": "assistant",
        "model": model.name,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {"input_tokens": len(prepared.request.prompt), "output_tokens": 0},
    }
    begun = False
    async with aclosing(server.run(model, prepared.request)) as events:  # type: ignore[type-var]
        async for event in events:
            if not begun:
                begun = True
                yield "message_start", {"type": "message_start", "message": message}
            if isinstance(event, Piece):
                parts = parser.push(event.text)
                if event.finish is not None:
                    parts += parser.finish()
                    finish, stop = event.finish, event.stop
                for part in parts:
                    kind = "tool_use"
                    if isinstance(part, Said):
                        kind = "thinking" if part.thought else "text"
                    if kind != open_kind or isinstance(part, CallBegun):
                        if open_kind:
                            yield "content_block_stop", {"type": "content_block_stop", "index": index}
                        index, open_kind = index + 1, kind
                        block = _tool_use(part.name, {}) if isinstance(part, CallBegun) else _empty(kind)
                        start = {"type": "content_block_start", "index": index, "content_block": block}
                        yield "content_block_start", start
                    called = called or isinstance(part, CallBegun)
                    if not isinstance(part, CallBegun):
                        delta = {"type": "content_block_delta", "index": index, "delta": _delta(part)}
                        yield "content_block_delta", delta
            elif isinstance(event, Done):
                if open_kind:
                    yield "content_block_stop", {"type": "content_block_stop", "index": index}
                ended = {"stop_reason": _reason(finish, stop, called), "stop_sequence": stop}
                yield "message_delta", {"type": "message_delta", "delta": ended, "usage": _usage(event.usage)}
                yield "message_stop", {"type": "message_stop"}


def _delta(part: Said | Arguments) -> dict[str, Any]:
    if isinstance(part, Arguments):
        return {"type": "input_json_delta", "partial_json": part.text}
    if part.thought:
        return {"type": "thinking_delta", "thinking": part.text}
    return {"type": "text_delta", "text": part.text}
