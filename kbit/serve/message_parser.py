"""From the text of an answer, as it comes, to a message: what was thought, what is said, which tools are called.

The formats are those that models are trained on, as their chat templates show:

    hermes   <tool_call>{"name": ..., "arguments": {...}}</tool_call>        (Hermes, Qwen and others)
    mistral  [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...], or [TOOL_CALLS]name[ARGS]{...}
    llama3   {"name": ..., "parameters": {...}}, alone, also after <|python_tag|>

JSON is read by a JSON parser, so braces and marks inside of strings end nothing. What looks like a call and is none is
shown as it was written. Wherever the text is cut, the message is the same.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

ToolFormat = Literal["hermes", "mistral", "llama3"]
_OPEN, _CLOSE = "<think>", "</think>"
_MARKS: dict[ToolFormat, tuple[str, ...]] = {
    "hermes": ("<tool_call>",),
    "mistral": ("[TOOL_CALLS]",),
    "llama3": ("<|python_tag|>",),
}
_ENDS = {"<tool_call>": "</tool_call>"}
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class Said:
    """A part of the message's text, or of what was thought before it."""

    text: str
    thought: bool = False


@dataclass(frozen=True)
class Called:
    """A call of a tool; its arguments are JSON."""

    name: str
    arguments: str


Part = Said | Called


def tool_format(template: str) -> ToolFormat | None:
    """The format of tool calls that a chat template writes, or None: it knows of none."""
    if "tools" not in template:
        return None
    if "[TOOL_CALLS]" in template:
        return "mistral"
    if "<tool_call>" in template:
        return "hermes"
    if "<|python_tag|>" in template or '"parameters"' in template:
        return "llama3"
    return None


def thinks(template: str) -> bool:
    """Whether a chat template knows of thoughts before an answer."""
    return _CLOSE in template


def without_thoughts(template: str, prompt: str) -> str:
    """What a prompt must end with so that the answer has no thoughts, where the template did not see to it."""
    for begin, end in ((_OPEN, _CLOSE), ("<|START_THINKING|>", "<|END_THINKING|>")):
        if end in template:
            if prompt.rstrip().endswith(begin):
                return end
            # A template that knows the switch has obeyed it.
            return "" if "enable_thinking" in template or begin == _OPEN else begin + end
    return ""


class MessageParser:
    """Reads one answer.

    Args:
        tools: how calls are written; None: there are none.
        names: of the tools there are; other calls are text.
        reasoning: thoughts stand between <think> and </think> before all else.
        thinking: the prompt ended within a thought.
    """

    def __init__(
        self,
        tools: ToolFormat | None = None,
        names: Collection[str] = (),
        *,
        reasoning: bool = False,
        thinking: bool = False,
    ) -> None:
        self._tools = tools
        self._names = frozenset(names)
        self._state: Literal["begin", "thought", "text", "call"] = "thought" if thinking else "begin"
        self._reasoning = reasoning or thinking
        self._buffer = ""
        self._mark = ""  # which begins the call that is being read
        self._after_call = False
        self._separated = False

    def push(self, text: str) -> list[Part]:
        """What follows from more of the text."""
        self._buffer += text
        return self._read(end=False)

    def finish(self) -> list[Part]:
        """What was held back, now that no more comes."""
        return self._read(end=True)

    def _read(self, *, end: bool) -> list[Part]:
        parts: list[Part] = []
        while True:
            before = (self._state, len(self._buffer))
            parts += getattr(self, f"_{self._state}")(end)
            if (self._state, len(self._buffer)) == before:
                return parts

    def _begin(self, end: bool) -> list[Part]:
        """Nothing but white space so far."""
        stripped = self._buffer.lstrip()
        if self._separated and stripped.startswith(";"):
            self._buffer, self._separated = stripped[1:], False
            return []
        first = (_OPEN,) if self._reasoning else ()
        if not stripped or any(mark.startswith(stripped) and mark != stripped for mark in first):
            if not end:
                return []
        elif self._reasoning and stripped.startswith(_OPEN):
            self._buffer = stripped[len(_OPEN) :]
            self._state = "thought"
            return []
        elif self._tools == "llama3" and stripped.startswith("{"):
            self._mark, self._state = "", "call"
            return []
        self._state = "text"
        return []

    def _thought(self, end: bool) -> list[Part]:
        shown, found, self._buffer = _until(self._buffer, (_CLOSE,), spaces=True, end=end)
        if found:
            self._buffer = self._buffer.lstrip()
            self._state, self._reasoning, self._after_call = "begin", False, True
        return [Said(shown, thought=True)] if shown else []

    def _text(self, end: bool) -> list[Part]:
        if self._after_call:  # white space after a call or a thought is layout
            self._buffer = self._buffer.lstrip()
            if not self._buffer:
                return []
            self._after_call = False
        if self._tools is None:
            shown, self._buffer = self._buffer, ""
        else:
            shown, mark, self._buffer = _until(self._buffer, _MARKS[self._tools], spaces=True, end=end)
            if mark:
                self._mark, self._state = mark, "call"
        return [Said(shown)] if shown else []

    def _call(self, end: bool) -> list[Part]:
        """Behind a mark: waits for a whole call."""
        closing = _ENDS.get(self._mark)
        found = _calls(self._buffer, self._tools)
        if found is not None:
            calls, rest = found
            if closing is not None and not end:
                stripped = rest.lstrip()
                if closing.startswith(stripped) and stripped != closing:
                    return []  # its end is still to come
            known = calls and all(call.name in self._names for call in calls)
            if known and (closing is None or rest.lstrip().startswith(closing) or (end and not rest.strip())):
                self._buffer = rest.lstrip().removeprefix(closing or "")
                self._state, self._after_call = "text", True
                if self._tools == "llama3":  # which writes several with semicolons between
                    self._state, self._separated = "begin", True
                return list(calls)
        elif not end and not _hopeless(self._buffer, self._tools):
            return []
        shown, self._buffer = self._mark + self._buffer, ""
        if closing is not None and (at := shown.find(closing)) >= 0:  # what comes after it may be a call again
            shown, self._buffer = shown[: at + len(closing)], shown[at + len(closing) :]
        self._state = "text"
        if self._tools == "llama3":
            self._tools = None
        return [Said(shown)]


