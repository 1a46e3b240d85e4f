"""`kbit chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

import typer

from kbit.cli.flag_groups import flag_groups
from kbit.cli.generation import GenerationFlags, Ready, load_to_generate
from kbit.cli.options import MAX_PROMPT_BYTES, show, streaming_output
from kbit.cli.processes import Peers, processes
from kbit.cli.run import INTERRUPTED, statistics

if TYPE_CHECKING:
    from kbit.checkpoint.source import CheckpointSource
    from kbit.engine.conversation import Conversation
    from kbit.engine.loader import LoadedModel
    from kbit.text.tokenizer import Tokenizer

HELP = """\
Type a message and press Enter.
  /reset   forget the conversation (the system message stays)
  /bits K  go on at another width of a nested model; alone: say which there are
  /help    this text
  /exit    leave; so does Ctrl-D
Anything else is a message, also where it begins with a slash.
Ctrl-C stops an answer; what there is of it stays in the conversation."""


@flag_groups(max_tokens=512)
def chat(*, flags: GenerationFlags) -> None:
    """Talk to a model, in the chat template that comes with it.

    Earlier turns stay in the key/value cache, so each answer costs only what is new. In the conversation, /help lists
    commands. With standard input from a pipe, each line is a message and only the answers are printed to standard
    output.

    Examples:

      kbit chat

      kbit chat --model out/ --system "Answer in one sentence." --temperature 0

      printf 'Hello!\\nWhat did I say?\\n' | kbit chat --seed 1

      torchrun --nproc-per-node 2 -m kbit chat --device cuda
    """
    with processes() as peers:
        with peers.together():
            flags.check()

        def check(tokenizer: Tokenizer, source: CheckpointSource) -> None:
            from kbit.engine.conversation import require_template

            require_template(tokenizer, flags.model)

        ready = load_to_generate(flags, peers, check, recommended=True)
        loaded = ready.loaded
        from kbit.engine.conversation import Conversation

        with peers.together():
            conversation = Conversation(loaded.decoder, loaded.tokenizer, flags.model, flags.system, ready.speculation)
        with streaming_output():
            _converse(peers, conversation, ready, flags)


def _converse(
    peers: Peers,
    conversation: Conversation,
    ready: Ready,
    flags: GenerationFlags,
) -> None:
    """Reads messages and shows answers until there are no more. Of several processes, the first does both."""
    from kbit.engine.self_speculation import SelfDrafter
    from kbit.host.errors import UsageError

    loaded, params = ready.loaded, ready.sampling
    shared = peers.group is not None
    note = _note if peers.speaks else _unsaid
    terminal = peers.decided_by_first(sys.stdin.isatty)
    if terminal:
        if peers.speaks:
            with suppress(ImportError):  # importing it gives input() line editing and history; Windows has its own
                import readline  # noqa: F401
        note(f"{loaded.name} · {loaded.backend_description} · /help for commands, Ctrl-D to leave")
    while (line := peers.decided_by_first(lambda: _next_message(terminal, shared))) is not None:
        message = line.strip()
        if not message:
            continue
        if message == "/exit":
            return
        if message == "/reset":
            conversation.reset()
            note("conversation forgotten")
        elif message == "/help":
            note(HELP)
        elif message.split()[0] == "/bits" and len(message.split()) <= 2:
            try:
                loaded = _at_width(loaded, message.removeprefix("/bits").strip(), note)
            except UsageError as error:
                if not terminal:
                    with peers.together():
                        raise
                note(str(error))
                continue
            conversation.use(loaded.decoder)
            if ready.speculation is not None and isinstance(ready.speculation.drafter, SelfDrafter):
                ready.speculation.drafter.follow(loaded)
        else:
            try:
                generation = conversation.reply(
                    message,
                    params,
                    max_tokens=flags.max_tokens,
                    stop=flags.stop or (),
                    stop_repetition=not flags.allow_repetition,
                )
            except UsageError as error:
                # Interactively the user can shorten or reset; a script cannot, and must see that it failed.
                if not terminal:
                    with peers.together():
                        raise
                note(str(error))
                continue
            result = generation.run(show if peers.speaks else None)
            if peers.speaks:
                show("\n")
            conversation.add(message, result)
            if terminal:
                note(statistics(result, loaded))
            if result.finish_reason == "context":
                note("the model's context is full: /reset starts a new conversation")
            elif result.finish_reason == "repetition":
                note("stopped, as the answer only repeated itself; --allow-repetition lets it")
            elif result.finish_reason == "length":
                note(f"stopped after {flags.max_tokens} tokens; --max-tokens sets this limit")
            elif result.finish_reason == "interrupted" and (shared or not terminal):
                # Several processes do not stop at the same token, so they cannot go on together.
                raise typer.Exit(INTERRUPTED)


def _at_width(loaded: LoadedModel, asked: str, note: Callable[[str], None]) -> LoadedModel:
    """The model at the width that /bits asks for; the same, where it only asks which there are.

    Raises:
        UsageError: the model does not serve it, or it is no number.
    """
    from kbit.host.errors import UsageError

    if not asked:
        served = ", ".join(str(width) for width in loaded.widths)
        note(f"{loaded.bits} of {served} bits" if served else f"{loaded.name} has one width")
        return loaded
    if not asked.isdecimal():
        raise UsageError(f"/bits {asked}: write a number of bits, as in /bits 3")
    found = loaded.at_width(int(asked))
    note(f"{found.bits} bits; what was said before is read again at this width, with the next message")
    return found


def _next_message(terminal: bool, shared: bool) -> str | None:
    """The next line of input; None at its end.

    Args:
        terminal: a person types it.
        shared: several processes wait for it, and Ctrl-C ends them all.
    """
    from kbit.host.errors import UsageError

    if not terminal:
        line = sys.stdin.buffer.readline(MAX_PROMPT_BYTES + 1)
        if len(line) > MAX_PROMPT_BYTES:
            raise UsageError(f"a message from standard input is longer than {MAX_PROMPT_BYTES >> 20} MiB: shorten it")
        try:
            return line.decode("utf-8") or None
        except UnicodeDecodeError as error:
            raise UsageError(f"a message from standard input is not UTF-8 at byte {error.start}: convert it") from None
    while True:
        try:
            return input("> ")
        except EOFError:
            _note("")
            return None
        except KeyboardInterrupt:
            if shared:
                raise
            _note("\n(Ctrl-D or /exit to leave)")


def _note(text: str) -> None:
    """Something that is not the model's words: to standard error."""
    typer.echo(text, err=True)


def _unsaid(text: str) -> None:
    """The same in a process that does not speak."""
