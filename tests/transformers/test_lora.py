"""LoRA on k-bit layers (QLoRA) by PEFT, and a head on a k-bit encoder: losses fall, merging and unmerging."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_cases import model_of, saved

import kbit

transformers = pytest.importorskip("transformers", minversion="5")
peft = pytest.importorskip("peft")

import kbit.transformers as plugin  # noqa: E402
from kbit.modules.convert import kbit_layers  # noqa: E402
from kbit.modules.linear import KbitLinear  # noqa: E402
from kbit.transformers.lora import KbitLoraLinear, with_kbit  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

TARGETS = ["q_proj", "v_proj", "down_proj"]


def lora(**settings: Any) -> Any:
    return with_kbit(peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, **settings))


def with_adapter(folder: str, **settings: Any) -> Any:
    config = plugin.KbitConfig(bits=3)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config)
    return peft.get_peft_model(base, lora(**settings))


def train(model: Any, batches: list[dict[str, torch.Tensor]], rate: float) -> list[float]:
    """Losses before each step."""
    optimizer = torch.optim.Adam([each for each in model.parameters() if each.requires_grad], lr=rate)
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def set_up(model: Any) -> None:
    """Adapters that change something: B is zero at the start."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, values in model.named_parameters():
            if "lora_B" in name:
                values.copy_(0.2 * torch.randn(values.shape, generator=generator))


def scores(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).logits
    return found


@pytest.fixture(scope="module")
def small_folder(data_dir: Path) -> str:
    """The smallest of the models trained on novels."""
    return str(data_dir / "models" / "novels-0.7m")


@pytest.fixture(scope="module")
def text_ids(data_dir: Path, small_folder: str) -> torch.Tensor:
    """Text of another kind than the model's: an encyclopedia's, (9, 48)."""
    text = (data_dir / "wikitext2" / "wiki.test.raw").read_text(encoding="utf-8")[:20000]
    ids = transformers.AutoTokenizer.from_pretrained(small_folder)(text)["input_ids"]
    return torch.tensor(ids[: 9 * 48]).view(9, 48)


def test_training_adapters_lowers_the_loss_on_real_text(
    small_folder: str, text_ids: torch.Tensor, tmp_path: Path
) -> None:
    model = with_adapter(small_folder)
    layers = [layer for layer in model.modules() if isinstance(layer, KbitLoraLinear)]
    assert len(layers) == 12
    trained = [name for name, values in model.named_parameters() if values.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    codes = {name: part.clone() for name, part in model.state_dict().items() if "packed" in name}
    batches = [{"input_ids": part, "labels": part} for _ in range(5) for part in text_ids.split(3)]
    losses = train(model, batches, 5e-3)
    first, last = sum(losses[:3]) / 3, sum(losses[-3:]) / 3  # over the same text
    assert last < first - 0.3, losses
    assert all(torch.equal(model.state_dict()[name], part) for name, part in codes.items())
    model.save_pretrained(tmp_path / "adapter")
    expected = scores(model, text_ids[:2])
    base = transformers.AutoModelForCausalLM.from_pretrained(
        small_folder, dtype=torch.float32, quantization_config=plugin.KbitConfig(bits=3)
    )
    config = with_kbit(peft.PeftConfig.from_pretrained(tmp_path / "adapter"))
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", config=config)
    assert torch.equal(scores(again, text_ids[:2]), expected)


def test_merging_rounds_and_unmerging_gives_the_bits_back(small_folder: str, text_ids: torch.Tensor) -> None:
    model = with_adapter(small_folder)
    set_up(model)
    layer = next(layer for layer in model.modules() if isinstance(layer, KbitLoraLinear))
    before, wanted = scores(model, text_ids[:2]), layer.base_layer.dequantize() + layer.get_delta_weight("default")
    codes = layer.base_layer.parts[0].stored["scales"].clone()
    model.merge_adapter(safe_merge=True)
    assert isinstance(layer.base_layer, KbitLinear)
    format = layer.base_layer.parts[0].format
    expected = format.encode(lambda start, stop: wanted[start:stop], tuple(wanted.shape))
    assert all(torch.equal(layer.base_layer.parts[0].stored[name], part) for name, part in expected.stored.items())
    assert not torch.equal(scores(model, text_ids[:2]), before)
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.parts[0].stored["scales"], codes)
    assert torch.equal(scores(model, text_ids[:2]), before)
    with model.disable_adapter():
        plain = scores(model, text_ids[:2])
    assert not torch.equal(plain, before)
    assert torch.equal(scores(model.unload(), text_ids[:2]), plain)


