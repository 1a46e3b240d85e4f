"""`kbit serve`: models over HTTP, as OpenAI's API has it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from kbit.cli.flag_groups import flag_groups
from kbit.cli.options import (
    DEFAULT_MODEL,
    BackendOption,
    ComputeOption,
    DeviceOption,
    KvBitsOption,
    ThreadsOption,
)

if TYPE_CHECKING:
    from kbit.serve.models import Models

_ACCESS, _LIMITS, _ANSWERS = "Access", "Limits", "Answers"
_SWITCHES = ("metrics", "slots", "page")  # what --without takes


@dataclass(frozen=True)
class AccessFlags:
    """Where the server listens, and who may use it."""

    host: Annotated[
        str,
        typer.Option(
            "--host",
            metavar="ADDRESS",
            help="Address to listen on, or several with commas between.",
            rich_help_panel=_ACCESS,
        ),
    ] = "127.0.0.1"
    port: Annotated[
        int, typer.Option("--port", metavar="N", help="Port; 0 takes a free one.", rich_help_panel=_ACCESS)
    ] = 8080
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            "--api-key",
            metavar="KEY",
            help="A key that clients must send; several may be given. [default: KBIT_API_KEY, or none]",
            rich_help_panel=_ACCESS,
        ),
    ] = None
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            "--cors-origin",
            metavar="ORIGIN",
            help="Web pages of this origin may use the server: http://ui.local:3000, localhost for all of this "
            "machine, * for any. [default: none]",
            rich_help_panel=_ACCESS,
        ),
    ] = None
    tls_cert: Annotated[
        str | None,
        typer.Option("--tls-cert", metavar="FILE", help="Certificate, for HTTPS.", rich_help_panel=_ACCESS),
    ] = None
    tls_key: Annotated[
        str | None, typer.Option("--tls-key", metavar="FILE", help="Its private key.", rich_help_panel=_ACCESS)
    ] = None
    without: Annotated[
        list[str] | None,
        typer.Option(
            "--without",
            metavar="ROUTE",
            help="Switches metrics, slots or page off; several may be given.",
            rich_help_panel=_ACCESS,
        ),
    ] = None
    tags: Annotated[
        str | None,
        typer.Option(
            "--tags",
            metavar="WORDS",
            help="Words with commas between that /v1/models tells, for clients that choose by them.",
            rich_help_panel=_ACCESS,
        ),
    ] = None
    any_model: Annotated[
        bool,
        typer.Option(
            "--any-model", help="Requests for a model of another name get the first one.", rich_help_panel=_ACCESS
        ),
    ] = False


AdapterOption = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        metavar="NAME=FOLDER",
        help="A LoRA adapter that PEFT saved, served as a model of this name on the first MODEL's weights; several may "
        "be given.",
    ),
]


SpeculateOption = Annotated[
    str | None,
    typer.Option(
        "--speculate",
        metavar="ngram|self[:K]",
        help="Guess tokens where few answers are being written, for the same text sooner: from what it repeats "
        "(ngram), or with the low planes of nested models (self, or self:3 for 3 bits).",
    ),
]


@dataclass(frozen=True)
class LimitFlags:
    """How much of everything."""

    context: Annotated[
        int | None,
        typer.Option(
            "--context",
            metavar="N",
            help="Most tokens of a prompt and its answer. [default: the model's, or what the cache holds]",
            rich_help_panel=_LIMITS,
        ),
    ] = None
    cache_size: Annotated[
        str | None,
        typer.Option(
            "--cache-size",
            metavar="SIZE",
            help="Memory for keys and values of each model (2GiB). [default: for 32768 tokens or one whole context, "
            "at most a quarter of what is free]",
            rich_help_panel=_LIMITS,
        ),
    ] = None
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory",
            metavar="SIZE",
            help="What all loaded models may take together; the one used longest ago makes room. [default: what is "
            "free at the start]",
            rich_help_panel=_LIMITS,
        ),
    ] = None
    parallel: Annotated[
        int,
        typer.Option("--parallel", metavar="N", help="Most answers that are written at once.", rich_help_panel=_LIMITS),
    ] = 64
    batch: Annotated[
        int,
        typer.Option(
            "--batch", metavar="N", help="Most tokens of a pass; fewer take less memory.", rich_help_panel=_LIMITS
        ),
    ] = 512
    queue: Annotated[
        int,
        typer.Option("--queue", metavar="N", help="Most requests that wait; others get 429.", rich_help_panel=_LIMITS),
    ] = 256
    max_body: Annotated[
        str,
        typer.Option("--max-body", metavar="SIZE", help="Largest body of a request.", rich_help_panel=_LIMITS),
    ] = "32MiB"
    slot_save_path: Annotated[
        Path | None,
        typer.Option(
            "--slot-save-path",
            metavar="FOLDER",
            help="Requests with an id_slot share beginnings with those of the same slot only, and POST "
            "/slots/{id}?action=save, restore or erase keeps them in files here. [default: there are no slots]",
            rich_help_panel=_LIMITS,
        ),
    ] = None


@dataclass(frozen=True)
class AnswerFlags:
    """What holds where a request does not say."""

    temperature: Annotated[
        float | None,
        typer.Option(
            "--temperature",
            metavar="T",
            help="0 takes the best token. [default: the model's]",
            rich_help_panel=_ANSWERS,
        ),
    ] = None
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed", metavar="N", help="Of the random numbers. [default: a new one]", rich_help_panel=_ANSWERS
        ),
    ] = None
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens",
            metavar="N",
            help="Most tokens of an answer. [default: 16 for /v1/completions, else what the context holds]",
            rich_help_panel=_ANSWERS,
        ),
    ] = None
    chat_template: Annotated[
        Path | None,
        typer.Option(
            "--chat-template",
            metavar="FILE",
            help="A Jinja file in place of the models' own.",
            rich_help_panel=_ANSWERS,
        ),
    ] = None
    chat_template_kwargs: Annotated[
        str | None,
        typer.Option(
            "--chat-template-kwargs",
            metavar="JSON",
            help="An object of variables for chat templates, where a request does not say (chat_template_kwargs).",
            rich_help_panel=_ANSWERS,
        ),
    ] = None
    reasoning: Annotated[
        Literal["auto", "on", "off"],
        typer.Option(
            "--reasoning",
            help="Whether models think before they answer, where they can; auto: as they are made.",
            rich_help_panel=_ANSWERS,
        ),
    ] = "auto"
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose",
            help="Answers to chats tell the prompt that the model was given (__verbose).",
            rich_help_panel=_ANSWERS,
        ),
    ] = False


@flag_groups()
def serve(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...",
            help="What to serve: as --model elsewhere, NAME=MODEL to name it (or NAME,NAME=MODEL), MODEL:3 to round it "
            f"to 3 bits. [default: {DEFAULT_MODEL}]",
        ),
    ] = None,
    *,
    access: AccessFlags,
    limits: LimitFlags,
    answers: AnswerFlags,
    adapter: AdapterOption = None,
    speculate: SpeculateOption = None,
    device: DeviceOption = "auto",
    backend: BackendOption = "auto",
    compute: ComputeOption = None,
    kv_bits: KvBitsOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Serve models over HTTP: OpenAI's completions, chats and embeddings, and a page to chat at /.

    The first model loads at once, others when they are first asked for. The same request gives the same answer, alone
    or under load, where it has a seed or temperature 0. Ctrl-C ends what is under way first; a second one does not.

    Examples:

      kbit serve

      kbit serve out/ --port 9000 --api-key secret

      kbit serve smollm2=smollm2-135m-instruct smollm2:3=smollm2-135m-instruct:3

      kbit serve smollm2-135m-instruct --adapter poet=poet-lora/ --adapter clerk=clerk-lora/
    """
    from kbit.host.errors import UsageError
    from kbit.host.process import share_one_heap

    share_one_heap()
    if not 0 <= access.port < 1 << 16:
        raise UsageError(f"--port {access.port}: expected a number from 0 to 65535")
    counts = (
        ("--parallel", limits.parallel),
        ("--queue", limits.queue),
        ("--batch", limits.batch),
        ("--max-tokens", answers.max_tokens),
    )
    for flag, value in counts:
        if value is not None and value < 1:
            raise UsageError(f"{flag} {value}: expected at least 1")
    unknown = [each for each in access.without or () if each not in _SWITCHES]
    if unknown:
        raise UsageError(f"--without {unknown[0]}: expected one of {', '.join(_SWITCHES)}")
    if (access.tls_cert is None) != (access.tls_key is None):
        raise UsageError("--tls-cert and --tls-key belong together: give both, or neither")
    try:
        import fastapi  # noqa: F401
        import llguidance  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise UsageError(f"kbit serve needs {error.name}: pip install 'kbit[serve]'") from None
    from kbit.serve.app import ServeOptions, make_app
    from kbit.serve.models import served_adapter, served_name

    named = [served_name(model) for model in models or [DEFAULT_MODEL]]
    adapters = [served_adapter(each) for each in adapter or ()]
    served = _models(named, adapters, access, limits, answers, speculate, device, backend, compute, kv_bits, threads)
    keys = access.api_key or [key for key in [os.environ.get("KBIT_API_KEY")] if key]
    if any(not key.strip() for key in keys):
        raise UsageError("--api-key '': a key needs at least one character")
    from kbit.serve.access import LOOPBACK
    from kbit.serve.run import listen, run

    options = ServeOptions(
        keys=keys,
        hosts=LOOPBACK if set(access.host.split(",")) <= set(LOOPBACK) else None,
        origins=access.cors_origin or (),
        most_bytes=_bytes("--max-body", limits.max_body),
        most_requests=limits.queue,
        without=access.without or (),
    )
    sockets = listen(access.host, access.port)
    run(make_app(served, options), served, sockets, tls=(access.tls_cert, access.tls_key), keyed=bool(keys))


