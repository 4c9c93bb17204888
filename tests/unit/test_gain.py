"""Gains: intervals that hold what is true as often as they say, by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from smartspec.daemon.adoption.gain import (
    BIAS_LASTS_S,
    COMPARISONS_KEPT,
    LEAST_COMPARISONS,
    MODEL_ERROR,
    Comparisons,
    Discounted,
    GainEstimator,
    Interval,
    Tally,
    student_95,
)
from smartspec.daemon.decision import Arm

CERTAIN = {Arm.NONE: 0.0, Arm.OWN: 0.0}


def tally(
    tokens_per_s: float,
    own: float,
    none: float,
    chosen: float | None = None,
    seconds: float = 2.0,
) -> Tally:
    """Seconds at a goodput, where others were predicted."""
    made = Tally()
    made.add(
        seconds,
        seconds * tokens_per_s,
        tokens_per_s if chosen is None else chosen,
        {Arm.OWN: own, Arm.NONE: none},
    )
    return made


@pytest.mark.parametrize("freedom", [2.0, 3.0, 4.0, 10.0, 100.0])
def test_student_quantile_is_that_of_tables(freedom: float) -> None:
    assert student_95(freedom) == pytest.approx(scipy.stats.t.ppf(0.975, freedom), rel=0.04)


def test_old_values_fade() -> None:
    values = Discounted(memory=10.0)
    for x in [5.0] * 100 + [1.0] * 100:
        values.add(x)
    assert values.mean == pytest.approx(1.0, abs=0.01)
    assert 15 < values.count < 21


def test_variance_of_the_mean_is_that_of_simulated_means() -> None:
    rng = np.random.default_rng(0)
    means, claimed = [], []
    for _ in range(500):
        values = Discounted(memory=10.0)
        for x in rng.normal(size=60):
            values.add(float(x))
        means.append(values.mean)
        claimed.append(values.variance_of_mean)
    assert np.mean(claimed) == pytest.approx(np.var(means), rel=0.15)


def test_interval_of_comparisons_holds_the_true_gain_in_95_percent() -> None:
    rng = np.random.default_rng(1)
    held = 0
    for trial in range(600):
        comparisons = Comparisons()
        noise = rng.normal if trial % 2 else rng.laplace
        for x in noise(math.log(1.2), 0.05, size=8):
            comparisons.add(float(x))
        interval = comparisons.interval()
        assert interval is not None
        held += interval.low <= 0.2 <= interval.high
    assert 0.92 <= held / 600 <= 0.98


def test_comparisons_hold_the_true_gain_when_corrections_are_off_by_as_much_as_they_claim() -> None:
    rng = np.random.default_rng(2)
    held = 0
    for _ in range(200):
        comparisons = Comparisons()
        # A model that takes the two blocks' loads for 2% apart, when they are alike.
        for x in rng.normal(math.log(1.2), 0.02, size=30):
            comparisons.add(float(x) - 0.02, -0.02)
        interval = comparisons.interval()
        assert interval is not None
        held += interval.low <= 0.2 <= interval.high
    assert held == 200


def test_comparisons_are_not_judged_while_there_are_few_and_old_ones_are_dropped() -> None:
    comparisons = Comparisons()
    for count in range(1, COMPARISONS_KEPT + 11):
        comparisons.add(1.0 if count <= 10 else 0.0)
        assert (comparisons.interval() is None) == (count < LEAST_COMPARISONS)
    assert comparisons.num_made == COMPARISONS_KEPT + 10
    assert comparisons.interval() == (0.0, 0.0, 0.0)


# -- estimates ------------------------------------------------------------------------------------


def test_nothing_is_claimed_before_the_first_block() -> None:
    gains = GainEstimator()
    assert gains.over(Arm.OWN) is None and gains.bias(Arm.OWN) is None


def test_gain_is_that_of_the_models_while_nothing_is_steered() -> None:
    gains = GainEstimator()
    for _ in range(10):
        gains.note_block(Arm.OWN, tally(100.0, 100.0, 80.0, chosen=120.0), CERTAIN)
    over = gains.over(Arm.OWN)
    assert over is not None and over.value == pytest.approx(0.2)
    # The models' own certainty is not believed.
    assert over.high - over.value > 2 * MODEL_ERROR
    # What is chosen is near to what is run; no speculation may be better than is known.
    open_end = GainEstimator()
    open_end.note_block(
        Arm.OWN, tally(100.0, 100.0, 80.0, chosen=101.0), {Arm.NONE: 0.5, Arm.OWN: 0.0}
    )
    ignorant = open_end.over(Arm.OWN)
    assert ignorant is not None and ignorant.low > -0.2 and ignorant.high > 1.0
    uncertain = GainEstimator()
    uncertain.note_block(
        Arm.OWN, tally(100.0, 100.0, 80.0, chosen=120.0), {Arm.NONE: 0.2, Arm.OWN: 0.2}
    )
    wider = uncertain.over(Arm.OWN)
    assert wider is not None and wider.high > over.high + 0.3


def test_error_of_the_models_is_found_when_the_alternative_is_run() -> None:
    """The models think too little of the own setting and believe in 20% over it: 5% is true."""
    rng = np.random.default_rng(2)
    gains = GainEstimator()
    for count in range(60):
        noise = float(rng.normal(1.0, 0.01))
        gains.note_block(Arm.SMARTSPEC, tally(120.0 * noise, 100.0, 80.0), CERTAIN)
        if count % 3 == 0:
            noise = float(rng.normal(1.0, 0.01))
            gains.note_block(Arm.OWN, tally(120.0 / 1.05 * noise, 100.0, 80.0), CERTAIN)
    over, bias = gains.over(Arm.OWN), gains.bias(Arm.OWN)
    assert over is not None and bias is not None
    assert bias == pytest.approx(1.2 / 1.05 - 1, abs=0.01)
    assert over.low < 0.05 < over.high and over.high - over.low < 0.1
    other = gains.over(Arm.NONE)  # never run: believed, with the doubt of models
    assert other is not None and other.value == pytest.approx(0.5, abs=0.02)
    assert other.high - other.low > 0.3


@pytest.mark.parametrize(
    ("num_checks", "noise"), [(0, 0.03), (1, 0.03), (3, 0.03), (8, 0.03), (20, 0.03), (60, 0.2)]
)
def test_interval_of_estimates_holds_the_true_gain_in_95_percent(
    num_checks: int, noise: float
) -> None:
    """Models that are wrong by 5% or so; blocks, of which the old ones fade, with a noise."""
    rng = np.random.default_rng(3)
    held = 0
    for _ in range(400):
        wrong, true = float(rng.normal(0.0, MODEL_ERROR)), float(rng.uniform(-0.1, 0.5))
        gains = GainEstimator()
        for block in range(60):
            off = math.exp(float(rng.normal(true + wrong, noise)))
            gains.note_block(Arm.SMARTSPEC, tally(100.0 * off, 100.0, 90.0), CERTAIN)
            if block >= 60 - num_checks:
                off = math.exp(float(rng.normal(wrong, noise)))
                gains.note_block(Arm.OWN, tally(100.0 * off, 100.0, 90.0), CERTAIN)
        over = gains.over(Arm.OWN)
        assert over is not None
        held += over.low <= math.expm1(true) <= over.high
    assert held / 400 >= 0.93


def test_what_a_check_showed_grows_old() -> None:
    """Until the estimate is the models' own again, with their doubt."""
    unchecked, gains = GainEstimator(), GainEstimator()
    for _ in range(10):
        gains.note_block(Arm.OWN, tally(110.0, 100.0, 80.0), CERTAIN)
    for each in (gains, unchecked):
        each.note_block(Arm.SMARTSPEC, tally(120.0, 100.0, 80.0), CERTAIN)
    values, widths = [], []
    for hours in (0.0, 1.0, 1.0, 20.0):
        aged = tally(120.0, 100.0, 80.0, seconds=hours * BIAS_LASTS_S + 1.0)
        gains.note_block(Arm.SMARTSPEC, aged, CERTAIN)
        over = gains.over(Arm.OWN)
        assert over is not None
        values.append(over.value)
        widths.append(over.high - over.low)
    assert values == sorted(values) and widths == sorted(widths)
    alone = unchecked.over(Arm.OWN)
    assert alone is not None and values[-1] == pytest.approx(alone.value, abs=1e-3)
    assert widths[-1] == pytest.approx(alone.high - alone.low, rel=0.01)


