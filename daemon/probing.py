"""Trying lengths that would not be chosen, so that their worth stays known.

A controller that never tries a length learns nothing about it: what it believes of deep or switched
off speculation would stay as it was. Probes are deliberate and paid from a budget: a share of the
engine's time, which at the value of time is the same share of its goodput. They stop while requests
wait. A probe is paid at what it is expected to cost, and then for what it brought less than
expected, and for the drafter's forward that follows it where drafts go on by themselves.

A first start sweeps: it tries lengths for all. First the longest, and lengths that halve, once
each, which shows how a step's time grows with its tokens up to the most that there can be. Then all
that by this lose little, some more times: what is best lies among them, wherever there is a knee.
"""

from __future__ import annotations

import numpy as np

from smartspec.daemon.engines import Observation
from smartspec.daemon.outlook import Outlook
from smartspec.engine_adapter.lengths import I64, CostCurve, batch_seconds
from smartspec.engine_adapter.optimum import Optimum

NEAR, LOOKS = 0.4, 4  #: share of a step's time that a length may lose to be tried so often more
MAX_TRIES = 50  #: steps in which one length of the sweep may find something to draft, or room
PROBE_TOKENS = 8  #: of a draft model in one probe, whose requests share the drafter's forwards
SPACING = 8  #: decisions between two probes, or two looks at what one would cost
#: Lengths probed in turn, 0 for the longest: while some requests speculate, and while none does.
#: Then what is wanted is news of the first draft, of which a cheap probe brings most.
TURNS, TURNS_WHEN_OFF = (2, 0, 1), (1, 1, 2, 1, 1, 0)
SHARE_WHILE_DRAFTING = 0.2  #: of the budget, once settled: much is then learned without probes
SHARE_WHILE_OFF = 0.5  #: of the budget: deep probes, which bring little then, are dear
#: Of the budget, where drafts are cut by their confidences: such engines try drafts by themselves
#: (engine_adapter/reference/growth.py).
SHARE_BY_CONFIDENCE = 0.2
SETTLING_STEPS = 1000  #: of a first start, whose sweep saw each size of pass only now and then
#: What was earned in more than this time, or in these steps where they are long, is not saved up:
#: else what was saved while nothing was drafted is spent in a burst once something is.
SAVINGS_S, SAVINGS_STEPS = 60.0, 1000


def sweep_lengths(max_length: int) -> list[int]:
    """What the sweep tries: the longest, and lengths that halve, down to 0.

    >>> sweep_lengths(5)
    [5, 4, 2, 1, 0]
    """
    if not max_length:
        return []
    return [max_length, *(1 << i for i in reversed(range((max_length - 1).bit_length()))), 0]


