"""llama.cpp's own routes, for programs that know its server: /completion, /apply-template; and /v1/rerank."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from kbit.engine.answers import Done, Finish, Piece, Progress, Request, TokenInfo, Usage
from kbit.serve.bridge import collect, together, while_connected
from kbit.serve.conversation import plain_messages, render
from kbit.serve.errors import ApiError, bad_request
from kbit.serve.models import ServedModel
from kbit.serve.requests import request_of
from kbit.serve.schemas import Body, RerankBody, SamplingFields
from kbit.serve.sse import EventStream, started
from kbit.serve.state import Server, meter_of, server_of, timings
from kbit.text.token_text import token_bytes, token_text

router = APIRouter()
_MOST_PROMPTS = 256
# Samplers of llama.cpp that this server has not, and the values that switch them off.
_OFF: dict[str, Any] = {
    "mirostat": 0,
    "dynatemp_range": 0,
    "xtc_probability": 0,
    "dry_multiplier": 0,
    "top_n_sigma": -1,
    "min_keep": 0,
    "n_keep": 0,
    "lora": [],
}


class NativeBody(SamplingFields):
    """POST /completion."""

    prompt: Any = None
    logit_bias: Any = None
    n_probs: Annotated[int, Field(ge=0, le=1 << 16)] = 0
    return_tokens: bool = False
    response_fields: list[str] | None = None
    post_sampling_probs: bool = False
    # Where tokens are chosen changes none.
    backend_sampling: bool = False
    # See _OFF.
    mirostat: Any = None
    dynatemp_range: Any = None
    xtc_probability: Any = None
    dry_multiplier: Any = None
    top_n_sigma: Any = None
    min_keep: Any = None
    n_keep: Any = None
    lora: Any = None


class TemplateBody(Body):
    """POST /apply-template."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    model: str | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool = True


@dataclass(frozen=True)
class _Asked:
    """A prompt of a request, of which there may be several.

    Attributes:
        request: the engine's.
        index: which.
        settings: as the answer repeats them.
    """

    request: Request
    index: int
    settings: dict[str, Any]


@router.post("/completion")
@router.post("/completions", include_in_schema=False)
async def completion(body: NativeBody, http: HttpRequest) -> Response:
    """Goes on with a text, or several."""
    server = server_of(http)
    model = await server.models.ready(body.model)
    several, prompts = await asyncio.to_thread(prompts_of, body.prompt, model)
    return await answer(server, model, body, prompts, http, several=several)


async def answer(
    server: Server,
    model: ServedModel,
    body: NativeBody,
    prompts: Sequence[list[int]],
    http: HttpRequest,
    *,
    several: bool = False,
) -> Response:
    """Goes on with prompts that are tokens.

    Raises:
        ApiError, KbitError: something that is wrong, or not known here.
    """
    asked = await asyncio.to_thread(lambda: [_asked(body, model, ids, i) for i, ids in enumerate(prompts)])
    for each in asked:
        model.generating().check(each.request)
    if body.stream:
        if several:
            raise bad_request("stream: this route streams one answer: send one prompt", "stream")
        return EventStream(await started(_stream(server, model, body, asked[0])), None)
    runs = [collect(server.run(model, each.request), 1) for each in asked]
    found = []
    for each, answered in zip(asked, await while_connected(http, together(runs)), strict=True):
        (whole,) = answered.choices
        shown = _ended(model, each, whole.finish, whole.stop, whole.text, answered.usage)
        shown |= {"content": whole.text, "tokens": [info.id for info in whole.tokens] if body.return_tokens else []}
        if body.n_probs:
            shown["completion_probabilities"] = [_probability(model, body, info) for info in whole.tokens]
        found.append(_fields(shown, body.response_fields))
    return JSONResponse(found if several else found[0])


