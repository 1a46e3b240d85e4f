"""The flags of `kbit serve`: where it listens, how much of everything, and what holds where a request does not say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

_ACCESS, _LIMITS, _ANSWERS = "Access", "Limits", "Answers"
SWITCHES = ("metrics", "slots", "page")  # what --without takes


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
