"""Rows stay together, prompts share a budget, waits count by weight, and everybody's turn comes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from smartspec.engine_adapter.reference.scheduler import Scheduler
from smartspec.engine_adapter.reference.sequence import Request, Sequence


class Moves:
    """A KV cache that only notes where rows went."""

    def __init__(self) -> None:
        self.log: list[tuple[int, int, int]] = []

    def move(self, source: int, target: int, num_tokens: int) -> None:
        self.log.append((source, target, num_tokens))


def build(max_num_running: int = 4, max_prefill_tokens: int = 10) -> tuple[Scheduler, Moves]:
    moves = Moves()
    caches: Any = (moves,)
    return Scheduler(max_num_running, 64, max_prefill_tokens, caches), moves


def add(
    scheduler: Scheduler, number: int, prompt: int = 3, weight: float = 1.0, added_s: float = 0.0
) -> Sequence:
    request = Request([1] * prompt, weight=weight)
    sequence = Sequence(number, request, max_tokens=5, seed=0, added_s=added_s)
    scheduler.add(sequence)
    return sequence


def prefill(sequence: Sequence) -> None:
    sequence.num_computed = sequence.num_prompt
    sequence.tokens.append(2)


def test_prompts_are_cut_when_they_exceed_the_budget() -> None:
    scheduler, _ = build()
    first, second, third = add(scheduler, 1, 4), add(scheduler, 2, 9), add(scheduler, 3, 2)
    schedule = scheduler.schedule(0.0)
    assert schedule.prefilling == [(first, 4), (second, 6)]
    assert schedule.num_prefill_tokens == 10
    prefill(first)
    second.num_computed = 6
    schedule = scheduler.schedule(0.0)
    assert schedule.decoding == [first]
    assert schedule.prefilling == [(second, 3), (third, 2)]


def test_requests_wait_when_all_rows_are_taken() -> None:
    scheduler, _ = build(max_num_running=2)
    first, second, third = (add(scheduler, i) for i in range(3))
    scheduler.schedule(0.0)
    assert scheduler.running == [first, second]
    assert list(scheduler.waiting) == [third]
    scheduler.remove(first)
    scheduler.schedule(0.0)
    assert scheduler.running == [second, third]
    assert third.row == 0


def test_first_come_is_first_served_when_weights_are_equal() -> None:
    scheduler, _ = build(max_num_running=1)
    waiting = [add(scheduler, i, weight=3.0, added_s=float(i // 2)) for i in range(6)]
    for expected in waiting:
        scheduler.schedule(7.0)
        assert scheduler.running == [expected]
        scheduler.remove(expected)


def test_wait_counts_by_weight_when_a_row_is_free() -> None:
    scheduler, _ = build(max_num_running=1)
    first, urgent = add(scheduler, 1), add(scheduler, 2, weight=4.0, added_s=6.0)
    scheduler.schedule(7.0)  # 7 against 4 * 1
    assert scheduler.running == [first]
    scheduler.remove(first)
    second = add(scheduler, 3, added_s=6.5)
    scheduler.schedule(8.0)  # 4 * 2 against 1.5
    assert scheduler.running == [urgent]
    assert list(scheduler.waiting) == [second]


def test_turn_comes_when_more_urgent_requests_never_cease() -> None:
    """A full queue of ten times the weight; whoever leaves is replaced at once."""
    scheduler, _ = build(max_num_running=1)
    patient = add(scheduler, 0)
    num_ahead = 8
    for number in range(1, num_ahead + 1):
        add(scheduler, number, weight=10.0)
    served = 0
    while not scheduler.running or scheduler.running[0] is not patient:
        if scheduler.running:
            scheduler.remove(scheduler.running[0])
            served += 1
            add(scheduler, 100 + served, weight=10.0, added_s=float(served))
        scheduler.schedule(float(served))
        assert served <= 10 * num_ahead


def test_last_row_fills_the_hole_when_nobody_waits() -> None:
    scheduler, moves = build()
    first, second, third = (add(scheduler, i) for i in range(3))
    scheduler.schedule(0.0)
    for sequence in (first, second, third):
        prefill(sequence)
    scheduler.remove(first)
    assert scheduler.schedule(0.0).decoding == [third, second]
    assert moves.log == [(2, 0, third.num_tokens)]


def test_nothing_moves_when_a_newcomer_fills_the_hole() -> None:
    scheduler, moves = build()
    first, _, third = (add(scheduler, i) for i in range(3))
    scheduler.schedule(0.0)
    scheduler.remove(first)
    newcomer = add(scheduler, 9)
    scheduler.schedule(0.0)
    assert (newcomer.row, third.row) == (0, 2)
    assert moves.log == []


def test_rows_are_distinct_and_in_front_when_requests_come_and_go() -> None:
    scheduler, moves = build(max_num_running=5, max_prefill_tokens=100)
    rng = np.random.default_rng(0)
    living: list[Sequence] = []
    where: dict[int, int] = {}
    for step in range(500):
        for _ in range(rng.integers(0, 3)):
            living.append(add(scheduler, len(living) + 1000 * step))
        scheduler.schedule(0.0)
        for source, target, _ in moves.log:
            where[target] = where.pop(source)
        moves.log.clear()
        rows = sorted(s.row for s in scheduler.running)
        assert rows == list(range(len(rows)))
        for sequence in scheduler.running:
            # A cache row only changes its owner through a move or after its owner left.
            assert where.setdefault(sequence.row, sequence.id) == sequence.id
        for sequence in [s for s in living if rng.random() < 0.3]:
            living.remove(sequence)
            where.pop(sequence.row, None)
            scheduler.remove(sequence)
    assert not scheduler.waiting or len(scheduler.running) == 5


@pytest.mark.parametrize("bad", [(0, 64, 1), (1, 1, 1), (1, 64, 0)])
def test_sizes_are_refused_when_too_small(bad: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="must be >= 1"):
        Scheduler(*bad, caches=())
