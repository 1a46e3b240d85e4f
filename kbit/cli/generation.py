"""What `kbit run` and `kbit chat` share: their flags, and the way from these to a model that is ready to generate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from kbit.cli.options import (
    DEFAULT_MODEL,
    BackendOption,
    BitsOption,
    ComputeOption,
    DeviceOption,
    KvBitsOption,
    ModelOption,
    ThreadsOption,
    check_text,
)
from kbit.cli.processes import Peers
from kbit.host.errors import UsageError

if TYPE_CHECKING:
    from kbit.checkpoint.source import CheckpointSource
    from kbit.engine.loader import LoadedModel
    from kbit.engine.sampler import SamplingParams
    from kbit.engine.speculative import Speculation
    from kbit.text.tokenizer import Tokenizer

_SAMPLING = "Sampling"


@dataclass(frozen=True)
class GenerationFlags:
    """Flags of a command that generates text."""

    model: ModelOption = DEFAULT_MODEL
    adapter: Annotated[
        str | None,
        typer.Option("--adapter", metavar="FOLDER", help="A LoRA adapter that PEFT saved, beside the model's weights."),
    ] = None
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="System message of the conversation.")
    ] = None
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", metavar="N", help="Most tokens to generate.")] = 128
    temperature: Annotated[
        float | None,
        typer.Option(
            "--temperature",
            metavar="T",
            help="0 always takes the most probable token; higher is more random. [default: 0; in a chat, this and the "
            "following as the model's authors recommend]",
            rich_help_panel=_SAMPLING,
        ),
    ] = None
    top_k: Annotated[
        int | None,
        typer.Option(
            "--top-k", metavar="K", help="Keep the K most probable tokens; 0 keeps all.", rich_help_panel=_SAMPLING
        ),
    ] = None
    top_p: Annotated[
        float | None,
        typer.Option(
            "--top-p",
            metavar="P",
            help="Keep the fewest tokens whose probabilities reach P; 1 keeps all.",
            rich_help_panel=_SAMPLING,
        ),
    ] = None
    min_p: Annotated[
        float | None,
        typer.Option(
            "--min-p",
            metavar="P",
            help="Keep tokens at least P times as probable as the best one; 0 keeps all.",
            rich_help_panel=_SAMPLING,
        ),
    ] = None
    typical_p: Annotated[
        float | None,
        typer.Option(
            "--typical-p",
            metavar="P",
            help="Keep the most typical tokens whose probabilities reach P; 1 keeps all.",
            rich_help_panel=_SAMPLING,
        ),
    ] = None
    repetition_penalty: Annotated[
        float | None,
        typer.Option(
            "--repetition-penalty",
            metavar="R",
            help="Weaken tokens seen in prompt or answer; 1 is off, 1.1 is usual.",
            rich_help_panel=_SAMPLING,
        ),
    ] = None
    presence_penalty: Annotated[
        float,
        typer.Option(
            "--presence-penalty",
            metavar="X",
            help="Subtract X from the logits of tokens in the answer.",
            rich_help_panel=_SAMPLING,
        ),
    ] = 0.0
    frequency_penalty: Annotated[
        float,
        typer.Option(
            "--frequency-penalty",
            metavar="X",
            help="Subtract X for every time a token is in the answer.",
            rich_help_panel=_SAMPLING,
        ),
    ] = 0.0
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            metavar="S",
            help="Makes sampling repeatable. [default: a fresh one]",
            rich_help_panel=_SAMPLING,
        ),
    ] = None
    stop: Annotated[
        list[str] | None,
        typer.Option("--stop", metavar="TEXT", help="End before this text appears. Can be given several times."),
    ] = None
    bits: BitsOption = None
    allow_repetition: Annotated[
        bool,
        typer.Option("--allow-repetition", help="Do not end a text that has come to only repeat itself."),
    ] = False
    device: DeviceOption = "auto"
    backend: BackendOption = "auto"
    compute: ComputeOption = None
    kv_bits: KvBitsOption = None
    threads: ThreadsOption = None
    speculate: Annotated[
        str | None,
        typer.Option(
            "--speculate",
            metavar="ngram|self[:K]|MODEL",
            help="Guess tokens and check several at once, for the same text sooner: from what the text repeats "
            "(ngram), with the low planes of a nested model itself (self, or self:3 for 3 bits), or with a smaller "
            "MODEL of the same vocabulary.",
        ),
    ] = None
    draft_tokens: Annotated[
        int | None,
        typer.Option("--draft-tokens", metavar="N", help="Most tokens to guess at a time. [default: 8]"),
    ] = None

    def check(self) -> None:
        """Look for mistakes that show before a model is opened, which may mean a download.

        Raises:
            UsageError: a flag is out of range, or needs another one.
        """
        if self.max_tokens < 1:
            raise UsageError(f"--max-tokens {self.max_tokens}: expected at least 1")
        if any(not text for text in self.stop or ()):
            raise UsageError("--stop '': a stop string needs at least one character")
        if self.system is not None:
            check_text("--system", self.system)
        self.draft_limit()

    def draft_limit(self) -> int:
        """--draft-tokens, or what it is by default.

        Raises:
            UsageError: it is out of range, or given without --speculate.
        """
        from kbit.engine.speculative import DRAFT_TOKENS, check_draft_tokens

        if self.draft_tokens is None:
            return DRAFT_TOKENS
        if self.speculate is None:
            raise UsageError("--draft-tokens needs --speculate: nothing is drafted without it")
        check_draft_tokens(self.draft_tokens)
        return self.draft_tokens

    def sampling(self, seed: int | None, base: SamplingParams | None = None) -> SamplingParams:
        """How tokens are chosen.

        Args:
            seed: of the random numbers.
            base: what the flags do not say; None: greedy.

        Raises:
            UsageError: a value is out of range.
        """
        from kbit.engine.sampler import SamplingParams

        names = ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return replace(
            base or SamplingParams(),
            **given,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=seed,
        )


@dataclass(frozen=True)
class Ready:
    """A model that is ready to generate as the flags say."""

    loaded: LoadedModel
    sampling: SamplingParams
    speculation: Speculation | None


def load_to_generate(
    flags: GenerationFlags,
    peers: Peers,
    check: Callable[[Tokenizer, CheckpointSource], None],
    *,
    recommended: bool = False,
) -> Ready:
    """Load the model, and what drafts for it.

    Args:
        flags: already checked.
        peers: the processes that share the model.
        check: called with tokenizer and checkpoint before any weight is read, to refuse early what these can tell.
        recommended: what the flags do not say of sampling is as the model's authors recommend, else greedy.

    Raises:
        UsageError, CheckpointError, UnsupportedError: see `kbit.engine.loader.load_model`; in every process alike.
    """
    from kbit.backends.select import select_backend
    from kbit.checkpoint.narrowed import widths_below
    from kbit.checkpoint.readers.lora_file import check_adapter
    from kbit.engine.draft_widths import asks_for_self, check_widths, draft_bits
    from kbit.engine.loader import with_template_of
    from kbit.engine.sampling_defaults import sampling_defaults
    from kbit.engine.self_speculation import SelfDrafter
    from kbit.engine.speculative import NGRAM, Speculation, load_drafter

    model, speculate = flags.model, flags.speculate
    speculation: Speculation | None = None
    seed = peers.seed(flags.seed)
    itself = speculate is not None and asks_for_self(speculate)
    peers.fetch([name for name in (model, None if itself else speculate) if name not in (None, NGRAM)])
    with peers.together():
        sampling = flags.sampling(seed)
        backend = select_backend(
            flags.device, backend=flags.backend, threads=flags.threads, compute=flags.compute, kv_bits=flags.kv_bits
        )
        load = peers.loader(backend, flags.threads)
        load_whole = partial(load, bits=flags.bits)

        def prepare(tokenizer: Tokenizer, source: CheckpointSource) -> None:
            nonlocal speculation, sampling
            check(tokenizer if flags.adapter is None else with_template_of(tokenizer, flags.adapter), source)
            if recommended:
                sampling = flags.sampling(seed, sampling_defaults(source, model).params)
            if speculate is not None and itself:
                check_widths(model, widths_below(source, flags.bits), draft_bits(speculate))
            elif speculate is not None:
                speculation = Speculation(load_drafter(speculate, model, tokenizer, load), flags.draft_limit())

        if flags.adapter is not None:
            check_adapter(flags.adapter)
            loaded = load_whole(model, check=prepare, adapters={"adapter": flags.adapter}).with_adapter("adapter")
        else:
            loaded = load_whole(model, check=prepare)
        if speculate is not None and itself:
            speculation = Speculation(SelfDrafter(loaded, draft_bits(speculate)), flags.draft_limit())
        return Ready(loaded, sampling, speculation)


def refuse_too_large(flags: GenerationFlags, source: CheckpointSource, prompt: int) -> None:
    """
    Args:
        flags: of a command that generates.
        source: the model, opened.
        prompt: tokens.

    Raises:
        KbitError: on the CPU, a limit leaves this process less memory than the model takes with its prompt and answer.
    """
    if flags.device == "cuda" or flags.backend not in ("auto", "native"):
        return
    from kbit.backends.select import kv_kind
    from kbit.host.cpu import default_threads
    from kbit.planner.fits import Wanted, refuse_what_does_not_fit

    compute = flags.compute or "int8"
    kv = kv_kind(flags.kv_bits) if flags.kv_bits else "fp32" if compute == "fp32" else "fp16"
    context = prompt + flags.max_tokens
    wanted = Wanted(context, prompt, kv=kv, compute=compute, threads=flags.threads or default_threads())
    refuse_what_does_not_fit(source, wanted, flags.model)
