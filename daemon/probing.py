"""Trying lengths that would not be chosen, so that their worth stays known.

A controller that never tries a length learns nothing about it: what it believes of deep or switched
off speculation would stay as it was. Probes are deliberate and paid from a budget: a share of the
engine's time, which at the value of time is the same share of its goodput. They stop while requests
wait. A probe is paid at what it is expected to cost, and then for what it brought less than
expected, and for the drafter's forward that follows it where drafts go on by themselves.

A first start sweeps: it tries lengths for all, the short ones first, so that what they show says
whether the long ones can be afforded.
"""

from __future__ import annotations

import numpy as np

from smartspec.daemon.engines import Engine, Observation
from smartspec.daemon.goodput import Optimum
from smartspec.engine_adapter.lengths import I64, CostCurve, DraftCost, Ladder, step_seconds

SWEEP_STEPS = 4  #: steps without drafts whose time the sweep may be expected to lose
MAX_TRIES = 50  #: steps that one length of the sweep may take to find something to draft
PROBE_TOKENS = 8  #: of a draft model in one probe, whose requests share the drafter's forwards
SPACING = 8  #: decisions between two probes, or two looks at what one would cost
#: Lengths probed in turn, 0 for the longest: while some requests speculate, and while none does.
#: Then what is wanted is news of the first draft, of which a cheap probe brings most.
TURNS, TURNS_WHEN_OFF = (2, 0, 1), (1, 1, 2, 1, 1, 0)
#: Of the budget, once settled: while drafting, much is learned without probes; while not, that it
#: would not pay. All of it is spent again while what the probes bring puts that in doubt.
SHARE_WHEN_SETTLED = 0.2
DOUBT = 0.15  #: of what it takes to tell that acceptance has changed
SETTLING_STEPS = 500  #: of a first start, whose sweep saw each size of pass only now and then
#: What was earned in more than this time, or in these steps where they are long, is not saved up:
#: else what was saved while nothing was drafted is spent in a burst once something is.
SAVINGS_S, SAVINGS_STEPS = 60.0, 1000


def sweep_lengths(max_length: int) -> list[int]:
    """What the sweep tries: lengths that double, up and down again.

    >>> sweep_lengths(5)
    [0, 1, 2, 4, 5, 5, 4, 2, 1, 0]
    """
    if not max_length:
        return []
    up = [0, *(1 << i for i in range((max_length - 1).bit_length())), max_length]
    return up + up[::-1]


