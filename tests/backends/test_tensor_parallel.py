"""A model split among processes: the shares are the whole, and two processes together say what one says."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tensor_parallel_cases
import torch
import toy_family
from conversion_cases import quantize
from error_cases import run_command
from generation_cases import CHATML
from gguf_model_cases import Model
from native_cases import assert_close
from tensor_parallel_cases import (
    CASES,
    TRITON_CASES,
    WORLD,
    WRITERS,
    few_logits,
    latent_source,
    logits,
    run_all,
    source_for,
    source_of,
    toy_source,
    triton_source,
    whole_logits,
    written_logits,
)

from kbit.backends import parallel as tensor_parallel
from kbit.backends.cpu.backend import NativeBackend
from kbit.backends.reference.backend import ReferenceBackend
from kbit.checkpoint.gguf.source import GGUFSource
from kbit.checkpoint.resolve import open_model
from kbit.checkpoint.source import CheckpointSource
from kbit.cli.main import COMMANDS as MAIN_COMMANDS
from kbit.engine.loader import load_model
from kbit.evaluate.evaluation import _check_same_windows
from kbit.formats.blockwise import quantize_blockwise
from kbit.formats.codec import Cut
from kbit.formats.quant_format import QuantFormat
from kbit.formats.quant_tensor import QuantTensor
from kbit.host.errors import CheckpointError, KbitError, UnsupportedError, UsageError
from kbit.models.check import check_tensors
from kbit.models.encoder_decoder import load_encoder_decoder
from kbit.models.families import FAMILIES, spec_from_config
from kbit.models.load import load_decoder
from kbit.models.opening import open_model as open_canonical
from kbit.models.shard import shard
from kbit.text.windows import Windows

pytestmark = pytest.mark.usefixtures("one_thread")

REFERENCE = tensor_parallel_cases.__file__
COMMANDS = list(MAIN_COMMANDS)


class Solo:
    """A group whose other processes are not there: for what needs no answer."""

    rank, size = 0, 2

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def from_first(self, x: torch.Tensor) -> torch.Tensor:
        return x


class TestCutting:
    @pytest.mark.parametrize(
        "text",
        ["nf4-b16", "int3-b32-asym-dq", "int5-b16-asym-bf16", "nf4-row", "lloyd3-row-fp32", "quantile7-b64-dq"]
        + ["int8-b64", "nf4-b16-dq", "int2-b4096", "int6-b16-asym-dq"],
    )
    def test_a_part_has_the_values_of_the_whole(self, text: str) -> None:
        """Every cut at a whole unit, and three of rows; bit for bit, in arrays that the part's format prescribes."""
        format, shape = QuantFormat.parse(text), (30, 205)
        whole = quantize_blockwise(torch.randn(shape, generator=torch.Generator().manual_seed(1)), format)
        values, unit = whole.dequantize(), format.column_unit(shape[1])
        ends = [*range(unit, shape[1], unit), shape[1]]
        cuts = [Cut(0, 0, 13), Cut(0, 13, 30), Cut(0, 0, 30)]
        cuts += [Cut(1, 0, end) for end in ends] + [Cut(1, start, shape[1]) for start in ends[:-1]]
        for cut in cuts:
            part = whole.cut(cut)
            assert part.shape == cut.shape(shape)
            QuantTensor.checked("part", part.format, part.shape, part.stored, part.codebook)
            assert torch.equal(part.dequantize(), cut.of(values)), cut
            for array in part.stored.values():
                assert array.untyped_storage().nbytes() == array.numel() * array.element_size()

    def test_double_quantized_scales_stay_where_their_superblocks_are_whole(self) -> None:
        x = torch.randn((64, 1024), generator=torch.Generator().manual_seed(2))
        whole = quantize_blockwise(x, QuantFormat.parse("nf4-b64-dq"))
        for cut, format in ((Cut(0, 32, 64), "nf4-b64-dq"), (Cut(0, 8, 64), "nf4-b64-fp32")):
            part = whole.cut(cut)
            assert str(part.format) == format
            assert torch.equal(part.dequantize(), cut.of(whole.dequantize()))

    def test_a_cut_through_a_block_or_a_byte_is_refused(self) -> None:
        for text, stop, unit in (("nf4-b64", 96, 64), ("int3-row", 100, 8), ("nf4-row", 101, 2)):
            whole = quantize_blockwise(torch.ones((2, 205)), QuantFormat.parse(text))
            with pytest.raises(
                UnsupportedError, match=rf"^o: columns 0 to {stop} of 205 are no whole blocks of {unit}"
            ):
                whole.cut(Cut(1, 0, stop), "o")


