"""`kbit chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import TYPE_CHECKING

import typer

from kbit.cli.options import (
    DEFAULT_MODEL,
    MAX_PROMPT_BYTES,
    BackendOption,
    ComputeOption,
    DeviceOption,
    DraftTokensOption,
    FrequencyPenaltyOption,
    KvBitsOption,
    MaxTokensOption,
    MinPOption,
    ModelOption,
    PresencePenaltyOption,
    RepetitionPenaltyOption,
    SeedOption,
    SpeculateOption,
    StopOption,
    SystemOption,
    TemperatureOption,
    ThreadsOption,
    TopKOption,
    TopPOption,
    check_limits,
    check_text,
    draft_limit,
    show,
    streaming_output,
)
from kbit.cli.run import INTERRUPTED, statistics

if TYPE_CHECKING:
    from kbit.checkpoint.source import CheckpointSource
    from kbit.engine.conversation import Conversation
    from kbit.engine.loader import LoadedModel
    from kbit.engine.sampler import SamplingParams
    from kbit.engine.tokenizer import Tokenizer

HELP = """\
Type a message and press Enter.
  /reset   forget the conversation (the system message stays)
  /help    this text
  /exit    leave; so does Ctrl-D
Anything else is a message, also where it begins with a slash.
Ctrl-C stops an answer; what there is of it stays in the conversation."""


def chat(
    model: ModelOption = DEFAULT_MODEL,
    system: SystemOption = None,
    max_tokens: MaxTokensOption = 512,
    temperature: TemperatureOption = 0.7,
    top_k: TopKOption = 0,
    top_p: TopPOption = 0.95,
    min_p: MinPOption = 0.0,
    repetition_penalty: RepetitionPenaltyOption = 1.0,
    presence_penalty: PresencePenaltyOption = 0.0,
    frequency_penalty: FrequencyPenaltyOption = 0.0,
    seed: SeedOption = None,
    stop: StopOption = None,
    device: DeviceOption = "auto",
    backend: BackendOption = "auto",
    compute: ComputeOption = None,
    kv_bits: KvBitsOption = None,
    threads: ThreadsOption = None,
    speculate: SpeculateOption = None,
    draft_tokens: DraftTokensOption = None,
) -> None:
    """Talk to a model, in the chat template that comes with it.

    Earlier turns stay in the key/value cache, so each answer costs only what is new. In the conversation, /help lists
    commands. With standard input from a pipe, each line is a message and only the answers are printed to standard
    output.

    Examples:

      kbit chat

      kbit chat --model out/ --system "Answer in one sentence." --temperature 0

      printf 'Hello!\\nWhat did I say?\\n' | kbit chat --seed 1
    """
    check_limits(max_tokens, stop)
    if system is not None:
        check_text("--system", system)
    most = draft_limit(speculate, draft_tokens)

    from functools import partial

    from kbit.engine.conversation import Conversation, require_template
    from kbit.engine.loader import load_model
    from kbit.engine.sampler import SamplingParams
    from kbit.engine.speculative import Speculation, load_drafter
    from kbit.ops.select import select_backend

    params = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
    )
    speculation: Speculation | None = None
    chosen = select_backend(device, backend=backend, threads=threads, compute=compute, kv_bits=kv_bits)
    load = partial(load_model, threads=threads, backend=chosen)

    def prepare(tokenizer: Tokenizer, source: CheckpointSource) -> None:
        nonlocal speculation
        require_template(tokenizer, model)
        if speculate is not None:
            speculation = Speculation(load_drafter(speculate, model, tokenizer, load), most)

    loaded = load(model, check=prepare)
    conversation = Conversation(loaded.decoder, loaded.tokenizer, model, system, speculation)
    with streaming_output():
        _converse(conversation, loaded, params, max_tokens, stop or [])


def _converse(
    conversation: Conversation, loaded: LoadedModel, params: SamplingParams, max_tokens: int, stop: list[str]
) -> None:
    """Reads messages and shows answers until there are no more."""
    from kbit.errors import UsageError

    terminal = sys.stdin.isatty()
    if terminal:
        with suppress(ImportError):  # importing it gives input() line editing and history; Windows has its own
            import readline  # noqa: F401
        _note(f"{loaded.name} · {loaded.backend_description} · /help for commands, Ctrl-D to leave")
    while (line := _next_message(terminal)) is not None:
        message = line.strip()
        if not message:
            continue
        if message == "/exit":
            return
        if message == "/reset":
            conversation.reset()
            _note("conversation forgotten")
        elif message == "/help":
            _note(HELP)
        else:
            try:
                generation = conversation.reply(message, params, max_tokens=max_tokens, stop=stop)
            except UsageError as error:
                # Interactively the user can shorten or reset; a script cannot, and must see that it failed.
                if not terminal:
                    raise
                _note(str(error))
                continue
            result = generation.run(show)
            show("\n")
            conversation.add(message, result)
            if terminal:
                _note(statistics(result, loaded))
            if result.finish_reason == "context":
                _note("the model's context is full: /reset starts a new conversation")
            elif result.finish_reason == "length":
                _note(f"stopped after {max_tokens} tokens; --max-tokens sets this limit")
            elif result.finish_reason == "interrupted" and not terminal:
                raise typer.Exit(INTERRUPTED)


def _next_message(terminal: bool) -> str | None:
    """The next line of input; None at its end."""
    from kbit.errors import UsageError

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
            _note("\n(Ctrl-D or /exit to leave)")


def _note(text: str) -> None:
    """Something that is not the model's words: to standard error."""
    typer.echo(text, err=True)
