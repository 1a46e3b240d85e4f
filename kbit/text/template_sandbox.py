"""A Jinja environment for programs that come with a checkpoint: no way out, and no way to hang or eat the memory.

A chat template is code by whoever wrote the checkpoint. Jinja's immutable sandbox keeps it away from the insides of
Python, but not from `{% for %}` inside `{% for %}`, `"a" * 10**10` or forty doublings of a string. Here every render
has a budget: of steps (loop iterations, calls, elements a filter walks over) and of characters it makes. The hooks are
the ones Jinja offers (`call`, `call_binop`, `concat`, `finalize`, filters) and a rewrite of the syntax tree for the two
it lacks, loops and the `~` operator. Constant folding is off, so nothing runs while a template is compiled.

What stays possible is slow work inside one C-level operation on data within the budget, for example comparing two
large nested lists: seconds, not hours.
"""

from __future__ import annotations

import functools
import json
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextvars import ContextVar
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_STEPS = 5_000_000
MAX_CHARACTERS = 1 << 26
_CALL_COST = 20  # steps a call counts for, and a filter half of it, by the time they take
_NODE_COST = 16  # characters a list or dict entry counts for, so that containers are bounded with the text
_MAX_WIDTH = 1000  # columns a padding or indentation may ask for
_MAX_INTEGER_BITS = 4096

# Filters that look at no more than a few elements of their argument.
_CONSTANT_TIME = {"abs", "attr", "count", "d", "default", "first", "float", "int", "items", "last", "length", "round"}
# Filters that turn their arguments into text, whatever these are.
_TEXT_MAKING = {
    *("capitalize", "center", "e", "escape", "forceescape", "format", "indent", "join", "lower", "replace", "safe"),
    *("string", "striptags", "title", "tojson", "trim", "truncate", "upper", "urlencode", "wordcount"),
}
_WIDTH_FILTERS = {"batch", "center", "indent", "slice", "tojson"}
# Filters no chat template needs, whose output can be much larger than their input.
_REMOVED_FILTERS = ("filesizeformat", "pprint", "random", "urlize", "wordwrap", "xmlattr")
_WIDTH_METHODS = {"center", "ljust", "rjust", "zfill"}
_REFUSED_METHODS = {"encode", "expandtabs", "maketrans", "to_bytes", "translate"}


class TemplateRefusal(TemplateError):
    """The template called raise_exception: it does not accept these messages."""


class Budget:
    """What one render may still spend."""

    def __init__(self) -> None:
        self.steps = MAX_STEPS
        self.characters = MAX_CHARACTERS

    def spend_steps(self, count: int) -> None:
        self.steps -= count
        if self.steps < 0:
            raise SecurityError(f"it takes more than {MAX_STEPS} steps")

    def spend_characters(self, count: int) -> None:
        self.characters -= count
        if self.characters < 0:
            raise SecurityError(f"it makes more than {MAX_CHARACTERS} characters of text")

    def spend_on(self, value: Any) -> int:
        """Spends the characters a value has as text, elements of containers included; returns them.

        Containers may hold one object many times: the walk counts it each time, as its text would, and stops when the
        budget is gone.
        """
        before = self.characters
        stack = [value]
        while stack:
            item = stack.pop()
            if isinstance(item, str):
                self.spend_characters(len(item))
            elif isinstance(item, Mapping):
                self.spend_characters(_NODE_COST * (1 + len(item)))
                stack.extend(item.keys())
                stack.extend(item.values())
            elif isinstance(item, (list, tuple, set, frozenset)):
                self.spend_characters(_NODE_COST * (1 + len(item)))
                stack.extend(item)
            else:
                self.spend_characters(_NODE_COST)
        return before - self.characters


_BUDGET: ContextVar[Budget] = ContextVar("template budget")


