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
