"""The `kbit` command: registers the subcommands and turns errors into one line and an exit code.

Start-up time is a feature here (`kbit --help` answers in under 0.3 s): command modules import only typer and the
standard library at the top, and everything heavy inside the command.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
import warnings
from importlib import import_module
from types import FrameType
from typing import Annotated, TextIO

import typer

from kbit.cli.output import printable
from kbit.cli.processes import SHARED, end, refuse_copies
from kbit.host.errors import KbitError
from kbit.host.notes import KbitNote

_MAX_MESSAGE = 1000
# How torch's allocators say it, in a plain RuntimeError.
_OUT_OF_MEMORY = ("not enough memory", "can't allocate memory")

# Every command's module, function and line in the list of commands.
COMMANDS = {
    "run": ("kbit.cli.run", "run", "Answer a message, or continue a text."),
    "chat": ("kbit.cli.chat", "chat", "Talk to a model in its chat template."),
    "serve": ("kbit.cli.serve", "serve", "Serve models over HTTP, as OpenAI's API has it."),
    "launch": ("kbit.cli.launch", "launch", "Start another program on a running server."),
    "top": ("kbit.cli.top", "top", "Watch what a running server does."),
    "embed": ("kbit.cli.embed", "embed", "Turn texts into vectors."),
    "fill": ("kbit.cli.fill", "fill", "Say which words a model puts in masked places."),
    "classify": ("kbit.cli.classify", "classify", "Label texts, pairs of texts, or words."),
    "answer": ("kbit.cli.answer", "answer", "Find the answer to a question in a text."),
    "attention": ("kbit.cli.attention", "attention", "Draw which tokens of a text attend to which."),
    "translate": ("kbit.cli.translate", "translate", "Translate texts."),
    "transcribe": ("kbit.cli.transcribe", "transcribe", "Write down what is said in sound files."),
    "summarize": ("kbit.cli.summarize", "summarize", "Summarize texts."),
    "quantize": ("kbit.cli.quantize", "quantize", "Convert a model to k-bit weights."),
    "calibrate": ("kbit.cli.calibrate", "calibrate", "Measure what errors in each weight cost a model."),
    "eval": ("kbit.cli.eval", "evaluate", "Measure perplexity, KL divergence and zero-shot tasks."),
    "scale": ("kbit.cli.scale", "scale", "Measure accuracy versus bits over models and formats."),
    "plan": ("kbit.cli.plan", "plan", "Choose model, width and KV width for a memory and a speed."),
    "export": ("kbit.cli.export", "export", "Write a model for other programs."),
    "info": ("kbit.cli.info", "info", "Show a model's size and bits per weight."),
    "list": ("kbit.cli.list_models", "list_models", "List the models on this machine."),
    "rm": ("kbit.cli.remove", "remove", "Remove models from this machine."),
    "pull": ("kbit.cli.pull", "pull", "Fetch a model into the cache."),
    "bench": ("kbit.cli.bench", "bench", "Time a model: loading, prompts, decoding."),
    "completion": ("kbit.cli.completion", "completion", "Print a script for a shell's completion."),
    "check-gpu": ("kbit.cli.check_gpu", "check_gpu", "Prove the kernels on this machine's GPU."),
    "tune": ("kbit.cli.tune", "tune", "Time the GPU kernels' configurations and keep the fastest."),
}


def build(arguments: list[str]) -> typer.Typer:
    """The application, with the command that the arguments name; where they name none, with all of them."""
    named = next((word for word in arguments if not word.startswith("-")), None)
    chosen = [named] if named in COMMANDS else list(COMMANDS)
    # Plain help: rich's renderer would cost as much time again as everything else together.
    app = typer.Typer(
        name="kbit",
        help="Convert, run and measure language models at 2 to 8 bits per weight.",
        epilog="Any command: --debug shows the traceback of an error. Exit codes: 0 done, 1 failed, 2 wrong usage.",
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        add_completion=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_global_options)
    for name in chosen:
        module, function, short_help = COMMANDS[name]
        command = getattr(import_module(module), function)
        app.command(name, short_help=short_help)(command)
    return app


def _print_version(asked: bool) -> None:
    if asked:
        from kbit import __version__

        typer.echo(f"kbit {__version__}")
        raise typer.Exit


def _global_options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    if context.invoked_subcommand not in SHARED:
        refuse_copies(f"kbit {context.invoked_subcommand}")


def main() -> None:
    """Entry point of the `kbit` script."""
    _open_streams()
    signal.signal(signal.SIGINT, _on_interrupt)
    arguments, debug = _take_debug(sys.argv[1:])
    end(_run(arguments, debug or bool(os.environ.get("KBIT_DEBUG"))))


def _open_streams() -> None:
    """Where this program was started without one of the three standard streams (`kbit ... >&-`), nothing is there.

    Else the next file that is opened would get the stream's number, and what is meant for the terminal would be written
    into it.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, "r" if descriptor == 0 else "w", closefd=False))  # noqa: SIM115


