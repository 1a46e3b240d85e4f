"""`kbit launch`: other programs, told to use a server of kbit's."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import typer

from kbit.cli.remote import DEFAULT_URL, KeyOption, server_address, server_key
from kbit.host.errors import KbitError, UsageError


@dataclass(frozen=True)
class Client:
    """A program that talks to a server.

    Attributes:
        command: the program and its arguments.
        variables: of the environment that it reads. In both, {url}, {model} and {key} stand for the server's.
        install: how to get it.
        source: the page that says so.
    """

    command: tuple[str, ...]
    variables: Mapping[str, str]
    install: str
    source: str


_OPENAI = {"OPENAI_BASE_URL": "{url}/v1", "OPENAI_API_KEY": "{key}"}
CLIENTS = {
    "aider": Client(
        ("aider", "--model", "openai/{model}"),
        {"OPENAI_API_BASE": "{url}/v1", "OPENAI_API_KEY": "{key}"},
        "pip install aider-install && aider-install",
        "https://aider.chat/docs/llms/openai-compat.html",
    ),
    "claude": Client(
        ("claude", "--model", "{model}"),
        {
            "ANTHROPIC_BASE_URL": "{url}",
            "ANTHROPIC_AUTH_TOKEN": "{key}",
            "ANTHROPIC_DEFAULT_OPUS_MODEL": "{model}",
            "ANTHROPIC_DEFAULT_SONNET_MODEL": "{model}",
            "ANTHROPIC_DEFAULT_HAIKU_MODEL": "{model}",
        },
        "npm install -g @anthropic-ai/claude-code",
        "https://code.claude.com/docs/en/env-vars",
    ),
    "goose": Client(
        ("goose", "session"),
        {"GOOSE_PROVIDER": "openai", "GOOSE_MODEL": "{model}", "OPENAI_HOST": "{url}", "OPENAI_API_KEY": "{key}"},
        "see https://github.com/block/goose",
        "https://block.github.io/goose/docs/guides/environment-variables",
    ),
    "open-webui": Client(
        ("open-webui", "serve", "--port", "8081"),
        {"OPENAI_API_BASE_URL": "{url}/v1", "OPENAI_API_KEY": "{key}", "ENABLE_OLLAMA_API": "False"},
        "pip install open-webui",
        "https://docs.openwebui.com/getting-started/env-configuration",
    ),
    "python": Client(("python",), _OPENAI, "see https://www.python.org", "https://github.com/openai/openai-python"),
    "shell": Client(("{shell}",), _OPENAI, "", "https://github.com/openai/openai-python"),
}


def launch(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="The program; without one: which there are.")
    ] = None,
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[ARGUMENT]...", help="For the program, after a --.")
    ] = None,
    url: Annotated[str, typer.Option("--url", metavar="URL", help="Address of the server.")] = DEFAULT_URL,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", metavar="NAME", help="Which of its models. [default: the first]"),
    ] = None,
    api_key: KeyOption = None,
    only_print: Annotated[
        bool, typer.Option("--print", help="Print what would be set and started, for a shell, and start nothing.")
    ] = False,
) -> None:
    """Start a program that talks to a running server (kbit serve), with the environment that tells it where.

    Nothing of the program's own settings is changed: what is set holds for this start. "python" and "shell" get what
    OpenAI's libraries read.

    \b
    Examples:
      kbit launch
      kbit launch aider -- --no-auto-commits
      kbit launch claude --url http://localhost:9000 --model qwen3
      eval "$(kbit launch shell --print)"
    """
    if name is None:
        for each, known in CLIENTS.items():
            typer.echo(f"{each:<12}{', '.join(known.variables)}")
        return
    client = CLIENTS.get(name)
    if client is None:
        raise UsageError(f"{name}: kbit knows {', '.join(CLIENTS)}; for another, kbit launch shell")
    key = server_key(api_key)
    address = server_address(url)
    words = {"url": address, "model": _model(address, key, model), "key": key or "none"}
    words["shell"] = os.environ.get("SHELL") or "sh"
    variables = {variable: value.format_map(words) for variable, value in client.variables.items()}
    command = [word.format_map(words) for word in client.command] + (arguments or [])
    if only_print:
        for variable, value in variables.items():
            typer.echo(f"export {variable}={shlex.quote(value)}")
        if name != "shell":
            typer.echo(shlex.join(command))
        return
    program = shutil.which(command[0])
    if program is None and name == "python":
        program = sys.executable
    if program is None:
        raise KbitError(f"{command[0]}: is not on PATH: {client.install}; or kbit launch {name} --print, for elsewhere")
    for variable, value in variables.items():
        typer.echo(f"{variable}={'...' if key and value == key else value}", err=True)
    typer.echo(shlex.join(command), err=True)
    sys.stdout.flush()
    os.execve(program, command, {**os.environ, **variables})


def _model(address: str, key: str | None, wanted: str | None) -> str:
    """The model to use.

    Raises:
        UsageError: the server has none of this name.
        KbitError: it does not answer.
    """
    from kbit.cli.remote import fetched

    try:
        names = [str(model["id"]) for model in json.loads(fetched(f"{address}/v1/models", key))["data"]]
    except (ValueError, KeyError, TypeError):
        raise KbitError(f"{address}: does not list its models as kbit serve does") from None
    if wanted is None:
        return names[0]
    if wanted not in names:
        raise UsageError(f"--model {wanted}: the server at {address} has {', '.join(names)}")
    return wanted
