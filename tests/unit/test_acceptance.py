"""AcceptanceEstimator: hazards from censored drafts, corrections per request, match rates."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from smartspec.estimators.acceptance import AcceptanceEstimator
from smartspec.estimators.base import F64
from smartspec.estimators.request_rows import RequestRows


def draft(rng: np.random.Generator, hazards: np.ndarray, drafted: np.ndarray) -> np.ndarray:
    """Drafts accepted of ``drafted`` [B], by hazards [B, K]."""
    passed = rng.random(hazards.shape) < hazards
    run = np.cumprod(passed, axis=1).sum(axis=1)
    return np.minimum(run, drafted)


def step_log_loss(survival: np.ndarray, drafted: np.ndarray, accepted: np.ndarray) -> float:
    """Negative log-likelihood of ``accepted`` [B], by survivals [B, K]."""
    full = np.concatenate((np.ones((len(survival), 1)), survival), axis=1)
    batch = np.arange(len(survival))
    after = full[batch, np.minimum(accepted + 1, survival.shape[1])]
    chance = full[batch, accepted] - np.where(accepted < drafted, after, 0.0)
    return float(-np.log(np.maximum(chance, 1e-12)).sum())


def test_hazards_are_recovered_when_the_plain_ratio_is_biased() -> None:
    rng = np.random.default_rng(0)
    truth = np.array([[0.9, 0.8, 0.6, 0.5], [0.5, 0.7, 0.8, 0.9]])
    estimator = AcceptanceEstimator(num_buckets=2, max_length=4, window=20_000)
    totals = np.zeros(2)
    for _ in range(400):
        buckets = rng.integers(0, 2, 64)
        drafted = rng.integers(0, 5, 64)
        accepted = draft(rng, truth[buckets], drafted)
        estimator.learn_many(estimator.rows(np.arange(64)), buckets, drafted, accepted)
        totals += accepted[buckets == 1].sum(), drafted[buckets == 1].sum()
    assert np.abs(estimator.hazards() - truth).max() < 0.03
    ratio = totals[0] / totals[1]  # what a moving average of accepted / drafted sees
    assert ratio < truth[1].mean() - 0.15
    survival = np.exp(estimator.log_survival())
    assert np.abs(survival - np.cumprod(truth, axis=1)).max() < 0.03


def test_table_is_finite_and_falls_with_depth_when_all_or_nothing_is_accepted() -> None:
    estimator = AcceptanceEstimator(num_buckets=3, max_length=5)
    for step in range(5000):  # of others each time: what one request does, its correction says
        estimator.learn_many(estimator.rows([2 * step, 2 * step + 1]), [0, 1], [5, 5], [5, 0])
    table = estimator.log_survival()
    assert table.shape == (3, 5) and table.dtype == np.float32
    assert np.isfinite(table).all()
    assert (table < 0.0).all() and (np.diff(table, axis=1) < 0.0).all()
    assert np.exp(table[0, -1]) > 0.98 and np.exp(table[1, 0]) < 0.02


def test_old_counts_are_given_up_when_a_few_probes_say_that_the_world_has_changed() -> None:
    rng = np.random.default_rng(0)
    estimator = AcceptanceEstimator(max_length=4)
    low, high = np.full((1, 4), 0.05), np.full((1, 4), 0.9)
    for step in range(1000):
        row, one = estimator.rows(np.array([step // 50])), np.array([2])
        estimator.learn_many(row, [0], one, draft(rng, low, one))
    assert estimator.num_changes == 0 and estimator.pooled_hazards()[0] < 0.1
    for probe in range(12):
        row, one = estimator.rows(np.array([100 + probe])), np.array([2])
        estimator.learn_many(row, [0], one, draft(rng, high, one))
    assert estimator.num_changes == 1 and estimator.pooled_hazards()[0] > 0.5
    again = AcceptanceEstimator.from_state(estimator.state())
    assert again.num_changes == 1


@pytest.mark.parametrize("size", [1, 8, 256])
def test_requests_that_differ_are_no_change(size: int) -> None:
    rng = np.random.default_rng(size)
    estimator = AcceptanceEstimator(max_length=4)
    for step in range(4000 // min(size, 16)):
        if step % 40 == 0:  # others come: Beta(1.4, 0.6) over requests
            hazards = np.repeat(rng.beta(1.4, 0.6, (size, 1)), 4, axis=1)
        drafted = rng.integers(0, 5, size)
        rows = estimator.rows(np.arange(size) + size * (step // 40))
        accepted = draft(rng, hazards, drafted)
        estimator.learn_many(rows, np.zeros(size, np.intp), drafted, accepted)
    # Requests alone one after the other, each of its own acceptance, may look like one.
    assert estimator.num_changes <= (3 if size == 1 else 0)


def test_every_cell_starts_at_the_prior_when_nothing_was_seen() -> None:
    estimator = AcceptanceEstimator(num_buckets=2, max_length=3, prior=0.7)
    assert estimator.hazards() == pytest.approx(0.7)
    assert estimator.corrections(estimator.rows([5, 6])).tolist() == [1.0, 1.0]
    assert estimator.presence(estimator.rows([5])).tolist() == [0.5]


def test_unseen_bucket_and_depth_follow_the_pooled_ones_when_others_were_seen() -> None:
    estimator = AcceptanceEstimator(num_buckets=3, max_length=4)
    rows = estimator.rows(np.arange(20))
    for _ in range(100):
        estimator.learn_many(rows, np.zeros(20, int), np.full(20, 2), np.full(20, 2))
    hazards = estimator.hazards()
    assert (hazards[1:, :2] > 0.97).all()  # other buckets at the depths that were tried
    assert (hazards[0, 2:] > 0.97).all()  # deeper than was tried
    assert (hazards[1:, 2:] > 0.97).all()
    survivals = np.cumprod(estimator.pooled_hazards())
    assert estimator.pooled_survivals() == pytest.approx(survivals)


def test_first_observation_moves_a_bucket_little_when_it_is_alone() -> None:
    estimator = AcceptanceEstimator(num_buckets=1, max_length=1)
    estimator.learn_one({"drafted": 1}, 0)
    assert 0.55 < estimator.hazards()[0, 0] < 0.7


def test_counts_are_bounded_and_kept_when_one_cell_is_observed_for_ever() -> None:
    estimator = AcceptanceEstimator(num_buckets=2, max_length=2, window=500)
    rng = np.random.default_rng(1)
    rows = estimator.rows(np.arange(50))
    for _ in range(200):
        accepted = draft(rng, np.full((50, 2), 0.4), np.full(50, 2))
        estimator.learn_many(rows, np.ones(50, int), np.full(50, 2), accepted)
    before = estimator.hazards()[1].copy()
    for _ in range(20_000):
        estimator.learn_many(rows[:1], [0], [2], [2])
    assert estimator.num_observed().max() <= 500.0 + 1e-6
    # What is left of a change: the pooled hazard that bucket 1 is shrunk to.
    assert np.abs(estimator.hazards()[1] - before).max() < 0.05


def test_batches_weigh_as_single_observations_when_learned_at_once() -> None:
    one, many = (AcceptanceEstimator(num_buckets=1, max_length=2, window=100) for _ in range(2))
    for step in range(300):
        for _ in range(8):
            one.learn_one({"drafted": 2}, 1)
        rows = many.rows(8 * step + np.arange(8))  # requests of which nothing is known
        many.learn_many(rows, np.zeros(8, int), np.full(8, 2), np.ones(8, int))
    assert many.num_observed() == pytest.approx(one.num_observed())
    assert many.hazards() == pytest.approx(one.hazards())


def serve(estimator: AcceptanceEstimator, spread: float, num_steps: int) -> tuple[F64, F64]:
    """32 requests at once for 40 steps each, of Beta(0.4 spread, 0.6 spread) acceptance.

    Returns expected and true survivals of all that are at least 20 steps old, by depth, of the
    last third of the steps.
    """
    rng = np.random.default_rng(5)
    zeros, full, depths = np.zeros(32, int), np.full(32, 5), np.arange(1, 6)
    rate = np.zeros(32)
    expected, true = [], []
    for step in range(num_steps):
        age = (step + np.arange(32)) % 40
        rate = np.where(age == 0, rng.beta(0.4 * spread, 0.6 * spread, 32), rate)
        rows = estimator.rows(np.arange(32) + 32 * ((step + np.arange(32)) // 40))
        if 3 * step > 2 * num_steps:
            c = estimator.corrections(rows)[age >= 20]
            expected.append(np.exp(estimator.log_survival()[0] * c[:, None]))
            true.append(rate[age >= 20, None] ** depths)
        accepted = draft(rng, np.repeat(rate[:, None], 5, axis=1), full)
        estimator.learn_many(rows, zeros, full, accepted)
    return np.concatenate(expected), np.concatenate(true)


def test_deep_drafts_are_rated_as_they_fare_when_requests_differ() -> None:
    expected, true = serve(AcceptanceEstimator(num_buckets=1, max_length=5), 6.0, 900)
    assert expected.mean(axis=0) == pytest.approx(true.mean(axis=0), rel=0.1)


def test_strength_falls_when_requests_differ_and_rises_when_they_do_not() -> None:
    found = []
    for spread in (3.0, 1e6):
        estimator = AcceptanceEstimator(num_buckets=1, max_length=5)
        serve(estimator, spread, 900)
        found.append(estimator.strength)
    assert found[0] < 5.0 and found[1] > 24.0


def test_strength_stays_when_one_request_goes_on_for_ever() -> None:
    estimator = AcceptanceEstimator(num_buckets=1, max_length=5)
    found = []
    for _ in range(2):
        for _ in range(1000):
            estimator.learn_one({"request_id": 1, "drafted": 5}, 5)
        found.append(estimator.strength)
    assert found[0] == found[1] < 12.0


def test_table_follows_a_change_when_traffic_changes() -> None:
    rng = np.random.default_rng(2)
    estimator = AcceptanceEstimator(num_buckets=1, max_length=3, window=500)
    rows, zeros, full = estimator.rows(np.arange(32)), np.zeros(32, int), np.full(32, 3)
    for hazard in (0.9, 0.3):
        for _ in range(100):
            accepted = draft(rng, np.full((32, 3), hazard), full)
            estimator.learn_many(rows, zeros, full, accepted)
        assert estimator.hazards()[0, 0] == pytest.approx(hazard, abs=0.06)


@pytest.mark.parametrize(("before", "after"), [(0.7, 0.4), (0.4, 0.8)])
def test_new_requests_are_expected_to_do_as_those_of_late_when_others_come(
    before: float, after: float
) -> None:
    rng = np.random.default_rng(6)
    estimator = AcceptanceEstimator(num_buckets=1, max_length=5)
    zeros, full = np.zeros(8, int), np.full(8, 5)
    rate = np.zeros(8)
    first = []
    for step in range(3000):
        age = (step + 20 * np.arange(8)) % 160
        mean = before if step < 1500 else after
        rate = np.where(age == 0, rng.beta(6 * mean, 6 * (1 - mean), 8), rate)
        rows = estimator.rows(np.arange(8) + 8 * ((step + 20 * np.arange(8)) // 160))
        accepted = draft(rng, np.repeat(rate[:, None], 5, axis=1), full)
        estimator.learn_many(rows, zeros, full, accepted)
        first.append(float(np.exp(estimator.log_survival()[0, 0])))
    # Fifty requests later, and from then on.
    assert np.mean(first[2500:]) == pytest.approx(after, abs=0.1)
    assert estimator.num_changes == 0  # the sum that watches first drafts knows of requests


def test_known_requests_are_expected_to_do_as_before_when_the_table_follows_others() -> None:
    rng = np.random.default_rng(7)
    estimator = AcceptanceEstimator(num_buckets=1, max_length=3)
    rows, zeros, full = estimator.rows(np.arange(32)), np.zeros(32, int), np.full(32, 3)
    rate = np.repeat(rng.beta(2.4, 3.6, 32)[:, None], 3, axis=1)
    for _ in range(120):
        estimator.learn_many(rows, zeros, full, draft(rng, rate, full))
    before = estimator.log_survival()[0] * estimator.corrections(rows)[:, None]
    estimator._level, estimator._following, estimator._num_unscored = 0.4, 1.0, 0
    estimator._follow(0.0, 0.0)
    after = estimator.log_survival()[0] * estimator.corrections(rows)[:, None]
    assert after == pytest.approx(before, rel=0.25) and after.mean() == pytest.approx(
        before.mean(), rel=0.1
    )


def test_hazard_std_is_what_repetition_shows_when_data_are_few() -> None:
    rng = np.random.default_rng(3)
    estimates, claimed = [], 0.0
    for _ in range(200):
        estimator = AcceptanceEstimator(num_buckets=1, max_length=1, prior_weight=1.0)
        accepted = (rng.random(200) < 0.7).astype(int)
        rows = estimator.rows(np.arange(200))
        estimator.learn_many(rows, np.zeros(200, int), np.ones(200, int), accepted)
        estimates.append(estimator.pooled_hazards()[0])
        claimed = float(estimator.hazard_std()[0])
    assert claimed == pytest.approx(np.std(estimates), rel=0.25)
    assert claimed < float(AcceptanceEstimator(1, 1).hazard_std()[0])


def simulate_requests(
    spread: float, change_every: int | None = None
) -> tuple[float, float, np.ndarray, np.ndarray]:
    """Log loss per step of the table alone and with corrections; true rates and corrections."""
    rng = np.random.default_rng(4)
    size, depth, steps = 64, 6, 200
    estimator = AcceptanceEstimator(num_buckets=1, max_length=depth)
    rows = estimator.rows(np.arange(size))
    zeros = np.zeros(size, int)
    rate = rng.beta(0.7 * spread, 0.3 * spread, size)
    shared = corrected = 0.0
    for step in range(steps):
        if change_every is not None and step % change_every == change_every - 1:
            rate = rng.beta(0.7 * spread, 0.3 * spread, size)
        drafted = rng.integers(1, depth + 1, size)
        accepted = draft(rng, np.repeat(rate[:, None], depth, axis=1), drafted)
        if step >= steps // 2:  # predicted before it is learned
            table = estimator.log_survival()[zeros].astype(float)
            shared += step_log_loss(np.exp(table), drafted, accepted)
            power = estimator.corrections(rows)[:, None]
            corrected += step_log_loss(np.exp(table * power), drafted, accepted)
        estimator.learn_many(rows, zeros, drafted, accepted)
    per_step = size * (steps - steps // 2)
    return shared / per_step, corrected / per_step, rate, estimator.corrections(rows)


def test_corrections_lower_the_log_loss_when_requests_differ() -> None:
    shared, corrected, rate, corrections = simulate_requests(spread=3.0)
    assert corrected < shared - 0.1
    ranks = [np.argsort(np.argsort(values)) for values in (rate, -corrections)]
    assert np.corrcoef(*ranks)[0, 1] > 0.9


def test_corrections_lower_the_log_loss_when_requests_change() -> None:
    shared, corrected, _, _ = simulate_requests(spread=2.0, change_every=40)
    assert corrected < shared - 0.05


def test_corrections_cost_little_when_requests_are_alike() -> None:
    shared, corrected, _, corrections = simulate_requests(spread=1e6)
    assert corrected < shared + 0.03
    assert corrections.mean() == pytest.approx(1.0, abs=0.15)


def test_correction_is_calibrated_when_the_request_is_not_average() -> None:
    """c has the value with which the table's survivals become the request's."""
    rng = np.random.default_rng(5)
    estimator = AcceptanceEstimator(num_buckets=1, max_length=4, request_half_life=200.0)
    zeros, full = np.zeros(40, int), np.full(40, 4)
    rows = estimator.rows(np.arange(40))
    power = np.where(np.arange(40) < 4, 3.0, 1.0)
    hazards = np.repeat((0.8**power)[:, None], 4, axis=1)
    for _ in range(400):
        estimator.learn_many(rows, zeros, full, draft(rng, hazards, full))
    table = np.exp(estimator.log_survival()[zeros] * estimator.corrections(rows)[:, None])
    assert table[:4, 0].mean() == pytest.approx(0.8**3, abs=0.04)
    assert table[4:, 0].mean() == pytest.approx(0.8, abs=0.03)


def test_correction_follows_when_a_request_changes() -> None:
    estimator = AcceptanceEstimator(num_buckets=1, max_length=4)
    rows = estimator.rows(np.arange(32))
    zeros, full = np.zeros(32, int), np.full(32, 4)
    rng = np.random.default_rng(6)
    for _ in range(100):
        estimator.learn_many(rows, zeros, full, draft(rng, np.full((32, 4), 0.8), full))
    for _ in range(40):  # one of them stops being predictable
        accepted = draft(rng, np.full((32, 4), 0.8), full)
        accepted[0] = 0
        estimator.learn_many(rows, zeros, full, accepted)
    survival = np.exp(estimator.log_survival()[0, 0] * estimator.corrections(rows))
    assert survival[0] < 0.7 < survival[1:].mean()


def test_nothing_is_learned_when_nothing_was_drafted() -> None:
    estimator = AcceptanceEstimator(num_buckets=1, max_length=4)
    rows = estimator.rows([1, 2])
    before = estimator.state()
    estimator.learn_many(rows, [0, 0], [0, 0], [0, 0])
    estimator.learn_one({"drafted": 0}, 0)
    assert estimator.state() == before


def test_presence_ranks_requests_and_shrinks_to_the_pooled_rate_when_few_were_seen() -> None:
    estimator = AcceptanceEstimator()
    rows = estimator.rows(np.arange(3))
    for _ in range(40):
        estimator.learn_presence(rows[:2], np.array([True, False]))
    always, never, unseen = estimator.presence(rows).tolist()
    assert always > 0.9 and never < 0.1
    assert unseen == pytest.approx(estimator.pooled_presence(), abs=1e-6)
    assert 0.4 < unseen < 0.6


def test_rows_are_bounded_and_the_last_batch_known_when_requests_pass_through() -> None:
    estimator = AcceptanceEstimator(num_buckets=1, max_length=2, max_requests=256)
    zeros = np.zeros(64, int)
    for start in range(0, 100_000, 64):
        rows = estimator.rows(np.arange(start, start + 64, dtype=np.uint64))
        estimator.learn_many(rows, zeros, zeros + 2, zeros)
        assert len(set(rows.tolist())) == 64
    assert estimator._requests.capacity == 256 and len(estimator._requests) <= 256
    assert (estimator.corrections(rows) > 1.0).all()
    fresh = estimator.rows(np.arange(200_000, 200_064))
    assert (estimator.corrections(fresh) == 1.0).all()


def test_a_request_keeps_its_history_when_it_was_away() -> None:
    estimator = AcceptanceEstimator(num_buckets=1, max_length=2, max_requests=64)
    row = estimator.rows([7])
    for _ in range(10):
        estimator.learn_many(row, [0], [2], [0])
    known = estimator.corrections(row)
    estimator.rows(np.arange(100, 110))
    assert estimator.corrections(estimator.rows([7])) == known


def test_the_longest_unseen_go_first_when_room_is_needed() -> None:
    rows = RequestRows(capacity=4, num_columns=1)
    rows.counts[rows.rows([1])] = 1.0
    rows.counts[rows.rows([2])] = 2.0
    rows.rows([1])
    rows.rows([10, 11])
    assert rows.find(1) is not None and rows.find(2) is not None
    rows.rows([12])
    assert rows.find(2) is None
    assert rows.counts[rows.find(1)] == 1.0


def test_rows_grow_when_a_batch_is_larger_than_the_room() -> None:
    rows = RequestRows(capacity=4, num_columns=1)
    rows.counts[rows.rows([1, 2])] = 5.0
    many = rows.rows(np.arange(1, 31))
    assert len(set(many.tolist())) == 30
    assert rows.counts[many, 0].tolist() == [5.0, 5.0] + [0.0] * 28


@pytest.mark.parametrize(
    "columns",
    [
        ([0, 0], [2, 2], [3, 0]),  # more accepted than drafted
        ([0, 9], [2, 2], [1, 0]),
        ([0, -1], [2, 2], [1, 0]),
        ([0, 0], [9, 2], [1, 0]),
        ([0], [2], [1]),
        ([0.0, 0.0], [2, 2], [1, 0]),
        ([0, 0], [2, 2], [np.nan, 0]),
        ([[0, 0]], [2, 2], [1, 0]),
    ],
)
def test_nothing_changes_when_outcomes_are_impossible(columns: tuple[list, list, list]) -> None:
    estimator = AcceptanceEstimator(num_buckets=2, max_length=4)
    rows = estimator.rows([1, 2])
    before = estimator.state()
    with pytest.raises(ValueError, match=r"must be|differ|accepted"):
        estimator.learn_many(rows, *columns)
    assert estimator.state() == before


@pytest.mark.parametrize("ids", [[1, 1], [-1, 2], [0.5, 1.0], [[1, 2]]])
def test_rows_are_refused_when_ids_are_impossible(ids: list) -> None:
    estimator = AcceptanceEstimator()
    before = estimator.state()
    with pytest.raises(ValueError, match="request ids"):
        estimator.rows(ids)
    assert estimator.state() == before


def test_rows_of_others_are_refused_when_out_of_range() -> None:
    estimator = AcceptanceEstimator(max_requests=4)
    for rows in (np.array([4]), np.array([-1])):
        with pytest.raises(ValueError, match="rows are not"):
            estimator.corrections(rows)
        with pytest.raises(ValueError, match="rows are not"):
            estimator.learn_many(rows, [0], [1], [1])


def test_requests_start_anew_when_forgotten_but_the_table_stays() -> None:
    estimator = AcceptanceEstimator(num_buckets=1, max_length=1)
    for _ in range(50):
        estimator.learn_many(estimator.rows([3]), [0], [1], [0])
    hazards = estimator.hazards()
    estimator.forget_requests()
    assert estimator.corrections(estimator.rows([3])).tolist() == [1.0]
    assert (estimator.hazards() == hazards).all()


def test_rare_buckets_follow_their_digits_when_features_add_up() -> None:
    """A bucket that was never seen is known by what its digits did in others."""
    rng = np.random.default_rng(7)
    estimator = AcceptanceEstimator(num_buckets=12, max_length=2, axis_sizes=(3, 4))
    first, second = np.divmod(np.arange(12), 4)
    logit = -1.5 + 1.0 * first + 0.8 * second
    hazards = np.repeat(1.0 / (1.0 + np.exp(-logit))[:, None], 2, axis=1)
    seen = np.array([b for b in range(12) if b not in (3, 8)])
    rows = estimator.rows(np.arange(64))
    for _ in range(200):
        buckets = rng.choice(seen, 64)
        estimator.learn_many(
            rows, buckets, np.full(64, 2), draft(rng, hazards[buckets], np.full(64, 2))
        )
    found = estimator.hazards()[:, 0]
    assert np.abs(found - hazards[:, 0]).max() < 0.06
    assert np.abs(found[[3, 8]] - hazards[[3, 8], 0]).max() < 0.06


@pytest.mark.parametrize("sizes", [(2, 2), (6, 0)])
def test_axes_are_refused_when_they_do_not_make_the_buckets(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="axis_sizes"):
        AcceptanceEstimator(num_buckets=6, axis_sizes=sizes)


def test_state_is_refused_when_its_effects_are_out_of_range() -> None:
    state = AcceptanceEstimator(num_buckets=6, axis_sizes=(2, 3)).state()
    state["effects"] = {"shape": [5, 2], "data": np.full((5, 2), 1e6).astype("<f8").tobytes()}
    with pytest.raises(ValueError, match="effects"):
        AcceptanceEstimator.from_state(state)


def test_table_is_worked_out_with_every_eighth_step_once_it_has_settled() -> None:
    rng = np.random.default_rng(0)
    estimator = AcceptanceEstimator(max_length=4, window=200)
    rows, hazards = estimator.rows(np.arange(16)), np.full((16, 4), 0.7)
    tables, drafted = [], np.full(16, 4)
    for _ in range(201):
        accepted = draft(rng, hazards, drafted)
        estimator.learn_many(rows, np.zeros(16, np.intp), drafted, accepted)
        tables.append(estimator.log_survival())
    fresh = [after is not before for before, after in pairwise(tables)]
    assert all(fresh[:5])
    assert sum(fresh[40:]) == len(fresh[40:]) / 8


def test_what_is_learned_does_not_depend_on_who_has_asked_for_corrections() -> None:
    rng = np.random.default_rng(0)
    asked, unasked = (AcceptanceEstimator(max_length=4) for _ in range(2))
    for step in range(50):
        drafted = rng.integers(0, 5, 16) if step % 2 else np.full(16, 4)
        accepted = draft(rng, np.full((16, 4), 0.7), drafted)
        for estimator in (asked, unasked):
            rows = estimator.rows(np.arange(step, step + 16))
            if estimator is asked:
                estimator.corrections(rows)
            estimator.learn_many(rows, np.zeros(16, np.intp), drafted, accepted)
            if estimator is asked:
                estimator.corrections(rows)
            estimator.learn_many(rows, np.zeros(16, np.intp), drafted, accepted)
    assert asked.state() == unasked.state()


def test_state_of_many_young_requests_can_be_restored() -> None:
    estimator = AcceptanceEstimator(num_buckets=1, max_length=4)
    rng = np.random.default_rng(0)
    for step in range(700):
        ids = np.arange(1000) + 1000 * (step // 40)
        rows = estimator.rows(ids)
        drafted = np.full(1000, 2)
        accepted = np.minimum(rng.geometric(0.4, 1000) - 1, 2)
        estimator.learn_many(rows, np.zeros(1000, np.int64), drafted, accepted)
    again = AcceptanceEstimator.from_state(estimator.state())
    assert again.strength == estimator.strength
