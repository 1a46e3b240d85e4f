"""Rotary frequencies and tables against transformers, and against the formulas where they are easy to state."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from kbit.host.errors import CheckpointError, UnsupportedError
from kbit.models import rope
from kbit.models.config_values import ConfigValues
from kbit.models.rope_config import RopeRules, ropes_from_config
from kbit.models.spec import RopeSpec

transformers = pytest.importorskip("transformers")

# Frequencies are computed in the same order as transformers, so they may differ only where a Python float meets a
# tensor in another order: a few roundings of 2^-24.
FREQUENCY_RTOL = 8 * 2.0**-24


def rope_from_config(config: dict[str, Any], head_dim: int, max_positions: int, where: str) -> RopeSpec:
    """The rotary settings of a family without any of its own."""
    return ropes_from_config(ConfigValues(config, {}, where), head_dim, max_positions, RopeRules()).rope


# settings, head_dim, max_position_embeddings
SETTINGS: dict[str, tuple[dict[str, Any], int, int]] = {
    "llama2": ({"rope_type": "default", "rope_theta": 10000.0}, 128, 4096),
    "qwen2.5": ({"rope_type": "default", "rope_theta": 1000000.0}, 64, 32768),
    "odd size": ({"rope_type": "default", "rope_theta": 12345.6}, 10, 77),
    "smallest": ({"rope_type": "default", "rope_theta": 10000.0}, 2, 16),
    "linear": ({"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}, 96, 4096),
    "dynamic": ({"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}, 64, 512),
    "dynamic, broken factor": ({"rope_type": "dynamic", "rope_theta": 500000.0, "factor": 3.3}, 14, 100),
    "llama3.1": (
        {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        128,
        131072,
    ),
    "llama3.2": (
        {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        64,
        131072,
    ),
    "llama4 scout, no band": (
        {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 16.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
        },
        128,
        131072,
    ),
    "qwen2.5 yarn": (
        {"rope_type": "yarn", "rope_theta": 1000000.0, "factor": 4.0, "original_max_position_embeddings": 32768},
        128,
        131072,
    ),
    "yarn, every option": (
        {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 2048,
            "beta_fast": 24,
            "beta_slow": 2,
            "mscale": 0.707,
            "mscale_all_dim": 0.4,
            "truncate": False,
        },
        64,
        32768,
    ),
    "yarn, given attention factor": (
        {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "original_max_position_embeddings": 1024,
            "attention_factor": 0.9,
            "mscale": 1.5,
        },
        32,
        8192,
    ),
    "yarn, factor from lengths": (
        {"rope_type": "yarn", "rope_theta": 10000.0, "factor": None, "original_max_position_embeddings": 1000},
        32,
        3000,
    ),
    "yarn, no ramp": (
        {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 2},
        8,
        4,
    ),
}


def inverse_frequencies(spec: RopeSpec, seq_lengths: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(rope.inverse_frequencies(spec, seq_lengths.numpy()))


def rope_tables(
    spec: RopeSpec, positions: torch.Tensor, seq_lengths: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = rope.rope_tables(spec, positions.numpy(), seq_lengths.numpy())
    return torch.from_numpy(cos), torch.from_numpy(sin)


def both(name: str) -> tuple[RopeSpec, Any]:
    """Our RopeSpec and transformers' rotary module for one setting."""
    settings, head_dim, max_positions = SETTINGS[name]
    config = transformers.LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=max_positions,
        rope_parameters=dict(settings),
    )
    module = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    return rope_from_config({"rope_parameters": settings}, head_dim, max_positions, "config.json"), module


def lengths(*values: int) -> torch.Tensor:
    return torch.tensor(values)


