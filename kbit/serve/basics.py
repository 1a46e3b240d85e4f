"""What is not generation: models, health, figures, tokens, vectors."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response

from kbit.serve.conversation import plain_messages, render
from kbit.serve.errors import ApiError, bad_request
from kbit.serve.models import ServedModel
from kbit.serve.schemas import DetokenizeBody, EmbeddingBody, TokenizeBody
from kbit.serve.state import STALLED_SECONDS, Server, server_of
from kbit.text.token_text import token_text

router = APIRouter()
_MOST_TEXTS = 2048


@router.get("/health")
@router.get("/v1/health", include_in_schema=False)
async def health(http: HttpRequest) -> Response:
    """Whether requests can be answered now. It asks nothing of the engine, so it never waits."""
    server = server_of(http)
    first, thread = server.models.first, server.bridge.thread
    if not thread.alive or thread.stalled_seconds > STALLED_SECONDS:
        return _unwell(f"the engine has ended no step for {thread.stalled_seconds:.0f} seconds")
    if first.state == "failed":
        return _unwell(f"{first.name} could not be loaded: {first.error}")
    if first.state != "ready":
        done, total = server.models.progress
        return _unwell("loading model", progress=done / total if total else 0.0)
    return JSONResponse({"status": "ok"})


def _unwell(message: str, **more: Any) -> Response:
    error = ApiError(503, message, code="unavailable", details=more)
    return JSONResponse(error.openai(), status_code=503)


@router.get("/metrics")
async def metrics(http: HttpRequest) -> Response:
    """Figures for Prometheus."""
    server = server_of(http)
    _refuse_without("metrics", server)
    headers = {"Process-Start-Time-Unix": str(int(server.started))}
    text = server.metrics.text()
    return PlainTextResponse(text, headers=headers, media_type="text/plain; version=0.0.4; charset=utf-8")


def _refuse_without(what: str, server: Server) -> None:
    if what in server.without:
        raise ApiError(501, f"this server was started with --without {what}", code="not_supported")


@router.get("/v1/models")
@router.get("/models", include_in_schema=False)
async def models(http: HttpRequest) -> Response:
    """All models, loaded or not."""
    served = server_of(http).models
    return JSONResponse({"object": "list", "data": [_model(each, served.options.tags) for each in served]})


@router.get("/v1/models/{name:path}")
async def model(name: str, http: HttpRequest) -> Response:
    """One of them."""
    served = server_of(http).models
    return JSONResponse(_model(served.named(name), served.options.tags))


def _model(model: ServedModel, tags: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {"id": model.name, "object": "model", "created": model.created, "owned_by": "kbit"}
    found |= {"state": model.state, "aliases": list(model.aliases), "tags": list(tags)}
    if model.engine is not None:
        found["max_model_len"] = model.engine.context
    return found


@router.get("/props")
async def props(http: HttpRequest, model: str | None = None) -> Response:
    """What the server chose."""
    server = server_of(http)
    found = await server.models.ready(model)
    engine = found.generating()
    assert found.loaded is not None
    assert found.defaults is not None
    return JSONResponse(
        {
            "model_alias": found.name,
            "model_path": found.path,
            "n_ctx": engine.context,
            "total_slots": server.models.options.seats,
            "cache_tokens": engine.pool.count * 64,
            "cache_bytes": engine.pool.nbytes,
            "weights_bytes": found.loaded.decoder.weights.nbytes,
            "backend": found.loaded.backend_description,
            "default_generation_settings": {
                "n_ctx": engine.context,
                "params": {**asdict(found.defaults.params), "n_predict": found.most_tokens(None)},
            },
            "sampling_defaults": {**asdict(found.defaults.params), "origin": found.defaults.origin},
            "chat_template": found.tokenizer.chat_template,
            "system_fingerprint": f"build-{found.fingerprint}",
        }
    )


@router.get("/slots")
async def slots(http: HttpRequest) -> Response:
    """How much is under way, and what it takes: an entry for every seat of every model that is loaded."""
    server = server_of(http)
    _refuse_without("slots", server)
    found: list[dict[str, object]] = []
    for model, engine in server.models.with_engines():
        if model.loaded is not None:
            together = {  # seats share all there is
                "model": model.name,
                "n_ctx": engine.context,
                "running": engine.running,
                "waiting": engine.waiting,
                "requests": len(engine),
                "weights_bytes": model.loaded.decoder.weights.nbytes,
                "cache_bytes": engine.pool.nbytes,
                "cache_used": 1 - engine.pool.available / max(1, engine.pool.count),
            }
            seats = server.models.options.seats
            found += [{"id": seat, "is_processing": seat < engine.running, **together} for seat in range(seats)]
    return JSONResponse(found)


@router.post("/tokenize")
@router.post("/v1/tokenize", include_in_schema=False)
async def tokenize(body: TokenizeBody, http: HttpRequest) -> Response:
    """A text's tokens, or a conversation's."""
    found = await server_of(http).models.ready(body.model)
    tokenizer = found.tokenizer
    text = body.prompt if body.content is None else body.content
    if (text is None) == (body.messages is None):
        raise bad_request("give either a prompt or messages", "prompt")

    def encode() -> list[int]:
        if body.messages is not None:
            rendered = render(found, plain_messages(body.messages), None, None, body.add_generation_prompt)
            return tokenizer.encode(rendered, add_special_tokens=False)
        # llama.cpp's field says no where it is missing, vLLM's yes.
        special = bool(body.add_special) if body.content is not None else body.add_special_tokens is not False
        return tokenizer.encode(text or "", add_special_tokens=special)

    ids = await asyncio.to_thread(encode)
    answer: dict[str, Any] = {"tokens": ids, "count": len(ids), "max_model_len": found.generating().context}
    if body.with_pieces:
        answer["tokens"] = [{"id": token, "piece": token_text(tokenizer, token)} for token in ids]
    if body.return_token_strs:
        answer["token_strs"] = [token_text(tokenizer, token) for token in ids]
    return JSONResponse(answer)


@router.post("/detokenize")
@router.post("/v1/detokenize", include_in_schema=False)
async def detokenize(body: DetokenizeBody, http: HttpRequest) -> Response:
    """The text of tokens."""
    found = await server_of(http).models.ready(body.model)
    tokenizer = found.tokenizer
    wrong = [token for token in body.tokens if not 0 <= token < 1 << 31]
    if wrong:
        raise bad_request(f"tokens: {wrong[0]} is no token id", "tokens")
    text = tokenizer.decode(body.tokens, skip_special_tokens=False)
    return JSONResponse({"prompt": text, "content": text})


@router.post("/v1/embeddings")
@router.post("/embeddings", include_in_schema=False)
async def embeddings(body: EmbeddingBody, http: HttpRequest) -> Response:
    """Vectors of texts."""
    found = await server_of(http).models.ready(body.model)
    embedder = found.embedding()
    if isinstance(body.input, list) and not all(isinstance(each, str) for each in body.input):
        raise bad_request("input: this server embeds texts, not token ids: send text", "input")
    texts = [body.input] if isinstance(body.input, str) else [str(each) for each in body.input]
    if not texts or len(texts) > _MOST_TEXTS or not all(texts):
        raise bad_request(f"input: give 1 to {_MOST_TEXTS} texts, none of them empty", "input")
    async with found.lock:
        made = await asyncio.to_thread(embedder.embed, texts, "", "refuse")
    width = made.vectors.shape[1]
    if body.dimensions not in (None, width):
        raise bad_request(f"dimensions: this model's vectors have {width}: leave it out", "dimensions")

    def shown(vector: Any) -> Any:
        if body.encoding_format == "base64":
            return base64.b64encode(np.asarray(vector, dtype="<f4").tobytes()).decode()
        return vector.tolist()

    data = [{"object": "embedding", "index": i, "embedding": shown(v)} for i, v in enumerate(made.vectors)]
    count = sum(made.tokens)
    server_of(http).metrics.embedded(count)
    usage = {"prompt_tokens": count, "total_tokens": count}
    return JSONResponse({"object": "list", "data": data, "model": found.name, "usage": usage})
