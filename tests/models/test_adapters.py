"""LoRA adapters beside a model: the same logits as of the weights with the adapter added, whatever the family's layout.

The judges are the merged folder (`kbit.checkpoint.readers.lora_folder`), and PEFT where it is installed.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from adapter_cases import saved_case, shapes_of, some, write_adapter
from native_cases import assert_close, exact, native, random_ids, reference, source_of

from kbit.backends.cpu.backend import NativeBackend
from kbit.backends.reference.backend import ReferenceBackend
from kbit.graph.backend import Backend
from kbit.graph.batch import Batch
from kbit.graph.operations import Adapt, Symbol
from kbit.host.errors import CheckpointError, KbitError, UnsupportedError, UsageError
from kbit.host.notes import KbitNote
from kbit.models.adapters import add_adapters
from kbit.models.decoder import Decoder
from kbit.models.load import load_decoder
from kbit.models.opening import open_model

pytestmark = pytest.mark.usefixtures("one_thread")


def logits_of(decoder: Decoder, ids: torch.Tensor) -> torch.Tensor:
    return decoder.forward(ids, decoder.new_cache(len(ids), ids.shape[1]))


def float_backends() -> list[Backend]:
    return [ReferenceBackend(), NativeBackend(2, compute="fp32", kv="fp32")]


# Plain; fused with biases that are added to sums; transposed; by head, parallel; interleaved; by quarters; norms after
# products; several query heads to one key; a state space beside attention; latents, expanded.
@pytest.mark.parametrize(
    "case",
    [
        "llama-biases",
        "phi3",
        "gpt2",
        "gpt_neox",
        "glm",
        "codegen",
        "olmo2",
        "falcon",
        "granite-hybrid",
        "deepseek-v2-lite",
    ],
)
def test_an_adapter_beside_a_model_is_the_merged_model(case: str, tmp_path: Path) -> None:
    base = saved_case(case, tmp_path / "base")
    shapes, transposed = shapes_of(base), case == "gpt2"
    assert len(shapes) >= 12
    lora = write_adapter(tmp_path / "lora", base, shapes, fan_in_fan_out=transposed)
    ids = random_ids(2, 9)
    for backend in float_backends():
        with open_model(str(base)) as source:
            plain = load_decoder(source, backend)
            adapted = add_adapters(plain, source.config, {"a": lora})
        with pytest.warns(KbitNote, match="a LoRA of rank"):
            merged_source = open_model(str(lora))
        with merged_source:
            merged = logits_of(load_decoder(merged_source, backend), ids)
        assert_close(logits_of(adapted.with_adapter("a"), ids), merged)
        assert torch.equal(logits_of(adapted, ids), logits_of(plain, ids))
        assert float((merged - logits_of(plain, ids)).abs().max() / merged.abs().max()) > 0.05


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 9}}])
def test_peft_says_the_same(settings: dict[str, object], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base = saved_case("llama-biases", tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    config = peft.LoraConfig(r=5, lora_alpha=7, target_modules=["q_proj", "o_proj", "up_proj"], **settings)
    model = peft.get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(tmp_path / "lora")
    ids = random_ids(1, 12)
    with torch.no_grad():
        expected = model(ids).logits
    for backend in float_backends():
        with open_model(str(base)) as source:
            adapted = add_adapters(load_decoder(source, backend), source.config, {"a": tmp_path / "lora"})
        assert_close(logits_of(adapted.with_adapter("a"), ids), expected)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of the tiny Llama: of everything, of some matrices, of a larger rank."""
    folder = tmp_path_factory.mktemp("adapters")
    shapes = shapes_of(saved_case("llama", folder / "base"))
    return {
        "all": write_adapter(folder / "all", "base", shapes, 3),
        "some": write_adapter(folder / "some", "base", some(shapes, ("q_proj", "down_proj")), 1, seed=2),
        "large": write_adapter(folder / "large", "base", some(shapes, ("v_proj", "gate_proj")), 17, seed=3),
        "half": write_adapter(folder / "half", "base", some(shapes, ("o_proj",)), 2, dtype=torch.bfloat16),
    }


