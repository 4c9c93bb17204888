"""engine_adapter.levels: lengths for drafts that have yet to be found, beside the exact ones."""

from __future__ import annotations

from bisect import bisect_left
from typing import NamedTuple

import numpy as np
import pytest

from smartspec.engine_adapter.lengths import (
    RAGGED,
    CostCurve,
    DraftCost,
    Ladder,
    choose_lengths,
    request_survivals,
    request_weights,
    step_seconds,
)
from smartspec.engine_adapter.levels import FAST_LEVELS, MANY, NEVER, NUM_LEVELS, Levels


class Batch(NamedTuple):
    """What a policy and a lookup bring together."""

    log_survival: np.ndarray  #: [K, num_buckets]
    correction: np.ndarray  #: [B]
    weight: np.ndarray | None
    worth: np.ndarray | None  #: [num_buckets], of an accepted draft
    buckets: np.ndarray  #: [B], as they turn out
    found: np.ndarray  #: [B], drafts
    price: float
    depth: int
    curve: CostCurve
    draft: DraftCost

    @property
    def survival(self) -> np.ndarray:
        return request_survivals(self.log_survival, self.buckets, self.correction)

    @property
    def weights(self) -> np.ndarray | None:
        return request_weights(self.weight, self.worth, self.buckets)

    def levels(self, longest: int) -> Levels:
        given = self.log_survival, self.correction, self.weight, self.worth, longest
        return Levels(*given, self.price, self.depth, self.curve, self.draft)

    def lengths(self, levels: Levels, prompts: int) -> np.ndarray:
        drafts = zip(
            range(len(self.found)), self.buckets.tolist(), self.found.tolist(), strict=True
        )
        found = [levels.of(*of) for of in drafts]
        split, surplus = levels.split(found, prompts)
        lengths = np.array([bisect_left(one, split) for one in found], np.int64)
        for row, one in enumerate(found):
            more = min(one.count(split), surplus)
            lengths[row] += more
            surplus -= more
        return lengths

    def value(self, lengths: np.ndarray, prompts: int) -> float:
        gain = Ladder(self.survival, self.weights).at(lengths)[1]
        drafts = np.array(float(lengths.sum()))
        tokens = len(lengths) + prompts + drafts
        return gain - self.price * float(
            step_seconds(self.curve, self.draft, tokens, drafts, self.depth)
        )

    def exact(self, prompts: int) -> np.ndarray:
        ladder = Ladder(self.survival, self.weights, None, self.found)
        return choose_lengths(
            ladder, self.price, self.depth, [self.curve], self.draft, prompts
        ).lengths


def _batch(rng: np.random.Generator, size: int, longest: int, num_buckets: int) -> Batch:
    rates = rng.uniform(0.05, 0.98, (longest, num_buckets))
    table = np.log(np.cumprod(rates, axis=0)).astype(np.float32)
    tokens = np.sort(rng.choice((size + 2) * (longest + 2), int(rng.integers(1, 9)), replace=False))
    seconds = rng.uniform(0.5, 3.0, len(tokens))  # with jumps, flat parts, and parts that fall
    if rng.random() < 0.6:
        seconds = np.sort(seconds)
    return Batch(
        table,
        rng.gamma(4.0, 0.25, size).astype(np.float32) if rng.random() < 0.8 else np.ones(size),
        rng.uniform(0.5, 2.0, size) if rng.random() < 0.3 else None,
        rng.uniform(0.4, 1.6, num_buckets) if rng.random() < 0.5 else None,
        rng.integers(0, num_buckets, size),
        rng.integers(0, longest + 1, size),
        float(rng.uniform(0, 2 * size)),
        int(rng.integers(1, longest + 2)),
        CostCurve(RAGGED, tokens.astype(float), seconds),
        DraftCost(*(rng.uniform(0, 0.3, 3) * rng.integers(0, 2, 3))),
    )


