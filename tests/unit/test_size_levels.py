"""SizeLevels: what is seen often is believed, noise and outliers are not; merging and state."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from smartspec.estimators.size_levels import LIMITS, NOISE, SIZES, WINDOW, SizeLevels


def learned(size: int, ratio: float, count: int) -> SizeLevels:
    levels = SizeLevels()
    for _ in range(count):
        levels.learn(size, ratio)
    return levels


def test_level_is_believed_the_more_often_it_is_seen() -> None:
    found = [learned(3, 1.2, count).of(3) for count in (0, 1, 8, 500)]
    assert found == sorted(found) and found[0] == 1.0
    assert found[-1] == pytest.approx(1.0 + (0.2 - NOISE) * WINDOW / (WINDOW + 8.0))


def test_what_is_within_the_noise_is_left_out() -> None:
    for ratio in (1.0 - 0.9 * NOISE, 1.0 + 0.9 * NOISE):
        assert learned(5, ratio, 100).of(5) == 1.0


def test_sizes_never_seen_keep_the_smooth_curve() -> None:
    levels = learned(3, 0.8, 50)
    others = np.array([1.0, 2.0, 4.0, SIZES, SIZES + 1, 1e9])
    assert levels.at(others).tolist() == [1.0] * len(others)
    assert levels.at(np.array([[3.0]]))[0, 0] == levels.of(3.0) < 0.9
    assert levels.of(SIZES + 1) == levels.of(1e9) == 1.0


def test_outlier_that_is_hardly_trusted_hardly_counts() -> None:
    levels = learned(2, 1.1, 20)
    before = levels.of(2)
    levels.learn(2, 50.0, trust=0.01)
    assert levels.of(2) == pytest.approx(before, abs=1e-3)


def test_levels_stay_within_their_limits() -> None:
    for ratio, limit in zip((0.0, 1e6), LIMITS, strict=True):
        assert abs(learned(1, ratio, 1000).of(1) - 1.0) < abs(limit - 1.0)


def test_merging_takes_each_size_from_who_knows_it() -> None:
    one, other = learned(3, 1.2, 50), learned(4, 0.8, 50)
    wanted = one.of(3), other.of(4)
    one.merge(other)
    assert (one.of(3), one.of(4)) == pytest.approx(wanted)
    copy = SizeLevels()
    copy.restore(one.state())
    one.merge(copy)
    assert one.factors == pytest.approx(copy.factors)


def test_state_goes_on_alike() -> None:
    levels = learned(3, 1.2, 50)
    copy = SizeLevels()
    copy.restore(levels.state())
    for each in (levels, copy):
        each.learn(3, 1.3)
    assert copy.factors == levels.factors


@pytest.mark.parametrize(
    ("name", "value"), [("means", 0.5), ("means", 2.0), ("counts", -1.0), ("counts", 1e6)]
)
def test_impossible_state_is_refused(name: str, value: float) -> None:
    state: dict[str, Any] = SizeLevels().state()
    packed = np.frombuffer(state[name]["data"], "<f8").copy()
    packed[2] = value
    state[name] = {"shape": [SIZES], "data": packed.tobytes()}
    with pytest.raises(ValueError, match="levels"):
        SizeLevels().restore(state)