def prompts_of(given: Any, model: ServedModel) -> tuple[bool, list[list[int]]]:
    """(whether there may be several, the prompts' tokens): a text, tokens, both in turns, or a list of such.

    Raises:
        ApiError: it is none of these.
    """
    several = isinstance(given, list) and not any(isinstance(each, int) for each in given)
    parts = given if several else [given]
    if not 1 <= len(parts) <= _MOST_PROMPTS:
        raise bad_request(f"prompt: {len(parts)} prompts: give 1 to {_MOST_PROMPTS}", "prompt")
    return several, [_tokens(part, model) for part in parts]


def _tokens(part: Any, model: ServedModel) -> list[int]:
    if isinstance(part, dict):
        if part.get("multimodal_data") is not None:
            raise bad_request("prompt.multimodal_data: this server reads text only", "prompt")
        part = part.get("prompt_string")
    if isinstance(part, str):
        return model.tokenizer.encode(part)
    if not isinstance(part, list) or not part:
        raise bad_request("prompt: expected text, token ids, or lists of these", "prompt")
    ids: list[int] = []
    for place, each in enumerate(part):
        if isinstance(each, str):
            ids += model.tokenizer.encode(each, add_special_tokens=place == 0)
        elif isinstance(each, int) and not isinstance(each, bool):
            ids.append(each)
        else:
            raise bad_request("prompt: expected text, token ids, or lists of these", "prompt")
    return ids


def _asked(body: NativeBody, model: ServedModel, ids: list[int], index: int) -> _Asked:
    if body.n is not None and body.n > 1:
        raise bad_request("n: this route gives one answer: use /v1/completions", "n")
    for name, off in _OFF.items():
        if getattr(body, name) not in (None, off):
            raise bad_request(f"{name}: this server has no such setting: leave it out", name)
    bias = _bias(body.logit_bias, model)
    seed = None if body.seed in (-1, None) else body.seed
    given = body.model_copy(update={"logit_bias": bias, "seed": seed})
    limit = model.most_tokens(body.most_tokens) if body.n_predict != -1 else model.generating().context
    request = request_of(
        given,
        model,
        ids,
        max_tokens=max(1, limit),
        logprobs=body.n_probs or None,
        after_settings=body.post_sampling_probs,
    )
    sampling = request.sampling
    if body.ignore_eos:
        ends = tuple((token, -math.inf) for token in sorted(model.tokenizer.eos_ids))
        sampling = replace(sampling, logit_bias=sampling.logit_bias + ends)
        request = replace(request, sampling=sampling)
    settings = {
        "n_predict": limit,
        "seed": sampling.seed,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "typical_p": sampling.typical_p,
        "repeat_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "ignore_eos": body.ignore_eos,
        "stop": list(request.stop),
        "n_probs": body.n_probs,
        "post_sampling_probs": body.post_sampling_probs,
        "logit_bias": [
            {"token": token, "bias": value if math.isfinite(value) else None} for token, value in sampling.logit_bias
        ],
        "grammar": body.grammar or "",
        "stream": bool(body.stream),
        **{name: off for name, off in _OFF.items() if name != "lora"},
        "adaptive_target": -1.0,  # off, as mirostat is
        "adaptive_decay": 0.0,
        "lora": [],
    }
    return _Asked(request, index, settings)


def _bias(given: Any, model: ServedModel) -> dict[str, float] | None:
    """Biases by token: of {token or text: bias} or [[token or text, bias], ...]; false forbids. A text's is for each of
    its tokens."""
    if given is None:
        return None
    pairs = given.items() if isinstance(given, dict) else given
    found: dict[str, float] = {}
    try:
        for token, value in pairs:
            bias = -100.0 if value is False else float(value)
            text = isinstance(token, str) and not token.isdecimal()
            ids = model.tokenizer.encode(token, add_special_tokens=False) if text else [int(token)]
            found.update({str(each): bias for each in ids})
    except (TypeError, ValueError):
        raise bad_request("logit_bias: expected {token: bias} or [[token, bias], ...]", "logit_bias") from None
    return found