def _batch_of_few_worths(rng: np.random.Generator) -> Batch:
    """Of requests that differ in so few ways that there are no more worths than levels."""
    longest, size = int(rng.integers(1, 6)), int(rng.integers(0, 40))
    most = FAST_LEVELS if size > MANY else NUM_LEVELS
    num_buckets = int(rng.integers(1, min(most // longest, 3) + 1))
    batch = _batch(rng, size, longest, num_buckets)
    kinds = rng.integers(0, most // (longest * num_buckets), len(batch.found))
    correction = rng.gamma(4.0, 0.25, NUM_LEVELS).astype(np.float32)[kinds]
    weight = None if batch.weight is None else rng.uniform(0.5, 2.0, NUM_LEVELS)[kinds]
    return batch._replace(correction=correction, weight=weight)


@pytest.mark.parametrize("seed", range(4))
def test_lengths_are_the_best_when_there_are_no_more_worths_than_levels(seed: int) -> None:
    rng = np.random.default_rng(seed)
    cut = 0
    for _ in range(150):
        batch = _batch_of_few_worths(rng)
        made = batch.levels(len(batch.log_survival))
        for prompts in (0, *rng.integers(0, 60, 3).tolist(), 100_000):
            lengths = batch.lengths(made, prompts)
            best = batch.value(batch.exact(prompts), prompts)
            assert batch.value(lengths, prompts) == pytest.approx(best, rel=1e-6, abs=1e-6)
            cut += int(lengths.sum()) < int(batch.found.sum())
    assert cut > 50


@pytest.mark.parametrize(("correction", "its_level"), [(0.1, 0), (2.0, 1)])
def test_one_request_of_twenty_has_a_level_of_its_own_when_it_is_worth_another(
    correction: float, its_level: int
) -> None:
    corrections = np.append(correction, np.ones(19))
    curve = CostCurve(RAGGED, [20.0, 21.0, 22.0, 40.0], [1.0, 1.1, 3.0, 4.0])  # one draft pays
    levels = Levels(np.log([[0.5]]), corrections, None, None, 1, 1.0, 1, curve, DraftCost())
    found = [levels.of(row, 0, 1) for row in range(20)]
    assert found == [bytes([its_level]), *[bytes([1 - its_level])] * 19]
    assert levels.split(found[:2], 0) == (1, 0)  # the better of the two


@pytest.mark.parametrize("size", [4, 16, 64, 256])
def test_little_is_lost_to_the_exact_lengths_when_levels_hold_many_worths(size: int) -> None:
    rng = np.random.default_rng(size)
    losses = []
    for _ in range(60):
        batch = _batch(rng, size, 5, 6)
        made = batch.levels(5)
        for prompts in (0, int(rng.integers(3 * size))):
            best = batch.exact(prompts)
            lost = batch.value(best, prompts) - batch.value(batch.lengths(made, prompts), prompts)
            losses.append(lost / Ladder(batch.survival, batch.weights).at(best)[1])
    assert min(losses) > -1e-5  # single precision: nothing is better than the best
    assert np.mean(losses) < 1e-3 and max(losses) < 0.03


def test_what_is_never_worth_a_token_has_no_level() -> None:
    table = np.log([[0.9, 0.5], [0.7, 0.2]])
    curve = CostCurve(RAGGED, [1.0, 4.0, 8.0], [1.0, 2.5, 5.0])  # 0.5 and 0.625 a token
    levels = Levels(table, np.ones(2), None, None, 3, 1.0, 2, curve, DraftCost(per_token_s=0.1))
    never = bytes([NEVER])
    assert levels.of(0, 0, 3) == bytes([0, 1]) + never
    assert levels.of(1, 1, 3) == 3 * never
    assert levels.split([levels.of(0, 0, 2), levels.of(1, 1, 1)], 0) == (2, 0)


def test_all_is_cut_when_a_policy_drafts_nothing() -> None:
    curve = CostCurve(RAGGED, [1.0, 4.0], [1.0, 1.1])
    levels = Levels(np.log([[0.9]]), np.ones(2), None, None, 3, 1.0, 0, curve, DraftCost())
    found = [levels.of(0, 0, 3), levels.of(1, 0, 0)]
    assert found == [bytes([NEVER] * 3), b""] and levels.split(found, 0) == (0, 0)
