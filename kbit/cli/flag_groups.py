"""Flags as dataclasses: a group of flags is declared once, and any number of commands take it.

    @dataclass(frozen=True)
    class Sampling:
        temperature: Annotated[float, typer.Option("--temperature", help="...")] = 0.0

    @flag_groups(temperature=0.7)
    def chat(*, sampling: Sampling, json: JsonOption = False) -> None: ...

Then `kbit chat --temperature 1` calls chat(sampling=Sampling(temperature=1)), and without the flag it is 0.7.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import Any, get_type_hints


def flag_groups(**defaults: object) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator: what typer sees of a command are the fields of its dataclass parameters, in their place.

    Args:
        defaults: of single fields, where this command's differ from the group's.

    Raises:
        TypeError: a default names no field of the command's groups.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(command, include_extras=True)
        parameters: list[Parameter] = []
        groups: dict[str, type[Any]] = {}
        left = dict(defaults)
        for name, parameter in signature(command).parameters.items():
            if not is_dataclass(hints[name]):
                parameters.append(parameter.replace(kind=Parameter.KEYWORD_ONLY, annotation=hints[name]))
                continue
            groups[name] = group = hints[name]
            of_group = get_type_hints(group, include_extras=True)
            for field in fields(group):
                default = left.pop(field.name, Parameter.empty if field.default is MISSING else field.default)
                annotation = of_group[field.name]
                parameters.append(Parameter(field.name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation))
        if left:
            raise TypeError(f"{command.__name__} takes no flag group with {', '.join(left)}")

        @wraps(command)
        def run(**given: Any) -> None:
            built = {
                name: group(**{field.name: given.pop(field.name) for field in fields(group)})
                for name, group in groups.items()
            }
            command(**built, **given)

        run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate
