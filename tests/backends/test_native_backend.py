"""The native backend: how far the rounding ways to compute are from fp32, its runner, and its choices."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from decoder_cases import TINY, DictSource, tame_tensors
from native_cases import ISAS, VOCABULARY, computes, exact, native, random_ids, reference, source_of

from kbit import _native
from kbit.backends.cpu.backend import NativeBackend
from kbit.backends.select import select_backend
from kbit.host.errors import UnsupportedError, UsageError
from kbit.models.decoder import Decoder

pytestmark = pytest.mark.usefixtures("one_thread")


class TestRoundedPaths:
    """int8 and bf16 compute round on purpose; here is by how much.

    One product with activations in int8: rounding to steps of s = max|x|/127 errs by s/sqrt(12) per value. Of 16 to 64
    normal values the largest is below 3 standard deviations on average, so s < 3/127 and the error of a sum, relative to
    its standard deviation, is below 3/127/sqrt(12) = 0.7 %. bf16 has 8 significant bits and errs by at most 2^-9 on both
    sides: below 0.3 %. A tiny model has 7 products in each of 3 layers and a head; if their errors added up without
    cancelling, each at full weight in the logits, these would be off by 22 times as much. Root mean squares are compared.
    """

    PRODUCTS = 22

    @pytest.mark.parametrize("name", ["llama", "qwen2-some-windows", "llama-head-dim"])
    @pytest.mark.parametrize("isa", ISAS)
    def test_error(self, isa: str, name: str) -> None:
        source = source_of(name, "int8-b16")
        ids = random_ids(1, 30)
        decoder = exact(source, isa=isa)
        expected = decoder.forward(ids, decoder.new_cache(1, 30))
        for compute in computes(isa):
            if compute == "fp32":
                continue
            decoder = native(source, compute=compute, kv="fp32", isa=isa)
            found = decoder.forward(ids, decoder.new_cache(1, 30))
            error = float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())
            bound = self.PRODUCTS * (0.007 if compute == "int8" else 0.003)
            # And it must be there: with none the weights ran in fp32.
            assert 1e-4 < error < bound, f"{compute} on {isa}: {error:.4f}"

    def test_kv_cache(self) -> None:
        """fp16 rounds by at most 2^-11; codes err the more the fewer bits they have. Heads of 16, as codes need them."""
        config = {**TINY, "head_dim": 16, "model_type": "llama"}
        source = DictSource(config, tame_tensors(config))
        ids = random_ids(1, 30)
        logits = {}
        for kv in ("fp32", "fp16", "8", "4", "3", "2"):
            decoder = native(source, compute="fp32", kv=kv)
            logits[kv] = decoder.forward(ids, decoder.new_cache(1, 30))
        scale = logits["fp32"].square().mean().sqrt()
        errors = [float((found - logits["fp32"]).square().mean().sqrt() / scale) for found in logits.values()]
        assert errors == sorted(errors)
        assert len(set(errors)) == 6
        assert errors[1] < self.PRODUCTS * 2**-11


class TestRunner:
    @pytest.fixture
    def decoder(self) -> Decoder:
        return native(source_of("llama", "int4-b16"))

    def test_padding_does_no_work(self, decoder: Decoder) -> None:
        runner = decoder._runner
        rows: list[int] = []

        class Counting:
            def __init__(self, program: Any) -> None:
                self._program = program

            def run(self, ids: Any, *rest: Any) -> None:
                rows.append(len(ids))
                self._program.run(ids, *rest)

        runner._program = Counting(runner._program)  # type: ignore[attr-defined]
        decoder.forward(random_ids(3, 100), decoder.new_cache(3, 100), torch.tensor([100, 0, 3]))
        decoder.forward(random_ids(2, 5), decoder.new_cache(2, 9), torch.tensor([0, 0]))
        decoder.forward(random_ids(8, 100), decoder.new_cache(8, 100))
        assert rows == [103, 512, 288]

    def test_results_are_the_callers_own(self, decoder: Decoder) -> None:
        cache = decoder.new_cache(1, 9)
        first = decoder.forward(torch.tensor([[5]]), cache)
        kept = first.clone()
        decoder.forward(torch.tensor([[6]]), cache)
        assert torch.equal(first, kept)

    def test_several_python_threads(self, decoder: Decoder) -> None:
        texts = [random_ids(1, 30, seed=seed) for seed in range(6)]

        def run(ids: torch.Tensor) -> torch.Tensor:
            cache = decoder.new_cache(1, 30)
            return torch.cat([decoder.forward(ids[:, at : at + 1], cache) for at in range(30)], dim=1)

        expected = [run(ids) for ids in texts]
        with ThreadPoolExecutor(3) as pool:
            assert all(torch.equal(*pair) for pair in zip(pool.map(run, texts), expected, strict=True))

    def test_a_failed_request_changes_nothing(self, decoder: Decoder) -> None:
        cache = decoder.new_cache(1, 4)
        decoder.forward(torch.tensor([[7]]), cache)
        for ids, lengths in (
            (torch.tensor([[1, VOCABULARY]]), None),
            (torch.tensor([[-1]]), None),
            (torch.tensor([[VOCABULARY]]), None),
            (torch.ones(1, 100, dtype=torch.int64) * VOCABULARY, None),
            (torch.ones(1, 4, dtype=torch.int64), None),
            (torch.ones(2, 1, dtype=torch.int64), None),
            (torch.tensor([[1]]), torch.tensor([2])),
        ):
            with pytest.raises(UsageError):
                decoder.forward(ids, cache, lengths)
        assert cache.lengths.tolist() == [1]
        for call in (lambda: cache.truncate(-1), lambda: cache.select(torch.tensor([1]))):
            with pytest.raises(UsageError):
                call()

    def test_caches_and_weights_of_another_backend(self, decoder: Decoder) -> None:
        other = reference(source_of("llama"))
        ids = torch.tensor([[1]])
        for model, stranger in ((decoder, other), (other, decoder)):
            with pytest.raises(TypeError, match="made by another backend"):
                model.forward(ids, stranger.new_cache(1, 4))


@pytest.mark.parametrize("name", ["llama", "llama-dynamic"])
@pytest.mark.parametrize("make", [native, reference])
class TestExtend:
    """`extend` is `forward` for one sequence, on both backends."""

    def test_it_gives_what_forward_gives(self, make: Callable[[DictSource], Decoder], name: str) -> None:
        decoder = make(source_of(name, "int4-b16"))
        ids = random_ids(1, 40)
        caches = decoder.new_cache(1, 40), decoder.new_cache(1, 40)
        for start, stop in [(0, 9), (9, 10), (10, 35), *((at, at + 1) for at in range(35, 40))]:
            last_only = start % 2 == 0
            expected = decoder.forward(ids[:, start:stop], caches[0], last_only=last_only)[0]
            found = decoder.extend(ids[0, start:stop].tolist(), caches[1], last_only)
            assert found.dtype == np.float32
            assert np.array_equal(found, expected.numpy())
        assert [cache.lengths.tolist() for cache in caches] == [[40], [40]]

    def test_it_refuses_what_forward_refuses(self, make: Callable[[DictSource], Decoder], name: str) -> None:
        decoder = make(source_of(name))
        cache = decoder.new_cache(1, 4)
        decoder.extend([5], cache)
        for ids, message in (
            ([], "at least 1 token, not 0"),
            ([1, VOCABULARY], f"token id {VOCABULARY} is outside"),
            ([-1], "token id -1 is outside"),
            ([1, 2, 3, 4], "holds 4 tokens per row: row 0 has 1 and 4 more do not fit"),
        ):
            with pytest.raises(UsageError, match=message):
                decoder.extend(ids, cache)
        with pytest.raises(UsageError, match="in a cache of 2 rows"):
            decoder.extend([1], decoder.new_cache(2, 4))
        assert cache.lengths.tolist() == [1]


class TestChoices:
    @pytest.fixture(autouse=True)
    def _no_cap(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("KBIT_CPU_ISA", raising=False)

    def test_select_backend(self) -> None:
        backend = select_backend("cpu", threads=2)
        assert isinstance(backend, NativeBackend)
        assert (backend.name, backend.isa, backend.threads) == ("native", ISAS[-1], 2)
        assert backend.describe() == f"native: {ISAS[-1]} kernels, 2 threads, int8 compute, fp16 KV cache"
        assert "fp32 compute, fp32 KV" in select_backend(compute="fp32").describe()
        assert "fp32 compute, 4-bit KV" in select_backend(compute="fp32", kv_bits=4).describe()
        assert "1 thread, int8 compute, fp32 KV" in select_backend("auto", threads=1, kv_bits=32).describe()

    def test_the_environment_caps_the_instruction_set(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for isa in ISAS:
            monkeypatch.setenv("KBIT_CPU_ISA", isa)
            backend = select_backend()
            assert isinstance(backend, NativeBackend)
            assert backend.isa == isa
        monkeypatch.setenv("KBIT_CPU_ISA", "mmx")
        with pytest.raises(UnsupportedError, match="mmx"):
            select_backend()

    def test_bf16_where_there_is_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("KBIT_CPU_ISA", "scalar")
        if _native.Context("scalar", 1).has_bf16:
            pytest.skip("here the scalar set has bfloat16 products")
        with pytest.raises(
            UnsupportedError, match="--compute bf16: the scalar kernels have no bfloat16.*; use --compute int8 or fp32"
        ):
            select_backend(compute="bf16")

    def test_codes_need_heads_of_whole_groups(self) -> None:
        with pytest.raises(
            UnsupportedError, match="--kv-bits 4: this model's heads have 14 features.* use --kv-bits 16"
        ):
            native(source_of("llama-head-dim"), kv="4")  # before any weight is read

    @pytest.mark.parametrize(("batch", "capacity"), [(0, 5), (1, 0), (1, -3)])
    def test_a_cache_needs_room(self, batch: int, capacity: int) -> None:
        with pytest.raises(UsageError, match="at least 1"):
            native(source_of("llama")).new_cache(batch, capacity)
