"""Trying lengths that would not be chosen, so that their worth stays known.

A controller that never tries a length learns nothing about it: what it believes of deep or switched
off speculation would stay as it was. Probes are deliberate and paid from a budget: a share of the
engine's time, which at the value of time is the same share of its goodput. They stop while requests
wait.
"""

from __future__ import annotations

import numpy as np

from smartspec.daemon.engines import Engine, Observation
from smartspec.daemon.goodput import Optimum
from smartspec.engine_adapter.lengths import I64, CostCurve, DraftCost, Ladder, step_seconds

SWEEPS = 2  #: times that the first start tries every length
MAX_TRIES = 50  #: steps that one length of the sweep may take to find something to draft
BATCH_PROBES = 8  #: requests that share the drafter's forwards in one probe
SPACING = 8  #: decisions between two probes, or two looks at what one would cost
#: Lengths probed in turn, 0 for the longest: while some requests speculate, and while none does.
#: Then what is wanted is news of the first draft, of which a cheap probe brings most.
TURNS, TURNS_WHEN_OFF = (2, 0, 1), (1, 1, 2, 1, 1, 0)
SHARE_WHILE_DRAFTING = 0.2  #: of the budget, once settled: much is then learned without probes
SETTLING_STEPS = 1000  #: of a first start, whose sweep saw each size of pass only now and then
#: What was earned in more than this time, or in these steps where they are long, is not saved up:
#: else what was saved while nothing was drafted is spent in a burst once something is.
SAVINGS_S, SAVINGS_STEPS = 60.0, 1000


class Prober:
    """One engine's probes.

    Parameters
    ----------
    max_length : longest length of the engine
    share : of goodput that probing may cost, 0 to 1
    sweep : whether this is a first start: try all lengths, each twice, outside the budget; and
        spend the whole budget for a while
    """

    def __init__(self, max_length: int, share: float, sweep: bool) -> None:
        self.share = share
        self.max_length = max_length
        self._sweep = list(range(max_length, -1, -1)) * SWEEPS if sweep and max_length else []
        self._settling = SETTLING_STEPS if sweep else 0
        self._tries = 0
        self._turn = 0
        self.num_probes = 0
        self._since_last = 0
        self.cost_s = 0.0  #: expected time given up for probes so far
        self._purse_s = 0.0

    @property
    def sweeping(self) -> bool:
        return bool(self._sweep)

    def account(self, observation: Observation) -> None:
        """Earn from a step, and cross off what it tried of the sweep."""
        settled = not self._settling
        self._settling = max(0, self._settling - 1)
        reduced = settled and observation.num_drafted.any()
        share = self.share * (SHARE_WHILE_DRAFTING if reduced else 1.0)
        step_s = observation.report.step_s
        most_s = share * max(SAVINGS_S, SAVINGS_STEPS * step_s)
        self._purse_s = min(self._purse_s + share * step_s, most_s)
        if not self._sweep or observation.report.num_waiting or not len(observation.batch.ids):
            return
        tried = int(observation.num_drafted.max(initial=0))
        self._tries += 1
        if tried in self._sweep:
            self._sweep.remove(tried)
            self._tries = 0
        elif self._tries >= MAX_TRIES:
            self._sweep.pop(0)
            self._tries = 0

    def sweep_length(self, observation: Observation) -> int | None:
        """The length that all requests should try next to seed the models; None: no sweep now."""
        if not self._sweep or observation.report.num_waiting:
            return None
        return self._sweep[0]

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
        if observation.report.num_waiting or self._sweep:
            return 0, 0
        self._since_last += 1
        if self._since_last < SPACING or self._purse_s <= 0:
            return 0, 0
        self._since_last = 0
        turns = TURNS if optimum.choice.lengths.any() else TURNS_WHEN_OFF
        length = min(turns[self._turn % len(turns)] or self.max_length, self.max_length)
        count = min(ladder.size, BATCH_PROBES) if draft.per_forward_s > 0 else 1
        cost_s = self._cost_s(optimum, ladder, curve, draft, num_other_tokens, length, count)
        if cost_s is None or cost_s > self._purse_s:
            return 0, 0
        self._purse_s -= cost_s
        self.cost_s += cost_s
        self.num_probes += 1
        self._turn += 1
        return length, count

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
