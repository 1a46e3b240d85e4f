"""`kbit run`: a prompt in, text out."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kbit.cli.flag_groups import flag_groups
from kbit.cli.generation import GenerationFlags, load_to_generate, refuse_too_large
from kbit.cli.options import JsonOption, read_prompt, show, streaming_output
from kbit.cli.processes import processes

if TYPE_CHECKING:
    from kbit.checkpoint.source import CheckpointSource
    from kbit.engine.generate import GenerationResult
    from kbit.engine.loader import LoadedModel
    from kbit.text.tokenizer import Tokenizer

# Exit code of a command that Ctrl-C ended, by the convention of shells (128 + SIGINT).
INTERRUPTED = 130


@flag_groups()
def run(
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT", help='The message, or text to continue; "-", or none in a pipe, reads standard input.'
        ),
    ] = None,
    *,
    flags: GenerationFlags,
    chat: Annotated[
        bool, typer.Option("--chat", help="Insist on an answer: refuse a model that has no chat template.")
    ] = False,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue PROMPT as a text, whether or not the model has a chat template.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Answer a message, or continue a text: with --raw, and with models that have no chat template. An encoder-decoder
    (FLAN-T5) reads the prompt and answers it.

    Only the generated text goes to standard output, as it appears; figures go to standard error. The same command gives
    the same text: decoding is greedy unless --temperature is set, and repeatable then with --seed.

    Examples:

      kbit run "What is the capital of France?"

      kbit run "Write a haiku about rivers." --temperature 0.7 --top-p 0.95 --seed 1

      kbit run --raw "Once upon a time"

      kbit run - --model out/ --max-tokens 200 --json < prompt.txt

      kbit run "Correct the spelling: ..." --speculate ngram

      torchrun --nproc-per-node 2 -m kbit run "Once upon a time" --device cuda
    """
    with processes() as peers:
        text = peers.decided_by_first(lambda: _question(prompt, chat, raw, flags))
        ids: list[int] = []
        answers = chat

        def encode(tokenizer: Tokenizer, source: CheckpointSource) -> None:
            nonlocal answers
            answers = chat or (not raw and tokenizer.chat_template is not None)
            ids.extend(_encode(text, answers, flags, tokenizer, source))
            refuse_too_large(flags, source, len(ids))

        from kbit.models.check import NeedsSourceError

        try:
            ready = load_to_generate(flags, peers, encode)
        except NeedsSourceError:
            if peers.group is not None:
                raise
            _answer(text, chat, flags, as_json)
            return
        loaded = ready.loaded
        with peers.together():
            from kbit.engine.generate import generate

            generation = generate(
                loaded.decoder,
                loaded.tokenizer,
                ids,
                ready.sampling,
                max_tokens=flags.max_tokens,
                stop=flags.stop or (),
                continues_prompt=not answers,
                speculation=ready.speculation,
                stop_repetition=not flags.allow_repetition,
            )
        if not peers.speaks:
            result = generation.run()
        elif as_json:
            from kbit.cli.output import print_json

            result = generation.run()
            print_json(result_dict(result, loaded))
        else:
            with streaming_output():
                result = generation.run(show)
                show("\n")
            typer.echo(statistics(result, loaded), err=True)
        if result.finish_reason == "interrupted":
            raise typer.Exit(INTERRUPTED)


def _answer(text: str, chat: bool, flags: GenerationFlags, as_json: bool) -> None:
    """Of an encoder-decoder: the prompt is what its encoder reads, and what its decoder writes is printed.

    Raises:
        UsageError: a flag that such a model has no use for.
    """
    from kbit.cli.text_to_text import TextToTextFlags, answer_all
    from kbit.engine.text_to_text import TextToText
    from kbit.host.errors import UsageError

    usual = GenerationFlags(flags.model)
    cuts = ("temperature", "top_k", "top_p", "min_p", "typical_p")
    penalties = ("repetition_penalty", "presence_penalty", "frequency_penalty")
    for name in (*cuts, *penalties, "seed", "stop", "system", "speculate", "adapter"):
        if getattr(flags, name) not in (getattr(usual, name), []):
            raise UsageError(
                f"--{name.replace('_', '-')}: {flags.model} is an encoder-decoder, whose texts are not sampled: leave "
                "it out (kbit translate and kbit summarize have --beams)"
            )
    if chat:
        raise UsageError(f"--chat: {flags.model} is an encoder-decoder and has no chat template: leave it out")
    engine = TextToTextFlags(
        flags.model,
        max_tokens=flags.max_tokens,
        device=flags.device,
        backend=flags.backend,
        threads=flags.threads,
        compute=flags.compute,
        kv_bits=flags.kv_bits,
        bits=flags.bits,
    )
    answer_all(engine, [text], TextToText, as_json=as_json)