@pytest.mark.parametrize("compute", ["int8", "fp32", "bf16"])
def test_rows_of_a_pass_may_have_different_adapters(compute: str, folders: dict[str, Path]) -> None:
    """Whoever shares the pass, in whatever pieces: the same bits. And without one, those of the model alone."""
    source = source_of("llama", "nf4-b32")
    try:
        plain = native(source, compute=compute, kv="fp16", threads=2)
    except UnsupportedError as error:
        pytest.skip(str(error))
    decoder = add_adapters(plain, source.config, folders)
    generator = np.random.default_rng(0)
    texts = [generator.integers(0, 131, int(length)).tolist() for length in generator.integers(1, 28, 14)]
    which = generator.permutation(len(texts)) % (1 + len(folders)) - 1

    def run(decoder: Decoder, chosen: list[int], pieces: int = 1) -> list[np.ndarray]:
        pool, found = decoder.new_cache(len(chosen), 32), [np.empty((0, 131), dtype=np.float32)] * len(chosen)
        for piece in range(pieces):
            parts = [texts[i][len(texts[i]) * piece // pieces : len(texts[i]) * (piece + 1) // pieces] for i in chosen]
            batch = Batch.of(parts, pool.lengths, "all")
            batch = replace(batch, adapters=np.array([which[i] for i in chosen], dtype=np.int64))
            rows = np.split(np.asarray(decoder.run(batch, pool)), batch.counts.cumsum()[:-1])
            found = [np.concatenate(pair) for pair in zip(found, rows, strict=True)]
        return found

    together = run(decoder, list(range(len(texts))))
    for again in (run(decoder, list(range(len(texts))), pieces=3), [run(decoder, [i])[0] for i in range(len(texts))]):
        assert all(np.array_equal(one, other) for one, other in zip(together, again, strict=True))
    for index in np.flatnonzero(which < 0).tolist():
        assert np.array_equal(together[index], run(plain, [index])[0])


def test_a_quantized_base_stays_quantized(folders: dict[str, Path]) -> None:
    source = source_of("llama", "nf4-b32")
    ids = random_ids(2, 9)
    expected = add_adapters(reference(source), source.config, folders).with_adapter("all")
    found = add_adapters(exact(source), source.config, folders).with_adapter("all")
    assert found.weights.nbytes == exact(source).weights.nbytes
    assert_close(logits_of(found, ids), logits_of(expected, ids))


@pytest.mark.parametrize(
    ("change", "message", "kind"),
    [
        ({"extra": {"base_model.model.lm_head.weight": torch.zeros(131, 48)}}, "changes lm_head.weight", UnsupportedError),
        ({"extra": {"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(2, 131),
                    "base_model.model.model.embed_tokens.lora_embedding_B": torch.zeros(48, 2)}},
         "changes model.embed_tokens.weight", UnsupportedError),
        ({"use_dora": True}, "it is a DoRA", UnsupportedError),
        ({"shapes": {"model.layers.7.self_attn.q_proj": (48, 48)}}, "no matrix of this model's layers", CheckpointError),
        ({"shapes": {"model.layers.0.self_attn.q_proj": (48, 40)}}, "the model has 48 x 48", CheckpointError),
        ({"rank": 50, "shapes": {"model.layers.0.self_attn.q_proj": (48, 48)}}, "has rank 50", CheckpointError),
        ({"size": float("nan")}, "values that are no numbers", CheckpointError),
    ],
)  # fmt: skip
def test_what_an_adapter_must_not_be(
    change: dict[str, object], message: str, kind: type[KbitError], tmp_path: Path
) -> None:
    source = source_of("llama")
    shapes = {"model.layers.1.mlp.up_proj": (77, 48)}
    lora = write_adapter(tmp_path / "lora", "base", **{"shapes": shapes, **change})  # type: ignore[arg-type]
    with pytest.raises(kind, match=message) as found:
        add_adapters(exact(source), source.config, {"a": lora})
    assert str(lora) in str(found.value)
    assert "\n" not in str(found.value)


def test_triton_refuses_them_by_name() -> None:
    pytest.importorskip("triton")
    from kbit.backends.triton.replay import Replay

    x, y, out = Symbol(4), Symbol(4), Symbol(4)
    with pytest.raises(UnsupportedError, match="the triton backend runs no LoRA adapters beside a model: open the"):
        Replay([Adapt(x, (y,), ((None,),), (out,))], x, out, torch.float16)


def test_what_is_no_adapter_and_who_has_none(tmp_path: Path) -> None:
    decoder = exact(source_of("llama"))
    with pytest.raises(UsageError, match="no LoRA adapter: name a folder"):
        add_adapters(decoder, source_of("llama").config, {"a": tmp_path})
    with pytest.raises(UsageError, match="there is no adapter 'b': this model was loaded with none"):
        decoder.with_adapter("b")


@pytest.mark.parametrize("part", ["kv_b_proj", "experts.0.down_proj"])
def test_matrices_that_are_not_just_multiplied_by_take_no_adapter(part: str, tmp_path: Path) -> None:
    sizes = {"kv_lora_rank": 80, "qk_nope_head_dim": 48, "qk_rope_head_dim": 16, "v_head_dim": 32}
    base = saved_case("deepseek-v2-lite", tmp_path / "base", **sizes)
    shapes = some(shapes_of(base, experts=True), (part,))
    lora = write_adapter(tmp_path / "lora", base, shapes)
    with open_model(str(base)) as source:
        decoder = load_decoder(source, NativeBackend(1))
        assert decoder.spec.keeps_latents
        with pytest.raises(KbitError, match="open (the adapter's|its) folder as the model"):
            add_adapters(decoder, source.config, {"a": lora})
