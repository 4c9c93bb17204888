"""Gains by rank: recovered from hits, falling, corrected per request; forwards of trees."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from smartspec.estimators.acceptance import AcceptanceEstimator
from smartspec.estimators.tree_acceptance import TreeAcceptance

GAINS = np.array([0.6, 0.35, 0.2, 0.15, 0.08, 0.05])  # of a tree: not a running product


def teach(
    estimator: TreeAcceptance,
    rng: np.random.Generator,
    steps: int,
    gains: np.ndarray = GAINS,
    ids: tuple[int, ...] = tuple(range(8)),
    most: int = 6,
) -> None:
    """Steps of trees of 0 to ``most`` nodes, whose nodes are hit by rank."""
    for _ in range(steps):
        rows = estimator.rows(np.array(ids, np.uint64))
        drafted = rng.integers(0, most + 1, len(ids))
        hits = rng.random((len(ids), estimator.max_length)) < gains
        hits &= np.arange(estimator.max_length) < drafted[:, None]
        estimator.learn_many(rows, np.zeros(len(ids), np.int64), drafted, hits)


def test_gains_are_recovered_when_ranks_are_hit_out_of_turn() -> None:
    estimator = TreeAcceptance(max_length=6)
    rng = np.random.default_rng(0)
    teach(estimator, rng, 1500)
    assert np.exp(estimator.log_survival()[0]) == pytest.approx(GAINS, abs=0.035)
    assert estimator.pooled_survivals() == pytest.approx(GAINS, abs=0.035)
    # Told only how many were accepted, an estimator of chains takes them for the first ones.
    chains = AcceptanceEstimator(max_length=6)
    for _ in range(1500):
        hits = rng.random((8, 6)) < GAINS
        columns = np.zeros(8, np.int64), np.full(8, 6), hits.sum(axis=1)
        chains.learn_many(chains.rows(np.arange(8)), *columns)
    assert abs(np.exp(chains.log_survival()[0]) - GAINS).max() > 0.15


def test_gains_fall_with_rank_when_later_ranks_were_luckier() -> None:
    estimator = TreeAcceptance(max_length=4)
    hits = np.array([[False, True, False, True]])
    for _ in range(40):
        estimator.learn_many(estimator.rows([1]), np.array([0]), np.array([4]), hits)
    survival = np.exp(estimator.log_survival()[0])
    assert (np.diff(survival) <= 0).all()
    # In another order, and of the same sum.
    assert survival.sum() == pytest.approx(estimator.hazards()[0].sum(), rel=1e-5)
    assert survival[0] > 0.7 > 0.3 > survival[3]


def test_untried_ranks_are_expected_to_fall_as_the_inverse_of_the_rank() -> None:
    estimator = TreeAcceptance(max_length=6)
    teach(estimator, np.random.default_rng(1), 500, most=2)
    pooled = estimator.pooled_hazards()
    assert pooled[1:] == pytest.approx(pooled[1] * 2 / np.arange(2, 7), rel=1e-6)


def test_corrections_find_who_is_better_than_average() -> None:
    estimator = TreeAcceptance(max_length=6)
    rng = np.random.default_rng(2)
    good, bad = GAINS**0.5, GAINS**2.0
    for _ in range(400):
        teach(estimator, rng, 1, GAINS, ids=tuple(range(8)))
        teach(estimator, rng, 1, good, ids=(100,))
        teach(estimator, rng, 1, bad, ids=(101,))
    rows = estimator.rows(np.array([0, 100, 101], np.uint64))
    average, better, worse = estimator.corrections(rows)
    assert average == pytest.approx(1.0, abs=0.25)
    assert better == pytest.approx(0.5, abs=0.2)
    assert worse == pytest.approx(2.0, abs=0.7)


def test_corrections_lower_the_log_loss_when_requests_differ_and_cost_little_when_alike() -> None:
    rng = np.random.default_rng(3)
    for spread, most in ((0.0, 0.002), (0.7, -0.02)):
        estimator = TreeAcceptance(max_length=6)
        powers = np.exp(spread * rng.standard_normal(16))
        own, table, count = 0.0, 0.0, 0
        for step in range(600):
            rows = estimator.rows(np.arange(16))
            drafted = np.full(16, 4)
            hits = rng.random((16, 6)) < GAINS ** powers[:, None]
            hits[:, 4:] = False
            if step > 200:
                plain = np.exp(estimator.log_survival()[[0] * 16, :4].astype(np.float64))
                fitted = plain ** estimator.corrections(rows)[:, None]
                seen = hits[:, :4]
                table -= np.log(np.where(seen, plain, 1 - plain)).sum()
                own -= np.log(np.where(seen, fitted, 1 - fitted)).sum()
                count += seen.size
            estimator.learn_many(rows, np.zeros(16, np.int64), drafted, hits)
        assert (own - table) / count < most, spread


def test_forwards_are_those_of_the_reports_and_never_more_than_nodes() -> None:
    estimator = TreeAcceptance(max_length=64)
    assert estimator.forwards()[:4] == pytest.approx((1.0, 2.0, 1 + np.log2(3), 3.0))
    for nodes, forwards in ((2, 1), (4, 2), (8, 2), (16, 3), (32, 3)) * 100:
        estimator.learn_forwards(nodes, forwards)
    learned = estimator.forwards()
    assert learned[0] == 1.0
    assert [learned[k - 1] for k in (4, 8, 16, 32)] == pytest.approx([2, 2, 3, 3], abs=0.6)
    before = learned
    estimator.learn_forwards(1, 1), estimator.learn_forwards(0, 0), estimator.learn_forwards(8, 0)
    assert estimator.forwards() == before  # nothing to learn from these
    for _ in range(2000):  # passes to catch up among them
        estimator.learn_forwards(8, 40)
    assert (np.array(estimator.forwards()) <= np.arange(1, 65)).all()
    assert estimator.forwards()[7] == pytest.approx(8.0, abs=0.2)


@pytest.mark.parametrize(
    ("taken", "tolerance"),
    [
        (lambda k: k, 0.4),  # chains
        (lambda k: min(k, round(1 + np.log2(k))), 0.7),  # every level doubles
        (lambda k: min(k, round(1 + 0.55 * (k - 1))), 0.7),  # in between
        (lambda k: min(k, 4), 1.5),  # no level beyond the fourth
    ],
)
def test_forwards_are_learned_of_chains_and_of_bushes_and_beyond_what_was_tried(
    taken: Callable[[int], int], tolerance: float
) -> None:
    estimator = TreeAcceptance(max_length=16)
    for nodes in (2, 3, 4, 5, 6, 8, 10) * 60:
        estimator.learn_forwards(nodes, taken(nodes))
    learned = estimator.forwards()
    for nodes in range(1, 11):
        assert learned[nodes - 1] == pytest.approx(taken(nodes), abs=tolerance), nodes
    assert learned[15] == pytest.approx(taken(16), abs=3 * tolerance)
    assert (np.diff(learned) >= 0).all()
    again = TreeAcceptance.from_state(estimator.state())
    assert again.forwards() == learned


def test_forwards_are_kept_of_whom_has_seen_more_when_merged() -> None:
    one, other = TreeAcceptance(max_length=16), TreeAcceptance(max_length=16)
    for _ in range(300):
        one.learn_forwards(16, 4)
    other.learn_forwards(16, 16)
    expected = one.forwards()
    for mine, its in ((one, other), (other, one)):
        mine.merge(its)
        assert mine.forwards() == expected


@pytest.mark.parametrize(
    ("drafted", "hits"),
    [
        ([2], [[False, False, True, False, False, False]]),  # beyond the tree
        ([2], [[True, False]]),  # not a column per rank
        ([2], [1]),  # a count
        ([7], [[True] * 6]),
        ([1, 1], [[True] + [False] * 5]),
    ],
)
def test_nothing_changes_when_outcomes_are_impossible(drafted: list, hits: list) -> None:
    estimator = TreeAcceptance(max_length=6)
    before = estimator.state()
    with pytest.raises(ValueError):
        estimator.learn_many(
            np.arange(len(drafted)), np.zeros(len(drafted), np.int64), drafted, hits
        )
    assert estimator.state() == before


def test_state_is_refused_when_its_forwards_are_not_of_trees() -> None:
    state = TreeAcceptance(max_length=6).state()
    state["forwards"]["data"] = np.full((3, 2), -2.0).tobytes()
    with pytest.raises(ValueError, match="forwards"):
        TreeAcceptance.from_state(state)
