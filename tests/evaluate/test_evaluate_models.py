"""Evaluation of real and tiny models from folders on disk: against transformers, and through the command line."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import typer
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from kbit.cli.eval import evaluate
from kbit.evaluate.evaluation import Evaluation, Request, evaluate_model
from kbit.formats.blockwise import quantize_blockwise
from kbit.formats.quant_format import QuantFormat
from kbit.host.errors import KbitError, UsageError

TEXT = "It was the best of times, it was the worst of times.\n" * 20


def _tiny_model(folder: Path, seed: int = 0, vocab_size: int = 256, max_positions: int = 64) -> Path:
    """A random Llama of two layers whose tokens are bytes."""
    folder.mkdir()
    hidden, mlp, layers = 32, 48, 2
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": max_positions,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate(alphabet)}
    vocab |= {f"<extra{index}>": index for index in range(len(vocab), vocab_size)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) / columns**0.5

    tensors = {"model.embed_tokens.weight": matrix(vocab_size, hidden), "model.norm.weight": torch.ones(hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = torch.ones(hidden)
        for name, rows, columns in (
            ("self_attn.q_proj", hidden, hidden),
            ("self_attn.k_proj", hidden // 2, hidden),
            ("self_attn.v_proj", hidden // 2, hidden),
            ("self_attn.o_proj", hidden, hidden),
            ("mlp.gate_proj", mlp, hidden),
            ("mlp.up_proj", mlp, hidden),
            ("mlp.down_proj", hidden, mlp),
        ):
            tensors[f"{prefix}.{name}.weight"] = matrix(rows, columns)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two tiny models, `a` and `b`, one with another vocabulary, `c`, and a text."""
    folder = tmp_path_factory.mktemp("tiny")
    _tiny_model(folder / "a", seed=0)
    _tiny_model(folder / "b", seed=1)
    _tiny_model(folder / "c", seed=0, vocab_size=260)
    (folder / "text.txt").write_text(TEXT)
    return folder


def _evaluate(model: Path, data: Path | str, reference: Path | str | None = None, **options: Any) -> Evaluation:
    return evaluate_model(Request(str(model), str(data), None if reference is None else str(reference), **options))


