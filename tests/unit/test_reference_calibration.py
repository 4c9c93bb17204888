"""Rates by confidence are those of the drafts whose parents were accepted."""

from __future__ import annotations

import numpy as np
import pytest

from smartspec.engine_adapter.reference.calibration import Calibration
from smartspec.engine_adapter.reference.draft_tree import ROOT, DraftTree


def test_rates_are_the_shares_that_were_right_when_much_was_seen() -> None:
    rng = np.random.default_rng(0)
    calibration = Calibration()
    true = {0.05: 0.2, 0.5: 0.4, 0.95: 0.7}
    for _ in range(6000):
        confidence = float(rng.choice(list(true)))
        path = [0] if rng.random() < true[confidence] else []
        calibration.learn(DraftTree.chain([3]), [confidence], path)
    assert calibration.rates(list(true)) == pytest.approx(list(true.values()), abs=0.04)


def test_drafts_after_a_rejected_one_are_no_evidence() -> None:
    calibration = Calibration()
    tree = DraftTree([1, 2, 3, 4], [ROOT, ROOT, 0, 1])
    for _ in range(100):
        calibration.learn(tree, [0.6, 0.3, 0.9, 0.1], [1, 3])
    # The third stands on the first, which was wrong.
    wrong, right, unknown, late = calibration.rates([0.6, 0.3, 0.9, 0.1])
    assert wrong < 0.1 and right > 0.85 and late > 0.85
    assert unknown == 0.9


def test_old_evidence_fades_when_the_world_changes() -> None:
    calibration = Calibration()
    for _ in range(20_000):
        calibration.learn(DraftTree.chain([3]), [0.5], [])
    for _ in range(6_000):
        calibration.learn(DraftTree.chain([3]), [0.5], [0])
    assert calibration.rates(0.5) > 0.9


def test_bands_are_learned_apart() -> None:
    calibration = Calibration(num_bands=2)
    for _ in range(500):
        calibration.learn(DraftTree.chain([3]), [0.5], [0], band=1)
    greedy, sampled = calibration.rates([0.5, 0.5], np.array([0, 1]))
    assert greedy == 0.5 and sampled > 0.95


def test_outlook_is_the_mean_worth_of_drafts_as_they_come() -> None:
    rng = np.random.default_rng(2)
    calibration = Calibration()
    confidences = rng.beta(0.5, 1.5, 20_000)
    calibration.note(confidences, np.zeros(20_000, np.int64))
    chances, price = np.array([1.0, 0.6]), np.array([0.3, 0.3])
    # Nothing was learned of outcomes: a confidence stands for itself.
    expected = np.maximum(chances[:, None] * confidences - 0.3, 0).mean(axis=1)
    found = calibration.outlook(chances, price, np.zeros(2, np.int64))
    assert found == pytest.approx(expected, abs=0.01)


def test_outlook_falls_when_drafts_turn_out_worse_than_they_seem() -> None:
    calibration = Calibration()
    confidences = np.linspace(0.05, 0.95, 19)
    calibration.note(confidences.repeat(200), np.zeros(3800, np.int64))
    before = calibration.outlook(np.ones(1), np.array([0.3]), np.zeros(1, np.int64))
    for confidence in confidences.tolist():
        for _ in range(200):
            calibration.learn(DraftTree.chain([3]), [confidence], [])
    after = calibration.outlook(np.ones(1), np.array([0.3]), np.zeros(1, np.int64))
    assert after < 0.3 * before