def _until(text: str, marks: tuple[str, ...], *, spaces: bool, end: bool) -> tuple[str, str, str]:
    """(what can be shown, the mark behind it or "", what is left), without white space right before a mark."""
    at, mark = min(((at, mark) for mark in marks if (at := text.find(mark)) >= 0), default=(-1, ""))
    if mark:
        shown = text[:at]
        return shown.rstrip() if spaces else shown, mark, text[at + len(mark) :]
    if end:
        return text, "", ""
    keep = len(text)
    for mark in marks:
        for size in range(min(len(mark) - 1, len(text)), 0, -1):
            if text.endswith(mark[:size]):
                keep = min(keep, len(text) - size)
                break
    if spaces:
        keep = len(text[:keep].rstrip())
    return text[:keep], "", text[keep:]


def _calls(text: str, tools: ToolFormat | None) -> tuple[list[Called], str] | None:
    """The calls that a text begins with, and what is left; None: it does not hold a whole one (yet)."""
    begin = len(text) - len(text.lstrip())
    if tools == "mistral" and text[begin : begin + 1] not in ("[", "{"):
        name, brace, rest = text.partition("{")
        if not brace:
            return None
        found = _decoded(brace + rest, 0)
        if found is None:
            return None
        name = name.partition("[")[0].strip()  # [CALL_ID]..., [ARGS]
        return [Called(name, json.dumps(found[0], ensure_ascii=False))], found[1]
    found = _decoded(text, begin)
    if found is None:
        return None
    value, rest = found
    calls = [_called(each) for each in (value if isinstance(value, list) else [value])]
    return [call for call in calls if call is not None] if all(calls) else [], rest


def _decoded(text: str, begin: int) -> tuple[Any, str] | None:
    try:
        value, stop = _DECODER.raw_decode(text, begin)
    except (ValueError, RecursionError):
        return None
    # A number or word may go on; an object and a list have an end of their own.
    return (value, text[stop:]) if isinstance(value, (dict, list)) else None


def _called(value: Any) -> Called | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        return Called(value["name"], arguments)
    return Called(value["name"], json.dumps(arguments, ensure_ascii=False))


def _hopeless(text: str, tools: ToolFormat | None) -> bool:
    """Whether no text that begins like this holds a call."""
    stripped = text.lstrip()
    if not stripped or tools == "mistral":
        return False
    return stripped[0] not in "{["