def _hf_model(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _hf_log_probs(folder: Path, batch: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of transformers' model, float64 (W, n, V)."""
    with torch.inference_mode():
        return torch.cat([_hf_model(folder)(part).logits.double().log_softmax(-1) for part in batch.split(4)])


def _hf_losses(log_probs: torch.Tensor, batch: torch.Tensor, first: int = 0) -> torch.Tensor:
    """Losses of positions first .. n-2, float64 (W, n - 1 - first)."""
    return -log_probs[:, first:-1].gather(2, batch[:, first + 1 :, None])[..., 0]


def _tokens(folder: Path, text: str) -> list[int]:
    return list(tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids)


EXACT = {"compute": "fp32"}


class TestAgainstTransformers:
    """Both sides compute float32 logits with sums in another order: they agree to about 1e-6 of their size."""

    @pytest.mark.parametrize("how", [{"backend": "reference"}, EXACT], ids=["reference", "native"])
    @pytest.mark.parametrize(("convention", "first"), [("gptq", 0), ("llamacpp", 128)])
    def test_perplexity_of_a_real_model(self, data_dir: Path, convention: str, first: int, how: dict[str, str]) -> None:
        model = data_dir / "models" / "novels-2m"
        file = data_dir / "novels" / "heldout" / "Doyle_Hound_1902.txt"
        report = _evaluate(model, file, max_tokens=8 * 256, convention=convention, **how)

        text = file.read_bytes().decode("utf-8-sig")  # not text mode: its line ends are CRLF, and stay
        batch = torch.tensor(_tokens(model, text)[: 8 * 256]).view(8, 256)
        losses = _hf_losses(_hf_log_probs(model, batch), batch, first)
        assert report.result.context == 256
        assert report.result.tokens == losses.numel()
        assert report.result.perplexity == pytest.approx(math.exp(losses.mean()), rel=1e-5)
        # Logits of size 20 after a few dozen float32 sums differ by some 1e-5 (100 eps of their size).
        np.testing.assert_allclose(report.result.nll, losses.numpy(), atol=1e-4)

    def test_divergence_of_a_quantized_model(self, data_dir: Path, tmp_path: Path) -> None:
        reference = data_dir / "models" / "novels-2m"
        file = data_dir / "novels" / "heldout" / "Woolf_Lighthouse_1927.txt"
        model = tmp_path / "nf4"
        shutil.copytree(reference, model)
        tensors = load_file(reference / "model.safetensors")
        nf4 = QuantFormat.parse("nf4-b64")
        for name, tensor in tensors.items():
            tensors[name] = tensor.float()
            if name.endswith("proj.weight"):
                tensors[name] = quantize_blockwise(tensor.float(), nf4).dequantize()
        (model / "model.safetensors").chmod(0o644)
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
        report = _evaluate(model, file, reference, max_tokens=6 * 256, **EXACT)
        result = report.comparison
        assert result is not None

        batch = torch.tensor(_tokens(model, file.read_bytes().decode("utf-8-sig"))[: 6 * 256]).view(6, 256)
        log_p, log_q = _hf_log_probs(reference, batch)[:, :-1], _hf_log_probs(model, batch)[:, :-1]
        kl = (log_p.exp() * (log_p - log_q)).sum(-1).numpy()
        following = batch[:, 1:, None]
        delta = (log_p - log_q).gather(2, following)[..., 0].numpy()
        # KL changes by at most (|q - p|_1 + E_p |log p/q - KL|) max |d logit|: below 1 times some 1e-5 here.
        np.testing.assert_allclose(result.kl, kl, atol=2e-5)
        assert result.kl_mean == pytest.approx(kl.mean(), rel=1e-4)
        assert result.kl_percentile(99) == pytest.approx(np.percentile(kl, 99), rel=1e-3)
        assert result.delta_nll == pytest.approx(delta.mean(), abs=2e-6)
        # A top token may flip where two logits differ by rounding alone: at most one position in 1530.
        agreement = (log_p.argmax(-1) == log_q.argmax(-1)).double().mean().item()
        assert result.top1_agreement == pytest.approx(agreement, abs=1.01 / kl.size)
        assert 0.005 < result.kl_mean < 0.5
        assert 0.7 < result.top1_agreement < 1.0

    def test_a_tiny_model_in_windows_shorter_than_its_pieces(self, tiny: Path) -> None:
        report = _evaluate(tiny / "a", tiny / "text.txt", context=17, **EXACT)
        batch = torch.tensor(_tokens(tiny / "a", TEXT))
        batch = batch[: len(batch) // 17 * 17].view(-1, 17)
        losses = _hf_losses(_hf_log_probs(tiny / "a", batch), batch)
        np.testing.assert_allclose(report.result.nll, losses.numpy(), atol=1e-4)


class TestReport:
    def test_context_is_what_both_models_can_take(self, tiny: Path, tmp_path: Path) -> None:
        short = _tiny_model(tmp_path / "short", max_positions=48)
        text = str(tiny / "text.txt")
        assert _evaluate(tiny / "a", text, max_tokens=64).result.context == 64
        assert _evaluate(tiny / "a", text, short, max_tokens=64).result.context == 48
        with pytest.raises(UsageError, match="--context 49 exceeds the model's maximum of 48"):
            _evaluate(tiny / "a", text, short, context=49)

    def test_context_of_extended_models(self, tiny: Path, tmp_path: Path) -> None:
        """YaRN takes windows beyond max_position_embeddings; dynamic RoPE, which pieces would falsify, does not."""
        paths = {}
        for kind in ("yarn", "dynamic"):
            paths[kind] = _tiny_model(tmp_path / kind)
            config = json.loads((paths[kind] / "config.json").read_text())
            config["rope_scaling"] = {"rope_type": kind, "factor": 2.0}
            (paths[kind] / "config.json").write_text(json.dumps(config))
        text = str(tiny / "text.txt")
        assert _evaluate(paths["yarn"], text, max_tokens=256).result.context == 128
        batch = torch.tensor(_tokens(paths["yarn"], TEXT)[:256]).view(2, 128)
        losses = _hf_losses(_hf_log_probs(paths["yarn"], batch), batch)
        report = _evaluate(paths["yarn"], text, max_tokens=256, context=128, **EXACT)
        np.testing.assert_allclose(report.result.nll, losses.numpy(), atol=1e-4)
        assert _evaluate(paths["dynamic"], text, max_tokens=256).result.context == 64
        assert _evaluate(paths["dynamic"], text, max_tokens=256, context=64).result.context == 64
        with pytest.raises(UsageError, match="--context 65: .*dynamic RoPE.* use --context 64 or less"):
            _evaluate(paths["dynamic"], text, context=65)
        with pytest.raises(UsageError, match="--context 129 exceeds the model's maximum of 128"):
            _evaluate(paths["yarn"], text, context=129)

    @pytest.mark.parametrize("who", ["native", "reference"])
    def test_a_model_against_itself(self, tiny: Path, who: str) -> None:
        report = _evaluate(tiny / "a", tiny / "text.txt", tiny / "a", backend=who, reference_backend=who)
        assert report.comparison is not None
        assert report.backend == report.reference_backend
        assert (report.comparison.kl == 0).all()
        assert report.comparison.top1_agreement == 1.0
        assert report.to_dict()["delta_nll_ci95"] == [0.0, 0.0]

    def test_the_engines_own_error(self, tiny: Path) -> None:
        """The reference computes exactly unless told otherwise, so a model against itself shows what its engine adds."""
        divergences = []
        for how in ({"compute": "fp32"}, {"kv_bits": 32}, {}):
            report = _evaluate(tiny / "a", tiny / "text.txt", tiny / "a", max_tokens=256, **how)
            assert report.comparison is not None
            assert report.backend.startswith("native: ")
            assert report.to_dict()["reference_backend"] == report.reference_backend
            assert str(report.reference_backend).startswith("reference: ")
            divergences.append(report.comparison.kl_mean)
        exact, dense, half = divergences
        # These weights are not quantized, so int8 has nothing to multiply; the cache in fp16 rounds by up to 2^-11, and
        # KL is about half the squared error of a logit. float32 logits of size 3 leave 1e-12 or less.
        assert abs(exact) < 1e-11
        assert abs(dense) < 1e-11
        assert 1e-10 < half < 1e-5

    def test_vocabularies_of_different_size(self, tiny: Path) -> None:
        with pytest.raises(UsageError, match="vocabulary of 256 tokens, the reference one of 260"):
            _evaluate(tiny / "a", tiny / "text.txt", tiny / "c")

    def test_tokenizers_that_differ(self, tiny: Path, tmp_path: Path) -> None:
        other = tmp_path / "other"
        shutil.copytree(tiny / "b", other)
        content = json.loads((other / "tokenizer.json").read_text())
        vocab = content["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
        (other / "tokenizer.json").write_text(json.dumps(content))
        with pytest.raises(UsageError, match=r"tokenizers .* differ .*vocabularies of 256 and 256"):
            _evaluate(tiny / "a", tiny / "text.txt", other)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"convention": "hf"}, "--convention hf: choose one of gptq, llamacpp"),
            ({"max_tokens": 0}, "--max-tokens 0: expected at least 1"),
            ({"threads": 0}, "--threads 0: expected at least 1"),
            ({"max_tokens": 63}, "--max-tokens 63 is less than one window of 64"),
            ({"context": 65}, "--context 65 exceeds the model's maximum of 64"),
            ({"context": 1}, "--context 1 is too short"),
            ({"device": "abacus"}, "abacus"),
            ({"compute": "int4"}, "--compute int4: use one of int8, fp8, fp16, bf16, fp32"),
            ({"kv_bits": 7}, "--kv-bits 7: use one of 2, 3, 4, 8, 16, 32"),
            ({"backend": "reference", "kv_bits": 4}, "--kv-bits 4: the reference backend has only 32"),
            ({"reference_backend": "abacus"}, "--reference-backend abacus: use reference, native-fp32 or native"),
            ({"data": "no-such-text"}, "no such file, and not one of the named texts"),
            ({"reference": "no such model"}, "no such model"),
        ],
    )
    def test_wrong_requests(self, tiny: Path, options: dict[str, Any], message: str) -> None:
        arguments = {"data": str(tiny / "text.txt"), **options}
        with pytest.raises(KbitError, match=message) as caught:
            _evaluate(tiny / "a", **arguments)
        assert "\n" not in str(caught.value)
        assert caught.value.exit_code == 2

    def test_beside_a_gpu_the_reference_runs_on_the_cpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[tuple[str, str]] = []

        def select(device: str, backend: str, **_: object) -> SimpleNamespace:
            asked.append((device, backend))
            return SimpleNamespace(name="triton")

        monkeypatch.setattr("kbit.evaluate.request.select_backend", select)
        Request("model", reference="other", device="cuda").backends()
        Request("model", reference="other", device="cuda", reference_backend="native").backends()
        assert asked == [("cuda", "auto"), ("cpu", "reference"), ("cuda", "auto"), ("cpu", "native")]

    def test_a_text_shorter_than_a_window(self, tiny: Path, tmp_path: Path) -> None:
        (tmp_path / "short.txt").write_text("Hello.")
        with pytest.raises(UsageError, match=r"short\.txt has 6 tokens, one window needs 64"):
            _evaluate(tiny / "a", tmp_path / "short.txt")


