"""`kbit chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING

import typer

from kbit.cli.flag_groups import flag_groups
from kbit.cli.generation import GenerationFlags, Ready, load_to_generate, refuse_too_large
from kbit.cli.options import show, streaming_output
from kbit.cli.processes import Peers, processes
from kbit.cli.run import INTERRUPTED, statistics

if TYPE_CHECKING:
    from kbit.checkpoint.source import CheckpointSource
    from kbit.engine.conversation import Conversation
    from kbit.text.tokenizer import Tokenizer


@flag_groups(max_tokens=512)
def chat(*, flags: GenerationFlags) -> None:
    """Talk to a model, in the chat template that comes with it.

    Earlier turns stay in the key/value cache, so each answer costs only what is new. In the conversation, /help lists
    commands: /model, /system, /bits, /save and others. What is typed is kept for the next time, in chat_history of
    kbit's cache (KBIT_HISTORY names another file, or says "off"). With standard input from a pipe, each line is a
    message and only the answers are printed to standard output.

    Examples:

      kbit chat

      kbit chat --model out/ --system "Answer in one sentence." --temperature 0

      printf 'Hello!\\nWhat did I say?\\n' | kbit chat --seed 1

      torchrun --nproc-per-node 2 -m kbit chat --device cuda
    """
    with processes() as peers:
        with peers.together():
            flags.check()

        def load(flags: GenerationFlags) -> Ready:
            def check(tokenizer: Tokenizer, source: CheckpointSource) -> None:
                from kbit.engine.conversation import require_template

                require_template(tokenizer, flags.model)
                refuse_too_large(flags, source, 1)  # of messages nothing is known yet

            return load_to_generate(flags, peers, check, recommended=True)

        ready = load(flags)
        loaded = ready.loaded
        from kbit.engine.conversation import Conversation

        with peers.together():
            conversation = Conversation(loaded.decoder, loaded.tokenizer, flags.model, flags.system, ready.speculation)
        with streaming_output():
            _converse(peers, conversation, ready, flags, load)


def _converse(
    peers: Peers,
    conversation: Conversation,
    ready: Ready,
    flags: GenerationFlags,
    load: Callable[[GenerationFlags], Ready],
) -> None:
    """Reads messages and shows answers until there are no more. Of several processes, the first does both."""
    from kbit.cli.chat_commands import ChatCommands
    from kbit.cli.chat_input import line_editing, next_message
    from kbit.host.errors import KbitError

    shared = peers.group is not None
    note = _note if peers.speaks else _unsaid
    commands = ChatCommands(conversation, ready, flags, None if shared else load, note)
    terminal = peers.decided_by_first(sys.stdin.isatty)
    greeting = f"{ready.loaded.name} · {ready.loaded.backend_description} · /help for commands, Ctrl-D to leave"
    if terminal:
        note(greeting)
    with line_editing() if terminal and peers.speaks else nullcontext():
        while (line := peers.decided_by_first(lambda: next_message(terminal, shared, _note))) is not None:
            message = line.strip()
            if not message:
                continue
            if message == "/exit":
                return
            # Interactively the user can shorten or reset; a script cannot, and must see that it failed.
            try:
                if not commands.run(message):
                    _answer(peers, conversation, commands.ready, flags, message, terminal)
            except KbitError as error:
                if not terminal:
                    with peers.together():
                        raise
                note(str(error))


def _answer(
    peers: Peers, conversation: Conversation, ready: Ready, flags: GenerationFlags, message: str, terminal: bool
) -> None:
    """Shows the answer to a message.

    Raises:
        UsageError: the conversation leaves no room in the model's context.
    """
    shared, note = peers.group is not None, _note if peers.speaks else _unsaid
    generation = conversation.reply(
        message,
        ready.sampling,
        max_tokens=flags.max_tokens,
        stop=flags.stop or (),
        stop_repetition=not flags.allow_repetition,
    )
    result = generation.run(show if peers.speaks else None)
    if peers.speaks:
        show("\n")
    conversation.add(message, result)
    if terminal:
        note(statistics(result, ready.loaded))
    if result.finish_reason == "context":
        note("the model's context is full: /reset starts a new conversation")
    elif result.finish_reason == "repetition":
        note("stopped, as the answer only repeated itself; --allow-repetition lets it")
    elif result.finish_reason == "length":
        note(f"stopped after {flags.max_tokens} tokens; --max-tokens sets this limit")
    elif result.finish_reason == "interrupted" and (shared or not terminal):
        # Several processes do not stop at the same token, so they cannot go on together.
        raise typer.Exit(INTERRUPTED)


def _note(text: str) -> None:
    """Something that is not the model's words: to standard error."""
    typer.echo(text, err=True)


def _unsaid(text: str) -> None:
    """The same in a process that does not speak."""
