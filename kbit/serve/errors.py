"""Errors as HTTP tells them: OpenAI's `Error` object, Anthropic's for its routes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kbit.engine.batch_engine import TooLongError
from kbit.engine.engine_thread import QueueFullError, StoppedError
from kbit.host.errors import KbitError, UnsupportedError, UsageError, one_line


class ApiError(Exception):
    """A request that is not answered.

    Args:
        status: of HTTP.
        message: one line: what is wrong, and what to do.
        code: a word for programs, or None.
        param: the field of the request that is wrong, or None.
        headers: of the response.
        details: more keys of the error object.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = dict(headers or {})
        self.details = dict(details or {})

    @property
    def kind(self) -> str:
        """OpenAI's name of such errors."""
        return {
            401: "authentication_error",
            403: "permission_error",
            404: "not_found_error",
            429: "rate_limit_error",
        }.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def openai(self) -> dict[str, Any]:
        """The body of the response."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": {**error, **self.details}}

    def anthropic(self) -> dict[str, Any]:
        """The body of the response, in Anthropic's words."""
        kinds = {413: "request_too_large", 503: "overloaded_error", 500: "api_error"}
        return {"type": "error", "error": {"type": kinds.get(self.status, self.kind), "message": self.message}}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that is wrong in a field."""
    return ApiError(400, message, param=param, code=code or "invalid_value")


# What an error that names flags of the command line calls the fields of a request.
_FLAGS = (
    "temperature",
    "top-k",
    "top-p",
    "min-p",
    "repetition-penalty",
    "presence-penalty",
    "frequency-penalty",
    "typical-p",
)


def api_error(error: Exception) -> ApiError:
    """What to tell a client of any error."""
    if isinstance(error, ApiError):
        return error
    text = one_line(error, 1000)
    if isinstance(error, TooLongError):
        # The name that llama.cpp's clients look for; OpenAI's is the code.
        numbers = {"type": "exceed_context_size_error", "n_prompt_tokens": error.tokens, "n_ctx": error.context}
        return ApiError(400, text, code="context_length_exceeded", details=numbers)
    if isinstance(error, QueueFullError):
        return ApiError(429, text, code="queue_full", headers={"Retry-After": str(error.retry_after)})
    if isinstance(error, StoppedError):
        return ApiError(503, text, code="shutting_down", headers={"Retry-After": "10"})
    if isinstance(error, (UsageError, UnsupportedError)):
        for flag in (*_FLAGS, "seed", "stop", "max-tokens"):
            name = flag.replace("-", "_")
            if text.startswith(f"--{flag} "):
                return bad_request(name + text[len(flag) + 2 :], name)
        return bad_request(text)
    if isinstance(error, KbitError):
        return ApiError(500, text, code="model_failed")
    return ApiError(500, f"internal error: {type(error).__name__}: {one_line(error)}", code="internal_error")
