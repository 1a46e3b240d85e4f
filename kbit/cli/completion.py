"""`kbit completion`: what makes a shell complete kbit's commands and flags."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from argparse import ArgumentParser

SHELLS = ("bash", "zsh", "fish")
# What a flag's metavar shows when it takes one of some words.
_WORDS = re.compile(r"[a-z0-9-]+(\|[a-z0-9-]+)+")
# Parameters whose values are, or may be, files.
_FILES = {"model", "models", "folder", "folders", "name", "names", "output", "out", "reference", "data", "plan"}
_FILES |= {"points", "task_data", "tls_cert", "tls_key"}


def completion(
    shell: Annotated[str, typer.Argument(metavar="bash|zsh|fish", help="The shell to complete in.")],
) -> None:
    """Print a script that makes a shell complete kbit's commands, their flags and files.

    It starts no program when it completes, so it is as quick as the shell; it belongs to this version of kbit: print it
    again after an update.

    \b
    Examples:
      eval "$(kbit completion bash)"                                    # in ~/.bashrc
      kbit completion zsh > ~/.zfunc/_kbit                              # with fpath+=~/.zfunc before compinit
      kbit completion fish > ~/.config/fish/completions/kbit.fish
    """
    import shtab

    from kbit.cli.main import build
    from kbit.host.errors import UsageError

    if shell not in SHELLS:
        raise UsageError(f"completion {shell}: expected {', '.join(SHELLS)}")
    typer.echo(shtab.complete(_parser(typer.main.get_command(build([]))), shell))


def _parser(program: Any) -> ArgumentParser:
    """All commands as argparse has them, which is what shtab reads."""
    from argparse import ArgumentParser

    parser = ArgumentParser("kbit", description=program.help, add_help=False)
    _add_parameters(parser, program.params)
    commands = parser.add_subparsers(dest="command")
    for name, command in program.commands.items():
        help_line = command.get_short_help_str(100)
        each = commands.add_parser(name, help=help_line, description=help_line, add_help=False)
        _add_parameters(each, [*command.params])
    return parser


def _add_parameters(parser: ArgumentParser, parameters: list[Any]) -> None:
    import shtab

    parser.add_argument("-h", "--help", action="store_true", help="Show what it does, and its flags.")
    parser.add_argument("--debug", action="store_true", help="Show the traceback of an error.")
    for parameter in parameters:
        metavar = str(parameter.metavar or "")
        more: dict[str, Any] = {}
        if parameter.param_type_name == "argument":
            names = [parameter.name]
            more["nargs"] = "*"
        else:
            names = [*parameter.opts, *parameter.secondary_opts]
            # The first sentence: it is shown on one line.
            more["help"] = re.split(r"(?<=[.:;])\s|\n", parameter.help or "")[0].rstrip(".:;")
            if parameter.is_flag:
                more["action"] = "store_true"
        if not more.get("action") and _WORDS.fullmatch(metavar):
            more["choices"] = metavar.split("|")
        added = parser.add_argument(*names, **more)
        if not more.get("action") and (parameter.name in _FILES or "FILE" in metavar or "DIR" in metavar):
            added.complete = shtab.FILE  # type: ignore[attr-defined]