def _question(prompt: str | None, chat: bool, raw: bool, flags: GenerationFlags) -> str:
    """The prompt, once the flags that need no model are known to make sense."""
    from kbit.host.errors import UsageError

    flags.check()
    if raw and chat:
        raise UsageError("--raw and --chat: a text is continued or answered: leave one out")
    if raw and flags.system is not None:
        raise UsageError("--system goes with an answer: a text to continue (--raw) has no system message")
    return read_prompt(prompt)


def _encode(text: str, chat: bool, flags: GenerationFlags, tokenizer: Tokenizer, source: CheckpointSource) -> list[int]:
    """The prompt's tokens, once they are known to fit the model."""
    from kbit.engine.conversation import chat_prompt
    from kbit.engine.prompt_cache import check_prompt
    from kbit.host.errors import UsageError
    from kbit.models.families import spec_from_config

    if chat:
        messages = [{"role": "user", "content": text}]
        if flags.system is not None:
            messages.insert(0, {"role": "system", "content": flags.system})
        ids = chat_prompt(tokenizer, messages, flags.model)
    else:
        if flags.system is not None:
            raise UsageError(f"--system: {flags.model} has no chat template, and a text to continue no system message")
        ids = tokenizer.encode(text)
    check_prompt(ids, spec_from_config(source.config, where=f"config of {source.path}"))
    return ids


def result_dict(result: GenerationResult, loaded: LoadedModel) -> dict[str, Any]:
    """The object `--json` prints. Rates that cannot be known (fewer than two tokens, no drafts) are null."""
    from kbit.host.process import peak_rss_bytes

    drafts = result.speculation
    return {
        "model": loaded.name,
        "text": result.text,
        "finish_reason": result.finish_reason,
        "prompt_tokens": result.prompt_tokens,
        "completion_tokens": result.completion_tokens,
        "prefill_tokens_per_second": result.prefill_tokens_per_second,
        "decode_tokens_per_second": result.decode_tokens_per_second,
        "time_to_first_token_s": result.time_to_first_token,
        "load_s": loaded.load_seconds,
        "prepared_weights": loaded.prepared and str(loaded.prepared),
        "peak_rss_bytes": peak_rss_bytes(),
        "backend": loaded.backend_name,
        "backend_description": loaded.backend_description,
        "seed": result.seed,
        "speculation": drafts and {**asdict(drafts), "acceptance_rate": drafts.acceptance_rate},
    }


def statistics(result: GenerationResult, loaded: LoadedModel) -> str:
    """One line for people about what a generation took."""
    prompt = f"{result.prompt_tokens} prompt tokens"
    if result.cached_tokens:
        prompt += f" ({result.cached_tokens} cached)"
    if result.prefill_tokens_per_second is not None:
        prompt += f" in {result.prefill_seconds:.2f} s ({result.prefill_tokens_per_second:.0f} tok/s)"
    parts = [prompt]
    if result.time_to_first_token is not None:
        parts.append(f"first token {result.time_to_first_token:.2f} s")
    generated = f"{result.completion_tokens} token{'s' if result.completion_tokens != 1 else ''}"
    if result.decode_tokens_per_second is not None:
        generated += f" at {result.decode_tokens_per_second:.1f} tok/s"
    parts.append(generated)
    if (drafts := result.speculation) is not None:
        rate = "" if drafts.acceptance_rate is None else f" ({drafts.acceptance_rate:.0%})"
        parts.append(f"{drafts.accepted} of {drafts.drafted} drafted tokens accepted{rate}")
        if drafts.note is not None:
            parts.append(drafts.note)
    if result.finish_reason == "context":
        parts.append("the model's context is full")
    elif result.finish_reason == "repetition":
        parts.append("stopped, as it only repeated itself (--allow-repetition lets it)")
    elif result.finish_reason == "interrupted":
        parts.append("interrupted")
    parts.append(loaded.backend_description)
    return " · ".join(parts)
