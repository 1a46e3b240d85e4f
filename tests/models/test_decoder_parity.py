"""The decoder against transformers: tiny random models of every family and switch, written and read as real folders."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from decoder_cases import CASES, PAD, TINY, saved_model

from kbit.backends.reference.backend import ReferenceBackend
from kbit.backends.reference.kv_cache import reference_pages
from kbit.checkpoint.readers.hf_folder import HFFolder
from kbit.models.decoder import Decoder
from kbit.models.load import load_decoder
from kbit.models.opening import open_model

pytestmark = pytest.mark.usefixtures("one_thread")

transformers = pytest.importorskip("transformers")

# Both sides compute in float32 but sum in different orders. A sum of n terms is off by at most n eps |x||y|, in
# practice by about sqrt(n) eps: with n <= 80 and a few dozen operations in a row, 1e-5 of the largest logit.
RELATIVE = 1e-4


@dataclass
class Pair:
    """The same weights in transformers and in kbit."""

    theirs: Any
    ours: Decoder
    folder: Path


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp(request.param)
    model = saved_model(request.param, folder)
    with open_model(str(folder)) as source:
        yield Pair(model, load_decoder(source, ReferenceBackend()), folder)


@pytest.fixture(autouse=True)
def _fresh_rotary(request: pytest.FixtureRequest) -> None:
    """transformers keeps dynamic RoPE's last base between calls; give every test the model as it was loaded."""
    if "pair" in request.fixturenames:
        theirs = request.getfixturevalue("pair").theirs
        for name, module in theirs.named_modules():
            if name.endswith("rotary_emb"):
                module.__init__(theirs.config)


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    assert ours.dtype == torch.float32
    worst = float((ours - theirs).abs().max() / theirs.abs().max())
    assert worst <= RELATIVE, f"logits differ by {worst:.2e} of the largest"


def random_ids(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, TINY["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_prefill_beyond_the_context(pair: Pair) -> None:
    """40 tokens: longer than every window here and than max_position_embeddings (32)."""
    ids = random_ids(2, 40)
    cache = pair.ours.new_cache(2, 40)
    expected = pair.theirs(ids).logits
    assert_close(pair.ours.forward(ids, cache), expected)
    assert cache.lengths.tolist() == [40, 40]
    cache.truncate(0)
    assert_close(pair.ours.forward(ids, cache, last_only=True), expected[:, -1:])


@torch.no_grad()
def test_decoding_token_by_token(pair: Pair) -> None:
    """20 tokens at once, then one at a time past max_position_embeddings; transformers with its own cache."""
    ids = random_ids(2, 40, seed=2)
    cache = pair.ours.new_cache(2, 40)
    output = pair.theirs(ids[:, :20], use_cache=True)
    assert_close(pair.ours.forward(ids[:, :20], cache), output.logits)
    for position in range(20, 40):
        token = ids[:, position : position + 1]
        # (Bamba's own positions begin anew with every call.)
        places = {"position_ids": torch.full((2, 1), position)} if pair.theirs.config.model_type == "bamba" else {}
        output = pair.theirs(token, **places, past_key_values=output.past_key_values, use_cache=True)
        assert_close(pair.ours.forward(token, cache), output.logits)


@torch.no_grad()
def test_ragged_batch(pair: Pair) -> None:
    """Right-padded here, left-padded with an attention mask there; then 8 tokens decoded on the ragged batch."""
    lengths = torch.tensor([23, 9, 1])
    ids = random_ids(3, 23, seed=3)
    right, left, mask = torch.full_like(ids, PAD), torch.full_like(ids, PAD), torch.zeros_like(ids)
    for row, length in enumerate(lengths.tolist()):
        right[row, :length] = ids[row, :length]
        left[row, 23 - length :] = ids[row, :length]
        mask[row, 23 - length :] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    # Exactly as much room as the longest row needs: padding must not be written.
    cache = pair.ours.new_cache(3, 31)
    tempered = getattr(pair.theirs.config, "attn_temperature_tuning", False)
    if tempered or getattr(pair.theirs.config, "conv_bias", False):
        # There padding, zeros until then, becomes the linears' bias, which the convolution takes for tokens; and Llama 4
        # counts padding as positions where queries grow with them.
        ours = pair.ours.forward(right, cache, lengths)
        for row, length in enumerate(lengths.tolist()):
            assert_close(ours[row : row + 1, :length], pair.theirs(ids[row : row + 1, :length]).logits)
        return
    output = pair.theirs(left, attention_mask=mask, position_ids=positions, use_cache=True)
    ours = pair.ours.forward(right, cache, lengths)
    for row, length in enumerate(lengths.tolist()):
        assert_close(ours[row, :length], output.logits[row, 23 - length :])
    assert cache.lengths.tolist() == [23, 9, 1]
    for step in range(8):
        token = random_ids(3, 1, seed=100 + step)
        mask = torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], dim=1)
        output = pair.theirs(
            token,
            attention_mask=mask,
            position_ids=mask.sum(1, keepdim=True) - 1,
            past_key_values=output.past_key_values,
            use_cache=True,
        )
        assert_close(pair.ours.forward(token, cache), output.logits)


