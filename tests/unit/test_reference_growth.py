"""Drafts cut by confidence: worth more than whole ones, and what is told of them is unbiased."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from smartspec.engine_adapter.lengths import RAGGED, CostCurve, DraftCost
from smartspec.engine_adapter.prices import Prices
from smartspec.engine_adapter.reference.calibration import CURIOSITY, F64, I64, Calibration
from smartspec.engine_adapter.reference.candidates import Candidates, Children, Level
from smartspec.engine_adapter.reference.growth import Cut, Growth
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


def new_calibration() -> Calibration:
    return Candidates.new_calibration()


def lengthen(growth: Growth, level: Level, confidences: npt.ArrayLike) -> None:
    """Chains: one child of each node, always token 0."""
    own = np.asarray(confidences, np.float64)[:, None]
    growth.add(level, Children(np.zeros(own.shape, np.int64), own))


def run(growth: Growth, *places: int) -> None:
    """The first node of these."""
    growth.candidates.run(Level.of(places, 0), np.full(growth.candidates.size, 9))


def said(run: I64, most: int = DEPTH) -> list[list[int]]:
    """What the target says after each of the drafts, all 0, of which ``run`` are right."""
    return [[0] * min(int(right), most) + [1] * (most + 1 - min(int(right), most)) for right in run]


def grow(
    calibration: Calibration, rng: np.random.Generator, prices: Prices = PRICES
) -> tuple[Growth, Cut, F64, I64]:
    """A step: the growth, the cut, confidences [DEPTH, SIZE], and how many would be right."""
    confidences = rng.beta(0.8, 1.4, (DEPTH, SIZE))
    right = rng.random((DEPTH, SIZE)) < true_rate(confidences)
    growth = Growth(calibration, BANDS, np.full(SIZE, DEPTH), prices)
    level, depth = Level.of(growth.starting()), 0
    while level.size:
        lengthen(growth, level, confidences[depth, level.places])
        level = growth.next_level([DEPTH] * SIZE)
        depth += 1
    cut = growth.cut(rng.random(SIZE))
    run: I64 = np.cumprod(right, axis=0).sum(axis=0).astype(np.int64)
    accepted = np.minimum(run, cut.num_verified)
    known = zip(said(run), accepted.tolist(), strict=True)
    growth.candidates.learn([tokens[: num_accepted + 1] for tokens, num_accepted in known])
    return growth, cut, confidences, run


def test_survivals_are_those_of_all_drafts_when_the_unsure_ones_are_cut() -> None:
    rng = np.random.default_rng(4)
    calibration = new_calibration()
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
        paths = [list(range(num)) for num in accepted.tolist()]
        passed = np.array([len(path) for path in cut.accepted(said(run), paths)])
        rows = told.rows(np.arange(SIZE))
        told.learn_many(rows, buckets, cut.num_verified + cut.num_cut, passed)
    assert num_cut > 0.4 * 1000 * SIZE
    truth = float(np.mean(first))
    # Of the drafts that are verified alone, far more are right than of all.
    assert float(blind.pooled_hazards()[0]) > truth + 0.15
    assert float(told.pooled_hazards()[0]) == pytest.approx(truth, abs=0.03)


def test_of_cut_drafts_the_first_is_told_as_it_was_and_others_by_their_chances() -> None:
    growth = Growth(new_calibration(), np.zeros(3, np.int64), np.full(3, 3), PRICES)
    lengthen(growth, Level.of(range(3)), [0.9, 0.3, 0.3])
    run(growth, 0, 1, 2)
    lengthen(growth, Level.of([0, 1], 0), [0.4, 0.9])  # chances 0.36 and 0.27
    cut = growth.cut(np.full(3, 0.89))
    assert cut.num_verified.tolist() == [1, 0, 0]
    assert cut.num_cut.tolist() == [1, 2, 1]
    # The second draft of the second follows one that was right: with a chance of 0.9.
    one = [[0], [], []]  # accepted
    assert cut.accepted([[0, 0], [0], [1]], one) == [[0, 1], [0, 1], []]
    assert cut.accepted([[0, 1], [0], [0]], one) == [[0], [0, 1], [0]]
    unlucky = cut._replace(luck=np.full(3, 0.91))
    assert unlucky.accepted([[1, 0], [0], [1]], [[], [], []]) == [[], [0], []]


def test_what_is_told_of_a_cut_branch_is_drawn_among_its_children() -> None:
    growth = Growth(new_calibration(), np.zeros(1, np.int64), np.full(1, 9), PRICES)
    growth.add(Level.of([0]), Children(np.array([[5, 6]]), np.array([[0.4, 0.3]])))
    run(growth, 0)
    growth.add(Level.of([0], 0), Children(np.array([[7, 8]]), np.array([[0.5, 0.25]])))
    rng, hits = np.random.default_rng(2), np.zeros(4)
    for _ in range(2000):
        cut = growth.cut(rng.random(1))
        assert not cut.num_verified.any()
        for node in cut.accepted([[5]], [[]])[0]:
            hits[node] += 1
    assert cut.drafted[0].tokens == [5, 6, 7, 8]
    assert hits / 2000 == pytest.approx([1.0, 0.0, 0.5, 0.25], abs=0.04)


def test_floors_are_drafted_and_verified_whatever_they_are_worth() -> None:
    floor = np.zeros(SIZE, np.int64)
    floor[3] = 3
    dear = PRICES._replace(draft=DraftCost(0.0, 100.0), floor=floor)
    _, cut, _, _ = grow(new_calibration(), np.random.default_rng(0), dear)
    assert [tree.size for tree in cut.drafted] == floor.tolist() == cut.num_verified.tolist()


def test_nothing_is_drafted_or_cut_when_no_forward_pays() -> None:
    dear = PRICES._replace(draft=DraftCost(0.0, 100.0))
    growth, cut, _, _ = grow(new_calibration(), np.random.default_rng(0), dear)
    assert not growth.starting().size
    assert not cut.num_verified.any() and not cut.num_cut.any()


@pytest.mark.parametrize("weight", [0.01, 1.0, 100.0])
@pytest.mark.parametrize(("chance", "found_out"), [(0.8, True), (0.05, False)])
def test_drafts_that_turned_good_are_found_out_about_from_a_budget(
    chance: float, found_out: bool, weight: float
) -> None:
    """They did not pay once, so that nobody would run them any more; what is tried costs little."""
    weights = np.full(SIZE, weight)
    prices = Prices(weight, (CURVE,), DraftCost(0.0, 0.3, per_token_s=0.005), weights)
    calibration, rng = new_calibration(), np.random.default_rng(4)
    for _ in range(3):  # what is known: a sure draft is never right
        calibration.note(np.full((500, 1), 0.7), np.zeros(500, np.int64))
        calibration.learn([0.7] * 300, [False] * 300, np.zeros(300, np.int64))
    num_run, lost = np.zeros(4000), 0.0
    for step in range(4000):
        growth = Growth(calibration, BANDS, np.full(SIZE, 1), prices)
        level = Level.of(growth.starting())
        lengthen(growth, level, np.full(level.size, 0.7))
        cut, right = growth.cut(rng.random(SIZE)), rng.random(SIZE) < chance
        num_run[step] = level.size > 0
        lost += 0.3 * num_run[step] - (cut.num_verified * (right - PRICE)).sum()
        growth.candidates.learn([[0] if ok else [1] for ok in right])
    assert not num_run[:3].any()
    assert (num_run[-500:].mean() > 0.9) == found_out
    if not found_out:
        assert num_run[-500:].mean() < 0.3
        assert lost < 1.2 * CURIOSITY * SIZE * 4000


def test_tokens_beyond_their_price_are_more_than_of_any_fixed_length() -> None:
    rng = np.random.default_rng(9)
    calibration = new_calibration()
    fixed, ours = np.zeros(DEPTH + 1), 0.0
    for step in range(1500):
        _, cut, _, run = grow(calibration, rng)
        if step < 300:
            continue
        forwards = max(tree.size for tree in cut.drafted)
        verified = cut.num_verified
        ours += float(np.minimum(run, verified).sum()) - PRICE * float(verified.sum())
        ours -= 0.3 * forwards
        for length in range(DEPTH + 1):
            fixed[length] += np.minimum(run, length).sum() - (PRICE * SIZE + 0.3) * length
    assert ours > max(0.0, float(fixed.max())) + 0.5 * 1200
