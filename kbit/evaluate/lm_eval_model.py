"""kbit as a model of EleutherAI's lm-evaluation-harness, for all of its tasks.

lm-eval (0.4.13) finds models in a table of its own, which packages cannot add to without being imported: `lm_eval
--model kbit` alone does not work. From the command line, with all of lm_eval's options:

    python -m kbit.evaluate.lm_eval_model --model kbit --model_args model=out/,compute=fp32 --tasks piqa --limit 100

and from Python, by name once this module is imported, or with the object:

    import lm_eval
    from kbit.evaluate.lm_eval_model import KbitLM, local_tasks

    lm_eval.simple_evaluate(model=KbitLM("out/"), tasks=["piqa"])
    lm_eval.simple_evaluate(model="kbit", model_args="model=out/", tasks=[local_tasks(["piqa"], "data/")])

For LAMBADA, PIQA, WinoGrande, HellaSwag and ARC, `kbit eval --tasks` gives the same numbers without lm-eval.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

from kbit.engine.generate import generate
from kbit.engine.loader import load_model
from kbit.engine.sampler import SamplingParams
from kbit.evaluate.tasks.documents import Row, parse_tasks
from kbit.evaluate.tasks.scorer import Scorer
from kbit.evaluate.tasks.sources import load_items
from kbit.host.errors import KbitError, UnsupportedError, UsageError, one_line

try:
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
except ImportError as error:
    raise UnsupportedError(f"lm-eval cannot be imported ({error}): pip install 'kbit[tasks]'") from None

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

# What lm-eval's own models generate unless a task says otherwise.
_MAX_GENERATED = 256
# Settings of a task's generation_kwargs that a SamplingParams has, beside temperature.
_SAMPLING = ("top_k", "top_p", "min_p", "repetition_penalty")


@register_model("kbit")
class KbitLM(TemplateLM):  # type: ignore[misc]
    """A model that kbit runs.

    Args:
        model: a folder, a .gguf file, a hub id or a name `kbit pull` lists.
        pretrained: the same, under the name that lm-eval's own models use.
        device: "auto", "cpu" or "cuda" (also with a number, which must be that of the current GPU). lm-eval's command
            line asks for a GPU unless told otherwise: where there is none, the CPU runs, which the log says.
        backend, compute, kv_bits, threads: who runs the model, and how (`kbit.backends.select.select_backend`).
        max_length: tokens of context and answer; by default what the model is meant for.
        prefix_token_id: stands for an empty context; by default the beginning of a sequence, or its end.
        batch_size, max_batch_size: not used: batches are as large as the kernels like them.

    Raises:
        UsageError, KbitError: see `kbit.engine.loader.load_model`.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        pretrained: str | None = None,
        device: str = "auto",
        backend: str = "auto",
        compute: str | None = None,
        kv_bits: int | str | None = None,
        threads: int | None = None,
        max_length: int | None = None,
        prefix_token_id: int | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        name = model or pretrained
        if not name or (model and pretrained):
            raise UsageError("--model_args: give the model once, as model=... (or pretrained=...)")
        device = device.partition(":")[0]
        if device == "cuda" and not torch.cuda.is_available():
            logging.getLogger(__name__).warning("no GPU for device=cuda (lm-eval's default): running on the CPU")
            device = "cpu"
        loaded = load_model(str(name), device, threads, backend=backend, compute=compute, kv_bits=kv_bits)
        self.model_name = str(name)
        self._decoder = loaded.decoder
        self._tokenizer = loaded.tokenizer
        self._scorer = Scorer(loaded.decoder, loaded.tokenizer, max_length, prefix_token_id)
        self._device = loaded.decoder.backend.device
        self._template: str | None = None

    @property
    def eot_token_id(self) -> int:
        """The end-of-sequence token, or what stands for an empty context where there is none."""
        ids = self._tokenizer.eos_ids
        return min(ids) if ids else self.prefix_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands for an empty context.

        Raises:
            UsageError: the tokenizer has neither beginning nor end of a sequence.
        """
        if self._scorer.prefix_id is None:
            raise UsageError(
                f"{self.model_name}: the tokenizer has no token for an empty context: give prefix_token_id"
            )
        return self._scorer.prefix_id

    @property
    def max_length(self) -> int:
        """Tokens of context and answer."""
        return self._scorer.max_length

    @property
    def max_gen_toks(self) -> int:
        """Tokens to generate unless a task says otherwise."""
        return _MAX_GENERATED

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's cache of requests."""
        return self.model_name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; with special tokens as `Scorer.tokens` unless told."""
        if add_special_tokens is None:
            return self._scorer.tokens(string)
        return self._tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, Sequence[int], Sequence[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, greedy) of (texts, context ids, continuation ids)."""
        encoded = [self._scorer.fit(context, continuation) for _, context, continuation in requests]
        answers: dict[int, tuple[float, bool]] = {}
        bar = _progress(len(requests), "Running loglikelihood requests", disable_tqdm)
        for index, score in self._scorer.stream(encoded):
            answers[index] = (score.loglikelihood, score.greedy)
            texts = requests[index][0]
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answers[index])
            bar(1)
        return [answers[index] for index in range(len(requests))]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows that do not overlap in what they score."""
        windows, owners = [], []
        for owner, (text,) in enumerate(request.args for request in requests):
            rolling = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in map(utils.make_disjoint_window, rolling):
                windows.append((None, *window))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (loglikelihood, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += loglikelihood
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to a stop string, greedy unless the task samples.

        Raises:
            UsageError: a task asks for more tokens than the model has room for.
        """
        end = self._tokenizer.decode([self.eot_token_id], skip_special_tokens=False)
        texts = []
        bar = _progress(len(requests), "Running generate_until requests", disable_tqdm)
        for context, settings in (request.args for request in requests):
            wanted = normalize_gen_kwargs(settings, self.max_gen_toks)
            stop = handle_stop_sequences(wanted.get("until"), eos=end)
            most = int(wanted["max_gen_toks"])
            room = self.max_length - most
            if room < 1:
                raise UsageError(f"{most} tokens to generate leave no room for a prompt in {self.max_length}")
            sampling = bool(wanted.get("do_sample"))
            params = SamplingParams(
                temperature=float(wanted["temperature"]) if sampling else 0.0,
                # lm-eval seeds torch's generator: drawing from it makes samples repeatable.
                seed=int(torch.randint(1 << 62, (1,))) if sampling else None,
                **{name: wanted[name] for name in _SAMPLING if wanted.get(name) is not None},
            )
            run = generate(
                self._decoder,
                self._tokenizer,
                self.tok_encode(context)[-room:],
                params,
                max_tokens=most,
                stop=[text for text in stop if text],
            ).run()
            if run.finish_reason == "interrupted":
                raise KeyboardInterrupt  # which `run` takes for the end of one text
            text = postprocess_generated_text(self._tokenizer.decode(run.ids), stop, None)
            texts.append(text)
            self.cache_hook.add_partial("generate_until", (context, settings), text)
            bar(1)
        return texts

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The checkpoint's chat template of a name, or its default; None where no template is asked for.

        Raises:
            UsageError: there is no such template.
        """
        if chat_template is False or chat_template is None:
            return None
        if isinstance(chat_template, str):
            found = self._tokenizer.chat_templates.get(chat_template)
        else:
            found = self._tokenizer.chat_template
        if found is None:
            names = ", ".join(self._tokenizer.chat_templates) or "none"
            raise UsageError(f"{self.model_name} has no such chat template (it has {names})")
        self._template = found
        return found

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as a prompt, in the template that `chat_template` chose, or the checkpoint's default."""
        from kbit.engine.chat import render_chat

        template = self._template or self.chat_template(True)
        assert template is not None  # chat_template(True) gives one or raises
        tokens = self._tokenizer.special_tokens
        if add_generation_prompt or chat_history[-1]["role"] != "assistant":
            return render_chat(
                template, chat_history, special_tokens=tokens, add_generation_prompt=add_generation_prompt
            )
        # The beginning of an answer to continue: what the template writes after the answer is left out.
        text = render_chat(template, chat_history, special_tokens=tokens, add_generation_prompt=False)
        answer = chat_history[-1]["content"].strip()
        return text[: text.rindex(answer) + len(answer)]