@torch.no_grad()
def test_greedy_text(pair: Pair) -> None:
    """Past max_position_embeddings; but where frequencies then change, up to there: transformers begins anew."""
    prompt = random_ids(1, 11, seed=4)
    more = 20 if pair.ours.spec.rope.kind == "longrope" else 32
    theirs = pair.theirs.generate(prompt, max_new_tokens=more, do_sample=False, attention_mask=torch.ones_like(prompt))
    assert theirs.shape == (1, 11 + more)
    cache = pair.ours.new_cache(1, 43)
    tokens, new = prompt[0].tolist(), prompt
    for _ in range(more):
        new = pair.ours.forward(new, cache, last_only=True).argmax(-1)
        tokens.append(int(new))
    assert tokens == theirs[0].tolist()


def test_old_spelling_of_the_config_means_the_same(pair: Pair, tmp_path: Path) -> None:
    """transformers 5 writes rope_parameters; earlier versions wrote rope_theta and rope_scaling (with "type")."""
    config = json.loads((pair.folder / "config.json").read_text())
    if "rope_parameters" not in config:
        pytest.skip("positions do not rotate")
    if config["model_type"] == "gemma4_text":
        pytest.skip("there is no older spelling")
    rope = config.pop("rope_parameters")
    if "full_attention" in rope:
        local, rope = rope["sliding_attention"]["rope_theta"], rope["full_attention"]
        if config["model_type"] == "olmo3":  # its older spelling has one theta
            rope["rope_theta"] = local
        else:
            config["rope_local_base_freq"] = local
    config["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        config["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    kind = rope.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {**rope, "type": kind}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(pair.folder / "model.safetensors")
    spec = pair.ours.spec
    if spec.family == "olmo3":
        assert spec.window_rope is not None
        spec = replace(spec, rope=replace(spec.rope, theta=spec.window_rope.theta))
    with open_model(str(tmp_path)) as source:
        assert load_decoder(source, ReferenceBackend()).spec == spec


@pytest.mark.parametrize("pair", ["llama", "mistral-window", "qwen2-some-windows", "llama-dynamic"], indirect=True)
def test_rows_do_not_depend_on_their_neighbours(pair: Pair) -> None:
    """A row gives the same alone, in a ragged batch, in pieces, and in a cache that held something else."""
    lengths = [38, 17, 5]
    ids = random_ids(3, 38, seed=5)
    batch_cache = pair.ours.new_cache(3, 38)
    together = pair.ours.forward(ids, batch_cache, torch.tensor(lengths))
    assert bool(torch.isfinite(together).all())
    for row, length in enumerate(lengths):
        cache = pair.ours.new_cache(1, 50)
        pair.ours.forward(random_ids(1, 50, seed=6), cache)
        cache.truncate(0)
        alone = pair.ours.forward(ids[row : row + 1, :length], cache)
        assert_close(together[row : row + 1, :length], alone)
        for layer in range(TINY["num_hidden_layers"]):
            stored, kept = (
                reference_pages(each).read(layer, table.pages, length)[0]
                for each, table in ((batch_cache, batch_cache.rows[row]), (cache, cache.rows[0]))
            )
            assert_close(stored, kept)


@pytest.mark.parametrize("pair", ["llama", "mistral-window", "qwen2-layer-types", "llama-yarn"], indirect=True)
def test_pieces_of_a_prompt_equal_the_whole(pair: Pair) -> None:
    """Ragged pieces, an idle row among them. (Dynamic RoPE is the exception, see models/rope.py.)"""
    ids = random_ids(2, 30, seed=7)
    whole = pair.ours.forward(ids, pair.ours.new_cache(2, 30))
    cache = pair.ours.new_cache(2, 30)
    done = [0, 0]
    for taken in ((13, 4), (0, 9), (17, 1), (0, 16)):
        width = max(taken)
        piece = torch.zeros(2, width, dtype=torch.int64)
        for row in range(2):
            piece[row, : taken[row]] = ids[row, done[row] : done[row] + taken[row]]
        logits = pair.ours.forward(piece, cache, torch.tensor(taken))
        assert bool(torch.isfinite(logits).all())
        for row in range(2):
            if taken[row]:
                assert_close(logits[row, : taken[row]], whole[row, done[row] : done[row] + taken[row]])
            done[row] += taken[row]
    assert cache.lengths.tolist() == [30, 30]


@pytest.mark.parametrize("pair", ["llama", "mistral-window"], indirect=True)
def test_last_only_of_a_ragged_batch(pair: Pair) -> None:
    lengths = torch.tensor([12, 3, 7])
    ids = random_ids(3, 12, seed=8)
    every = pair.ours.forward(ids, pair.ours.new_cache(3, 12), lengths)
    last = pair.ours.forward(ids, pair.ours.new_cache(3, 12), lengths, last_only=True)
    assert last.shape == (3, 1, TINY["vocab_size"])
    assert_close(last[:, 0], every[torch.arange(3), lengths - 1])


def test_novels_2m(data_dir: Path) -> None:
    """A trained model in fp16, on held-out prose, against AutoModelForCausalLM in float32."""
    folder = data_dir / "models" / "novels-2m"
    if not (folder / "model.safetensors").is_file():
        pytest.skip(f"no model at {folder}")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = next(iter(sorted((data_dir / "novels" / "heldout").glob("*.txt")))).read_text(encoding="utf-8")
    ids = torch.tensor([tokenizer(text[20_000:24_000])["input_ids"][:256]])
    assert ids.shape == (1, 256)
    with HFFolder(folder) as source:
        ours = load_decoder(source, ReferenceBackend())
    with torch.no_grad():
        logits = ours.forward(ids, ours.new_cache(1, 256))
        assert_close(logits, theirs(ids).logits)
        # It is a trained model: about 3.5 nats per token; a wrong but self-consistent rotation would show here.
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
        assert float(loss) < 4.5
        prompt = ids[:, :64]
        expected = theirs.generate(
            prompt, max_new_tokens=64, min_new_tokens=64, do_sample=False, attention_mask=torch.ones_like(prompt)
        )
    cache, new, tokens = ours.new_cache(1, 128), prompt, prompt[0].tolist()
    end = theirs.generation_config.eos_token_id
    for _ in range(64):
        scores = ours.forward(new, cache, last_only=True)
        scores[..., end] = -torch.inf  # min_new_tokens does the same
        new = scores.argmax(-1)
        tokens.append(int(new))
    assert tokens == expected[0].tolist()
