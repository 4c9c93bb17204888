"""CumulativeSum: alarms on shifts, silence otherwise, state."""

from __future__ import annotations

import numpy as np
import pytest

from smartspec.estimators.drift import CumulativeSum


def alarm_after(shift: float, seed: int) -> int:
    detector, rng = CumulativeSum(), np.random.default_rng(seed)
    for i in range(1000):
        detector.update(float(np.clip(rng.normal() + shift, -4, 4)))
        if detector.drift_detected:
            return i + 1
    return 1000


@pytest.mark.parametrize(("shift", "within"), [(10.0, 7), (-10.0, 7), (3.0, 15), (1.5, 120)])
def test_alarm_comes_soon_when_residuals_keep_to_one_side(shift: float, within: int) -> None:
    assert max(alarm_after(shift, seed) for seed in range(20)) <= within


def test_no_alarm_is_raised_when_residuals_are_noise_and_lone_outliers() -> None:
    detector, rng = CumulativeSum(), np.random.default_rng(0)
    for _ in range(50_000):
        z = 100.0 if rng.random() < 0.01 else rng.normal()
        detector.update(float(np.clip(z, -4, 4)))
    assert detector.num_alarms == 0


def test_detector_starts_anew_when_it_has_raised_an_alarm() -> None:
    detector = CumulativeSum()
    seen = []
    for _ in range(14):
        detector.update(4.0)
        seen.append(detector.drift_detected)
    assert [i + 1 for i, alarm in enumerate(seen) if alarm] == [7, 14]
    assert detector.num_alarms == 2


def test_copy_goes_on_alike_when_state_travels() -> None:
    detector, copy = CumulativeSum(), CumulativeSum()
    for _ in range(5):
        detector.update(3.0)
    copy.restore(detector.state())
    assert copy.state() == detector.state()
    with pytest.raises(ValueError, match="above"):
        copy.restore({"num_alarms": 0})
