"""From the text of an answer, as it comes, to a message: what was thought, what is said, which tools are called.

The formats are those that models are trained on, as their chat templates show:

    hermes   <tool_call>{"name": ..., "arguments": {...}}</tool_call>        (Hermes, Qwen and others)
    mistral  [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...], or [TOOL_CALLS]name[ARGS]{...}
    llama3   {"name": ..., "parameters": {...}}, alone, also after <|python_tag|>
    pythonic <|tool_call_start|>[name(key="value", ...), ...]<|tool_call_end|>, also without marks   (LFM2)

Braces and marks inside of strings end nothing. What looks like a call and is none is shown as it was written; a call
that has begun is passed on as it comes (`CallReader`). Wherever the text is cut, the message is the same.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

from kbit.serve.tool_calls import Arguments, CallBegun, CallReader

ToolFormat = Literal["hermes", "mistral", "llama3", "pythonic"]
_OPEN, _CLOSE = "<think>", "</think>"
_MARKS: dict[ToolFormat, tuple[str, ...]] = {
    "hermes": ("<tool_call>",),
    "mistral": ("[TOOL_CALLS]",),
    "llama3": ("<|python_tag|>",),
    "pythonic": ("<|tool_call_start|>",),
}
_ENDS = {"<tool_call>": "</tool_call>", "<|tool_call_start|>": "<|tool_call_end|>"}
_STYLES: dict[ToolFormat, Literal["named", "python"]] = {"mistral": "named", "pythonic": "python"}


@dataclass(frozen=True)
class Said:
    """A part of the message's text, or of what was thought before it."""

    text: str
    thought: bool = False


@dataclass(frozen=True)
class Called:
    """A call of a tool; its arguments are JSON, unless the answer was cut."""

    name: str
    arguments: str


Part = Said | CallBegun | Arguments


def tool_format(template: str) -> ToolFormat | None:
    """The format of tool calls that a chat template writes, or None: it knows of none."""
    if "tools" not in template:
        return None
    if "[TOOL_CALLS]" in template:
        return "mistral"
    if "<|tool_list_start|>" in template or "<|tool_call_start|>" in template:
        return "pythonic"
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
        self._state: Literal["begin", "thought", "text", "call", "closing"] = "thought" if thinking else "begin"
        self._reasoning = reasoning or thinking
        self._buffer = ""
        self._mark = ""  # which begins the call that is being read
        self._reader: CallReader | None = None
        self._after_call = False
        self._separated = False

    def push(self, text: str) -> list[Part]:
        """What follows from more of the text."""
        if self._tools is None and self._state == "text" and not self._after_call:  # nothing else can come
            return [Said(text)] if text else []
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
        elif stripped.startswith({"llama3": "{", "pythonic": "["}.get(self._tools or "hermes", "\0")):
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
        """Behind a mark."""
        if self._reader is None:
            self._reader = CallReader(self._names, _STYLES.get(self._tools or "hermes", ""))
        reader = self._reader
        parts: list[Part] = [*reader.push(self._buffer)]
        self._buffer = ""
        if end:
            parts += reader.finish()
        if not reader.over:
            return parts
        self._reader, self._buffer = None, reader.left
        if reader.called:
            self._after_call = True
            self._state = "closing" if self._mark in _ENDS else "text"
            if self._tools == "llama3":  # which writes several with semicolons between
                self._state, self._separated = "begin", True
            return parts
        self._state = "text"
        if self._tools == "llama3":
            self._tools = None
        return [Said(self._mark)] if self._mark else []

    def _closing(self, end: bool) -> list[Part]:
        """Behind a call: the mark that ends it, if it comes."""
        closing, stripped = _ENDS[self._mark], self._buffer.lstrip()
        if closing.startswith(stripped) and stripped != closing:
            if not end:
                return []
            stripped = ""  # the answer was cut within it
        self._buffer, self._state = stripped.removeprefix(closing), "text"
        return []


def joined(parts: Iterable[Part]) -> list[Said | Called]:
    """The parts of a whole answer: texts and thoughts in one piece each, and calls."""
    whole: list[Said | Called] = []
    for part in parts:
        last = whole[-1] if whole else None
        if isinstance(part, CallBegun):
            whole.append(Called(part.name, ""))
        elif isinstance(part, Arguments):
            assert isinstance(last, Called)
            whole[-1] = Called(last.name, last.arguments + part.text)
        elif isinstance(last, Said) and last.thought == part.thought:
            whole[-1] = Said(last.text + part.text, last.thought)
        else:
            whole.append(part)
    return whole


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