def _models(
    named: list[tuple[str, str]],
    adapters: list[tuple[str, str]],
    access: AccessFlags,
    limits: LimitFlags,
    answers: AnswerFlags,
    speculate: str | None,
    *engine: Any,
) -> Models:
    from kbit.backends.select import select_backend
    from kbit.serve.models import ModelOptions, Models

    device, backend, compute, kv_bits, threads = engine
    chosen = select_backend(device, backend=backend, threads=threads, compute=compute, kv_bits=kv_bits)
    cache = None if limits.cache_size is None else _bytes("--cache-size", limits.cache_size)
    options = ModelOptions(
        chosen,
        limits.context,
        cache,
        limits.parallel,
        sampling=_sampling(answers),
        max_tokens=answers.max_tokens,
        chat_template=None if answers.chat_template is None else _template(answers.chat_template),
        reasoning=answers.reasoning,
        verbose=answers.verbose,
        template_variables=_variables(answers.chat_template_kwargs),
        tags=tuple(tag for tag in (access.tags or "").split(",") if tag),
        batch_tokens=limits.batch,
        memory=None if limits.memory is None else _bytes("--memory", limits.memory),
        speculate=speculate,
        slot_folder=_folder(limits.slot_save_path),
    )
    return Models(named, options, any_name=access.any_model, adapters=adapters)