class Prober:
    """One engine's probes.

    Parameters
    ----------
    max_length : longest length of the engine
    share : of goodput that probing may cost, 0 to 1
    sweep : whether this is a first start: sweep, outside the budget; and spend the whole budget
        for a while
    """

    def __init__(self, max_length: int, share: float, sweep: bool) -> None:
        self.share = share
        self.max_length = max_length
        self._sweep = sweep_lengths(max_length) if sweep else []
        self._near = list(range(max_length, -1, -1)) * LOOKS if self._sweep else []
        self._settling = SETTLING_STEPS if sweep else 0
        self._tries = 0
        self._turn = 0
        self.num_probes = 0
        self._since_last = 0
        self.cost_s = 0.0  #: time given up for probes so far, at the value of time
        self._purse_s = 0.0

    @property
    def sweeping(self) -> bool:
        return bool(self._sweep or self._near)

    def account(self, observation: Observation) -> None:
        """Earn from a step, and cross off what it tried of the sweep."""
        settled = not self._settling
        self._settling = max(0, self._settling - 1)
        share = self.share
        if not observation.drafted_any:
            share *= SHARE_WHILE_OFF
        elif settled:
            share *= SHARE_WHILE_DRAFTING
        if observation.report.num_cut:
            share *= SHARE_BY_CONFIDENCE
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

    def sweep_length(self, observation: Observation, outlook: Outlook) -> int | None:
        """The length that all requests should try next to seed the models; None: no sweep now.

        Each call goes on to the next, since what was told shows only some steps later. The short
        ones come last, so that what is told again meanwhile costs little. What ceilings cut for all
        waits for requests that can have it, for as many steps as drafts are waited for.
        """
        if observation.report.num_waiting:
            return None
        if not self._sweep:
            return self._near.pop(0) if self._near else None
        ceiling = outlook.ladder.ceiling  # None for lookups: what they will find is not known
        deepest = self.max_length if ceiling is None else int(ceiling.max())
        length = next((length for length in self._sweep if length <= deepest), None)
        if length is not None:
            self._sweep.remove(length)
            self._sweep.append(length)
        return length

    def plan(self, observation: Observation, outlook: Outlook, optimum: Optimum) -> tuple[int, int]:
        """Length and number of requests to probe in the next step; (0, 0) for none."""
        ladder = outlook.ladder
        if self.max_length == 0 or ladder.size == 0:
            return 0, 0
        self._correct(observation, outlook, optimum)
        if observation.report.num_waiting:
            return 0, 0
        if not self._sweep:
            most_s = NEAR * optimum.choice.seconds
            while self._near and (
                self._near[0] > observation.num_available.max()
                or _loss_s(outlook, optimum, self._near[0]) > most_s
            ):
                self._near.pop(0)
        if self.sweeping:
            return 0, 0
        self._since_last += 1
        if self._since_last < SPACING or self._purse_s <= 0:
            return 0, 0
        self._since_last = 0
        turns = TURNS if optimum.choice.lengths.any() else TURNS_WHEN_OFF
        length = min(turns[self._turn % len(turns)] or self.max_length, self.max_length)
        count = 1
        if outlook.draft.per_forward_s > 0:
            count = min(ladder.size, max(1, PROBE_TOKENS // length))
        cost_s = _cost_s(outlook, optimum, length, count)
        if cost_s is None or cost_s > self._purse_s:
            return 0, 0
        self._pay(cost_s)
        self.num_probes += 1
        self._turn += 1
        return length, count

    def _pay(self, cost_s: float) -> None:
        self._purse_s -= cost_s
        self.cost_s += cost_s

    def _correct(self, observation: Observation, outlook: Outlook, optimum: Optimum) -> None:
        """Pay for what a probe brought less than was expected, and for a forward that follows it.

        Some engines run the first forward of whoever was drafted for in the step before, whether or
        not anything is then drafted. Where drafts are cut by their confidences, what the drafter is
        run for is decided in the step, and no probe's doing. No more is lost by a step than the
        time that it took.
        """
        report, ladder, lost_s = observation.report, outlook.ladder, 0.0
        if report.source == "probe":
            drafted = np.arange(ladder.max_length)[:, None] < observation.num_drafted
            expected = ladder.weight_sum + float(ladder.worth[drafted].sum())
            lost_s = (expected - observation.weighted_tokens) / optimum.value_of_time
        elif report.num_draft_forwards and not observation.drafted_any and not report.num_cut:
            lost_s = outlook.draft.by_depth(report.num_draft_forwards)
        self._pay(min(lost_s, report.step_s))


def _loss_s(outlook: Outlook, optimum: Optimum, length: int) -> float:
    """Time lost by a step of this length for all, at the value of time."""
    best = optimum.choice
    lengths, gain = outlook.ladder.at(length)
    given = lengths, outlook.num_prompt_tokens, outlook.num_drafts(lengths)
    seconds = min(batch_seconds(curve, outlook.draft, *given) for curve in outlook.possible())
    return (best.gain - gain) / optimum.value_of_time + seconds - best.seconds


def _cost_s(outlook: Outlook, optimum: Optimum, length: int, count: int) -> float | None:
    """Expected time lost by the probe, less its gain at the value of time; None: no probe."""
    ladder, lengths = outlook.ladder, optimum.choice.lengths
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
    curves = outlook.possible()  # ragged first: what some are probed with is not one length for all
    before = next(curve for curve in curves if curve.mode == optimum.choice.mode)
    extra_s = _seconds(outlook, curves[0], after) - _seconds(outlook, before, lengths)
    return max(0.0, extra_s - gain / optimum.value_of_time)


def _seconds(outlook: Outlook, curve: CostCurve, lengths: I64) -> float:
    """Of a step in which all drafts are there."""
    drafts = float(lengths.sum())
    return batch_seconds(curve, outlook.draft, lengths, outlook.num_prompt_tokens, drafts)
