"""Calls of tools, read piece by piece as a model writes them: behind a mark, one call or a list of them.

    {"name": "find", "arguments": {...}}     or with "parameters"; the arguments are JSON and passed on as they come
    find[ARGS]{...}                          Mistral's: a name, and the arguments
    find(what="x", most=3)                   as Python has it; the arguments are made JSON, one after another

A call has begun for good once its name, which must be known, and the beginning of its arguments are there. Until then
nothing is passed on, and what turns out to be no call is given back. What is passed on depends on the text alone, not
on where it was cut.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

# Characters that may stand before it is clear what a name belongs to.
_LONGEST_NAME = 256
_JSON_HEAD = re.compile(r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
_NAMED_HEAD = re.compile(r"([^\[{]*?)\s*(?:\[CALL_ID\][^\[{]*)?(?:\[ARGS\]\s*)?(?=\{)")
_PYTHON_HEAD = re.compile(r"([A-Za-z_][\w.\-]*)\s*\(\s*(?=\)|[A-Za-z_]\w*\s*=)")
_KEYWORD = re.compile(r"\s*([A-Za-z_]\w*)\s*=\s*")
_BRACKETS = {"{": 1, "[": 1, "(": 1, "}": -1, "]": -1, ")": -1}


@dataclass(frozen=True)
class CallBegun:
    """The beginning of a call of a tool."""

    name: str


@dataclass(frozen=True)
class Arguments:
    """A part of the arguments of the call that began last: all of them together are JSON, unless the answer was cut."""

    text: str


class _Scan:
    """Finds the end of a bracket, or of what stands in one, in text that comes in pieces.

    Args:
        quotes: characters that strings stand between.
        depth: brackets that are open already.
    """

    def __init__(self, quotes: str = '"', depth: int = 0) -> None:
        self._quotes, self.depth = quotes, depth
        self._quote, self._escaped = "", False

    def end(self, text: str, stops: str = "") -> int | None:
        """Where the last bracket has closed, or one of `stops` stands outside of all; None: not in this piece."""
        for at, letter in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._quote:
                self._escaped = letter == "\\"
                if letter == self._quote:
                    self._quote = ""
            elif letter in self._quotes:
                self._quote = letter
            elif not self.depth and letter in stops:
                return at
            elif letter in _BRACKETS:
                self.depth += _BRACKETS[letter]
                if self.depth <= 0 and not stops:
                    return at + 1
        return None


class CallReader:
    """Reads what stands behind a mark.

    Args:
        names: of the tools there are.
        style: what may stand there besides JSON: "named" is Mistral's form, "python" calls.

    Attributes:
        over: nothing more of it comes.
        left: text that is no part of it, once it is over.
        called: whether there was a call.
    """

    def __init__(self, names: Collection[str], style: Literal["", "named", "python"] = "") -> None:
        self.over, self.left, self.called = False, "", False
        self._names, self._style = names, style
        self._buffer = ""
        self._taken = ""  # of a list, and given back where no call follows
        self._listed = False
        self._state: Literal["open", "item", "arguments", "tail", "keyword", "value", "between"] = "open"
        self._scan, self._scanned = _Scan(), 0  # characters of the buffer that it has seen
        self._inner = False  # the arguments stand in an object
        self._written = 0  # keywords of a call

    def push(self, text: str) -> list[CallBegun | Arguments]:
        """What follows from more of the text."""
        self._buffer += text
        return self._read(end=False)

    def finish(self) -> list[CallBegun | Arguments]:
        """The same, now that no more comes: then it is over."""
        found = self._read(end=True)
        if not self.over:
            self._stop("" if self._state in ("arguments", "tail", "keyword", "value") else self._buffer)
        return found

    def _read(self, *, end: bool) -> list[CallBegun | Arguments]:
        found: list[CallBegun | Arguments] = []
        while not self.over:
            before = (self._state, len(self._buffer))
            found += getattr(self, f"_{self._state}")(end)
            if (self._state, len(self._buffer)) == before:
                break
        return found

    def _stop(self, left: str) -> None:
        self.over, self.left, self._buffer = True, self._taken + left, ""

    def _open(self, end: bool) -> list[CallBegun | Arguments]:
        stripped = self._buffer.lstrip()
        if stripped.startswith("["):
            cut = len(self._buffer) - len(stripped) + 1
            self._taken, self._buffer, self._listed = self._buffer[:cut], self._buffer[cut:], True
        if stripped:
            self._state = "item"
        return []

    def _item(self, end: bool) -> list[CallBegun | Arguments]:
        """A call, or none."""
        text = self._buffer.lstrip()
        if not text:
            return []
        if text.startswith("{"):
            return self._json_item(text)
        if self._style == "named" and not self._listed:
            head = _NAMED_HEAD.match(text)
            if head is not None and head[1].strip() in self._names and head.end() <= _LONGEST_NAME:
                return self._begin(head[1].strip(), text[head.end() :], "arguments", _Scan())
            if head is not None or len(text) > _LONGEST_NAME:
                self._stop(self._buffer)
            return []
        if self._style == "python" and self._listed:
            head = _PYTHON_HEAD.match(text)
            if head is not None and head[1] in self._names and head.end() <= _LONGEST_NAME:
                return self._begin(head[1], text[head.end() :], "keyword", _Scan())
            unclear = re.fullmatch(r"[A-Za-z_][\w.\-]*\s*(\(\s*([A-Za-z_]\w*\s*)?)?", text)
            if head is None and unclear is not None and len(text) <= _LONGEST_NAME:
                return []
        self._stop(self._buffer)
        return []

    def _json_item(self, text: str) -> list[CallBegun | Arguments]:
        head = _JSON_HEAD.match(text)
        if head is not None and (name := _string(head[1])) is not None:
            if name in self._names:
                return self._begin(name, text[head.end() :], "arguments", _Scan())
            self._stop(self._buffer)
            return []
        stop = self._next_end(text)
        if stop is None:
            return []  # its keys may come in another order
        call = _whole(text[:stop])
        if call is None or call[0] not in self._names:
            self._stop(self._buffer)
            return []
        return [*self._begin(call[0], text[stop:], "between", _Scan()), Arguments(call[1])]

    def _begin(
        self, name: str, rest: str, state: Literal["arguments", "keyword", "between"], scan: _Scan
    ) -> list[CallBegun | Arguments]:
        self._inner = state == "arguments" and self._buffer.lstrip().startswith("{")
        self._buffer, self._state, self._scan, self._scanned = rest, state, scan, 0
        self._taken, self._written, self.called = "", 0, True
        return [CallBegun(name)]

    def _arguments(self, end: bool) -> list[CallBegun | Arguments]:
        """Within an object: what comes is passed on."""
        stop = self._scan.end(self._buffer)
        shown = self._buffer[:stop]
        self._buffer = "" if stop is None else self._buffer[stop:]
        if stop is not None:
            self._state, self._scan = ("tail", _Scan(depth=1)) if self._inner else ("between", _Scan())
        return [Arguments(shown)] if shown else []

    def _tail(self, end: bool) -> list[CallBegun | Arguments]:
        """What the object that the arguments are in has besides: an id, and its end."""
        stop = self._scan.end(self._buffer)
        self._buffer = "" if stop is None else self._buffer[stop:]
        if stop is not None:
            self._state = "between"
        return []

    def _keyword(self, end: bool) -> list[CallBegun | Arguments]:
        """In the brackets of a Python call: name= or the end."""
        text = self._buffer.lstrip()
        if text.startswith(")"):
            self._buffer, self._state = text[1:], "between"
            return [Arguments("}" if self._written else "{}")]
        if self._written and text.startswith(","):
            text = text[1:].lstrip()
            if text.startswith(")"):
                self._buffer = text
                return []
        if _KEYWORD.match(text) is not None:
            self._state, self._buffer = "value", text
            self._scan, self._scanned = _Scan("\"'"), 0
            return []
        if not text or re.fullmatch(r"[A-Za-z_]\w*\s*", text):
            return []
        self._stop(self._buffer)  # something that calls have not: they end here
        return [Arguments("}" if self._written else "{}")]

    def _value(self, end: bool) -> list[CallBegun | Arguments]:
        """Of a keyword: passed on as JSON when it is whole."""
        head = _KEYWORD.match(self._buffer)
        assert head is not None
        text = self._buffer[head.end() :]
        stop = self._next_end(text, ",)")
        if stop is None:
            return []
        before = ", " if self._written else "{"
        self._written += 1
        self._buffer, self._state = text[stop:], "keyword"
        return [Arguments(f"{before}{json.dumps(head[1])}: {_literal(text[:stop].strip())}")]

    def _next_end(self, text: str, stops: str = "") -> int | None:
        """`_Scan.end` in the rest of the buffer, of which what was seen is not looked at again."""
        stop = self._scan.end(text[self._scanned :], stops)
        if stop is not None:
            return self._scanned + stop
        self._scanned = len(text)
        return None

    def _between(self, end: bool) -> list[CallBegun | Arguments]:
        """After a call: another, where there is a list of them, or its end."""
        if not self._listed:
            self._stop(self._buffer)
            return []
        text = self._buffer.lstrip()
        if text.startswith("]"):
            self._stop(text[1:])
        elif text.startswith(","):
            self._taken, self._buffer, self._state = ",", text[1:], "item"
            self._scan, self._scanned = _Scan(), 0
        elif text:
            self._stop(self._buffer)
        return []


def _string(text: str) -> str | None:
    """A string of JSON, or None: it is none."""
    try:
        return str(json.loads(text))
    except ValueError:
        return None


def _whole(text: str) -> tuple[str, str] | None:
    """(name, arguments) of an object that is a call, whatever the order of its keys; None: it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value.get("name"), str):
        return None
    arguments: Any = value.get("arguments", value.get("parameters", {}))
    return value["name"], arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _literal(text: str) -> str:
    """A literal of Python, or of JSON, as JSON; what is neither, as a string."""
    for read in (json.loads, ast.literal_eval):
        try:
            return json.dumps(read(text), ensure_ascii=False, allow_nan=False)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            continue
    return json.dumps(text, ensure_ascii=False)
