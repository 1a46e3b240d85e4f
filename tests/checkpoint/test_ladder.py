"""Rungs of nested files: which widths a number of bits takes, and orders that are none."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from nested_cases import some_order, write_mixed

from kbit.checkpoint.ladder import ORDER, Ladder, Order
from kbit.checkpoint.narrowed import narrowed, widths_of
from kbit.formats.nested import NestedFormat
from kbit.host.errors import CheckpointError, UsageError
from kbit.models.opening import open_model

SIZES = {"a": 100, "b": 300, "c": 50, "d": 7}
WIDTHS = (6, 5, 4, 3, 2)
LADDER = Ladder(WIDTHS, SIZES, some_order(list(SIZES), 4, seed=3))


def mean(widths: dict[str, int]) -> float:
    return sum(SIZES[name] * width for name, width in widths.items()) / sum(SIZES.values())


def test_a_number_of_bits_takes_the_longest_prefix_that_is_no_wider() -> None:
    """Tried with every prefix, one by one."""
    assert LADDER.order is not None
    prefixes = [dict.fromkeys(SIZES, 2)]
    for step in LADDER.order.steps:
        name = LADDER.order.matrices[step]
        prefixes.append({**prefixes[-1], name: prefixes[-1][name] + 1})
    means = [mean(widths) for widths in prefixes]
    for bits in (2.0, 2.01, 2.5, 3, 3.4, 4.999, 5.5, 6, *means):
        longest = max(place for place, each in enumerate(means) if each <= bits + 1e-9)
        assert LADDER.at(bits) == prefixes[longest]
        assert LADDER.mean(bits) == pytest.approx(means[longest])
    assert LADDER.at(6) == dict.fromkeys(SIZES, 6)


def test_without_an_order_all_matrices_have_the_same_width() -> None:
    plain = Ladder(WIDTHS, SIZES)
    assert plain.at(3) == dict.fromkeys(SIZES, 3)
    assert plain.mean(3) == 3
    plain.check("it", 6)
    with pytest.raises(UsageError, match=r"--bits 3.5: it serves whole numbers of bits, 2 to 6; choose .* or make"):
        plain.check("it", 3.5)
    for ladder in (plain, LADDER):
        for wrong in (1.9, 6.1, float("nan")):
            with pytest.raises(UsageError, match=r"it serves 2 to 6 bits; choose one of these"):
                ladder.check("it", wrong)
    LADDER.check("it", 3.5)
    with pytest.raises(UsageError, match=r"--bits 3: it serves 4 bits only; drop --bits"):
        Ladder((4,), SIZES).check("it", 3)
    with pytest.raises(UsageError, match=r"it has nested matrices that share no width; drop --bits"):
        Ladder((), SIZES, uneven=True).check("it", 3)


def test_a_file_has_planes_in_the_order_of_its_steps() -> None:
    served = dict.fromkeys(SIZES, WIDTHS)
    assert LADDER.order is not None
    steps = LADDER.all_steps(served)
    assert steps[:4] == [(name, 2) for name in SIZES]
    assert sorted(steps) == sorted((name, width) for name in SIZES for width in WIDTHS)
    assert [name for name, _ in steps[4:]] == [LADDER.order.matrices[step] for step in LADDER.order.steps]
    # Without one, width by width; a matrix may serve more than others.
    plain = Ladder((4, 3), SIZES).all_steps({"a": (4, 3), "b": (5, 4, 3, 2)})
    assert plain == [("a", 3), ("b", 2), ("b", 3), ("a", 4), ("b", 4), ("b", 5)]


GOOD: dict[str, Any] = {"matrices": ["a", "b"], "steps": [0, 1, 1, 0]}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (None, "no object"),
        ([0, 1], "no object"),
        ({"matrices": ["a", "b"]}, "no object"),
        ({**GOOD, "matrices": ["a", 1]}, "no name, or named twice"),
        ({**GOOD, "matrices": ["a", "a"]}, "no name, or named twice"),
        ({**GOOD, "matrices": ["a", "x"]}, "x is no nested matrix"),
        ({"matrices": ["a"], "steps": [0, 0]}, "b is nested and not in it"),
        ({**GOOD, "steps": [0, 1, 1, 2]}, "step 2 is none of 2 matrices"),
        ({**GOOD, "steps": [0, 1, 1, -1]}, "step -1 is none of 2 matrices"),
        ({**GOOD, "steps": [0, 1, 1, True]}, "step True is none"),
        ({**GOOD, "steps": [0, 1, 1, 0.0]}, "step 0.0 is none"),
        ({**GOOD, "steps": [0, 1, 1]}, "a has 1 steps instead of 2"),
        ({**GOOD, "steps": [0, 1, 1, 1, 0]}, "b has 3 steps instead of 2"),
    ],
)
def test_what_is_no_order(entry: object, message: str) -> None:
    widths = {"a": (4, 3, 2), "b": (4, 3, 2)}
    assert Order.from_json(GOOD, widths).to_json() == GOOD
    with pytest.raises(ValueError, match=message):
        Order.from_json(entry, widths)
    with pytest.raises(ValueError, match="different widths"):
        Order.from_json(GOOD, {**widths, "b": (5, 4, 3)})


def test_a_folder_with_a_broken_order_is_refused_by_name(tiny_model: Path, tmp_path: Path) -> None:
    """As is one whose order was taken out, by its checksum; what is read at a width of its own has no order any more."""
    folder = write_mixed(tiny_model, tmp_path / "mixed", NestedFormat(2, 4, 16))
    with open_model(str(folder)) as source:
        assert widths_of(source) == (4, 3, 2)
        narrow = narrowed(source, 2.6)
        assert ORDER not in narrow.config["quantization_config"]
        assert narrow.fingerprint() != narrowed(source, 2.7).fingerprint()
        found = {name: info.stored_as for name, info in narrow.tensors.items() if name in Ladder.of(source).sizes}
        assert set(found.values()) <= {f"nested2..{width}-b16" for width in (2, 3, 4)}
        assert len(set(found.values())) > 1
    config, manifest = folder / "config.json", folder / "kbit-manifest.json"
    whole = json.loads(config.read_text())
    for broken in ({"matrices": [], "steps": []}, {**whole["quantization_config"][ORDER], "steps": [0]}, "2"):
        changed = {**whole, "quantization_config": {**whole["quantization_config"], ORDER: broken}}
        config.write_text(json.dumps(changed))
        entry = json.loads(manifest.read_text())
        entry["files"]["config.json"] = hashlib.sha256(config.read_bytes()).hexdigest()
        manifest.write_text(json.dumps(entry))
        with pytest.raises(
            CheckpointError, match=r"config.json: the order of nested widths: .*; copy or make it again"
        ):
            open_model(str(folder))