def render(template: Any, variables: Mapping[str, Any]) -> str:
    """Renders a template compiled by `ChatEnvironment.compile_chat` with a fresh budget."""
    token = _BUDGET.set(Budget())
    try:
        return str(template.render(variables))
    finally:
        _BUDGET.reset(token)


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """Jinja as transformers sets it up for chat templates, with budgets (see the module's text).

    Blocks are trimmed; `break` and `continue`; `{% generation %}`; `tojson` without HTML escapes; `raise_exception`,
    `strftime_now`, `namespace` and `dict` without access to their classes.
    """

    intercepted_binops = frozenset({"+", "*", "%", "**"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            finalize=_finalize,
            extensions=[_GenerationTag, "jinja2.ext.loopcontrols"],
        )
        self.filters["tojson"] = _tojson
        for name in _REMOVED_FILTERS:
            del self.filters[name]
        for name, function in list(self.filters.items()):
            self.filters[name] = _metered(name, function)
        self.filters["_loop"] = _count_iterations
        self.filters["_concat"] = _concat_values
        del self.globals["lipsum"]
        self.globals["dict"] = lambda *args, **kwargs: dict(*args, **kwargs)
        self.globals["namespace"] = _PublicNamespace
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda form: datetime.now().strftime(form)

    def compile_chat(self, source: str) -> Any:
        """A template whose loops and concatenations are metered."""
        return self.from_string(_Meter().visit(self.parse(source)))

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """Joins the pieces of a block, macro or template."""
        budget = _BUDGET.get()
        kept = []
        for part in parts:
            budget.spend_characters(len(part))
            kept.append(part)
        return "".join(kept)

    def call(self, context: Context, obj: Any, *args: Any, **kwargs: Any) -> Any:
        budget = _BUDGET.get()
        budget.spend_steps(_CALL_COST)
        owner = getattr(obj, "__self__", None)
        if isinstance(owner, (str, int, bytes)):
            _check_method(owner, obj.__name__, args, budget)
            result = super().call(context, obj, *args, **kwargs)
            budget.spend_on(result)
            return result
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = _BUDGET.get()
        if operator == "+" and isinstance(left, Sized) and isinstance(right, Sized):
            budget.spend_characters(len(left) + len(right))
        elif operator == "*":
            for value, factor in ((left, right), (right, left)):
                if isinstance(value, Sized) and isinstance(factor, int):
                    budget.spend_characters(len(value) * max(factor, 0))
            if isinstance(left, int) and isinstance(right, int):
                _check_integer(left.bit_length() + right.bit_length())
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_integer(left.bit_length() * max(right, 1))
        elif operator == "%" and isinstance(left, str):
            _check_format(left, right, budget)
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        form = value.__self__

        def bounded(*args: Any, **kwargs: Any) -> str:
            _check_format(form, (args, kwargs), _BUDGET.get())
            return wrapped(*args, **kwargs)

        return bounded


class _GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}` marks assistant text for training; rendering just shows its body."""

    tags = {"generation"}  # noqa: RUF012 - the attribute and its type are Jinja's

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Meter(NodeTransformer):
    """Sends what loops iterate over through a counter, and `a ~ b` through a metered filter."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        if node.recursive:
            raise SecurityError("recursive loops are not supported in chat templates")
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "_loop")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), "_concat")


def _filtered(node: nodes.Node, name: str) -> nodes.Filter:
    assert isinstance(node, nodes.Expr)  # Jinja types For.iter more widely than its parser fills it
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _PublicNamespace(Namespace):
    """Jinja's namespace without names that start with an underscore, which reach into Python's object model."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # no named self: `namespace(self=...)` is legal
        self, rest = args[0], args[1:]
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}")


@pass_context
def _finalize(context: Context, value: Any) -> Any:
    """Called with every value a template writes. (A finalize that wants a context is never run at compile time.)"""
    _BUDGET.get().spend_on(value)
    return value


def _count_iterations(values: Iterable[Any]) -> Iterator[Any]:
    budget = _BUDGET.get()
    for value in values:
        budget.spend_steps(1)
        yield value


def _concat_values(values: list[Any]) -> str:
    budget = _BUDGET.get()
    for value in values:
        budget.spend_on(value)
    return "".join(map(str, values))


def _metered(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter with its arguments and result on the budget. `wraps` keeps Jinja's marks (pass_context etc.)."""
    skipped = 1 if getattr(function, "jinja_pass_arg", None) is not None else 0

    @functools.wraps(function)
    def metered(*args: Any, **kwargs: Any) -> Any:
        budget = _BUDGET.get()
        budget.spend_steps(_CALL_COST // 2)
        value, *rest = args[skipped:]
        if name not in _CONSTANT_TIME and isinstance(value, Sized):
            budget.spend_steps(len(value) if not isinstance(value, str) else len(value) // _NODE_COST)
        if name in _WIDTH_FILTERS:
            _check_widths((*rest, *kwargs.values()))
        if name in _TEXT_MAKING:
            if isinstance(value, types.GeneratorType):  # from map, select and others: see what they hold
                value = list(value)
                args = (*args[:skipped], value, *rest)
            size = budget.spend_on(value)
            options = [*rest, *kwargs.values()]
            if name == "join":
                budget.spend_characters(len(value) * sum(map(_text_length, options)) if isinstance(value, Sized) else 0)
            elif name == "replace":
                _check_replace(str(value), [str(option) for option in options[:2]], budget)
            elif name in {"indent", "tojson"}:
                # At worst every element of a container, or every line of a text, is indented by the given width.
                lines = str(value).count("\n") + 1 if isinstance(value, str) else size // _NODE_COST
                widths = [option if isinstance(option, int) else _text_length(option) for option in options]
                budget.spend_characters(lines * sum(widths))
            elif name == "format":
                _check_format(str(value), (rest, kwargs), budget)
        result = function(*args, **kwargs)
        if isinstance(result, (str, list)):
            budget.spend_characters(len(result))
        return result

    return metered


def _text_length(value: object) -> int:
    return len(value) if isinstance(value, str) else _NODE_COST


def _check_method(owner: object, name: str, args: tuple[Any, ...], budget: Budget) -> None:
    if name in _REFUSED_METHODS:
        raise SecurityError(f"the method {name} is not available in chat templates")
    if name in _WIDTH_METHODS:
        _check_widths(args)
    if isinstance(owner, str):
        budget.spend_characters(len(owner))
        if name == "replace" and len(args) >= 2:
            _check_replace(owner, args, budget)
        elif name == "join":
            for value in args:
                budget.spend_on(value)
                budget.spend_characters(len(owner) * (len(value) if isinstance(value, Sized) else 0))


def _check_replace(text: str, args: Any, budget: Budget) -> None:
    if len(args) >= 2 and isinstance(args[0], str) and isinstance(args[1], str):
        budget.spend_characters(len(text) + text.count(args[0]) * len(args[1]))


def _check_widths(args: Iterable[Any]) -> None:
    for value in args:
        if isinstance(value, int) and abs(value) > _MAX_WIDTH:
            raise SecurityError(f"a width of {_short_integer(value)} is more than {_MAX_WIDTH}")


def _check_integer(bits: int) -> None:
    if bits > _MAX_INTEGER_BITS:
        raise SecurityError(f"it makes an integer of about {_short_integer(bits)} bits")


def _short_integer(value: int) -> str:
    return str(value) if value.bit_length() < 64 else f"2**{value.bit_length()}"


def _check_format(form: str, values: Any, budget: Budget) -> None:
    """`%` and `format`: no widths beyond three digits, none computed; each field may show all the values."""
    if re.search(r"\d{4,}|%[^a-zA-Z%]*\*|\{[^{}]*\{", form.replace("{{", "")):
        raise SecurityError("a format string with a width of more than three digits, or a computed one")
    fields = form.count("%") + form.count("{")
    budget.spend_characters(len(form) + fields * (budget.spend_on(values) + 999))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: object) -> NoReturn:
    raise TemplateRefusal(str(message))
