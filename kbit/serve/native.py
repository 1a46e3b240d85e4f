"""llama.cpp's own routes, for programs that know its server: /completion, /apply-template; and /v1/rerank."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from kbit.engine.answers import Done, Finish, Piece, Request
from kbit.serve.bridge import collect, while_connected
from kbit.serve.conversation import plain_messages, render
from kbit.serve.errors import bad_request
from kbit.serve.models import ServedModel
from kbit.serve.requests import request_of
from kbit.serve.schemas import Body, RerankBody, SamplingFields
from kbit.serve.sse import EventStream, started
from kbit.serve.state import Server, server_of

router = APIRouter()


class NativeBody(SamplingFields):
    """POST /completion."""

    prompt: str | list[int]
    n_predict: Annotated[int, Field(ge=-1)] = -1
    repeat_penalty: float | None = None
    json_schema: dict[str, Any] | None = None
    cache_prompt: bool = True  # what is cached changes no answer
    return_tokens: bool = False


class TemplateBody(Body):
    """POST /apply-template."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    model: str | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool = True


@router.post("/completion")
@router.post("/completions", include_in_schema=False)
async def completion(body: NativeBody, http: HttpRequest) -> Response:
    """Goes on with a text."""
    server = server_of(http)
    model = await server.models.ready(body.model)
    request = await asyncio.to_thread(_request, body, model)
    model.generating().check(request)
    if body.stream:
        return EventStream(await started(_stream(server, model, request)), None)
    answer = await while_connected(http, collect(server.run(model, request), 1))
    (whole,) = answer.choices
    found = _ended(model, request, whole.finish, whole.stop) | {"content": whole.text}
    if answer.usage is not None:
        found |= {"tokens_evaluated": answer.usage.prompt_tokens, "tokens_cached": answer.usage.cached_tokens}
        found["tokens_predicted"] = answer.usage.completion_tokens
    if body.return_tokens:
        found["tokens"] = [info.id for info in whole.tokens]
    return JSONResponse(found)


def _request(body: NativeBody, model: ServedModel) -> Request:
    ids = model.tokenizer.encode(body.prompt) if isinstance(body.prompt, str) else body.prompt
    if body.n is not None and body.n > 1:
        raise bad_request("n: this route gives one answer: use /v1/completions", "n")
    if body.repeat_penalty is not None:
        body = body.model_copy(update={"repetition_penalty": body.repeat_penalty})
    if body.json_schema is not None:
        form = {"type": "json_schema", "json_schema": {"schema": body.json_schema}}
        body = body.model_copy(update={"response_format": form})
    limit = body.n_predict if body.max_tokens is None else body.max_tokens
    return request_of(body, model, ids, max_tokens=model.generating().context if limit < 0 else max(1, limit))


def _ended(model: ServedModel, request: Request, finish: Finish, stop: str | None) -> dict[str, Any]:
    kinds = {"stop": "eos" if stop is None else "word"}
    return {
        "stop": True,
        "stop_type": kinds.get(finish, "limit"),
        "stopping_word": stop or "",
        "truncated": False,
        "model": model.name,
        "generation_settings": {"seed": request.sampling.seed, "temperature": request.sampling.temperature},
    }


async def _stream(server: Server, model: ServedModel, request: Request) -> AsyncIterator[dict[str, Any]]:
    finish: Finish = "stop"
    stop: str | None = None
    async with aclosing(server.run(model, request)) as events:  # type: ignore[type-var]
        async for event in events:
            if isinstance(event, Piece):
                finish, stop = event.finish or finish, event.stop or stop
                yield {"content": event.text, "tokens": [info.id for info in event.tokens], "stop": False}
            elif isinstance(event, Done):
                counts = {
                    "tokens_evaluated": event.usage.prompt_tokens,
                    "tokens_predicted": event.usage.completion_tokens,
                }
                yield {"content": "", **_ended(model, request, finish, stop), **counts}


@router.post("/apply-template")
async def apply_template(body: TemplateBody, http: HttpRequest) -> Response:
    """The prompt that a conversation becomes."""
    model = await server_of(http).models.ready(body.model)
    messages, more = plain_messages(body.messages), body.chat_template_kwargs
    text = await asyncio.to_thread(render, model, messages, body.tools, more, body.add_generation_prompt)
    return JSONResponse({"prompt": text})


@router.post("/v1/rerank")
@router.post("/rerank", include_in_schema=False)
async def rerank(body: RerankBody, http: HttpRequest) -> Response:
    """Orders documents by how near they are to a query: by the cosine of an embedding model's vectors."""
    found = await server_of(http).models.ready(body.model)
    embedder = found.embedding()
    if not body.documents or not body.query or not all(body.documents):
        raise bad_request("documents: give at least one, none of them and no query empty", "documents")
    async with found.lock:
        made = await asyncio.to_thread(embedder.embed, [body.query, *body.documents], "", "refuse")
    vectors = made.vectors.astype(np.float64)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-30)
    scores = vectors[1:] @ vectors[0]
    order = np.argsort(-scores, kind="stable")[: body.top_n].tolist()
    results = [
        {"index": i, "relevance_score": float(scores[i])}
        | ({"document": {"text": body.documents[i]}} if body.return_documents else {})
        for i in order
    ]
    count = sum(made.tokens)
    usage = {"prompt_tokens": count, "total_tokens": count}
    return JSONResponse({"object": "list", "model": found.name, "results": results, "usage": usage})