def _folder(path: Path | None) -> Path | None:
    from kbit.host.errors import UsageError

    if path is not None and not path.is_dir():
        raise UsageError(f"--slot-save-path {path}: is no folder: make it first (mkdir)")
    return path


def _sampling(answers: AnswerFlags) -> dict[str, Any]:
    from kbit.engine.sampler import SamplingParams

    given: dict[str, Any] = {"temperature": answers.temperature, "seed": answers.seed}
    said = {name: value for name, value in given.items() if value is not None}
    SamplingParams(**said)  # complains in the words of the flags
    return said


def _template(path: Path) -> str:
    from kbit.host.errors import UsageError

    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is no text"
        raise UsageError(f"--chat-template {path}: {why}: name a file with a Jinja template") from None


def _variables(text: str | None) -> dict[str, Any]:
    from kbit.host.errors import UsageError

    try:
        found = json.loads(text or "{}")
    except ValueError as error:
        raise UsageError(f"--chat-template-kwargs {text}: no JSON ({error}): give an object of variables") from None
    if not isinstance(found, dict):
        raise UsageError(f'--chat-template-kwargs {text}: expected an object of variables, such as {{"name": 1}}')
    return found


def _bytes(flag: str, text: str) -> int:
    from kbit.host.errors import UsageError
    from kbit.host.quantities import parse_size

    size = parse_size(text)
    if size is None:
        raise UsageError(f"{flag} {text}: expected a size, for example 64MiB or 2GB")
    return size