class TestCommandLine:
    @pytest.fixture
    def run(self) -> Iterator[Any]:
        app = typer.Typer()
        app.command("eval")(evaluate)
        runner = CliRunner()
        threads = torch.get_num_threads()
        yield lambda *arguments: runner.invoke(app, [str(argument) for argument in arguments])
        torch.set_num_threads(threads)

    def test_json_without_a_reference(self, run: Any, tiny: Path) -> None:
        result = run(tiny / "a", "--data", tiny / "text.txt", "--json", "--max-tokens", 700, "--context", 32)
        assert result.exit_code == 0, result.exception
        assert result.stdout.count("\n") == 1
        report = json.loads(result.stdout)
        assert report["convention"] == "gptq"
        assert report["context"] == 32
        assert report["windows"] == 21
        assert report["tokens"] == 21 * 31
        assert report["model"] == str(tiny / "a")
        assert report["data"] == str(tiny / "text.txt")
        assert report["perplexity"] == pytest.approx(math.exp(report["mean_nll"]), rel=1e-12)
        assert report["perplexity_stderr"] > 0
        assert "kl_mean" not in report

    def test_json_with_a_reference(self, run: Any, tiny: Path) -> None:
        result = run(
            tiny / "b",
            "--data",
            tiny / "text.txt",
            "--reference",
            tiny / "a",
            "--json",
            "--backend",
            "native",
            "--compute",
            "fp32",
            "--kv-bits",
            "16",
            "--reference-backend",
            "native",
        )
        assert result.exit_code == 0, result.exception
        report = json.loads(result.stdout)
        for key in ("kl_mean", "kl_stderr", "kl_p50", "kl_p99", "kl_p99.9", "kl_max", "reference_perplexity"):
            assert report[key] > 0, key
        assert 0 <= report["top1_agreement"] <= 1
        low, high = report["delta_nll_ci95"]
        assert low < report["delta_nll"] < high
        ratio = math.log(report["perplexity"] / report["reference_perplexity"])
        assert report["delta_nll"] == pytest.approx(ratio, abs=1e-12)
        assert report["reference"] == str(tiny / "a")
        assert "fp32 compute, fp16 KV cache" in report["backend"]
        assert report["reference_backend"] == report["backend"]

    def test_unknown_errors_are_null_not_nan(self, run: Any, tiny: Path) -> None:
        result = run(
            tiny / "b",
            "--data",
            tiny / "text.txt",
            "--reference",
            tiny / "a",
            "--json",
            "--context",
            8,
            "--max-tokens",
            8,
        )
        report = json.loads(result.stdout, parse_constant=pytest.fail)
        assert report["perplexity_stderr"] is None
        assert report["delta_nll_ci95"] is None
        assert report["stderr_clusters"] == 1

    def test_the_table_for_people(self, run: Any, tiny: Path) -> None:
        result = run(
            tiny / "b",
            "--data",
            tiny / "text.txt",
            "--reference",
            tiny / "a",
            "--convention",
            "llamacpp",
            "--threads",
            1,
        )
        assert result.exit_code == 0, result.exception
        for word in (
            "perplexity",
            "llamacpp, context 64",
            "KL(reference || model)",
            "top-1 agreement",
            "delta NLL",
            "native: ",
            "reference: ",
        ):
            assert word in result.stdout

    @pytest.mark.parametrize("threads", [0, -1])
    def test_threads(self, run: Any, tiny: Path, threads: int) -> None:
        result = run(tiny / "a", "--data", tiny / "text.txt", "--threads", threads)
        assert isinstance(result.exception, UsageError)
        assert "--threads" in str(result.exception)

    def test_a_wrong_value_prints_nothing_on_stdout(self, run: Any, tiny: Path) -> None:
        result = run(tiny / "a", "--data", "no-such-text", "--json")
        assert isinstance(result.exception, UsageError)
        assert result.stdout == ""
