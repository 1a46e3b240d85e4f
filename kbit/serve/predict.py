"""POST /predict: the route that Google's Vertex AI calls in a container, with several requests in one body."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import BaseModel, Field
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from kbit.serve.basics import embeddings
from kbit.serve.bridge import together
from kbit.serve.chat import chat_completions
from kbit.serve.completions import completions
from kbit.serve.errors import bad_request
from kbit.serve.schemas import Body, ChatBody, CompletionBody, EmbeddingBody

router = APIRouter()
Route = Callable[[Any, HttpRequest], Awaitable[Response]]
# What an instance says it is, in llama-server's words.
_FORMATS: dict[str, tuple[type[BaseModel], Route]] = {
    "chatCompletions": (ChatBody, chat_completions),
    "completions": (CompletionBody, completions),
    "embeddings": (EmbeddingBody, embeddings),
}


class PredictBody(Body):
    """POST /predict."""

    instances: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=256)]
    parameters: dict[str, Any] | None = None


@router.post("/predict")
async def predict(body: PredictBody, http: HttpRequest) -> Response:
    """Answers several requests, each as its own route would."""
    if body.parameters:
        raise bad_request("parameters: give each instance its own settings", "parameters")
    runs = [_run(instance, index, http) for index, instance in enumerate(body.instances)]
    return JSONResponse({"predictions": await together(runs)})


async def _run(instance: dict[str, Any], index: int, http: HttpRequest) -> Any:
    kind = instance.get("@requestFormat")
    if kind not in _FORMATS:
        known = ", ".join(_FORMATS)
        raise bad_request(f"instances[{index}].@requestFormat {kind!r}: use one of {known}", "instances")
    if instance.get("stream"):
        raise bad_request(f"instances[{index}].stream: this route streams nothing: leave it out", "instances")
    schema, route = _FORMATS[kind]
    request = schema.model_validate({key: value for key, value in instance.items() if key != "@requestFormat"})
    response = await route(request, http)
    return json.loads(bytes(response.body))
