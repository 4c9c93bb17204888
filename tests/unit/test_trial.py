"""Trials: what runs when, that comparisons are fair, and when SmartSpec gives way."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest

from smartspec.daemon.adoption.trial import (
    BETS,
    MIN_STEPS,
    PAIRS_PER_FALSE_ALARM,
    Evidence,
    Step,
    Trial,
)
from smartspec.daemon.config import AdoptionSettings
from smartspec.daemon.decision import Arm

STEP_S = 0.125


class Rig:
    """A trial of an engine whose goodputs are known, and whose load wanders."""

    def __init__(
        self,
        mode: str,
        goodputs: dict[Arm, float],
        *,
        noise: float = 0.05,
        seed: int = 0,
        own_is_none: bool = False,
        predicted: dict[Arm, float] | None = None,
        model_std: float = 0.0,
        **settings: Any,
    ) -> None:
        self.trial = Trial(mode, AdoptionSettings(**settings), seed, own_is_none)
        self.goodputs = goodputs
        self.noise = noise
        self.predicted = predicted or {Arm.OWN: 100.0, Arm.NONE: 90.0}
        self.model_std = dict.fromkeys(self.predicted, model_std)
        self.rng = np.random.default_rng(seed + 1)
        self.now = 0.0
        self.arms: list[Arm] = []
        self.said: list[str] = []
        self.load = 0.0
        self.num_waiting = 0
        self.comparable = True
        self.obeys = True

    def step(self) -> None:
        arm = self.trial.arm(self.now)
        # Known load cancels; of what remains, the larger part is the same for neighbours.
        self.load = 0.99 * self.load + float(self.rng.normal(0, 0.01))
        factor = math.exp(self.load + float(self.rng.normal(0, self.noise)))
        step = Step(
            step_s=STEP_S,
            tokens=STEP_S * self.goodputs[arm] * factor,
            chosen=110.0,
            otherwise=self.predicted,
            model_std=lambda: self.model_std,
            obeyed=self.obeys,
            comparable=self.comparable,
            num_waiting=self.num_waiting,
        )
        words = self.trial.note(step, self.now)
        if words is not None:
            self.said.append(words)
        self.arms.append(arm)
        self.now += STEP_S

    def run(self, seconds: float) -> Rig:
        for _ in range(round(seconds / STEP_S)):
            self.step()
        return self

    def share(self, arm: Arm) -> float:
        return Counter(self.arms)[arm] / len(self.arms)


def fail(*_: Any) -> None:
    raise ZeroDivisionError


EQUAL = dict.fromkeys(Arm, 100.0)
WORSE = {Arm.SMARTSPEC: 90.0, Arm.OWN: 100.0, Arm.NONE: 80.0}
BETTER = {Arm.SMARTSPEC: 120.0, Arm.OWN: 100.0, Arm.NONE: 80.0}
MUCH_BETTER = {Arm.SMARTSPEC: 200.0, Arm.OWN: 100.0, Arm.NONE: 50.0}


# -- what runs when -------------------------------------------------------------------------------


def test_engine_is_left_to_itself_when_observing() -> None:
    rig = Rig("observe", BETTER).run(100)
    assert set(rig.arms) == {Arm.OWN}
    over = rig.trial.gains.over(Arm.OWN)
    assert over is not None and over.value == pytest.approx(0.1)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_share_of_time_is_kept_when_canary(share: float) -> None:
    rig = Rig("canary", BETTER, canary_share=share).run(2000)
    # A change of arm costs a few steps that belong to neither.
    assert rig.share(Arm.SMARTSPEC) == pytest.approx(share, rel=0.15)
    assert rig.share(Arm.NONE) == 0.0


@pytest.mark.parametrize("goodputs", [BETTER, MUCH_BETTER], ids=["better", "much better"])
def test_comparisons_cost_what_was_promised_when_in_control(goodputs: dict[Arm, float]) -> None:
    rig = Rig("control", goodputs, noise=0.02, check_loss=0.004).run(40_000)
    lost = {
        arm: rig.share(arm) * (1 - goodputs[arm] / goodputs[Arm.SMARTSPEC])
        for arm in (Arm.OWN, Arm.NONE)
    }
    # Of what they are known to lose, which is less than they do, half each.
    assert 0.5 * 0.004 < sum(lost.values()) < 1.5 * 0.004
    assert lost[Arm.OWN] == pytest.approx(lost[Arm.NONE], rel=0.5)


def test_comparisons_that_lose_nothing_have_ten_times_their_share_of_the_time() -> None:
    rig = Rig("control", EQUAL, check_loss=0.002).run(8000)
    assert 1 - rig.share(Arm.SMARTSPEC) == pytest.approx(0.02, rel=0.25)
    assert rig.share(Arm.OWN) == pytest.approx(rig.share(Arm.NONE), rel=0.3)


def test_what_is_not_known_is_compared_more_often() -> None:
    shares = []
    for std in (0.0, 1.0):
        rig = Rig("control", MUCH_BETTER, model_std=std, check_loss=0.004).run(600)
        shares.append(1 - rig.share(Arm.SMARTSPEC))
    assert shares[1] > 2 * shares[0] > 0


def test_no_model_is_so_sure_that_it_is_not_checked() -> None:
    """Promised the moon: the alternatives are predicted to bring nearly nothing."""
    rig = Rig("control", BETTER, predicted={Arm.OWN: 1e-6, Arm.NONE: 1e-6}, check_loss=0.01)
    rig.run(1000)
    assert rig.share(Arm.OWN) > 0.7 * 0.01 / 2 and rig.share(Arm.NONE) > 0.7 * 0.01 / 2


def test_nothing_is_checked_when_it_may_cost_nothing() -> None:
    rig = Rig("control", WORSE, check_loss=0.0).run(2000)
    assert set(rig.arms) == {Arm.SMARTSPEC} and not rig.said
    assert rig.trial.gains.over(Arm.OWN) is None  # nothing is measured


def test_block_ends_whatever_goes_wrong_with_it() -> None:
    rig = Rig("canary", BETTER, canary_share=0.5)
    note_block, rig.trial.gains.note_block = rig.trial.gains.note_block, fail  # type: ignore[method-assign]
    failed = 0
    for _ in range(3000):
        try:
            rig.step()
        except ZeroDivisionError:
            failed += 1
    assert 5 < failed < 300  # once a block, and not with every step after it
    rig.trial.gains.note_block = note_block  # type: ignore[method-assign]
    rig.run(300)
    assert rig.trial.gains.over(Arm.OWN) is not None


def test_order_of_a_pair_is_drawn_by_lot_and_by_seed() -> None:
    rig = Rig("canary", EQUAL, canary_share=0.5).run(2000)
    blocks = [arm for arm, _ in itertools.groupby(rig.arms)]
    again = Rig("canary", EQUAL, canary_share=0.5).run(2000)
    assert rig.arms == again.arms
    assert Rig("canary", EQUAL, canary_share=0.5, seed=5).run(2000).arms != rig.arms
    # Strict alternation would give as many runs as blocks.
    assert 0.6 < len(blocks) / (2000 / 2.2) < 0.9


def test_queue_does_not_grow_for_the_sake_of_knowing() -> None:
    rig = Rig("control", EQUAL, check_loss=0.01)
    rig.num_waiting = 3
    rig.run(500)
    assert rig.share(Arm.NONE) == 0.0 and rig.share(Arm.OWN) > 0.04


def test_no_speculation_is_not_run_apart_when_it_is_the_own_setting() -> None:
    rig = Rig("control", BETTER, check_loss=0.02, own_is_none=True).run(500)
    assert rig.share(Arm.NONE) == 0.0
    assert rig.trial.gains.comparisons[Arm.NONE].num_made > 5


def test_pause_and_release_take_effect_at_once() -> None:
    rig = Rig("control", BETTER).run(10)
    rig.trial.is_paused = True
    assert rig.trial.arm(rig.now) is Arm.OWN and rig.trial.stance(rig.now) == "paused"
    rig.run(100)
    assert set(rig.arms[-100:]) == {Arm.OWN}
    rig.trial.is_paused = False
    assert rig.trial.arm(rig.now) is Arm.SMARTSPEC and rig.trial.stance(rig.now) == "control"


# -- what counts ----------------------------------------------------------------------------------


def test_steps_do_not_count_until_the_arm_is_in_force() -> None:
    rig = Rig("canary", BETTER, canary_share=0.5)
    rig.obeys = False
    rig.run(200)
    assert rig.trial.gains.over(Arm.OWN) is None
    assert rig.trial.gains.comparisons[Arm.OWN].num_made == 0
    assert rig.share(Arm.SMARTSPEC) > 0.3  # and it is not waited for for ever


def test_blocks_bent_by_other_aims_are_void() -> None:
    rig = Rig("canary", WORSE, canary_share=0.5)
    rig.comparable = False
    rig.run(500)
    assert rig.trial.gains.comparisons[Arm.OWN].num_made == 0 and not rig.said


def test_slow_steps_make_longer_blocks_not_noisier_ones() -> None:
    trial = Trial("canary", AdoptionSettings(canary_share=0.5, block_s=STEP_S))
    rig = Rig("canary", BETTER)
    rig.trial = trial
    rig.run(100)
    runs = [len(list(steps)) for _, steps in itertools.groupby(rig.arms)]
    assert min(runs[:-1]) >= MIN_STEPS


def test_what_was_under_way_is_dropped_when_the_engine_comes_anew() -> None:
    rig = Rig("canary", BETTER, canary_share=0.5).run(7)
    rig.trial.interrupt()
    assert rig.trial._block.tally.num_steps == 0 and not rig.trial._done


def test_measured_gain_holds_the_truth_when_load_wanders() -> None:
    held = 0
    for seed in range(40):
        rig = Rig("canary", BETTER, canary_share=0.5, seed=seed).run(80)
        interval = rig.trial.gains.comparisons[Arm.OWN].interval()
        assert interval is not None
        held += interval.low <= 0.2 <= interval.high
        assert interval.high - interval.low < 0.15
    assert held >= 35


# -- retreat --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["normal", "student", "two_points", "skew_shift"])
def test_false_alarms_are_rarer_than_stated_when_at_the_edge_of_the_tolerance(shape: str) -> None:
    rng = np.random.default_rng(4)
    num_pairs, tolerance = 30_000, 0.02
    noise = {
        "normal": lambda: rng.normal(0, 0.03, num_pairs),
        "student": lambda: rng.standard_t(2.5, num_pairs) * 0.05,
        "two_points": lambda: rng.choice([-0.1, 0.1], num_pairs),
        # Symmetric about values that wander, none of them worse than the tolerance.
        "skew_shift": lambda: rng.exponential(0.02, num_pairs) + rng.normal(0, 0.03, num_pairs),
    }[shape]()
    evidence, alarms = Evidence(tolerance), 0
    for x in noise - tolerance:
        evidence.add(float(x))
        if evidence.value >= PAIRS_PER_FALSE_ALARM:
            alarms += 1
            evidence.reset()
    assert alarms <= num_pairs / PAIRS_PER_FALSE_ALARM


def test_bet_is_fair_when_the_difference_is_symmetric() -> None:
    """E[exp(l x - l^2 x^2 / 2)] <= 1 for any mirror pair, also moved to the better side."""
    for bet, u, moved in itertools.product(BETS, np.geomspace(1e-4, 3, 40), (0, 1e-3, 0.1, 2)):
        pair = np.array([u, -u]) - moved
        assert np.exp(bet * pair - 0.5 * (bet * pair) ** 2).mean() <= 1 + 1e-12


def test_nothing_is_given_up_when_both_are_equal() -> None:
    for seed in range(5):
        rig = Rig("canary", EQUAL, canary_share=0.5, seed=seed).run(2000)
        assert not rig.said and rig.trial.gains.comparisons[Arm.OWN].num_made > 400


@pytest.mark.parametrize("mode", ["canary", "control"])
def test_engine_is_left_to_itself_when_smartspec_is_a_tenth_worse(mode: str) -> None:
    for seed in range(5):
        rig = Rig(mode, WORSE, seed=seed, canary_share=0.5)
        while not rig.said:
            rig.run(10)
            assert rig.now < 1200
        assert "measurably worse" in rig.said[0] and "300 s" in rig.said[0]
        assert rig.trial.stance(rig.now) == "retreated"
        assert rig.trial.arm(rig.now) is Arm.OWN
        assert rig.trial.gains.comparisons[Arm.OWN].num_made < 60


def test_engine_is_left_to_itself_as_soon_when_the_models_are_sure_of_the_contrary() -> None:
    """The own setting is predicted to bring nearly nothing, and brings more."""
    for seed in range(5):
        rig = Rig("control", WORSE, seed=seed, predicted={Arm.OWN: 1e-6, Arm.NONE: 80.0})
        while not rig.said:
            rig.run(10)
            assert rig.now < 2400
        assert rig.trial.gains.comparisons[Arm.OWN].num_made < 30


def test_suspicion_spends_more_on_comparing_and_passes_when_unfounded() -> None:
    rig = Rig("control", BETTER).run(60)
    assert rig.share(Arm.OWN) < 0.1
    rig.goodputs = WORSE
    while not rig.trial.is_suspicious:
        rig.run(2)
        assert rig.now < 200  # by the models alone: no check was needed
    rig.arms.clear()
    rig.run(30)
    assert rig.share(Arm.OWN) > 0.3
    rig.goodputs = BETTER
    rig.run(200)
    rig.arms.clear()
    rig.run(400)
    assert rig.share(Arm.OWN) < 0.05 and not rig.said


def test_waits_grow_and_start_over_when_it_went_well_for_long() -> None:
    rig = Rig("control", WORSE, retry_s=100.0)
    waits = []
    for count in range(1, 4):
        while len(rig.said) < count:
            rig.run(10)
        waits.append(rig.trial.retry_at - rig.now)  # type: ignore[operator]
        rig.run(waits[-1] + 1)
    assert waits == pytest.approx([100, 200, 400], abs=11)
    rig.goodputs = BETTER
    rig.run(4100)
    rig.goodputs = WORSE
    while len(rig.said) < 4:
        rig.run(10)
    assert rig.trial.retry_at is not None
    assert rig.trial.retry_at - rig.now == pytest.approx(100, abs=11)