def _on_interrupt(signal_number: int, frame: FrameType | None) -> None:
    """Ctrl-C: KeyboardInterrupt, but not inside an import.

    Extension modules do not survive an exception in the middle of their initialisation (torch aborts, or swallows it);
    and while something is being imported nothing has begun that would need cleaning up.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, b"\nkbit: interrupted\n")
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt


def _take_debug(arguments: list[str]) -> tuple[list[str], bool]:
    """Remove --debug wherever it stands before a `--`."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options = [argument for argument in arguments[:end] if argument != "--debug"]
    return options + arguments[end:], len(options) < end


def _run(arguments: list[str], debug: bool) -> int:
    with warnings.catch_warnings():
        others, told = warnings.showwarning, set()

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            told_line = f"kbit: note: {_one_line(message)}\n"
            if not issubclass(category, KbitNote):
                others(message, category, filename, lineno, file, line)
            elif told_line not in told:  # a command may open a model several times
                told.add(told_line)
                sys.stderr.write(told_line)

        warnings.showwarning = show
        warnings.filterwarnings("always", category=KbitNote)
        return _run_command(arguments, debug)


def _run_command(arguments: list[str], debug: bool) -> int:
    # Not app(arguments): that turns Ctrl-C and a closed pipe into exit codes of its own, without a word.
    command = typer.main.get_command(build(arguments))
    try:
        with command.make_context("kbit", list(arguments)) as context:
            command.invoke(context)
        sys.stdout.flush()
        return 0
    except typer.Exit as done:
        return done.exit_code
    except SystemExit as done:  # rich ends the program so, with code 1, when the reader has gone
        if not isinstance(done.__context__, BrokenPipeError):
            raise
        _drop_output()
        return 0
    except KeyboardInterrupt:
        sys.stderr.write("\nkbit: interrupted\n")
        return 130
    except BrokenPipeError:
        # The reader of our output has gone (`kbit run ... | head`): not an error, and nothing more can be said.
        _drop_output()
        return 0
    except Exception as error:
        if debug:
            traceback.print_exc()
        message, code = _explain(error)
        if message:
            sys.stderr.write(message + "\n")
        try:
            sys.stdout.flush()
        except OSError:  # tried once more when the interpreter ends, it would fail again, with an exit code of its own
            _drop_output()
        return code


def _drop_output() -> None:
    """Nothing more goes to standard output."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _explain(error: Exception) -> tuple[str, int]:
    """One line for a person, and the exit code."""
    if isinstance(error, KbitError):
        return f"kbit: error: {_one_line(error)}", error.exit_code
    if isinstance(error, ImportError) and error.name in ("kbit._native", "kbit.kernels"):  # see kbit/__init__.py
        return f"kbit: error: {_one_line(error)}", 1
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # click's exceptions
        context = getattr(error, "ctx", None)
        hint = f" (see {context.command_path} --help)" if context is not None else ""
        if type(error).__name__ == "NoArgsIsHelpError":
            return error.format_message(), 2
        return f"kbit: error: {_one_line(error.format_message())}{hint}", error.exit_code
    if type(error).__name__ == "Abort":
        return "kbit: interrupted", 130
    if isinstance(error, MemoryError) or any(sign in str(error) for sign in _OUT_OF_MEMORY):
        return f"kbit: error: out of memory ({_one_line(error)[:120]}); use a smaller model or fewer bits", 1
    if isinstance(error, RuntimeError) and "home directory" in str(error):  # pathlib, for a user id without one
        return "kbit: error: there is no home folder for this user: set HOME to a folder", 1
    if isinstance(error, OSError) and error.errno is not None:
        remedy = {errno.ENOSPC: "; make room on the disk", errno.EACCES: "; check its permissions"}.get(error.errno, "")
        return f"kbit: error: {error.filename or 'input/output'}: {error.strerror}{remedy}", 1
    kind = type(error).__name__
    return f"kbit: internal error: {kind}: {_one_line(error)}; this is a bug: please report it with --debug's output", 1


def _one_line(error: object) -> str:
    # Names from a hostile file may hold escape sequences, or megabytes.
    text = printable(" ".join(str(error).split()))
    return text if len(text) <= _MAX_MESSAGE else f"{text[:_MAX_MESSAGE]}..."


if __name__ == "__main__":
    main()