def test_merging_into_plain_layers_is_exact(small_folder: str, text_ids: torch.Tensor) -> None:
    model = with_adapter(small_folder)
    set_up(model)
    before = scores(model, text_ids[:2])
    merged = plugin.dequantize_(model).merge_and_unload()
    assert not list(kbit_layers(merged))
    assert not any("lora" in name for name, _ in merged.named_parameters())
    found = scores(merged, text_ids[:2])
    assert float((found - before).abs().max()) <= 1e-4 * float(before.abs().max())  # sums in another order


def test_a_layer_of_several_matrices(published: Callable[[str], Path], tmp_path: Path) -> None:
    """q, k and v in one, in formats and an order of their own: merged part by part."""
    kbit.quantize(
        published("gpt2"), tmp_path / "k", format="nf4-b16", method="rtn", override={"*v_proj.weight": "int8-b16"}
    )
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "k", dtype=torch.float32)
    model = peft.get_peft_model(base, with_kbit(peft.LoraConfig(r=4, target_modules=["c_attn"])))
    set_up(model)
    layer = next(layer for layer in model.modules() if isinstance(layer, KbitLoraLinear))
    wanted = layer.base_layer.dequantize() + layer.get_delta_weight("default")
    assert len(layer.base_layer.parts) == 3
    model.merge_adapter()
    # Rounded to 4 bits: no value is farther from its own than half of the widest step of its block's grid.
    largest = float(wanted.abs().max())
    assert float((layer.base_layer.dequantize() - wanted).abs().max()) <= 0.16 * largest


def test_rows_of_a_batch_with_adapters_of_their_own(small_folder: str, text_ids: torch.Tensor) -> None:
    model = with_adapter(small_folder).eval()
    model.add_adapter("other", lora())
    set_up(model)
    ids = text_ids[:3]
    apart = []
    for name, row in (("default", 0), ("other", 1)):
        model.set_adapter(name)
        apart.append(scores(model, ids[row : row + 1]))
    with model.disable_adapter():
        apart.append(scores(model, ids[2:3]))
    with torch.no_grad():
        together = model(input_ids=ids, adapter_names=["default", "other", "__base__"]).logits
    for row, alone in enumerate(apart):
        assert float((together[row] - alone[0]).abs().max()) <= 1e-4 * float(alone.abs().max())
    assert float((apart[0] - apart[1]).abs().max()) > 0.1


def test_what_is_not_supported_is_refused(small_folder: str) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained(
        small_folder, dtype=torch.float32, quantization_config=plugin.KbitConfig(bits=4)
    )
    with pytest.raises(kbit.UnsupportedError, match="lora_bias=True is not supported"):
        peft.get_peft_model(base, lora(lora_bias=True))
    with pytest.raises(ValueError, match="use_dora"):
        peft.get_peft_model(base, lora(use_dora=True))
    with pytest.raises(ValueError, match=r"(?s)KbitLinear.*is not supported"):  # PEFT was not told
        peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"]))


def test_a_head_on_a_k_bit_encoder_learns(tmp_path: Path) -> None:
    """Whether a text names the first of two words, or the second."""
    folder = saved(model_of("Bert"), tmp_path / "bert")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, num_labels=2, quantization_config=plugin.KbitConfig(bits=4)
    )
    assert "classifier" not in dict(kbit_layers(model))
    for name, values in model.named_parameters():
        values.requires_grad_(name.startswith("classifier"))
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(10, 99, (48, 12), generator=generator)
    labels = torch.arange(48) % 2
    ids[torch.arange(48), torch.randint(1, 12, (48,), generator=generator)] = 5 + labels
    model.eval()  # no dropout
    losses = train(model, [{"input_ids": ids, "labels": labels}] * 60, 0.05)
    assert losses[-1] < 0.75 * losses[0], losses
    with torch.no_grad():
        right = (model(input_ids=ids).logits.argmax(-1) == labels).float().mean()
    assert right > 0.75