class Prober:
    """One engine's probes.

    Parameters
    ----------
    max_length : longest length of the engine
    share : of goodput that probing may cost, 0 to 1
    sweep : whether this is a first start: try lengths that double, each twice, outside the budget;
        and spend the whole budget for a while
    """

    def __init__(self, max_length: int, share: float, sweep: bool) -> None:
        self.share = share
        self.max_length = max_length
        self._sweep = sweep_lengths(max_length) if sweep else []
        self._sweep_cost_s = 0.0
        self._settling = SETTLING_STEPS if sweep else 0
        self._tries = 0
        self._turn = 0
        self.num_probes = 0
        self._since_last = 0
        self._in_doubt = False  #: whether acceptance may have risen
        self.cost_s = 0.0  #: time given up for probes so far, at the value of time
        self._purse_s = 0.0

    @property
    def sweeping(self) -> bool:
        return bool(self._sweep)

    def account(self, observation: Observation) -> None:
        """Earn from a step, and cross off what it tried of the sweep."""
        settled = not self._settling
        self._settling = max(0, self._settling - 1)
        reduced = settled and (observation.drafted_any or not self._in_doubt)
        share = self.share * (SHARE_WHEN_SETTLED if reduced else 1.0)
        step_s = observation.report.step_s
        most_s = share * max(SAVINGS_S, SAVINGS_STEPS * step_s)
        self._purse_s = min(self._purse_s + share * step_s, most_s)
        if not self._sweep or observation.report.num_waiting or not len(observation.batch.ids):
            return
        tried = int(observation.num_drafted.max(initial=0))
        self._tries += 1
        if tried in self._sweep:
            last_told = len(self._sweep) - 1 - self._sweep[::-1].index(tried)
            del self._sweep[last_told]
            self._tries = 0
        elif self._tries >= MAX_TRIES:
            self._sweep.pop(0)
            self._tries = 0

    def next_sweep_length(self, observation: Observation) -> int | None:
        """The length that all requests should try next to seed the models; None: no sweep now.

        Each call goes on to the next, since what was told shows only some steps later.
        """
        if not self._sweep or observation.report.num_waiting:
            return None
        self._sweep.append(self._sweep.pop(0))
        return self._sweep[-1]

    def plan(
        self,
        engine: Engine,
        optimum: Optimum,
        ladder: Ladder,
        curve: CostCurve,
        draft: DraftCost,
        num_other_tokens: int,
    ) -> tuple[int, int]:
        """Length and number of requests to probe in the next step; (0, 0) for none."""
        observation = engine.last
        if self.max_length == 0 or ladder.size == 0 or observation is None:
            return 0, 0
        self._in_doubt = engine.acceptance.rise > DOUBT
        self._correct(observation, optimum, ladder, draft)
        if observation.report.num_waiting:
            return 0, 0
        if self._sweep:
            self._afford_sweep(optimum, ladder, curve, draft, num_other_tokens)
            return 0, 0
        self._since_last += 1
        if self._since_last < SPACING or self._purse_s <= 0:
            return 0, 0
        self._since_last = 0
        turns = TURNS if optimum.choice.lengths.any() else TURNS_WHEN_OFF
        length = min(turns[self._turn % len(turns)] or self.max_length, self.max_length)
        count = 1
        if draft.per_forward_s > 0:
            count = min(ladder.size, max(1, PROBE_TOKENS // length))
        cost_s = self._cost_s(optimum, ladder, curve, draft, num_other_tokens, length, count)
        if cost_s is None or cost_s > self._purse_s:
            return 0, 0
        self._pay(cost_s)
        self.num_probes += 1
        self._turn += 1
        return length, count

    def _pay(self, cost_s: float) -> None:
        self._purse_s -= cost_s
        self.cost_s += cost_s

    def _correct(
        self, observation: Observation, optimum: Optimum, ladder: Ladder, draft: DraftCost
    ) -> None:
        """Pay for what a probe brought less than was expected, and for a forward that follows it.

        Some engines run the first forward of whoever was drafted for in the step before, whether or
        not anything is then drafted.
        """
        report = observation.report
        if report.source == "probe":
            drafted = np.arange(ladder.max_length)[:, None] < observation.num_drafted
            expected = ladder.weight_sum + float(ladder.worth[drafted].sum())
            self._pay((expected - observation.weighted_tokens) / optimum.value_of_time)
        elif report.num_draft_forwards and not observation.drafted_any:
            self._pay(draft.by_depth(report.num_draft_forwards))

    def _afford_sweep(
        self,
        optimum: Optimum,
        ladder: Ladder,
        curve: CostCurve,
        draft: DraftCost,
        num_other_tokens: int,
    ) -> None:
        """Pay for the sweep's next length; give up those that would cost too much by now."""
        best = optimum.choice
        most_s = SWEEP_STEPS * float(curve.at(ladder.size + num_other_tokens))
        while self._sweep:
            lengths, gain = ladder.at(self._sweep[0])
            present = 1.0 if ladder.presence is None else ladder.presence
            drafts = np.array(float((lengths * present).sum()))
            num_tokens = ladder.size + num_other_tokens + drafts
            seconds = float(step_seconds(curve, draft, num_tokens, drafts, int(lengths.max())))
            loss_s = (best.gain - gain) / optimum.value_of_time + seconds - best.seconds
            if self._sweep_cost_s + loss_s <= most_s:
                self._sweep_cost_s += max(0.0, loss_s)
                return
            self._sweep.pop(0)
            self._tries = 0

    @staticmethod
    def _cost_s(
        optimum: Optimum,
        ladder: Ladder,
        curve: CostCurve,
        draft: DraftCost,
        num_other_tokens: int,
        length: int,
        count: int,
    ) -> float | None:
        """Expected time lost by the probe, less its gain at the value of time; None: no probe."""
        lengths = optimum.choice.lengths
        most = ladder.clip(length)
        able = np.flatnonzero(most > lengths)
        if not len(able):
            return None
        probed = able[np.argsort(lengths[able], kind="stable")[:count]]
        after = lengths.copy()
        after[probed] = most[probed]
        depths = np.arange(ladder.max_length)[:, None]
        added = (depths >= lengths) & (depths < after)
        gain = float(ladder.worth[added].sum())

        def seconds(k: I64) -> float:
            drafts = np.array(float(k.sum()))
            depth = int(k.max(initial=0))
            num_tokens = ladder.size + num_other_tokens + drafts
            return float(step_seconds(curve, draft, num_tokens, drafts, depth))

        extra_s = seconds(after) - seconds(lengths)
        return max(0.0, extra_s - gain / optimum.value_of_time)
