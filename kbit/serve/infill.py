"""POST /infill: code between what stands before and after, as llama.cpp's editor plug-ins ask for it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from kbit.serve.errors import bad_request
from kbit.serve.models import ServedModel
from kbit.serve.native import NativeBody, answer
from kbit.serve.state import server_of

if TYPE_CHECKING:
    from kbit.text.tokenizer import Tokenizer

router = APIRouter()
# Before, after and between, as models are trained: Qwen2.5-Coder and CodeGemma, StarCoder and Granite, DeepSeek-Coder,
# Code Llama.
_MARKS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
)
# The begin of a repository's files, and of each (Qwen2.5-Coder); without them files stand one after another.
_REPOSITORY, _FILE = "<|repo_name|>", "<|file_sep|>"
# Tokens of the text around that are looked at: most before, and a part after.
_AFTER_SHARE = 4


class ExtraFile(BaseModel):
    """A file that is context."""

    model_config = ConfigDict(strict=True)

    filename: str = "tmp"
    text: str


class InfillBody(NativeBody):
    """POST /infill."""

    input_prefix: str = ""
    input_suffix: str = ""
    input_extra: list[ExtraFile] | None = None


@router.post("/infill")
async def infill(body: InfillBody, http: HttpRequest) -> Response:
    """What stands between two texts."""
    server = server_of(http)
    model = await server.models.ready(body.model)
    ids = await asyncio.to_thread(_prompt, body, model)
    return await answer(server, model, body, [ids], http)


def _prompt(body: InfillBody, model: ServedModel) -> list[int]:
    """The tokens of a request: other files, what stands before and after, and a text that the answer goes on from."""
    tokenizer = model.tokenizer
    marks = _marks(tokenizer)
    if marks is None:
        raise bad_request(
            f"the model {model.name} was not trained to fill in: it has no tokens like {', '.join(_MARKS[0])}: serve a "
            "code model, such as Qwen2.5-Coder",
            "model",
        )
    if body.prompt is not None and not isinstance(body.prompt, str):
        raise bad_request("prompt: expected text", "prompt")

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    before, after = encode(body.input_prefix + (body.prompt or "")), encode(body.input_suffix)
    # What is far from the gap says least: half of the context is for both sides, a quarter of that for what follows.
    room = model.generating().context // 2
    after = after[: max(room // _AFTER_SHARE, room - len(before))]
    before = before[-(room - len(after)) :]
    extra: list[int] = []
    repository, file = tokenizer.token_id(_REPOSITORY), tokenizer.token_id(_FILE)
    for each in body.input_extra or []:
        named = [file, *encode(f"{each.filename}\n")] if file is not None else encode("\n\n")
        extra += [*named, *encode(each.text)]
    if extra and repository is not None and file is not None:
        extra = [repository, *encode("myproject\n"), *extra, file, *encode("filename\n")]
    left = max(0, room // 2)
    prefix, suffix, middle = marks
    start = [] if tokenizer.bos_id is None or not encode_adds_bos(tokenizer) else [tokenizer.bos_id]
    return [*start, *extra[-left:], prefix, *before, suffix, *after, middle]


def encode_adds_bos(tokenizer: Tokenizer) -> bool:
    """Whether texts begin with the token that begins one."""
    return tokenizer.encode("a")[:1] == [tokenizer.bos_id]


def _marks(tokenizer: Tokenizer) -> tuple[int, int, int] | None:
    for names in _MARKS:
        before, after, between = (tokenizer.token_id(name) for name in names)
        if before is not None and after is not None and between is not None:
            return before, after, between
    return None
