"""The policy last told to an engine, and whether it will still do: what is not news is not sent.

To make and send one takes the daemon time, and to check it the engine. So a new policy is held back
while the lengths of the one last told lose no more than `WORTH_TELLING` of the goodput, by what is
known now. Once it is in force, the last step shows its lengths. While it is under way (an engine
may take it up several steps after the report that it follows from) they are worked out for the
batch as it is. What is held back by mistake ends soon: a policy is sent after `TOLD_EVERY`
decisions in any case, and after `LATE_STEPS` where the one told has not come into force, since it
may be lost.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from smartspec.daemon.engines import Observation
from smartspec.daemon.outlook import Outlook
from smartspec.engine_adapter.lengths import (
    Choice,
    Ladder,
    batch_seconds,
    choose_lengths,
    request_survivals,
    request_weights,
)
from smartspec.engine_adapter.messages import STEERED, align
from smartspec.engine_adapter.optimum import Optimum, steered

U64 = npt.NDArray[np.uint64]
TOLD_EVERY = 16  #: decisions between two policies at most, whether or not anything has changed
LATE_STEPS = 5  #: of a policy: vLLM takes it up three steps after the report that it follows from
WORTH_TELLING = 0.005  #: share of goodput by which the policy last told must fall short
#: Share by which the value of time must have moved, where drafts are chosen by confidence: what
#: that costs grows with its square.
VALUE_WORTH_TELLING = 0.02


class Told(NamedTuple):
    """A policy that was sent, as far as it decides lengths."""

    seq: int
    report_seq: int  #: of the report that it follows from
    outlook: Outlook
    ids: U64  #: [B], whom its corrections are of
    value_of_time: float
    depth: int
    deepest: int

    def may_hold(self, observation: Observation) -> bool:
        """Whether the engine is steered, by this policy or one that it may be about to replace."""
        report = observation.report
        if report.source not in STEERED or report.policy_seq > self.seq:
            return False
        return report.policy_seq == self.seq or report.seq - self.report_seq <= LATE_STEPS

    def values_time_at(self, value: float) -> bool:
        """Whether its value of time is close enough to ``value`` to choose drafts by."""
        return abs(value - self.value_of_time) <= VALUE_WORTH_TELLING * self.value_of_time

    def does_as_well(self, observation: Observation, outlook: Outlook, optimum: Optimum) -> bool:
        """Whether its lengths are as good as the optimum's price would make them."""
        ladder, best = outlook.ladder, optimum.choice
        if ladder.presence is not None:  # of what this step could draft
            ladder = outlook.ladder_of(observation.num_available)
            best = choose_lengths(
                ladder,
                optimum.value_of_time,
                optimum.depth,
                outlook.curves,
                outlook.draft,
                outlook.num_prompt_tokens,
            )
        elif outlook.worth is not None:
            ladder = outlook.ladder_of(ladder.ceiling)
            best = best._replace(gain=ladder.at(best.lengths)[1])
        report = observation.report
        if report.policy_seq == self.seq and report.source == "policy":
            mode = report.mode
            lengths, gain = ladder.at(observation.num_drafted)
        else:
            choice = self._choice(observation, outlook)
            mode = choice.mode
            lengths, gain = ladder.at(choice.lengths)
        curve = next((one for one in outlook.curves if one.mode == mode), outlook.curves[0])
        given = lengths, outlook.num_prompt_tokens, float(lengths.sum())
        seconds = batch_seconds(curve, outlook.draft, *given)
        loss = best.gain - gain - optimum.value_of_time * (best.seconds - seconds)
        return loss <= WORTH_TELLING * best.gain

    def _choice(self, observation: Observation, now: Outlook) -> Choice:
        """What it makes of the step last reported."""
        batch = observation.batch
        correction = self.outlook.correction
        if batch.ids is not self.ids:
            at = align(self.ids, batch.ids)
            correction = np.ones(len(at), np.float32)
            correction[at >= 0] = self.outlook.correction[at[at >= 0]]
        survival = request_survivals(self.outlook.table, observation.buckets, correction)
        weight = request_weights(batch.weight, self.outlook.worth, observation.buckets)
        ladder = Ladder(survival, weight, batch.floor, observation.num_available)
        return steered(
            ladder,
            self.value_of_time,
            self.depth,
            self.outlook.curves,
            self.outlook.draft._replace(sunk_s=now.draft.sunk_s),
            now.num_prompt_tokens,
            self.deepest,
        )
