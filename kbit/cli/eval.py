"""`kbit eval`: perplexity of a model and how far it is from a reference, or its answers to zero-shot tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from kbit.cli.flag_groups import flag_groups
from kbit.cli.options import (
    ENGINE,
    BackendOption,
    BitsOption,
    ComputeOption,
    DeviceOption,
    JsonOption,
    KvBitsOption,
    ThreadsOption,
    streaming_output,
)
from kbit.cli.output import print_json
from kbit.cli.processes import processes, refuse_copies
from kbit.host.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from kbit.backends.parallel import Group
    from kbit.evaluate.evaluation import Evaluation, Request

# Files of pairs of texts (`kbit.evaluate.pairs`).
ENDINGS = (".tsv", ".jsonl")
_TASKS = "Zero-shot tasks"
_PAIRS = "Pairs of texts (encoder-decoders)"


@dataclass(frozen=True)
class EvalFlags:
    """Flags of `kbit eval`."""

    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A folder, a .gguf file, a hub id, or a name kbit pull lists.")
    ]
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="FILE_OR_NAME",
            help="A UTF-8 text file, the name of a text, or sampled. [default: wikitext2]",
        ),
    ] = None
    reference: Annotated[
        str | None, typer.Option("--reference", metavar="MODEL", help="Also measure the distance to this model.")
    ] = None
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", metavar="N", help="Use at most N tokens of the text.")
    ] = None
    context: Annotated[
        int | None,
        typer.Option(
            "--context",
            metavar="N",
            help="Tokens per window. [default: 2048 (gptq), 512 (llamacpp); with --tasks what the model is meant for]",
        ),
    ] = None
    convention: Annotated[
        str | None,
        typer.Option(
            "--convention", metavar="gptq|llamacpp", help="Whose way of computing perplexity. [default: gptq]"
        ),
    ] = None
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            metavar="NAMES",
            help="Instead of perplexity, score these (separated by commas, or all): lambada_openai, piqa, winogrande, "
            "hellaswag, arc_easy, arc_challenge. Of an embedding model: stsb.",
            rich_help_panel=_TASKS,
        ),
    ] = None
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit", metavar="N", help="The first N items of each task. [default: all]", rich_help_panel=_TASKS
        ),
    ] = None
    task_data: Annotated[
        str | None,
        typer.Option(
            "--task-data",
            metavar="DIR|hub",
            help="Where the tasks' files are; of stsb also a file of pairs (score, tab, text, tab, text). [default: "
            "the folder KBIT_DATA names, else the hub]",
            rich_help_panel=_TASKS,
        ),
    ] = None
    prompt_name: Annotated[
        str | None,
        typer.Option(
            "--prompt-name",
            metavar="NAME",
            help="Of stsb: put the model's prompt of this name before every text.",
            rich_help_panel=_TASKS,
        ),
    ] = None
    items: Annotated[
        str | None,
        typer.Option(
            "--items",
            metavar="FILE",
            help="Keep what the model said to each item, as JSON lines; an interrupted run goes on from there.",
            rich_help_panel=_TASKS,
        ),
    ] = None
    against: Annotated[
        list[str] | None,
        typer.Option(
            "--against",
            metavar="FILE",
            help="Compare with what another run kept with --items. Can be given several times.",
            rich_help_panel=_TASKS,
        ),
    ] = None
    task: Annotated[
        str | None,
        typer.Option(
            "--task",
            metavar="translation|summarization",
            help="What an encoder-decoder is to do with the sources of --data. [default: what the sources say]",
            rich_help_panel=_PAIRS,
        ),
    ] = None
    source: Annotated[
        str | None,
        typer.Option("--from", metavar="LANGUAGE", help="Of the sources of a translation.", rich_help_panel=_PAIRS),
    ] = None
    target: Annotated[
        str | None,
        typer.Option("--to", metavar="LANGUAGE", help="Of the references of a translation.", rich_help_panel=_PAIRS),
    ] = None
    beams: Annotated[
        int | None,
        typer.Option(
            "--beams", metavar="N", help="Keep the N best texts. [default: as the model says]", rich_help_panel=_PAIRS
        ),
    ] = None
    bits: BitsOption = None
    device: DeviceOption = "auto"
    backend: BackendOption = "auto"
    compute: ComputeOption = None
    kv_bits: KvBitsOption = None
    reference_backend: Annotated[
        str,
        typer.Option(
            "--reference-backend",
            metavar="reference|native-fp32|native",
            help="Who computes the --reference: torch in fp32, weights expanded; natively in fp32, which takes "
            "less memory; or the native backend in the same way as MODEL.",
            rich_help_panel=ENGINE,
        ),
    ] = "reference"
    threads: ThreadsOption = None

    @property
    def of_pairs(self) -> dict[str, object]:
        """Flags that only encoder-decoders have."""
        return {"--task": self.task, "--from": self.source, "--to": self.target, "--beams": self.beams}

    @property
    def of_tasks(self) -> dict[str, object]:
        """Flags that only tasks have."""
        given = {"--limit": self.limit, "--task-data": self.task_data, "--items": self.items}
        return {**given, "--against": self.against, "--prompt-name": self.prompt_name}

    def request(self) -> Request:
        """What to measure of perplexity.

        Raises:
            UsageError: a flag was given that belongs to --tasks.
        """
        from kbit.evaluate.evaluation import Request

        refuse(self.of_tasks, "goes with --tasks")
        refuse(self.of_pairs, "goes with an encoder-decoder and --data PAIRS.tsv")
        return Request(
            self.model,
            "wikitext2" if self.data is None else self.data,
            self.reference,
            max_tokens=self.max_tokens,
            context=self.context,
            convention="gptq" if self.convention is None else self.convention,
            reference_backend=self.reference_backend,
            device=self.device,
            threads=self.threads,
            backend=self.backend,
            compute=self.compute,
            kv_bits=self.kv_bits,
            bits=self.bits,
        )


@flag_groups()
def evaluate(*, flags: EvalFlags, json: JsonOption = False) -> None:
    """Measure perplexity on a text and, with --reference, KL divergence, top-1 agreement and paired loss difference;
    or, with --tasks, how many questions a model answers rightly.

    Perplexities compare only within one convention and one context length: "gptq" is that of the GPTQ papers (windows
    of 2048 tokens, or what the model can take), "llamacpp" that of llama.cpp (512, the second half scored).

    MODEL runs as `kbit run` would run it (native backend, int8 compute): the figures include the engine's own error.
    The reference runs exactly, in fp32, unless --reference-backend says otherwise. With the same model on both sides,
    KL is the engine's error alone; with --backend reference it is that of the weights alone.

    Named texts are wikitext2, wikitext2-valid, wikitext2-valid-tokenized, tinystories and novels-heldout. They are
    looked for in the folder named by KBIT_DATA, then in the cache; the raw WikiText-2 splits can be downloaded. With
    --data sampled the --reference writes the text itself (8192 tokens, or --max-tokens), and it is kept in the cache:
    KL on it compares models without any data; perplexities on it compare with none on other texts.

    An encoder-decoder is asked for a text for every source of --data PAIRS.tsv (source, tab, reference) or PAIRS.jsonl
    ({"source": ..., "reference": ...}): BLEU and chrF by sacrebleu, with its signature, and ROUGE, of what is installed
    (pip install 'kbit[text]').

    Tasks are asked and scored as lm-eval does (zero-shot). With --reference or --against, the same items are compared
    one by one: how many were lost and gained, McNemar's exact test, corrected for the number of comparisons, and
    intervals. A few hundred items tell two widths apart only where these differ much: look at the log-likelihood of
    the right answers, which sees more.

    An embedding model is asked for --tasks stsb: Spearman's correlation of the cosines of pairs of texts with people's
    judgement of how alike they are, on the STS benchmark's test set or a file of your own.

    \b
    Examples:
      kbit eval smollm2-135m-instruct
      kbit eval out/ --reference smollm2-135m-instruct --max-tokens 20000
      kbit eval out/ --reference smollm2-135m-instruct --data sampled
      kbit eval out/ --reference out/ --kv-bits 4
      kbit eval out/ --data mytext.txt --json
      kbit eval model.gguf --convention llamacpp --context 512
      kbit eval out/ --tasks piqa,arc_easy --limit 200 --reference smollm2-135m-instruct
      kbit eval t5-small/ --data pairs.tsv --task translation --from en --to de --beams 4
      kbit eval minilm-q4/ --tasks stsb --reference all-MiniLM-L6-v2/
      kbit eval q4/ --tasks all --items q4.jsonl
      kbit eval q3/ --tasks all --against q4.jsonl
      torchrun --nproc-per-node 2 -m kbit eval out/ --device cuda
    """
    if flags.tasks is None and flags.data is not None and flags.data.endswith(ENDINGS):
        from kbit.cli.eval_pairs import run_pairs, writes_from_sources

        if writes_from_sources(flags.model):
            refuse_copies("kbit eval --data PAIRS")
            run_pairs(flags, as_json=json)
            return
    if flags.tasks is not None:
        from kbit.cli.eval_tasks import run_tasks

        refuse_copies("kbit eval --tasks")
        run_tasks(flags, as_json=json)
        return
    with processes() as peers:
        with peers.together():
            asked = flags.request()
            asked.check()
        peers.fetch([name for name in (flags.model, flags.reference) if name is not None], asked.text)
        evaluation = _run(asked, quiet=json or not peers.speaks, group=peers.group)
        if peers.speaks:
            _tell(evaluation, json)


def _tell(evaluation: Evaluation, json: bool) -> None:
    """Print what was measured."""
    if json:
        print_json(evaluation.to_dict())
        return
    from rich.console import Console

    with streaming_output():
        Console().print(_table(evaluation))


def refuse(flags: Mapping[str, object], why: str) -> None:
    """
    Raises:
        UsageError: a flag was given that has no meaning here.
    """
    for flag, value in flags.items():
        if value is not None:
            raise UsageError(f"{flag} {why}")


def _run(request: Request, quiet: bool, group: Group | None) -> Evaluation:
    """The evaluation, with a progress bar on stderr unless `quiet` or stderr is no terminal."""
    import math

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from kbit.evaluate.evaluation import evaluate_model

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task("opening", total=None)

        def on_window(done: int, total: int, mean_nll: float) -> None:
            bar.update(task, completed=done, total=total, description=f"perplexity {math.exp(min(mean_nll, 700)):.4f}")

        return evaluate_model(request, on_window, lambda text: bar.update(task, description=text), group)


def _table(evaluation: Evaluation) -> Table:
    """The result for people."""
    from rich.table import Table
    from rich.text import Text

    result = evaluation.result
    table = Table(show_header=False, title=Text(evaluation.request.model), title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")

    def row(name: str, value: str) -> None:
        table.add_row(name, Text(value))

    row("text", evaluation.data.name + (f" ({evaluation.data.note})" if evaluation.data.note else ""))
    row("convention", f"{result.convention}, context {result.context}")
    row("tokens scored", f"{result.tokens:,} in {result.windows} windows")
    row("perplexity", _with_error(result.perplexity, result.perplexity_stderr, 4))
    if evaluation.comparison is not None and evaluation.request.reference is not None:
        other = evaluation.comparison
        row("reference", evaluation.request.reference)
        row("reference perplexity", _with_error(other.reference.perplexity, other.reference.perplexity_stderr, 4))
        row("KL(reference || model)", _with_error(other.kl_mean, other.kl_stderr, 6) + " nats/token")
        percentiles = ", ".join(f"{percent:g}%: {other.kl_percentile(percent):.5f}" for percent in (50, 90, 99, 99.9))
        row("KL percentiles", f"{percentiles}, max: {other.kl_max:.5f}")
        row("top-1 agreement", _with_error(100 * other.top1_agreement, _percent(other.top1_stderr), 2) + " %")
        row("delta NLL", _with_error(other.delta_nll, other.delta_nll_stderr, 6) + " nats/token")
        interval = other.delta_nll_interval()
        if interval is not None:
            row("  95 % interval", f"{interval[0]:+.6f} to {interval[1]:+.6f}")
    if result.clusters != result.windows:
        row("errors from", f"{result.clusters} blocks of {result.windows} windows (few windows: errors are rough)")
    row("backend", evaluation.backend)
    if evaluation.reference_backend is not None:
        row("reference backend", evaluation.reference_backend)
    row("time", f"{evaluation.seconds:.1f} s")
    return table


def _with_error(value: float, error: float | None, digits: int) -> str:
    return f"{value:.{digits}f}" + ("" if error is None else f" +/- {error:.{digits}f}")


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value