def local_tasks(names: Iterable[str], data: str | None = None, limit: int | None = None) -> dict[str, Any]:
    """lm-eval's own tasks over the files that `kbit eval --tasks` reads, as a group for `simple_evaluate(tasks=[...])`.

    Prompts, choices and metrics are lm-eval's; only the rows are handed in, so no hub is asked for them.

    Args:
        names: of kbit.evaluate.tasks.documents.TASKS.
        data: folder, or "hub" (kbit.evaluate.tasks.sources).
        limit: rows of each, the first; None for all.

    Raises:
        UsageError, KbitError: no such task, or its files cannot be read.
    """
    tasks = parse_tasks(",".join(names))
    members = [{"task": task.name, "custom_dataset": _as_dataset(load_items(task, data, limit).rows)} for task in tasks]
    return {"group": "kbit_local", "task": members}


def _as_dataset(rows: Iterable[Row]) -> Callable[..., dict[str, Any]]:
    """What lm-eval calls for a task's data: every split is these rows."""

    def build(**_: Any) -> dict[str, Any]:
        found = import_module("datasets").Dataset.from_list([dict(row) for row in rows])
        return {"train": found, "validation": found, "test": found}

    return build


def _progress(total: int, text: str, disable: bool) -> Callable[[int], object]:
    bar = import_module("tqdm").tqdm(total=total, desc=text, disable=disable)
    advance: Callable[[int], object] = bar.update
    return advance


def main() -> None:
    """lm_eval's command line, with the model "kbit" added."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except KbitError as error:
        sys.stderr.write(f"kbit: error: {one_line(error, 1000)}\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
