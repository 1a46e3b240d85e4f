"""How much is drafted: the tokens per cost that a plan promises are those that drafts then have, and the best is taken."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from kbit.engine.draft_policy import EDGES, CopiedRecord, WidthRecord
from kbit.engine.pass_costs import PassClock, rows_cost

MIDDLES = [(low + high) / 2 for low, high in pairwise((0.0, *EDGES, 1.0))]
HELD = (0.2, 0.5, 0.6, 0.8, 0.9, 0.95, 0.99)
CHECKED = [rows_cost(1 + count) for count in range(8)]


def taught(shares: tuple[float, ...], held: tuple[float, ...]) -> WidthRecord:
    """A record of very many guesses."""
    record = WidthRecord()
    record.seen = [1e4 * share for share in shares]
    record.judged = [1e4] * len(held)
    record.held = [1e4 * share for share in held]
    return record


def rate_of(shares: tuple[float, ...], floor: float, most: int, drafted: float, rounds: int = 30_000) -> float:
    """Tokens per cost of drafts that really are made so, of guesses that are independent."""
    chance = random.Random(1)
    tokens = cost = 0.0
    for _ in range(rounds):
        kinds = chance.choices(range(len(shares)), shares, k=most)
        length = next((i + 1 for i, kind in enumerate(kinds) if MIDDLES[kind] < floor), most)
        holds = [chance.random() < HELD[kind] for kind in kinds[:length]]
        tokens += 1 + next((i for i, right in enumerate(holds) if not right), length)
        cost += length * drafted + CHECKED[length]
    return tokens / cost


@pytest.mark.parametrize("drafted", [0.3, 0.45])
@pytest.mark.parametrize("shares", [(0.1, 0.08, 0.08, 0.09, 0.09, 0.1, 0.46), (0.2, 0.2, 0.1, 0.1, 0.1, 0.1, 0.2)])
def test_a_plan_keeps_its_promise(shares: tuple[float, ...], drafted: float) -> None:
    """And no other threshold and length give more. 1 %: five standard deviations of so many rounds."""
    plan = taught(shares, HELD).plan(drafted, CHECKED)
    assert plan.length > 0
    assert rate_of(shares, plan.floor, plan.length, drafted) == pytest.approx(plan.rate, rel=0.01)
    for floor in (0.0, *EDGES):
        for most in (1, 3, 7):
            assert rate_of(shares, floor, most, drafted, rounds=5_000) < 1.03 * plan.rate


def test_plans_follow_what_held() -> None:
    record = WidthRecord()
    first = record.plan(0.4, CHECKED)
    assert first.length > 0
    assert record.plan(0.4, CHECKED[:3]).length <= 2
    assert record.plan(0.4, CHECKED[:1]) == record.plan(1.5, CHECKED)
    assert record.plan(1.5, CHECKED).length == 0
    for _ in range(60):
        record.record([0.99] * 7, 7, failed=False)
    better = record.plan(0.4, CHECKED)
    assert (better.rate, better.length) > (first.rate, 6)
    unsure = record.acceptance(0.1)
    for _ in range(60):
        record.record([0.99, 0.1, 0.99], 1, failed=True)
    assert record.acceptance(0.1) < unsure / 4
    assert record.acceptance(0.99) > 0.9
    assert record.plan(0.4, CHECKED).floor > 0  # a draft ends with what will not hold
    for _ in range(200):
        record.record([0.99], 0, failed=True)
    assert record.plan(0.4, CHECKED).length == 0


def test_what_was_not_judged_is_not_counted() -> None:
    record, other = WidthRecord(), WidthRecord()
    record.record([0.9, 0.2, 0.2], 1, failed=False)  # the text ended after the first
    other.record([0.9], 1, failed=False)
    assert record == other


def test_copies_are_made_where_they_hold() -> None:
    record = CopiedRecord()
    assert record.plan(0, CHECKED).length == 0
    assert record.plan(16, CHECKED).rate > record.plan(2, CHECKED).rate
    assert record.plan(2, CHECKED).length <= 2
    for _ in range(50):
        record.record(16, 0, failed=True)
    assert record.plan(16, CHECKED).length == 0
    assert record.plan(2, CHECKED) == CopiedRecord().plan(2, CHECKED)


def test_rows_cost_more_the_more_there_are() -> None:
    costs = [rows_cost(rows) for rows in range(1, 40)]
    assert costs[0] == 1.0
    assert costs == sorted(costs)
    assert all(cost <= rows for rows, cost in enumerate(costs, 1))


def test_the_clock_corrects_costs() -> None:
    """Of passes that take a second, and 30 % of one, with one in four disturbed; tokens beyond the first twice as dear."""
    clock = PassClock(2)
    assert (clock.cost(0, 0.4), clock.dearness(), clock.knows_one) == (0.4, 1.0, False)
    for i in range(12):
        late = 3.0 if i % 4 == 3 else 1.0
        clock.checked(1, late)
        clock.checked(4, late * (1 + 2 * (rows_cost(4) - 1)))
        clock.drafted(0, 0.3 * late)
    assert clock.knows_one
    assert clock.dearness() == pytest.approx(2.0)
    assert clock.cost(0, 0.4) == pytest.approx(0.3)
    assert clock.cost(1, 0.5) == 0.5  # never timed
    for _ in range(20):
        clock.drafted(1, 9.0)
    assert clock.cost(1, 0.5) == 1.0  # believed up to twice what is expected
