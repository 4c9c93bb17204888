"""Rates by confidence are those of the drafts whose parents were accepted."""

from __future__ import annotations

import numpy as np
import pytest

from smartspec.engine_adapter.reference.calibration import (
    CURIOSITY,
    SAVINGS_STEPS,
    Calibration,
    Curiosity,
)


def test_rates_are_the_shares_that_were_right_when_much_was_seen() -> None:
    rng = np.random.default_rng(0)
    calibration = Calibration()
    true = {0.05: 0.2, 0.5: 0.4, 0.95: 0.7}
    for _ in range(6000):
        confidence = float(rng.choice(list(true)))
        calibration.learn([confidence], [rng.random() < true[confidence]])
    assert calibration.rates(list(true)) == pytest.approx(list(true.values()), abs=0.04)


def test_old_evidence_fades_when_the_world_changes() -> None:
    calibration = Calibration()
    for _ in range(20_000):
        calibration.learn([0.5], [False])
    for _ in range(6_000):
        calibration.learn([0.5], [True])
    assert calibration.rates(0.5) > 0.9


def test_bands_are_learned_apart() -> None:
    calibration = Calibration(num_groups=2)
    for _ in range(500):
        calibration.learn([0.5], [True], np.ones(1, np.int64))
    greedy, sampled = calibration.rates([0.5, 0.5], np.array([0, 1]))
    assert greedy == 0.5 and sampled > 0.95


def test_a_band_of_which_little_is_known_is_like_its_group() -> None:
    calibration = Calibration(num_groups=2, num_bands=2)
    calibration.learn([0.5] * 2000, [True] * 2000, np.zeros(2000, np.int64))
    known, alike, another = calibration.rates([0.5] * 3, np.arange(3))
    assert known > 0.95 and alike > 0.95 and another == 0.5
    for _ in range(60):
        calibration.learn([0.5], [False], np.ones(1, np.int64))
    known, apart = calibration.rates([0.5] * 2, np.arange(2))
    assert known > 0.9 and apart < 0.3


def test_what_a_band_may_bring_is_as_in_its_group_until_it_was_run() -> None:
    calibration = Calibration(num_groups=1, num_bands=2)
    calibration.note(np.full((500, 1), 0.9), np.zeros(500, np.int64))
    one, price = np.ones(1), np.array([0.3])
    nothing = Calibration().outlook(one, price, np.zeros(1, np.int64))
    seen = calibration.outlook(one, price, np.zeros(1, np.int64))
    unseen = calibration.outlook(one, price, np.ones(1, np.int64))
    assert 1.05 * nothing < unseen < seen
    calibration.note(np.full((100, 1), 0.1), np.ones(100, np.int64))
    assert calibration.outlook(one, price, np.ones(1, np.int64)) < 0.5 * nothing


def test_curiosity_spends_a_share_and_saves_no_more_than_some_steps_of_it() -> None:
    curiosity = Curiosity()
    assert not curiosity.pay(0.1)
    spent = 0.0
    for step in range(5000):
        curiosity.earn(8.0)
        price = 0.1 + 0.4 * (step % 7 == 0)
        spent += price * curiosity.pay(price)
    assert 0.95 < spent / (CURIOSITY * 8.0 * 5000) <= 1.0
    for _ in range(10 * SAVINGS_STEPS):
        curiosity.earn(8.0)
    most = CURIOSITY * 8.0 * SAVINGS_STEPS
    assert not curiosity.pay(most * 1.01) and curiosity.pay(most * 0.99)


def test_outlook_is_the_mean_worth_of_drafts_as_they_come() -> None:
    rng = np.random.default_rng(2)
    calibration = Calibration()
    confidences = rng.beta(0.5, 1.5, 20_000)
    calibration.note(confidences[:, None], np.zeros(20_000, np.int64))
    chances, price = np.array([1.0, 0.6]), np.array([0.3, 0.3])
    # Nothing was learned of outcomes: a confidence stands for itself.
    expected = np.maximum(chances[:, None] * confidences - 0.3, 0).mean(axis=1)
    found = calibration.outlook(chances, price, np.zeros(2, np.int64))
    assert found == pytest.approx(expected, abs=0.01)


def test_outlook_counts_all_children_of_a_node() -> None:
    calibration = Calibration()
    calibration.note(np.tile([0.6, 0.2, 0.01], (2000, 1)), np.zeros(2000, np.int64))
    found = calibration.outlook(np.ones(1), np.array([0.1]), np.zeros(1, np.int64))
    assert found == pytest.approx([0.5 + 0.1], abs=0.1)  # bins are wide


def test_outlook_falls_when_drafts_turn_out_worse_than_they_seem() -> None:
    calibration = Calibration()
    confidences = np.linspace(0.05, 0.95, 19)
    calibration.note(confidences.repeat(200)[:, None], np.zeros(3800, np.int64))
    before = calibration.outlook(np.ones(1), np.array([0.3]), np.zeros(1, np.int64))
    for confidence in confidences.tolist():
        for _ in range(200):
            calibration.learn([confidence], [False])
    after = calibration.outlook(np.ones(1), np.array([0.3]), np.zeros(1, np.int64))
    assert after < 0.3 * before
