"""The requests of OpenAI's API, and what kbit adds to them.

A field that no class names is refused: nothing a client asks for is ignored without a word. What cannot change an
answer here (accounting, caching hints) is accepted and listed as such.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Texts = str | list[str]
LogitBias = dict[str, float]
_Count = Annotated[int, Field(ge=0, le=1 << 31)]


class Body(BaseModel):
    """Of a request: no other fields than these."""

    model_config = ConfigDict(extra="forbid")


class StreamOptions(BaseModel):
    """What a stream has besides its text."""

    model_config = ConfigDict(extra="ignore")

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class SamplingFields(Body):
    """How tokens are chosen; None: as the model's defaults say."""

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: _Count | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: int | None = None
    stop: Texts | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    logit_bias: LogitBias | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    max_tokens: _Count | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    regex: str | None = None
    grammar: str | None = None
    response_format: dict[str, Any] | None = None
    skip_special_tokens: bool = True
    stop_repetition: bool = False
    typical_p: float | None = None
    # llama.cpp's names of the same.
    repeat_penalty: float | None = None
    typ_p: float | None = None
    n_predict: Annotated[int, Field(ge=-1, le=1 << 31)] | None = None
    json_schema: dict[str, Any] | bool | None = None
    timings_per_token: bool = False
    return_progress: bool = False
    # Accepted, as they change no answer: accounting and hints.
    user: str | None = None
    cache_prompt: bool = True
    id_slot: int | None = None

    @property
    def most_tokens(self) -> int | None:
        """Tokens of the answer at most, by either name; None: as many as there is room for, or as is usual."""
        return self.n_predict if self.max_tokens is None and self.n_predict != -1 else self.max_tokens


class CompletionBody(SamplingFields):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]] | list[str | list[int]] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Annotated[int, Field(ge=0, le=128)] | None = None
    suffix: str | None = None


class ToolFunction(BaseModel):
    """A function that a model may call."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(BaseModel):
    """A tool: functions only."""

    type: Literal["function"]
    function: ToolFunction


class ChatBody(SamplingFields):
    """POST /v1/chat/completions."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_completion_tokens: _Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    # llama.cpp's: "none" leaves thoughts in the content, as they were written.
    reasoning_format: Literal["none", "auto", "deepseek"] = "auto"
    verbose: bool | None = None
    modalities: list[str] | None = None
    # Accepted, as they change no answer: accounting and hints.
    store: bool | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    safety_identifier: str | None = None
    verbosity: str | None = None
    prediction: dict[str, Any] | None = None
    # Known, and refused by name where they ask for something.
    audio: dict[str, Any] | None = None
    functions: list[dict[str, Any]] | None = None
    function_call: str | dict[str, Any] | None = None
    web_search_options: dict[str, Any] | None = None
    moderation: dict[str, Any] | None = None


class TokenizeBody(Body):
    """POST /tokenize."""

    model: str | None = None
    prompt: str | None = None
    content: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_special: bool | None = None
    add_generation_prompt: bool = True
    return_token_strs: bool = False
    with_pieces: bool = False
    parse_special: bool = True


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[int]


class EmbeddingBody(Body):
    """POST /v1/embeddings."""

    input: str | list[str] | list[int] | list[list[int]]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    user: str | None = None


class RerankBody(Body):
    """POST /v1/rerank, as Jina and Cohere have it."""

    query: str
    documents: list[str]
    model: str | None = None
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool = False