def test_interval_holds_the_true_gain_when_checks_are_rare_and_the_models_error_wanders() -> None:
    """An error of 5% that is another one after some hours, a check now and then."""
    rng = np.random.default_rng(4)
    held, true = 0, 0.15
    for _ in range(300):
        gains, wrong = GainEstimator(), float(rng.normal(0.0, MODEL_ERROR))

        def note(
            arm: Arm, log_goodput: float, seconds: float = 2.0, of: GainEstimator = gains
        ) -> None:
            goodput = 100.0 * math.exp(log_goodput + float(rng.normal(0.0, 0.02)))
            of.note_block(arm, tally(goodput, 100.0, 90.0, seconds=seconds), CERTAIN)

        for _ in range(8):
            note(Arm.OWN, wrong)
            waited_s = float(rng.uniform(600.0, 5000.0))
            keeps = math.exp(-waited_s / 7200.0)
            wrong = keeps * wrong + float(rng.normal(0.0, MODEL_ERROR * math.sqrt(1 - keeps**2)))
            note(Arm.SMARTSPEC, true + wrong, waited_s)
        for _ in range(100):
            note(Arm.SMARTSPEC, true + wrong)
        over = gains.over(Arm.OWN)
        assert over is not None
        held += over.low <= math.expm1(true) <= over.high
    assert held / 300 >= 0.93


def test_own_setting_counts_as_no_speculation_when_it_is_that() -> None:
    gains = GainEstimator(own_is_none=True)
    gains.note_block(Arm.OWN, tally(100.0, 110.0, 110.0), CERTAIN)
    assert gains.bias(Arm.NONE) == gains.bias(Arm.OWN) == pytest.approx(-1 / 11)
    gains.note_comparison(Arm.OWN, tally(120.0, 110.0, 110.0), tally(100.0, 110.0, 110.0))
    assert gains.comparisons[Arm.NONE].num_made == 1


def test_gain_is_bounded_however_little_is_known() -> None:
    everything = Interval.of_log(3.0, 5000.0)
    assert everything.low == pytest.approx(-1.0, abs=1e-5) and 1e6 < everything.high < 1e7
