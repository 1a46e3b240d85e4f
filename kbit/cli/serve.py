"""`kbit serve`: models over HTTP, as OpenAI's API has it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
from kbit.cli.serve_flags import SWITCHES, AccessFlags, AdapterOption, AnswerFlags, LimitFlags, SpeculateOption

if TYPE_CHECKING:
    from kbit.serve.models import Models


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
    _check(access, limits, answers)
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


def _check(access: AccessFlags, limits: LimitFlags, answers: AnswerFlags) -> None:
    """
    Raises:
        UsageError: a flag's value that none is.
    """
    from kbit.host.errors import UsageError

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
    unknown = [each for each in access.without or () if each not in SWITCHES]
    if unknown:
        raise UsageError(f"--without {unknown[0]}: expected one of {', '.join(SWITCHES)}")
    if (access.tls_cert is None) != (access.tls_key is None):
        raise UsageError("--tls-cert and --tls-key belong together: give both, or neither")


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