def folder_source(tmp_path: Path, write_model: Callable[..., Path], format: str | None) -> CheckpointSource:
    model = write_model(tmp_path / "model", attention_bias=True, mlp_bias=True, intermediate_size=104)
    if format is not None:
        quantize(model, tmp_path / "out", format)
    return open_model(str(tmp_path / ("model" if format is None else "out")))


def gguf_source(tmp_path: Path) -> CheckpointSource:
    """Q and K rows that GGUF stores in another order, packed and not; a packed down projection."""
    model = Model(biases=("attn_q", "attn_k", "attn_v", "attn_output"))
    kinds = {"attn_q": gguf.GGMLQuantizationType.Q8_0, "ffn_down": gguf.GGMLQuantizationType.Q4_1}
    for name, (values, _) in list(model.stored.items()):
        kind = kinds.get(name.split(".")[-2])
        if kind is not None and values.ndim == 2:
            model.stored[name] = (gguf.quants.quantize(values, kind), kind)
    return GGUFSource(model.write(tmp_path / "m.gguf"))


class TestShares:
    @pytest.mark.parametrize("kind", ["float", "int3-b16-asym-dq", "nf4-row", "gguf"])
    def test_together_they_are_the_whole(self, tmp_path: Path, write_model: Callable[..., Path], kind: str) -> None:
        """Every share passes as a checkpoint, stays packed, and what is cut can be put together again."""
        if kind == "gguf":
            whole = gguf_source(tmp_path)
        else:
            whole = folder_source(tmp_path, write_model, None if kind == "float" else kind)
        parts = [shard(whole, rank, WORLD) for rank in range(WORLD)]
        for part in parts:
            spec = spec_from_config(part.config)
            check_tensors(part, spec)
            assert (spec.heads, spec.kv_heads, spec.head_dim) == (2, 1, 8)
            assert part.sidecar_files() == whole.sidecar_files()
        assert len({whole.fingerprint(), *(part.fingerprint() for part in parts)}) == 1 + WORLD
        assert sum(part.config["intermediate_size"] for part in parts) == whole.config["intermediate_size"]
        packed = 0
        for name, info in whole.tensors.items():
            values = [part.read(name) for part in parts]
            weights = [part.read_weight(name) for part in parts]
            packed += isinstance(weights[0], QuantTensor)
            assert isinstance(whole.read_weight(name), QuantTensor) == isinstance(weights[0], QuantTensor)
            for part, value, weight in zip(parts, values, weights, strict=True):
                assert part.tensors[name].shape == tuple(value.shape) == tuple(weight.shape)
                assert torch.equal(value, weight.dequantize() if isinstance(weight, QuantTensor) else weight)
                assert torch.equal(part.read_rows(name, 1, 3), value[1:3])
            cut = next((dim for dim, size in enumerate(values[0].shape) if size != info.shape[dim]), None)
            assert torch.equal(whole.read(name), values[0] if cut is None else torch.cat(values, dim=cut))
            columns = name.endswith(("o_proj.weight", "down_proj.weight"))
            rows = any(f"{part}_proj" in name for part in ("q", "k", "v", "gate", "up"))
            assert cut == (1 if columns else 0 if rows else None), name
        assert packed == {"float": 0, "gguf": 4}.get(kind, packed)
        assert kind == "float" or packed

    def test_more_processes_than_key_heads_share_them(self) -> None:
        source = source_of("llama", None, num_attention_heads=8, num_key_value_heads=2)
        parts = [shard(source, rank, 4) for rank in range(4)]
        keys = [part.read("model.layers.0.self_attn.k_proj.weight") for part in parts]
        assert [part.config["num_key_value_heads"] for part in parts] == [1] * 4
        assert torch.equal(torch.cat([keys[0], keys[2]]), source.read("model.layers.0.self_attn.k_proj.weight"))
        assert torch.equal(keys[0], keys[1])
        assert torch.equal(keys[2], keys[3])

    @pytest.mark.parametrize(
        ("format", "world", "message"),
        [
            (None, 4, "it has 6 attention heads and 2 key/value heads; use 2 or 6$"),
            (
                "nf4-b32",
                2,
                "o_proj.weight has 48 columns for each, which are no whole blocks of 32 .nf4-b32.; use fewer",
            ),
            ("nf4-b48", 6, "layers.0.self_attn.o_proj.weight has 16 columns for each"),
        ],
    )
    def test_what_cannot_be_split(self, format: str | None, world: int, message: str) -> None:
        with pytest.raises(UnsupportedError, match=f"some-model: cannot be split among {world} processes: .*{message}"):
            shard(source_of("llama", format), 0, world)

    def test_a_norm_of_all_heads_together(self) -> None:
        """Where several processes have the same key head, which its mean would count twice."""
        with pytest.raises(UnsupportedError, match="6 attention heads and 2 key/value heads; use 2$"):
            shard(source_of("olmo2", None), 0, 6)
        assert shard(source_of("olmo2", None), 0, 2).config["num_attention_heads"] == 3

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("bamba", "2 key/value heads, and state spaces of 6 heads; use 2 or 6$"),
            ("lfm2", "it has 6 attention heads and 2 key/value heads; use 2 or 6$"),
            ("qwen3_5", "2 key/value heads, and delta nets of 2 heads of keys; use 2$"),
        ],
    )
    def test_layers_that_are_not_dealt_out(self, name: str, message: str) -> None:
        world = 4 if name in ("bamba", "lfm2") else 3
        with pytest.raises(UnsupportedError, match=f"cannot be split among {world} processes: .*{message}"):
            shard(source_of(name, None), 0, world)
        assert shard(source_of(name, None), 0, 1).config["num_attention_heads"] == 6

    def test_a_bias_that_is_added_before_the_sum_is_the_first_process_s(self) -> None:
        source = source_of("gpt-oss", None)
        first, second = (shard(source, rank, 2) for rank in range(2))
        name = "model.layers.0.mlp.experts.1.down_proj.bias"
        assert torch.equal(first.read(name), source.read(name))
        assert not second.read(name).any()
        gate = "model.layers.0.mlp.experts.1.gate_proj.bias"
        assert torch.equal(torch.cat([first.read(gate), second.read(gate)]), source.read(gate))

    @pytest.mark.parametrize("format", [None, "nf4-b16", "int4-b16-asym-dq", "lloyd3-row"])
    def test_queries_keys_and_values_of_delta_nets(self, format: str | None) -> None:
        """Three runs of rows of one matrix, put together, with the values of the whole."""
        source = source_of("qwen3_5", format, linear_value_head_dim=32)
        parts = [shard(source, rank, 2) for rank in range(2)]
        name, sizes = "model.layers.0.linear_attn.in_proj_qkv.weight", [12, 12, 96]
        whole = source.read(name).split([2 * size for size in sizes])
        for rank, part in enumerate(parts):
            weight = part.read_weight(name)
            values = weight.dequantize() if isinstance(weight, QuantTensor) else weight
            if isinstance(weight, QuantTensor):
                QuantTensor.checked("part", weight.format, weight.shape, weight.stored, weight.codebook)
            expected = torch.cat([x[rank * size : (rank + 1) * size] for x, size in zip(whole, sizes, strict=True)])
            assert torch.equal(values, expected)
            assert torch.equal(part.read_rows(name, 5, 40), expected[5:40])

    def test_an_mlp_of_too_few_blocks(self) -> None:
        tensors = source_of("llama", None, num_attention_heads=2)
        name = "model.layers.1.mlp.down_proj.weight"
        weight = tensors.data[name]
        assert isinstance(weight, torch.Tensor)
        tensors.data = {**tensors.data, name: quantize_blockwise(weight[:, :64], QuantFormat.parse("nf4-b64"))}
        with pytest.raises(CheckpointError, match=r"has shape \(48, 64\), but config.json asks for \(48, 77\)"):
            shard(tensors, 0, 2)
        narrow = source_of("llama", "nf4-b80", num_attention_heads=10, num_key_value_heads=10, intermediate_size=81)
        assert [shard(narrow, rank, 2).config["intermediate_size"] for rank in range(2)] == [80, 1]
        with pytest.raises(UnsupportedError, match="the 81 columns of .*down_proj.weight are 2 blocks of 80"):
            shard(
                source_of("llama", "nf4-b80", num_attention_heads=15, num_key_value_heads=15, intermediate_size=81),
                0,
                3,
            )


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What each of two processes on the reference backend found."""
    return two_processes(writers(tmp_path_factory.mktemp("together")), "reference")


def writers(folder: Path) -> Path:
    """Encoder-decoders for `tensor_parallel_cases.WRITERS`."""
    pytest.importorskip("transformers")
    from encoder_decoder_cases import model_of, saved

    for name in WRITERS:
        saved(model_of(name), folder / name)
    return folder


def two_processes(folder: Path, backend: str) -> list[dict[Any, Any]]:
    for code, _, error in run_all(REFERENCE, str(folder), backend):
        assert code == 0, error
    return [torch.load(folder / f"{backend}-{rank}.pt", weights_only=True) for rank in range(WORLD)]


class TestTwoProcesses:
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_logits_are_those_of_one(self, together: list[dict[Any, Any]], case: tuple[str, str | None]) -> None:
        """To rounding: sums are formed in another order. And the same in both, to the bit."""
        expected = logits(load_decoder(source_for(case), ReferenceBackend()))
        for name, values in expected.items():
            assert_close(together[0][case][name], values)
            assert torch.equal(together[0][case][name], together[1][case][name])
        whole = spec_from_config(source_for(case).config).intermediate_size
        assert together[0][case]["intermediate"] + together[1][case]["intermediate"] == whole

    def test_a_cache_of_latent_vectors(self, together: list[dict[Any, Any]]) -> None:
        """Every process keeps the vectors whole, and has its heads' rows of what makes keys and values of them."""
        model = load_decoder(latent_source(), ReferenceBackend(keeps_latents=True))
        assert model.spec.keeps_latents
        for name, values in logits(model).items():
            assert_close(together[0]["latents"][name], values)
            assert torch.equal(together[0]["latents"][name], together[1]["latents"][name])

    @pytest.mark.parametrize("name", WRITERS)
    def test_encoder_decoders(self, together: list[dict[Any, Any]], name: str, tmp_path: Path) -> None:
        """Both stacks are dealt out, what is added to scores by distance, and what is kept of the encoder's text."""
        with open_canonical(str(writers(tmp_path) / name)) as source:
            expected = written_logits(load_encoder_decoder(source, ReferenceBackend()))
            parts = [shard(source, rank, 2) for rank in range(2)]
            cross = "EncDecAttention.k" if name == "t5" else "encoder_attn.k_proj"
            key = next(key for key in source.tensors if key.endswith(f"{cross}.weight"))
            assert torch.equal(torch.cat([part.read(key) for part in parts]), source.read(key))
        for which, values in expected.items():
            assert_close(together[0][name][which], values)
            assert torch.equal(together[0][name][which], together[1][name][which])

    def test_a_norm_after_attention_is_of_the_sum(self, together: list[dict[Any, Any]]) -> None:
        """A family added from outside, whose processes meet before a norm and not at a residual."""
        toy_family.install()
        try:
            expected = whole_logits(load_decoder(toy_source(), ReferenceBackend()))
        finally:
            del FAMILIES["toy"]
        for name, values in expected.items():
            assert_close(together[0]["toy"][name], values)
            assert torch.equal(together[0]["toy"][name], together[1]["toy"][name])

    def test_a_failure_anywhere_ends_all_and_is_told_by_the_first(self, together: list[dict[Any, Any]]) -> None:
        assert together[0]["failures"] == [
            "UsageError: no \0 good at 0",
            "PeerError: process 1 of 2: no \0 good at 1",
            "UsageError: undecided",
            "decided by 0 é",
        ]
        assert together[1]["failures"] == [
            "PeerError: process 0 of 2: no \0 good at 0",
            "PeerError: process 1 of 2: no \0 good at 1",
            "PeerError: process 0 of 2: undecided",
            "decided by 0 é",
        ]
        assert together[1]["describe"].endswith(", 2 processes")

    def test_triton(self, device: str, tmp_path: Path) -> None:
        """In Triton's interpreter, or on as many GPUs."""
        pytest.importorskip("triton")
        if device == "cuda" and torch.cuda.device_count() < WORLD:
            pytest.skip(f"needs {WORLD} GPUs")
        from half_precision_cases import assert_close as assert_close_in_half_precision

        found = two_processes(tmp_path, "triton")
        for case in TRITON_CASES:
            source = triton_source(case)
            for name, values in few_logits(load_decoder(source, ReferenceBackend())).items():
                assert_close_in_half_precision(found[0][case][name], values, source)
                assert torch.equal(found[0][case][name], found[1][case][name])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> str:
    """A quantized model of two key heads."""
    out = tmp_path_factory.mktemp("quantized") / "out"
    quantize(tiny_model, out, "nf4-b16")
    return str(out)


