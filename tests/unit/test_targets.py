"""Requests with a time per token: what is chosen for them, and what is out of reach."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from smartspec.engine_adapter.lengths import RAGGED, CostCurve, DraftCost, Ladder, choose_lengths
from smartspec.engine_adapter.targets import choose_in_time, expected_tokens, out_of_reach

FREE = DraftCost()


def brute_force(
    survival: np.ndarray, ceiling: np.ndarray, targets: np.ndarray, price: float, curve: CostCurve
) -> tuple[int, float]:
    """Fewest targets missed, and the greatest gain - price T with so few."""
    tokens = expected_tokens(survival)
    size = len(ceiling)
    best = (size + 1, -np.inf)
    for lengths in itertools.product(*(range(c + 1) for c in ceiling)):
        seconds = float(curve.at(size + sum(lengths)))
        got = tokens[list(lengths), np.arange(size)]
        missed = int(((targets > 0) & (got * targets < seconds * (1 - 1e-6))).sum())
        value = float(got.sum()) - price * seconds
        if (missed, -value) < (best[0], -best[1]):
            best = (missed, value)
    return best


def test_fewest_targets_are_missed_when_batches_are_small() -> None:
    """Against all vectors of lengths: as few missed, nearly as much worth, in nearly all cases."""
    rng = np.random.default_rng(2)
    num_missed_more, lost, num_bound = 0, [], 0
    for _ in range(400):
        size, longest = int(rng.integers(2, 5)), int(rng.integers(1, 4))
        survival = np.cumprod(rng.uniform(0.3, 1, (longest, size)), axis=0)
        ceiling = rng.integers(0, longest + 1, size).astype(np.uint8)
        curve = CostCurve(RAGGED, [1.0, 20.0], [1.0, 1.0 + rng.uniform(0.5, 6)])
        price = float(rng.uniform(0.5, 3))
        targets = rng.uniform(0.4, 2.0, size) * (rng.random(size) < 0.5)
        given = (survival, None, None, ceiling)
        choice = choose_in_time(*given, targets, price, longest, [curve], FREE)
        assert (choice.lengths >= 0).all() and (choice.lengths <= ceiling).all()
        assert choice.seconds == pytest.approx(float(curve.at(size + choice.lengths.sum())))
        got = expected_tokens(survival)[choice.lengths, np.arange(size)]
        missed = int(((targets > 0) & (got * targets < choice.seconds * (1 - 1e-6))).sum())
        fewest, value = brute_force(survival, ceiling, targets, price, curve)
        free = choose_lengths(Ladder(*given), price, longest, [curve], FREE)
        num_bound += not np.array_equal(free.lengths, choice.lengths)
        num_missed_more += missed > fewest
        if missed == fewest:
            lost.append(value - (choice.gain - price * choice.seconds))
    assert num_bound > 40  # in so many the targets changed something
    assert num_missed_more < 12  # 3%: the grid of caps is coarse
    assert min(lost) > -1e-9
    assert np.mean(lost) < 0.02


def test_choice_is_that_without_targets_when_these_are_met_already() -> None:
    survival = np.cumprod(np.full((5, 8), 0.8), axis=0)
    ceiling = np.full(8, 5, np.uint8)
    curve = CostCurve(RAGGED, [1.0, 100.0], [0.02, 0.05])
    free = choose_lengths(Ladder(survival, ceiling=ceiling), 400.0, 5, [curve], FREE)
    for targets in (np.zeros(8), np.full(8, free.seconds)):
        choice = choose_in_time(survival, None, None, ceiling, targets, 400.0, 5, [curve], FREE)
        assert choice.lengths.tolist() == free.lengths.tolist()


def test_others_give_way_when_a_request_is_short_of_time() -> None:
    survival = np.cumprod(np.full((5, 32), 0.7), axis=0)
    ceiling = np.full(32, 5, np.uint8)
    curve = CostCurve(RAGGED, [1.0, 200.0], [0.02, 0.08])
    free = choose_lengths(Ladder(survival, ceiling=ceiling), 400.0, 5, [curve], FREE)
    targets = np.zeros(32)
    targets[3] = 0.7 * free.seconds / expected_tokens(survival)[free.lengths[3], 3]
    choice = choose_in_time(survival, None, None, ceiling, targets, 400.0, 5, [curve], FREE)
    got = expected_tokens(survival)[choice.lengths[3], 3]
    assert choice.seconds <= targets[3] * got * (1 + 1e-6)
    others = np.arange(32) != 3
    assert choice.lengths[others].sum() < free.lengths[others].sum()


def test_target_is_out_of_reach_when_the_request_alone_would_miss_it() -> None:
    survival = np.array([[0.9, 0.9, 0.1], [0.8, 0.8, 0.0]])
    curve = CostCurve(RAGGED, [3.0, 6.0], [1.0, 1.3])
    # Alone: 1 token in 1.0 s, 1.9 in 1.1 s (0.58 s each), 2.7 in 1.2 s (0.44 s each).
    targets = np.array([0.45, 0.43, 0.9])
    reach = out_of_reach(targets, expected_tokens(survival), curve, FREE, 0)
    assert reach.tolist() == [False, True, True]
    assert not out_of_reach(np.zeros(3), expected_tokens(survival), curve, FREE, 0).any()
    # A drafter that takes time of its own brings it out of reach.
    dear = DraftCost(per_forward_s=0.2)
    assert out_of_reach(targets, expected_tokens(survival), curve, dear, 0)[0]


def test_floors_stay_when_targets_are_out_of_reach() -> None:
    survival = np.full((4, 2), 0.05)
    floor, ceiling = np.array([2, 0], np.uint8), np.array([4, 4], np.uint8)
    curve = CostCurve(RAGGED, [1.0, 9.0], [1.0, 5.0])
    targets = np.array([0.0, 0.001])
    choice = choose_in_time(survival, None, floor, ceiling, targets, 1.0, 4, [curve], FREE)
    assert choice.lengths.tolist() == [2, 0]
