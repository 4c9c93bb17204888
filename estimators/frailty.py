"""How requests differ from their bucket's table: a correction of each, and how much they differ.

Request i accepts with probability h ** c_i where its bucket's hazard is h, a proportional-hazards
model with a gamma frailty c (Vaupel, Manton and Stallard, Demography 16, 1979, 439). With
L = -log h, a draft is an event time t of rate c against an exposure L: accepted when t > L.
Rejections count as events, and after d of them in exposure E, with a prior of mean 1 and shape
alpha, the posterior mean is c = (alpha + d) / (alpha + E). Exposure is L when accepted and the
expected time of the event when rejected, E[t | t < L] = 1 / c - L / (exp(c L) - 1), with the
present c. At c = 1 a draft then has expected exposure 1 - exp(-L): that of its events.

How much requests differ is learned too: alpha is an average, in the logarithm, of five values up
to 4 times the first guess and down to a quarter of it, weighted by the likelihood that each gives
to what came of later drafts (empirical Bayes). A request has its say in that for a hundred steps:
one that goes on for ever would change what is expected of all others.

Two memories are chained: c of the last hundred steps is the mean that a second such posterior, of
the last ten, starts from. In simulation (acceptance Beta(1.4, 0.6) over requests; nats per step;
1.20 by the table alone) one memory of half-life 64 loses 0.919 while requests stay what they are
and 1.093 where each changes every 40 steps; one of 8 loses 0.946 and 1.028; the two, 0.918 and
1.030. That was with alpha 2 and 4; real answers differ less, and with features in the table less is
left for c: on recorded ones (benchmarks/bench_acceptance.py, the tasks for tuning, prompt lookup)
alpha 2 and 4 lose 0.618 nats per draft and 12 and 32 0.600, at the price of following later. Of the
second alpha 64 is as good as 100, and better than 32, with the first one learned (draft model:
0.6171, 0.6172 and 0.6179).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from smartspec.estimators.base import F64, State, pack, unpack
from smartspec.estimators.survival_table import clipped

Flags = npt.NDArray[np.bool_]

CORRECTION_RANGE = (0.05, 20.0)
STRENGTHS = (0.25, 0.5, 1.0, 2.0, 4.0)  #: times the first guess: how alike requests may be
STRENGTH_WINDOW = 20_000  #: drafts that they are judged by
SCORED_STEPS = 100  #: of a request: one that goes on for ever says no more of how others differ
MAX_SCORE = 1e9
POPULATION = 32.0  #: requests that their mean c is remembered of, beside those of the step

NUM_COLUMNS = 5  #: of a request's counts
# Rejections and exposures, in the long and the short memory, and steps, which do not fade.
_EVENTS, _RECENT_EVENTS, _EXPOSURE, _RECENT_EXPOSURE, _STEPS = range(NUM_COLUMNS)


def time_of_event(c: F64, exposure: F64) -> F64:
    """E[t | t < L] of an event at rate c within ``exposure`` L."""
    most = np.maximum(exposure, 1e-9)
    expected: F64 = 1.0 / c - most / np.expm1(c * most)
    return expected


class Frailty:
    """Of the requests whose ``counts`` [B, NUM_COLUMNS] are given with each call.

    Parameters
    ----------
    half_life, recent_half_life : drafted steps after which a request's rejections count half, in
        its long and its short memory
    strength, recent_strength : alpha of the two: the rejections that the expectation is worth that
        a request is average (at first), or goes on as it did

    Attributes
    ----------
    strength : alpha of the first, as learned
    """

    def __init__(
        self, half_life: float, recent_half_life: float, strength: float, recent_strength: float
    ) -> None:
        self._fade = 0.5 ** (1.0 / np.array((half_life, recent_half_life) * 2))
        self._recent_strength = recent_strength
        self._strengths = strength * np.array(STRENGTHS)
        self._scores = np.zeros(len(STRENGTHS) + 1)  # log-likelihoods; last: of how many drafts
        self.strength = strength

    def corrections(self, counts: F64) -> F64:
        """c of each request, [B]; 1 when nothing is known of it."""
        return self._posterior(counts, self.strength)

    def _posterior(self, counts: F64, strength: float | F64) -> F64:
        alpha, recent = strength, self._recent_strength
        c: F64 = (alpha + counts[:, _EVENTS]) / (alpha + counts[:, _EXPOSURE])
        c *= (recent + counts[:, _RECENT_EVENTS]) / (recent + c * counts[:, _RECENT_EXPOSURE])
        return clipped(c, CORRECTION_RANGE)

    def note(self, counts: F64, events: F64, exposure: F64) -> None:
        """Take rejections and the exposure to them, both [B], into ``counts``, in place."""
        counts[:, :_STEPS] *= self._fade
        counts[:, _EVENTS:_EXPOSURE] += events[:, None]
        counts[:, _EXPOSURE:_STEPS] += exposure[:, None]
        counts[:, _STEPS] += 1.0

    def news_of_mean(self, before: F64, counts: F64) -> tuple[float, float]:
        """By how much the mean c has moved with a step, and the share of its memory that is new.

        The derivative of a request's log-likelihood by the logarithm of the mean is alpha (c - 1),
        so that a step is worth what c changes by from ``before`` [B] it, over the requests that the
        mean is remembered of. A request has its say in it for a hundred steps.
        """
        memory = POPULATION + len(counts)
        steps = counts[:, _STEPS]
        has_say = (steps <= SCORED_STEPS).astype(np.float64)
        change = (self.corrections(counts) - before).dot(has_say)
        return float(change) / memory, int(np.count_nonzero(steps == 1.0)) / memory

    @staticmethod
    def rescale(counts: F64, factor: float) -> None:
        """Follow hazards to this power: exposures of all requests, in place."""
        counts[:, _EXPOSURE:_STEPS] *= factor

    def score(self, counts: F64, passed: F64, exposure: F64, rejected: Flags) -> None:
        """Learn how much requests differ, from what became of their next drafts.

        Parameters
        ----------
        counts : before these drafts were noted
        passed : [B], cumulative hazard of the drafts that were accepted
        exposure : [B], hazard of the draft after them
        rejected : [B] bools, whether that one was drafted
        """
        young = np.flatnonzero(counts[:, _STEPS] < SCORED_STEPS)
        c = self._posterior(counts[young], self._strengths[:, None])  # [strengths, B]
        rejection = np.log(-np.expm1(-c * np.maximum(exposure[young], 1e-9)))
        likelihood = np.where(rejected[young], rejection, 0.0) - c * passed[young]
        self._scores *= (1.0 - 1.0 / STRENGTH_WINDOW) ** len(young)
        self._scores[:-1] += likelihood.sum(axis=1)
        self._scores[-1] += len(young)
        if self._scores[-1] > STRENGTH_WINDOW:  # many at once fade less than they bring
            self._scores *= STRENGTH_WINDOW / self._scores[-1]
        self._weigh()

    def _weigh(self) -> None:
        scores = self._scores[:-1]
        weight = np.exp(scores - scores.max())
        self.strength = float(np.exp(weight @ np.log(self._strengths) / weight.sum()))

    def merge(self, other: Self) -> None:
        """Take over how much requests differ from whoever has seen more of them."""
        if other._scores[-1] > self._scores[-1]:
            self._scores = other._scores.copy()
            self._weigh()

    def state(self) -> State:
        """What was learned of how much requests differ; ``counts`` are their keeper's."""
        return {"scores": pack(self._scores)}

    def restore(self, state: Mapping[str, Any]) -> None:
        scores = unpack(state, "scores", self._scores.shape)
        if np.abs(scores).max() > MAX_SCORE or not 0.0 <= scores[-1] <= 1.01 * STRENGTH_WINDOW:
            raise ValueError("scores are not log-likelihoods of so many drafts")
        self._scores = scores
        self._weigh()