class TestCommand:
    def test_torchrun_gives_the_text_of_one_process_once(self, model: str) -> None:
        flags = ["-m", model, "--backend", "reference", "--max-tokens", "12"]
        flags += ["--temperature", "0.8", "--seed", "3", "--speculate", "ngram"]
        code, alone, error = run_command(["run", "Once upon a time", *flags])
        assert code == 0, error
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORLD)]
        both = subprocess.run(
            [*launcher, "-m", "kbit", "run", "-", *flags],
            input="Once upon a time\n",
            capture_output=True,
            encoding="utf-8",
            timeout=300,
            check=False,
        )
        assert (both.returncode, both.stdout) == (0, alone), both.stderr
        assert len(alone) > 4
        assert both.stderr.count("prompt tokens in") == 1
        assert both.stderr.rstrip().endswith("quantized weights expanded, 2 processes")

    def test_a_fresh_seed_is_shared_and_one_object_printed(self, model: str) -> None:
        flags = ["run", "Once upon", "-m", model, "--backend", "reference", "--max-tokens", "12", "--temperature", "2"]
        (code, stdout, error), other = run_all("-m", "kbit", *flags, "--json")
        assert code == 0, error
        assert other[:2] == (0, "")
        report = json.loads(stdout)
        again = run_command([*flags, "--json", "--seed", str(report["seed"])])[1]
        assert json.loads(again)["text"] == report["text"]

    def test_the_native_backend_refuses_once(self, model: str) -> None:
        first, second = run_all("-m", "kbit", "run", "x", "-m", model)
        assert first[:2] == (1, "")
        assert "kbit: error: the native backend runs a model in one process" in first[2]
        assert second == (1, "", "")

    def test_a_conversation_is_read_and_shown_by_the_first(
        self, tmp_path: Path, write_model: Callable[..., Path]
    ) -> None:
        """Answers of one process; a message that is too long ends all, and is told once."""
        folder = write_model(tmp_path / "m", max_position_embeddings=150)
        (folder / "chat_template.jinja").write_text(CHATML)
        flags = ["-m", str(folder), "--backend", "reference", "--max-tokens", "6", "--speculate", "ngram"]
        (code, said, notes), other = run_all(
            "-m", "kbit", "chat", *flags, "--seed", "5", stdin="Hello\n\nAgain\n/reset\nHello\n" + "x" * 150 + "\n"
        )
        assert code == 2
        assert notes.count("stopped after 6 tokens") == 3
        assert notes.count("conversation forgotten") == 1
        assert notes.count("kbit: error: the conversation has") == 1
        assert other == (1, "", "")
        sampling = ["--temperature", "0.7", "--top-k", "40", "--top-p", "0.95", "--min-p", "0.05", "--seed", "5"]
        alone = json.loads(run_command(["run", "Hello", "--chat", *flags, *sampling, "--json"])[1])
        assert said.startswith(alone["text"] + "\n")
        assert len(said) > 2 * len(alone["text"])

    def test_an_evaluation_is_that_of_one_process(self, model: str, tiny_model: Path, tmp_path: Path) -> None:
        text = tmp_path / "text.txt"
        text.write_text("It was a dark and stormy night. " * 20)
        flags = ["eval", model, "--reference", str(tiny_model), "--data", str(text), "--context", "32"]
        flags += ["--backend", "reference", "--json"]
        alone = json.loads(run_command(flags)[1])
        (code, stdout, error), other = run_all("-m", "kbit", *flags)
        assert code == 0, error
        assert other == (0, "", "")
        report = json.loads(stdout)
        for backend in ("backend", "reference_backend"):
            assert report[backend].endswith(", 2 processes")
        same = ("tokens", "windows", "data_sha256", "reference")
        assert [report[key] for key in same] == [alone[key] for key in same]
        # Sums are formed in another order: logits of size 1 differ by some float32 roundings.
        for key in ("mean_nll", "kl_mean", "kl_max", "delta_nll"):
            assert report[key] == pytest.approx(alone[key], abs=1e-5), key
        assert alone["kl_mean"] > 1e-3

    def test_processes_with_other_texts_do_not_go_on(self) -> None:
        class Other:
            def decided_by_first(self, work: object) -> str:
                return "of another text"

            def together(self) -> AbstractContextManager[None]:
                return nullcontext()

        windows = Windows("gptq", np.zeros((1, 4), np.int64), 0, 4)
        with pytest.raises(KbitError, match="has another text or another tokenizer than the first"):
            _check_same_windows(windows, Other())  # type: ignore[arg-type]

    @pytest.mark.parametrize("command", [command for command in COMMANDS if command not in ("run", "chat", "eval")])
    def test_what_one_process_does_alone_is_refused(
        self, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Before its arguments are looked at. The first process of a machine tells why."""
        monkeypatch.chdir(tmp_path)
        for name, value in {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}.items():
            monkeypatch.setenv(name, value)
        refusal = f"kbit: error: kbit {command} runs as one process: start it without torchrun, or unset RANK"
        code, stdout, error = run_command([command, "--no-such-flag"])
        assert (code, stdout, error.startswith(refusal)) == (2, "", True), error
        monkeypatch.setenv("LOCAL_RANK", "1")
        assert run_command([command, "--no-such-flag"]) == (2, "", "")
        monkeypatch.delenv("LOCAL_RANK")
        assert run_command([command, "--no-such-flag"])[2].startswith(refusal)
        monkeypatch.setenv("WORLD_SIZE", "1")
        assert "--no-such-flag" in run_command([command, "--no-such-flag"])[2]
        assert not list(tmp_path.iterdir())

    def test_tasks_are_refused_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "2")
        code, stdout, error = run_command(["eval", "no/such/model", "--tasks", "piqa", "--items", "items.jsonl"])
        assert (code, stdout) == (2, "")
        assert error.startswith("kbit: error: kbit eval --tasks runs as one process: start it without torchrun")

    def test_after_an_error_no_thread_of_a_group_outlives_the_interpreter(self) -> None:
        """Which now and then ended a run with an abort: what Python runs at its end is not run, what it wrote is."""
        script = (
            "import atexit, torch.distributed as d; from kbit.cli.processes import end\n"
            "d.init_process_group('gloo', store=d.HashStore(), rank=0, world_size=1)\n"
            "atexit.register(print, 'too late'); print('said'); end(3)"
        )
        assert run_all("-c", script)[0] == (3, "said\n", "")


class TestJoining:
    @pytest.mark.parametrize(
        ("variables", "message"),
        [
            ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR is not set: start with torchrun"),
            ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "process 2 of 2 does not exist"),
            ({"RANK": "zero", "WORLD_SIZE": "2"}, "RANK is 'zero' where torchrun puts a number"),
            ({"RANK": "0", "WORLD_SIZE": "-2"}, "WORLD_SIZE is '-2' where torchrun puts a number"),
        ],
    )
    def test_senseless_variables(self, variables: dict[str, str], message: str) -> None:
        with pytest.raises(UsageError, match=message):
            tensor_parallel.join(variables)

    def test_a_backend_is_made_for_its_group(self, tiny_model: Path) -> None:
        backend = ReferenceBackend().split(Solo())
        assert backend.group is not None
        with pytest.raises(ValueError, match="was not made for this group"):
            load_model(str(tiny_model), backend=backend)
        with pytest.raises(UnsupportedError, match="the native backend runs a model in one process"):
            tensor_parallel.split(NativeBackend(1, compute="fp32", kv="fp32"), Solo())  # type: ignore[arg-type]

    def test_a_triton_backend_stays_what_it_is(self, device: str) -> None:
        pytest.importorskip("triton")
        from kbit.backends.triton.backend import TritonBackend

        for compute, kv in (("bf16", "4"), ("bf16", "16"), ("fp16", "16")):
            whole = TritonBackend(device, compute=compute, kv=kv)
            part = whole.split(Solo())
            assert (part.compute, part.dtype, part.kv) == (whole.compute, whole.dtype, whole.kv)
            assert part.describe().endswith(", 2 processes")
            assert not part.graphs
        with pytest.raises(UnsupportedError, match="CUDA graphs do not hold the sums"):
            TritonBackend(device, graphs=True, group=Solo())