def _ended(
    model: ServedModel, asked: _Asked, finish: Finish, stop: str | None, text: str, usage: Usage | None
) -> dict[str, Any]:
    kinds = {"stop": "eos" if stop is None else "word"}
    request = asked.request
    counts = {}
    if usage is not None:
        counts = {
            "tokens_predicted": usage.completion_tokens,
            "tokens_evaluated": usage.prompt_tokens,
            "tokens_cached": usage.cached_tokens,
        }
    return {
        "index": asked.index,
        "stop": True,
        "stop_type": kinds.get(finish, "limit"),
        "stopping_word": stop or "",
        "truncated": finish == "context",
        "has_new_line": "\n" in text,
        "model": model.name,
        "prompt": model.tokenizer.decode([i for i in request.prompt if i < 1 << 31], skip_special_tokens=False),
        "generation_settings": asked.settings,
        **counts,
        "timings": timings([usage]),
    }


def _fields(found: dict[str, Any], wanted: list[str] | None) -> dict[str, Any]:
    """Those that are wanted, such as "content" and "timings/predicted_n"; all where none is named."""
    if not wanted:
        return found
    picked: dict[str, Any] = {}
    for name in wanted:
        value: Any = found
        for part in name.split("/"):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            picked[name] = value
    return picked


def _probability(model: ServedModel, body: NativeBody, info: TokenInfo) -> dict[str, Any]:
    """Of a token and its rivals: log-probabilities by the model, or probabilities after all settings."""
    after = body.post_sampling_probs

    def each(token: int, logprob: float | None) -> dict[str, Any]:
        found = {"id": token, "token": token_text(model.tokenizer, token)}
        found["bytes"] = list(token_bytes(model.tokenizer, token))
        if after:
            return {**found, "prob": 0.0 if logprob is None else math.exp(logprob)}
        return {**found, "logprob": logprob}

    top = [each(token, value) for token, value in info.top]
    return {**each(info.id, info.logprob), "top_probs" if after else "top_logprobs": top}


async def _stream(server: Server, model: ServedModel, body: NativeBody, asked: _Asked) -> AsyncIterator[dict[str, Any]]:
    finish: Finish = "stop"
    stop: str | None = None
    text, meter = "", meter_of(body)
    async with aclosing(server.run(model, asked.request)) as events:  # type: ignore[type-var]
        async for event in events:
            meter.see(event)
            if isinstance(event, Progress) and (progress := meter.progress()) is not None:
                chunk = {"index": asked.index, "content": "", "tokens": [], "stop": False, **progress}
                yield _fields(chunk, body.response_fields)
            elif isinstance(event, Piece):
                finish, stop = event.finish or finish, event.stop or stop
                text += event.text
                if event.text or event.tokens:
                    chunk = {"index": asked.index, "content": event.text, "stop": False}
                    chunk |= {"tokens": [info.id for info in event.tokens], **meter.timings()}
                    if body.n_probs:
                        chunk["completion_probabilities"] = [_probability(model, body, info) for info in event.tokens]
                    yield _fields(chunk, body.response_fields)
            elif isinstance(event, Done):
                ended = _ended(model, asked, finish, stop, text, event.usage)
                yield _fields({"content": "", "tokens": [], **ended}, body.response_fields)


@router.post("/lora-adapters")
async def absent(http: HttpRequest) -> Response:
    """A route of llama.cpp's that this server has not, by name."""
    raise ApiError(501, f"{http.url.path}: this server changes no adapters while it runs", code="not_supported")


@router.get("/lora-adapters")
async def adapters() -> Response:
    """There are none."""
    return JSONResponse([])


@router.post("/apply-template")
async def apply_template(body: TemplateBody, http: HttpRequest) -> Response:
    """The prompt that a conversation becomes."""
    model = await server_of(http).models.ready(body.model)
    messages, more = plain_messages(body.messages), body.chat_template_kwargs
    text = await asyncio.to_thread(render, model, messages, body.tools or None, more, body.add_generation_prompt)
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
    server_of(http).metrics.embedded(count)
    usage = {"prompt_tokens": count, "total_tokens": count}
    return JSONResponse({"object": "list", "model": found.name, "results": results, "usage": usage})