@pytest.mark.parametrize("name", SETTINGS)
def test_frequencies_equal_transformers(name: str) -> None:
    spec, module = both(name)
    ours = inverse_frequencies(spec, lengths(5))
    assert ours.dtype == torch.float32
    assert ours.shape == (1, spec.dim // 2)
    torch.testing.assert_close(ours[0], module.inv_freq, rtol=FREQUENCY_RTOL, atol=0)
    assert math.isclose(spec.attention_factor, module.attention_scaling, rel_tol=1e-12)


@pytest.mark.parametrize("name", SETTINGS)
def test_tables_are_within_a_rounding_of_torchs(name: str) -> None:
    """Powers, cosines and sines formed in float64 and rounded once, against torch's float32 ones (1 ulp each)."""
    spec, _ = both(name)
    positions = torch.arange(0, 4096, 7)[None]
    frequencies = inverse_frequencies(spec, lengths(4096))
    cos, sin = rope_tables(spec, positions, lengths(4096))
    angles = positions[..., None].float() * frequencies
    for ours, theirs in ((cos, angles.cos()), (sin, angles.sin())):
        assert float((ours / spec.attention_factor - theirs).abs().max()) <= 2 * 2.0**-24


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("reach", [0.5, 1.0, 3.7])
def test_tables_equal_transformers(name: str, reach: float) -> None:
    """A whole sequence within, at and beyond max_position_embeddings."""
    spec, module = both(name)
    total = max(1, min(int(SETTINGS[name][2] * reach), 200_000))
    step = max(1, total // 1000)
    positions = torch.cat([torch.arange(0, total, step), lengths(total - 1)])[None]
    cos, sin = rope_tables(spec, positions, lengths(total))
    their_cos, their_sin = module(torch.zeros(1), positions)
    # An angle p f is off by what f is (8 roundings) and by the rounding of the product; cos and sin pass an error on at
    # most as it is and add about a rounding of their own.
    angles = positions[..., None] * inverse_frequencies(spec, lengths(total))
    bound = (9 * 2.0**-24 * angles + 2.0**-22) * spec.attention_factor
    half = spec.dim // 2
    for ours, theirs in ((cos, their_cos), (sin, their_sin)):
        assert ours.shape == (1, positions.shape[1], half)
        assert torch.equal(theirs[..., :half], theirs[..., half:])  # transformers holds each angle twice
        assert bool(((ours - theirs[..., :half]).abs() <= bound).all())


def test_longrope_may_have_factors_of_its_own_for_either_length() -> None:
    """Phi-3.5-MoE's; the text's length decides for all of its tokens, and with equal divisors too."""
    settings = {"rope_type": "longrope", "rope_theta": 1000.0, "short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0]}
    settings |= {"short_mscale": 1.25, "long_mscale": 1.5, "original_max_position_embeddings": 64}
    rules = RopeRules(mscales=True)
    for long_factor in ([2.0, 3.0], [1.0, 1.5]):
        config = {"rope_parameters": {**settings, "long_factor": long_factor}}
        spec = ropes_from_config(ConfigValues(config, {}, "config.json"), 4, 128, rules).rope
        assert spec.depends_on_length
        assert spec.constant_up_to == 64
        cos, sin = rope_tables(spec, torch.tensor([[3, 5], [3, 5]]), lengths(64, 65))
        for row, (factor, divisors) in enumerate(((1.25, [1.0, 1.5]), (1.5, long_factor))):
            turned = torch.tensor([[3.0], [5.0]]) / (torch.tensor(divisors) * 1000 ** torch.tensor([0.0, 0.5]))
            torch.testing.assert_close(cos[row], factor * turned.cos())
            torch.testing.assert_close(sin[row], factor * turned.sin())
    with pytest.raises(UnsupportedError, match="short_mscale 1.25 is not supported"):
        rope_from_config({"rope_parameters": settings}, 4, 128, "config.json")


def test_dynamic_grows_with_the_row_not_the_batch() -> None:
    spec, module = both("dynamic")
    frequencies = inverse_frequencies(spec, lengths(100, 512, 513, 2048))
    assert torch.equal(frequencies[0], frequencies[1])
    assert bool((frequencies[2:, 1:] < frequencies[1, 1:]).all())
    init = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["dynamic"]
    for row, length in enumerate((100, 512, 513, 2048)):
        expected, _ = init(module.config, seq_len=length)
        torch.testing.assert_close(frequencies[row], expected, rtol=1e-5, atol=0)


def test_dynamic_follows_a_growing_sequence() -> None:
    """Decoding: transformers recomputes the base at every step beyond the maximum, and so does rope_tables."""
    spec, module = both("dynamic, broken factor")
    for length in (90, 99, 100, 101, 102, 150, 400):
        position = lengths(length - 1)[None]
        cos, sin = rope_tables(spec, position, lengths(length))
        their_cos, their_sin = module(torch.zeros(1), position)
        half = spec.dim // 2
        torch.testing.assert_close(cos, their_cos[..., :half], rtol=0, atol=1e-4)
        torch.testing.assert_close(sin, their_sin[..., :half], rtol=0, atol=1e-4)


def test_default_is_the_papers_formula() -> None:
    spec = rope_from_config({"rope_theta": 10000.0}, 8, 100, "config.json")
    cos, sin = rope_tables(spec, torch.tensor([[0, 1, 37]]), lengths(38))
    for token, position in enumerate((0, 1, 37)):
        for pair in range(4):
            angle = position * 10000.0 ** (-2 * pair / 8)
            assert float(cos[0, token, pair]) == pytest.approx(math.cos(angle), abs=1e-5)
            assert float(sin[0, token, pair]) == pytest.approx(math.sin(angle), abs=1e-5)


@pytest.mark.parametrize(
    ("config", "theta", "kind"),
    [
        ({}, 10000.0, "default"),
        ({"rope_theta": 5e5}, 5e5, "default"),
        ({"rope_theta": 5e5, "rope_scaling": None}, 5e5, "default"),
        ({"rope_parameters": {"rope_theta": 7e5, "rope_type": "default"}}, 7e5, "default"),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_theta": 7e5, "rope_type": "default"}}, 7e5, "default"),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}}, 5e5, "linear"),
        ({"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "type": "yarn", "factor": 2}}, 5e5, "linear"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 3.0}},
            10000.0,
            "linear",
        ),
    ],
)
def test_both_spellings(config: dict[str, Any], theta: float, kind: str) -> None:
    spec = rope_from_config(config, 8, 100, "config.json")
    assert (spec.theta, spec.kind) == (theta, kind)


@pytest.mark.parametrize("kind", ["llama3", "yarn"])
def test_original_length_beside_inside_or_left_out(kind: str) -> None:
    settings = {"rope_type": kind, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    key = "original_max_position_embeddings"
    for config, expected in (
        ({"rope_parameters": settings}, 100),
        ({"rope_parameters": {**settings, key: 25}}, 25),
        ({"rope_parameters": {**settings, key: 25}, key: 30}, 30),
    ):
        assert rope_from_config(config, 8, 100, "config.json").original_positions == expected


@pytest.mark.parametrize(
    ("config", "error", "names"),
    [
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, CheckpointError, "short_factor"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 2]}}, UnsupportedError, "mrope"),
        ({"rope_scaling": {"type": ["yarn"]}}, UnsupportedError, "yarn"),
        ({"rope_scaling": {"full_attention": {"type": "default"}}}, UnsupportedError, "each layer type"),
        ({"partial_rotary_factor": 0.5}, UnsupportedError, "partial_rotary_factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, UnsupportedError, "partial_rotary_factor"),
        ({"rope_scaling": "yarn"}, CheckpointError, "rope_scaling"),
        ({"rope_scaling": [1]}, CheckpointError, "rope_scaling"),
        ({"rope_theta": "10000"}, CheckpointError, "rope_theta"),
        ({"rope_theta": -1.0}, CheckpointError, "rope_theta"),
        ({"rope_theta": math.nan}, CheckpointError, "rope_theta"),
        ({"rope_theta": math.inf}, CheckpointError, "rope_theta"),
        ({"rope_theta": 10**400}, CheckpointError, "rope_theta"),
        ({"rope_parameters": {"rope_theta": None}}, CheckpointError, "rope_theta"),
        ({"rope_scaling": {"type": "linear"}}, CheckpointError, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, CheckpointError, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, CheckpointError, "factor"),
        ({"rope_scaling": {"type": "dynamic", "factor": -3.0}}, CheckpointError, "factor"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}}, CheckpointError, "high_freq"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8.0, "low_freq_factor": 4, "high_freq_factor": 3}},
            CheckpointError,
            "high_freq_factor",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 0}},
            CheckpointError,
            "original_max_position_embeddings",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 8.0, "beta_fast": 1, "beta_slow": 2}}, CheckpointError, "beta"),
        ({"rope_scaling": {"type": "yarn", "factor": 8.0, "beta_fast": -5}}, CheckpointError, "beta_fast"),
        ({"rope_scaling": {"type": "yarn", "factor": 8.0, "beta_slow": 1e-320}}, CheckpointError, "beta_slow"),
        ({"rope_scaling": {"type": "yarn", "factor": 1e300}}, CheckpointError, "factor"),
        ({"rope_scaling": {"type": "yarn", "factor": 8.0, "attention_factor": True}}, CheckpointError, "attention"),
        ({"rope_scaling": {"type": "yarn", "factor": 8.0, "truncate": "no"}}, CheckpointError, "truncate"),
    ],
)
def test_bad_settings_are_named(config: dict[str, Any], error: type[Exception], names: str) -> None:
    with pytest.raises(error, match=names) as caught:
        rope_from_config(config, 8, 100, "folder/config.json")
    assert "folder/config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_head_dim_that_cannot_rotate() -> None:
    with pytest.raises(CheckpointError, match="head_dim is 7"):
        rope_from_config({}, 7, 100, "config.json")
    with pytest.raises(CheckpointError, match="head_dim above 2"):
        rope_from_config({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 2, 100, "config.json")


@pytest.mark.parametrize("kind", ["linear", "dynamic", "llama3", "yarn"])
@pytest.mark.parametrize("theta", [1.0000000000000002, 9e29])
@pytest.mark.parametrize("factor", [2e-6, 9e8])
@pytest.mark.parametrize("context", [1, 2**31])
def test_extreme_settings_stay_finite(kind: str, theta: float, factor: float, context: int) -> None:
    settings = {"rope_type": kind, "factor": factor, "low_freq_factor": 1e-5, "high_freq_factor": 9e8}
    config = {"rope_theta": theta, "rope_scaling": settings}
    spec = rope_from_config(config, 64, context, "config.json")
    cos, sin = rope_tables(spec, torch.tensor([[0, 1, 2**31]]), lengths(2**31 + 1))
    assert bool(torch.isfinite(cos).all())
    assert bool(torch.isfinite(sin).all())
