"""What an engine runs when: SmartSpec, its own setting, or no speculation, in blocks of seconds.

All requests of a step share its time, so that steering a share of the requests would slow or speed
the others too and compare nothing. What is compared is therefore *time*: neighbouring blocks, one
of each kind, in an order drawn by lot. The order is what makes the comparison fair: whatever drifts
(load, clocks, what people ask) meets both alike.

One scheme serves all stances. There is what the engine runs at *home*, and now and then a pair of
blocks, one of home and one of another arm, so that the others have a *share* of the time:

    stance      home        others       share
    observe     own         -            0
    canary      own         smartspec    adoption.canary_share
    control     smartspec   own, none    adoption.check_loss over what they lose (below)
    paused      own         -            0
    retreated   own         -            0, until it is time to try again

What comparing costs
--------------------
In control each alternative has its own half of `adoption.check_loss`, and rests until a block of
it is paid for from that: the more it is known to lose, the longer. Known is the low end of the gain
over it (gain.py), so that what is uncertain is looked at often and what is certain seldom; as it
grows old it is less certain. Of the own setting nothing is known before the first pair with it, nor
while pairs speak against SmartSpec: those who may be wrong have no say in when they are checked.

A block is taken to lose `LEAST_LOSS` of its goodput at least, so that comparisons have at most 10
times `check_loss` of the time. It cannot lose more than all, so that they have at least
`check_loss` of it, whatever the models are sure of. Under suspicion half of the time goes to pairs
with the own setting. When a pair begins depends on nothing but what came before, and its order is
drawn by lot as ever.

Retreat
-------
Of each pair of SmartSpec and own setting, x = -(difference of log goodput + tolerance) is evidence
that SmartSpec is worse by more than the tolerance. While it is not, x is symmetric about a value
<= 0 (the order of the two was drawn by lot), and then E[exp(l x - l^2 x^2 / 2)] <= 1 for every
l > 0: at 0 this is de la Pena's (Annals of Probability 27, 1999, 537), from
cosh(v) <= exp(v^2 / 2). Below 0 take two mirror images v >= w of l x, and f(v) = exp(v - v^2 / 2),
which rises up to v = 1. If v < 0, both f(v) and f(w) are below 1. Else w <= -v <= 0, so that
f(w) <= f(-v), and f(v) + f(w) <= f(v) + f(-v) <= 2 as at 0. Neither variance nor shape need be
known. Restarted whenever it falls below 1, the running product is a CUSUM e-detector (Shin, Ramdas
and Rinaldo, "E-detectors", 2024): an average over several l that crosses c does so by mistake once
in c pairs at most, on average.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from smartspec.daemon.adoption.gain import GainEstimator, Tally
from smartspec.daemon.config import AdoptionSettings
from smartspec.daemon.decision import Arm

MIN_STEPS = 16  #: of a block
WASHOUT_STEPS = 3  #: after a change of arm: a drafter that catches up, a batch of mixed origin
VOID_AFTER = 5.0  #: blocks' time without an end: the engine does not do as it is told
BETS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)  #: l, per unit of log goodput
PAIRS_PER_FALSE_ALARM = 1000.0  #: at least, on average
LEAST_LOSS = 0.1  #: of a block's goodput, that an alternative is taken to lose
NO_EVIDENCE = 1.0
SUSPICIOUS = 2.0  #: evidence from which on half of the time is spent on pairs
PROBATION_PAIRS = 20  #: in a row, after a retreat
LONGEST_RETRY_S = 86_400.0
REFORMED = 10.0  #: having run this many times the last wait, the next wait is a first one again


class Evidence:
    """That SmartSpec is worse than the engine's own setting by more than ``tolerance``.

    >>> evidence = Evidence(tolerance=0.02)
    >>> for _ in range(20): evidence.add(-0.15)
    >>> evidence.value < PAIRS_PER_FALSE_ALARM
    True
    >>> for _ in range(5): evidence.add(-0.15)
    >>> evidence.value > PAIRS_PER_FALSE_ALARM
    True
    """

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance
        self.reset()

    def reset(self) -> None:
        self._logs = [0.0] * len(BETS)

    def add(self, difference: float) -> None:
        """Take in a pair's difference of log goodput, SmartSpec's less its own."""
        x = -(difference + self.tolerance)
        self._logs = [
            max(log, 0.0) + bet * x - 0.5 * (bet * x) ** 2
            for bet, log in zip(BETS, self._logs, strict=True)
        ]

    @property
    def value(self) -> float:
        """0 and more; 1 at the start."""
        return sum(math.exp(min(log, 700.0)) for log in self._logs) / len(BETS)


class Plan(NamedTuple):
    """What runs at home, and which others for what share of the time."""

    home: Arm
    others: tuple[Arm, ...] = ()
    share: float = 0.0  #: of all others together, at most

    @property
    def is_control(self) -> bool:
        """Whether others run to learn what SmartSpec gains, and lose what it does."""
        return self.home is Arm.SMARTSPEC


class _Rest:
    """Of an arm between two pairs: blocks since the last one, and what its length is times."""

    def __init__(self, luck: float) -> None:
        self.luck = luck
        self.num_blocks = 0


class _Block:
    """A stretch of steps under one arm."""

    def __init__(self, arm: Arm, in_pair: bool, washout: int) -> None:
        self.arm = arm
        self.in_pair = in_pair
        self.washout = washout
        self.tally = Tally()
        self.seconds = 0.0  #: those before the arm was in force, and washed out, included
        self.is_void = False


class Step(NamedTuple):
    """What a trial needs to know of a step."""

    step_s: float
    tokens: float  #: emitted, by the requests' weights; and those that its prompts stand for
    chosen: float  #: goodput predicted of the optimum, tokens per second
    otherwise: Mapping[Arm, float]  #: and of the alternatives
    model_std: Callable[[], Mapping[Arm, float]]  #: deviation of log predicted gain over them
    obeyed: bool  #: its lengths were those of the arm
    comparable: bool = True  #: False: other aims than goodput were at work
    num_waiting: int = 0


class Trial:
    """One engine's schedule of arms, and what comes of it.

    Parameters
    ----------
    mode : "observe", "canary" or "control"
    settings : the section ``adoption``
    seed : of the order of blocks
    own_is_none : whether the engine's own setting is not to speculate
    """

    def __init__(
        self, mode: str, settings: AdoptionSettings, seed: int = 0, own_is_none: bool = False
    ) -> None:
        self._mode = mode
        self._settings = settings
        self._rng = np.random.default_rng(seed)
        self._own_is_none = own_is_none
        self.gains = GainEstimator(own_is_none)
        self.evidence = Evidence(settings.tolerance)
        self.is_paused = False
        self.num_retreats = 0
        self.retry_at: float | None = None  #: of the clock; None: not retreated
        self._wait_s = 0.0
        self._resumed_at = -math.inf
        self._probation = 0
        self._plan = Plan(Arm.OWN)
        self._rests: dict[Arm, _Rest] = {}
        self._pair: deque[Arm] = deque()
        self._done: dict[Arm, Tally] = {}
        self._waiting = False
        self._block = _Block(Arm.OWN, False, 0)

    def adjust(self, settings: AdoptionSettings) -> None:
        """Go on with other settings, from the next block on."""
        self._settings = settings
        self.evidence.tolerance = settings.tolerance

    # -- what to run ----------------------------------------------------------------------------

    def stance(self, now: float) -> str:
        """How the engine is treated: the mode, or "paused", or "retreated"."""
        if self.is_paused:
            return "paused"
        if self.retry_at is not None and now < self.retry_at:
            return "retreated"
        return self._mode

    def arm(self, now: float) -> Arm:
        """What the next step should run; ``now`` by a monotonic clock, seconds."""
        if self.retry_at is not None and now >= self.retry_at:
            self.retry_at = None
            self._resumed_at = now
            self._probation = PROBATION_PAIRS
        plan = self._plan_of(self.stance(now))
        if plan != self._plan:
            self._plan = plan
            self._rests = {other: self._draw_rest() for other in plan.others}
            self._drop_pair()
            self._begin()
        return self._block.arm

    @property
    def current(self) -> Arm:
        """The arm of the block under way."""
        return self._block.arm

    def interrupt(self) -> None:
        """The engine comes anew: what was under way is not counted."""
        self._drop_pair()
        self._begin()

    def _plan_of(self, stance: str) -> Plan:
        settings = self._settings
        if stance == "canary":
            return Plan(Arm.OWN, (Arm.SMARTSPEC,), settings.canary_share)
        if stance == "control":
            others = (Arm.OWN,) if self._own_is_none else (Arm.OWN, Arm.NONE)
            return Plan(Arm.SMARTSPEC, others, settings.check_loss / LEAST_LOSS)
        return Plan(Arm.OWN)

    @property
    def is_suspicious(self) -> bool:
        """Whether there is reason to compare as often as can be."""
        if not self._plan.is_control or not self._plan.share:
            return False
        if self.evidence.value >= SUSPICIOUS or self._probation:
            return True
        gain = self.gains.over(Arm.OWN)
        return gain is not None and gain.value < -self._settings.tolerance

    def _draw_rest(self) -> _Rest:
        # Uniform about its mean, lest pairs keep step with something periodic.
        return _Rest(luck=float(self._rng.uniform(0.5, 1.5)))

    def _drop_pair(self) -> None:
        self._pair.clear()
        self._done.clear()

    def _begin(self) -> None:
        """The next block."""
        if not self._pair:
            self._pair.extend(self._draw_pair())
        in_pair = bool(self._pair)
        arm = self._pair.popleft() if in_pair else self._plan.home
        if not in_pair:
            for rest in self._rests.values():
                rest.num_blocks += 1
        changed = arm is not self._block.arm
        self._block = _Block(arm, in_pair, WASHOUT_STEPS if changed else 0)

    def _draw_pair(self) -> list[Arm]:
        """Home and another in either order; nothing while none is due."""
        other = self._due()
        if other is None:
            return []
        self._rests[other] = self._draw_rest()
        pair = [self._plan.home, other]
        return pair if self._rng.integers(2) else pair[::-1]

    def _due(self) -> Arm | None:
        """Who has rested long enough, the one who did so by most blocks; None for nobody."""
        if self.is_suspicious:
            return Arm.OWN
        over = {
            other: rest.num_blocks - self._length_of(other) for other, rest in self._rests.items()
        }
        if self._waiting:
            over.pop(Arm.NONE, None)  # the queue must not grow for the sake of knowing
        other = max(over, key=over.__getitem__, default=None)
        return other if other is not None and over[other] >= 0.0 else None

    def _length_of(self, other: Arm) -> float:
        """Blocks of rest between two pairs with ``other``, by what is known now."""
        share = self._plan.share / len(self._plan.others)
        if self._plan.is_control:
            share *= LEAST_LOSS / max(LEAST_LOSS, self._known_loss(other))
        return round(self._rests[other].luck * (1.0 / share - 2.0)) if share else math.inf

    def _known_loss(self, other: Arm) -> float:
        """Share of its goodput that a block of ``other`` loses at least, as far as is known."""
        if other is Arm.OWN and self.evidence.value >= NO_EVIDENCE:
            return 0.0  # not a pair yet, or pairs against us: the models' word is not enough
        gain = self.gains.over(other)
        return 0.0 if gain is None else 1.0 - 1.0 / (1.0 + max(gain.low, 0.0))

    # -- what came of it ------------------------------------------------------------------------

    def note(self, step: Step, now: float) -> str | None:
        """Take in a step; returns words when SmartSpec retreats by it."""
        block, settings = self._block, self._settings
        self._waiting = step.num_waiting > 0
        block.seconds += step.step_s
        if not step.comparable or (block.arm is Arm.NONE and self._waiting):
            block.is_void = True
        if step.obeyed and block.washout:
            block.washout -= 1
        elif step.obeyed:
            block.tally.add(step.step_s, step.tokens, step.chosen, step.otherwise)
        complete = block.tally.seconds >= settings.block_s and block.tally.num_steps >= MIN_STEPS
        if not complete and block.seconds < VOID_AFTER * max(
            settings.block_s, MIN_STEPS * step.step_s
        ):
            return None
        return self._end(complete and not block.is_void and block.tally.is_usable, step, now)

    def _end(self, is_good: bool, step: Step, now: float) -> str | None:
        block = self._block
        words = None
        try:
            if is_good and self._is_telling(block.arm):
                self.gains.note_block(block.arm, block.tally, step.model_std())
            if block.in_pair:
                if is_good:
                    self._done[block.arm] = block.tally
                if not self._pair:
                    words = self._compare(now)
                    self._drop_pair()
        finally:
            self._begin()  # whatever went wrong: the block is over
        return words

    def _is_telling(self, arm: Arm) -> bool:
        """Whether a block says something of the gain.

        What was measured is only compared with what else was measured in the same time: where
        nothing is compared, steered steps say nothing, and others what is foreseen.
        """
        if self._plan.share:
            return True
        return arm is not Arm.SMARTSPEC and not self.gains.is_measured

    def _compare(self, now: float) -> str | None:
        smartspec = self._done.get(Arm.SMARTSPEC)
        if smartspec is None or len(self._done) < 2:
            return None  # one of the two was void
        (other,) = (arm for arm in self._done if arm is not Arm.SMARTSPEC)
        difference = self.gains.note_comparison(other, smartspec, self._done[other])
        if other is not Arm.OWN:
            return None
        self._probation = max(0, self._probation - 1)
        self.evidence.add(difference)
        return self._retreat(now) if self.evidence.value >= PAIRS_PER_FALSE_ALARM else None

    def _retreat(self, now: float) -> str:
        measured = self.gains.comparisons[Arm.OWN].interval()
        first_s = self._settings.retry_s
        if self._wait_s and now - self._resumed_at < REFORMED * self._wait_s:
            self._wait_s = min(2.0 * self._wait_s, max(LONGEST_RETRY_S, first_s))
        else:
            self._wait_s = first_s
        self.num_retreats += 1
        self.retry_at = now + self._wait_s
        self.evidence.reset()
        self._probation = 0
        by = (
            f" ({measured.value:+.1%}, {measured.low:+.1%} to {measured.high:+.1%})"
            if measured
            else ""
        )
        return (
            f"measurably worse than the engine's own setting{by}: left to it for "
            f"{self._wait_s:.0f} s, then tried again"
        )
