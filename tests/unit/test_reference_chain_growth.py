"""Chains cut by confidence: worth more than whole ones, and what is told of them is unbiased."""

from __future__ import annotations

import numpy as np
import pytest

from smartspec.engine_adapter.lengths import RAGGED, CostCurve, DraftCost
from smartspec.engine_adapter.prices import Prices
from smartspec.engine_adapter.reference.calibration import F64, I64, Calibration
from smartspec.engine_adapter.reference.chain_growth import ChainGrowth, Cut
from smartspec.engine_adapter.reference.draft_tree import DraftTree
from smartspec.estimators.acceptance import AcceptanceEstimator

SIZE, DEPTH = 16, 4
PRICE = 0.45
CURVE = CostCurve(RAGGED, [0.0, 1.0], [0.0, PRICE])
PRICES = Prices(1.0, (CURVE,), DraftCost(0.0, 0.3))
BANDS = np.zeros(SIZE, np.int64)


def true_rate(confidence: F64) -> F64:
    """The drafter is too sure of itself, except where it is not sure at all."""
    rate: F64 = 0.15 + 0.7 * confidence
    return rate


def grow(
    calibration: Calibration, rng: np.random.Generator, prices: Prices = PRICES
) -> tuple[ChainGrowth, Cut, F64, I64]:
    """A step: the growth, the cut, confidences [DEPTH, SIZE], and how many would be right."""
    confidences = rng.beta(0.8, 1.4, (DEPTH, SIZE))
    right = rng.random((DEPTH, SIZE)) < true_rate(confidences)
    growth = ChainGrowth(prices, calibration, BANDS, np.full(SIZE, DEPTH))
    able = growth.who_pays(np.ones(SIZE, np.bool_))
    for depth in range(DEPTH):
        if not able.any():
            break
        rows = np.flatnonzero(able)
        growth.add(rows, confidences[depth, rows])
        able = growth.who_pays(able)
    cut = growth.cut(rng.random(SIZE))
    run: I64 = np.cumprod(right, axis=0).sum(axis=0).astype(np.int64)
    accepted = np.minimum(run, cut.num_verified)
    for i, (size, count) in enumerate(zip(cut.num_verified.tolist(), accepted.tolist())):  # noqa: B905
        sure = confidences[:size, i].tolist()
        calibration.learn(DraftTree.chain([0] * size), sure, list(range(count)))
    return growth, cut, confidences, run


def test_survivals_are_those_of_all_drafts_when_the_unsure_ones_are_cut() -> None:
    rng = np.random.default_rng(4)
    calibration = Calibration()
    told, blind = AcceptanceEstimator(max_length=DEPTH), AcceptanceEstimator(max_length=DEPTH)
    buckets = np.zeros(SIZE, np.int64)
    first: list[float] = []
    num_cut = 0
    probing = PRICES._replace(floor=np.full(SIZE, DEPTH))
    for step in range(1200):
        # Now and then all are verified, as when a daemon probes: else of those that are never worth
        # it their own confidence would have to be believed.
        prices = probing if step % 20 == 0 else PRICES
        _, cut, confidences, run = grow(calibration, rng, prices)
        if step < 200:
            continue
        first += true_rate(confidences[0]).tolist()
        num_cut += int((cut.num_cut > 0).sum())
        accepted = np.minimum(run, cut.num_verified)
        rows = blind.rows(np.arange(SIZE))
        blind.learn_many(rows, buckets, cut.num_verified, accepted)
        passed = np.where(accepted == cut.num_verified, accepted + cut.num_cut_accepted, accepted)
        rows = told.rows(np.arange(SIZE))
        told.learn_many(rows, buckets, cut.num_verified + cut.num_cut, passed)
    assert num_cut > 0.4 * 1000 * SIZE
    truth = float(np.mean(first))
    # Of the drafts that are verified alone, far more are right than of all.
    assert float(blind.pooled_hazards()[0]) > truth + 0.15
    assert float(told.pooled_hazards()[0]) == pytest.approx(truth, abs=0.03)


def test_a_cut_draft_is_told_of_by_its_chance_given_what_is_verified() -> None:
    calibration = Calibration()
    growth = ChainGrowth(PRICES, calibration, np.zeros(3, np.int64), np.full(3, 2))
    growth.add(np.arange(3), [0.9, 0.3, 0.3])
    growth.add(np.array([0, 1]), [0.4, 0.9])  # chances 0.36 and 0.27
    cut = growth.cut(np.array([0.39, 0.28, 0.31]))
    assert cut.num_verified.tolist() == [1, 0, 0]
    assert cut.num_cut.tolist() == [1, 2, 1]
    # 0.4 given the first; 0.3 and then 0.27; 0.3.
    assert cut.num_cut_accepted.tolist() == [1, 1, 0]
    assert growth.cut(np.full(3, 0.26)).num_cut_accepted.tolist() == [1, 2, 1]


def test_floors_are_drafted_and_verified_whatever_they_are_worth() -> None:
    floor = np.zeros(SIZE, np.int64)
    floor[3] = 3
    dear = PRICES._replace(draft=DraftCost(0.0, 100.0), floor=floor)
    growth, cut, _, _ = grow(Calibration(), np.random.default_rng(0), dear)
    assert growth.drafted.tolist() == floor.tolist() == cut.num_verified.tolist()


def test_nothing_is_drafted_or_cut_when_no_forward_pays() -> None:
    dear = PRICES._replace(draft=DraftCost(0.0, 100.0))
    growth, cut, _, _ = grow(Calibration(), np.random.default_rng(0), dear)
    assert not growth.drafted.any() and not cut.num_verified.any() and not cut.num_cut.any()
    assert not growth.next_step().any()


def test_tokens_beyond_their_price_are_more_than_of_any_fixed_length() -> None:
    rng = np.random.default_rng(9)
    calibration = Calibration()
    fixed, ours = np.zeros(DEPTH + 1), 0.0
    for step in range(1500):
        growth, cut, _, run = grow(calibration, rng)
        if step < 300:
            continue
        forwards = int(growth.drafted.max())
        verified = cut.num_verified
        ours += float(np.minimum(run, verified).sum()) - PRICE * float(verified.sum())
        ours -= 0.3 * forwards
        for length in range(DEPTH + 1):
            fixed[length] += np.minimum(run, length).sum() - (PRICE * SIZE + 0.3) * length
    assert ours > max(0.0, float(fixed.max())) + 0.5 * 1200
