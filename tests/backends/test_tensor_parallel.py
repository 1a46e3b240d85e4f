"""Two processes that share a model say together what one says; who may join them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tensor_parallel_cases
import torch
import toy_family
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
    toy_source,
    triton_source,
    whole_logits,
    written_logits,
)

from kbit.backends import parallel as tensor_parallel
from kbit.backends.cpu.backend import NativeBackend
from kbit.backends.reference.backend import ReferenceBackend
from kbit.engine.loader import load_model
from kbit.host.errors import UnsupportedError, UsageError
from kbit.models.encoder_decoder import load_encoder_decoder
from kbit.models.families import FAMILIES, spec_from_config
from kbit.models.load import load_decoder
from kbit.models.opening import open_model as open_canonical
from kbit.models.shard import shard

pytestmark = pytest.mark.usefixtures("one_thread")


REFERENCE = tensor_parallel_cases.__file__


class Solo:
    """A group whose other processes are not there: for what needs no answer."""

    rank, size = 0, 2

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def from_first(self, x: torch.Tensor) -> torch.Tensor:
        return x


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
