"""engine_adapter.ranking: the same lengths as `choose_lengths`, found without arrays."""

from __future__ import annotations

import numpy as np
import pytest

from smartspec.engine_adapter.lengths import (
    RAGGED,
    UNIFORM,
    CostCurve,
    DraftCost,
    Ladder,
    choose_lengths,
)
from smartspec.engine_adapter.ranking import PricedCurve, Ranking, freely


def _ladder(rng: np.random.Generator, size: int, longest: int) -> Ladder:
    survival = np.sort(rng.random((longest, size)), axis=0)[::-1]
    if rng.random() < 0.3:
        survival = survival.round(1)  # many items are worth the same
    if rng.random() < 0.5:
        survival = survival.astype(np.float32)
    weight = rng.uniform(0.5, 2.0, size) if rng.random() < 0.5 else None
    floor = rng.integers(0, 3, size) if rng.random() < 0.4 else None
    ceiling = rng.integers(0, longest + 1, size) if rng.random() < 0.7 else None
    return Ladder(survival, weight, floor, ceiling)


def _curve(rng: np.random.Generator, mode: str) -> CostCurve:
    """Of any shape: with jumps, flat parts, and parts that fall."""
    size = int(rng.integers(1, 9))
    tokens = np.sort(rng.choice(120, size, replace=False)).astype(float)
    seconds = rng.uniform(0.5, 3.0, size)
    if rng.random() < 0.6:
        seconds = np.sort(seconds)
    if rng.random() < 0.3:
        seconds = seconds.round()
    return CostCurve(mode, tokens + rng.choice([0.0, 0.5]), seconds)


@pytest.mark.parametrize("seed", range(4))
def test_lengths_are_those_of_choose_lengths_for_any_prompts(seed: int) -> None:
    rng = np.random.default_rng(seed)
    modes = set()
    for _ in range(600):
        size, longest = int(rng.integers(0, 20)), int(rng.integers(0, 7))
        ladder = _ladder(rng, size, longest)
        curves = [_curve(rng, RAGGED)]
        if rng.random() < 0.4:
            curves.insert(int(rng.integers(2)), _curve(rng, UNIFORM))
        draft = DraftCost(*(rng.uniform(0, 0.3, 3) * rng.integers(0, 2, 3)))
        if rng.random() < 0.3:
            draft = draft.begun()
        terms = float(rng.uniform(0, 8)), int(rng.integers(0, longest + 2)), curves, draft
        ranking = Ranking(ladder, *terms)
        for prompts in (0, *rng.integers(0, 120, 4).tolist(), 100_000):
            expected = choose_lengths(ladder, *terms, prompts)
            choice = ranking.choose(prompts)
            assert choice.lengths == expected.lengths.tolist()
            assert choice.mode == expected.mode
            assert choice.gain == pytest.approx(expected.gain, rel=1e-9)
            assert choice.price == pytest.approx(terms[0] * expected.seconds, rel=1e-9)
            modes.add(choice.mode)
    assert modes == {RAGGED, UNIFORM}


def test_fewest_drafts_are_chosen_when_they_neither_bring_nor_cost() -> None:
    flat = CostCurve(RAGGED, [1.0, 9.0], [1.0, 1.0])
    ladder = Ladder(np.array([[0.5], [0.0], [0.0]]))
    assert Ranking(ladder, 1.0, 3, [flat], DraftCost()).choose(0).lengths == [1]


def test_drafts_are_taken_freely_as_far_as_none_costs_more_than_any_brings() -> None:
    curve = CostCurve(RAGGED, [1.0, 5.0, 7.0, 9.0], [1.0, 1.4, 1.6, 5.6])  # 0.1, 0.1 and 2 a token

    def free(
        least: float, drafting_s: float = 0.0, per_draft_s: float = 0.0, before: int = 2
    ) -> int:
        priced = PricedCurve(curve, 1.0, drafting_s, per_draft_s)
        return freely(list(priced.stretches(before, 7)), least)

    assert free(0.5) == 5 and free(0.05) == 0
    assert free(0.5, per_draft_s=0.45) == 0
    assert free(0.5, drafting_s=0.3) == 5  # which the first draft pays
    assert free(0.5, drafting_s=0.45) == 0  # which it does not
    assert free(2.5) == 7
    jump = CostCurve(RAGGED, [1.0, 5.0, 5.5, 9.0], [1.0, 1.4, 2.4, 2.5])
    priced = PricedCurve(jump, 1.0, 0.0, 0.0)
    assert freely(list(priced.stretches(2, 7)), 0.5) == 3
