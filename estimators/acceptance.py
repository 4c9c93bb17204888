"""How likely drafts are to be accepted: hazards per bucket and depth, corrected per request.

Observations are censored. Of ``drafted`` tokens of which ``accepted`` were accepted, depths up to
``accepted`` were reached and passed, the next one (if drafted) was reached and failed, and of the
rest nothing is known. What is estimated is therefore the hazard

    h[b, j] = P(draft j is accepted | draft j is reached, bucket b)

from discounted counts of both events; accepted / drafted would be biased down, the more so the
longer the drafts. The pooled hazard of a depth is shrunk to that of the depth before, so that an
untried depth is expected to go on as the last. The survival of a bucket is the running product.

A bucket is one digit per axis (a feature, cut), and most of a hundred buckets are seen too seldom
to be learned alone. A bucket's hazard is therefore shrunk to that of an additive logistic model

    logit m[b, j] = logit pooled[j] + sum_a u_a[digit_a(b), min(j, 3)]

whose effects u are shared by all buckets of a digit, and by all depths from the third on. Since
its inputs are the digits alone, the counts are all the evidence that there is: the model is fitted
to them by Newton's method, one axis with every step learned, and so forgets as they do, needs no
learning rate and samples nothing. (Ridge-penalised; within an axis the Hessian is diagonal.)

Requests differ within a bucket. Request i accepts with probability h ** c_i, a proportional-hazards
model with a gamma frailty c (Vaupel, Manton and Stallard, Demography 16, 1979, 439). With
L = -log h, a draft is a unit-rate event time t against an exposure L: accepted when t > L / c.
Rejections count as events, and after d of them in exposure E, with a prior of mean 1 and shape
alpha, the posterior mean is c = (alpha + d) / (alpha + E). Exposure is L when accepted and the
expected time of the event when rejected, E[t | t < L] = 1 / c - L / (exp(c L) - 1), with the
present c. At c = 1 a draft then has expected exposure 1 - exp(-L): that of its events.

The table is that of a request with c = 1: a draft that is reached counts, beside its outcome, with
h - h ** c_i, so that the table comes to rest where sum(outcomes) = sum(h ** c_i). Raw outcomes
would have in the hazards of deep drafts, which good requests alone reach and bad ones are not
drafted for, what c says already, and lengths were too long. (Requests Beta over 0.4 with
concentration 6: of old ones 1.13 and 1.27 times as many were expected to have 4 and 5 drafts
accepted as had.) Of trees, whose nodes are not independent, the table has the raw outcomes.

How much requests differ is learned too: alpha is an average, in the logarithm, of five values up
to 4 times ``request_strength`` and down to a quarter of it, weighted by the likelihood that each
gives to what came of later drafts (empirical Bayes). A request has its say in that for a hundred
steps: one that goes on for ever would change what is expected of all others.

Two memories are chained: c of the last hundred steps is the mean that a second such posterior, of
the last ten, starts from. In simulation (acceptance Beta(1.4, 0.6) over requests; nats per step;
1.20 by the table alone) one memory of half-life 64 loses 0.919 while requests stay what they are
and 1.093 where each changes every 40 steps; one of 8 loses 0.946 and 1.028; the two, 0.918 and
1.030. That was with alpha 2 and 4; real answers differ less, and with features in the table less is
left for c: on recorded ones (benchmarks/bench_acceptance.py, the tasks for tuning, prompt lookup)
alpha 2 and 4 lose 0.618 nats per draft and 12 and 32 0.600, at the price of following later. Of the
second alpha 64 is as good as 100, and better than 32, with the first one learned (draft model:
0.6171, 0.6172 and 0.6179).

Where little is drafted, the counts outlive what they were counted from: at length 0 only probes
bring news, and a window of them can last for hours. Whether first drafts go on being accepted as
expected is therefore watched by a cumulative sum (drift.py), and when they do not, the counts keep
the weight of a few observations: what is expected then is mostly the prior, which is worth a try.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from smartspec.estimators.base import (
    F64,
    State,
    non_negative,
    pack,
    shares_of_rivals,
    unpack,
)
from smartspec.estimators.drift import CumulativeSum
from smartspec.estimators.request_rows import RequestRows, Rows

F32 = npt.NDArray[np.float32]

EFFECT_RIDGE = 5.0  #: precision of an effect's prior, of mean 0
MAX_EFFECT = 10.0  #: in logits
MAX_EFFECT_STEP = 1.0  #: of one sweep: Newton's method overshoots where little was seen
PRESENCE_STRENGTH = 2.0  #: steps that the pooled presence is worth in a request's
HAZARD_RANGE = (1e-3, 1.0 - 1e-4)  #: keeps logarithms finite and every depth worth a probe
CORRECTION_RANGE = (0.05, 20.0)
CHANGE_THRESHOLD = 12.0  #: deviations in sum: four surprises in a row of MAX_SURPRISE
MAX_SURPRISE = 4.0  #: deviations that one step may count for
SMALL_CHANGE = 0.1  #: of a hazard: the window follows such changes by itself
MERGE_SWEEPS = 8  #: of Newton's method over all axes
STRENGTHS = (0.25, 0.5, 1.0, 2.0, 4.0)  #: times `request_strength`: how alike requests may be
STRENGTH_WINDOW = 20_000  #: drafts that they are judged by
SETTLED = 0.5  #: of the window: from then on a step moves the pooled hazard little
SCORED_EVERY = 8  #: steps: how alike requests are changes slowly, and so does a settled table
SCORED_STEPS = 100  #: of a request: one that goes on for ever says no more of how others differ
MAX_SCORE = 1e9
KEPT_AFTER_CHANGE = 4.0  #: observations that the counts of a depth are worth after a change

# Columns of a request's counts: rejections and exposures, long and short memory; matches and tries;
# steps with drafts, which do not fade.
_EVENTS, _RECENT_EVENTS, _EXPOSURE, _RECENT_EXPOSURE, _HITS, _TRIES, _DRAFTED = range(7)


_NOBODY: tuple[Rows | None, F64] = (None, np.zeros(0))  # whose corrections are known: nobody's


def _clipped(values: F64, limits: tuple[float, float]) -> F64:
    """As np.clip, which takes four times as long for few values."""
    clipped: F64 = np.minimum(np.maximum(values, limits[0]), limits[1])
    return clipped


def _joined(mine: F64, other: F64, of: int) -> F64:
    """Two tables' counts, of which row ``of`` counts tries, cell by cell."""
    shares = shares_of_rivals(mine[of], other[of])
    joined: F64 = mine * shares[0] + other * shares[1]
    return joined


def time_of_event(c: F64, exposure: F64) -> F64:
    """E[t | t < L] of an event at rate c within ``exposure`` L."""
    most = np.maximum(exposure, 1e-9)
    expected: F64 = 1.0 / c - most / np.expm1(c * most)
    return expected


def _whole(name: str, value: Any) -> int:
    number = non_negative(name, value)
    if number != int(number):
        raise ValueError(f"{name} must be a whole number, got {number!r}")
    return int(number)


class AcceptanceEstimator:
    """Survivals per bucket and depth, corrections and match rates per request.

    Memory is counted in observations, never in time: a cell that is not observed keeps what it
    knows, and one that is observed for ever is worth at most ``window`` observations.

    Parameters
    ----------
    num_buckets, max_length : the table's shape [num_buckets, max_length], both >= 1
    window : observations that a cell remembers
    prior, prior_weight : hazard expected at first, and the observations that it is worth
    bucket_weight : observations that the additive model is worth in a bucket's hazard
    request_half_life, recent_half_life : drafted steps after which a request's rejections count
        half, in its long and its short memory
    request_strength, recent_strength : alpha of the two: the rejections that the expectation is
        worth that a request is average (at first), or goes on as it did
    presence_half_life : steps after which a request's matches and misses count half
    max_requests : requests remembered; the least recently seen are forgotten
    axis_sizes : digits per axis of a bucket's index, the first axis slowest; their product is
        ``num_buckets``. Empty: one axis
    """

    #: where groups of depths begin that share their effects: the first, the second, and the others
    _group_starts: ClassVar[tuple[int, ...]] = (0, 1, 2)
    _tells_apart: ClassVar[bool] = True  #: what is due to requests from what the table explains
    _params: ClassVar[tuple[str, ...]] = (  # arguments, in the order of the state
        "num_buckets",
        "max_length",
        "window",
        "prior",
        "prior_weight",
        "bucket_weight",
        "request_half_life",
        "recent_half_life",
        "request_strength",
        "recent_strength",
        "presence_half_life",
        "max_requests",
        "axis_sizes",
    )

    def __init__(
        self,
        num_buckets: int = 1,
        max_length: int = 8,
        window: int = 2000,
        prior: float = 0.7,
        prior_weight: float = 10.0,
        bucket_weight: float = 30.0,
        request_half_life: float = 48.0,
        recent_half_life: float = 6.0,
        request_strength: float = 12.0,
        recent_strength: float = 64.0,
        presence_half_life: float = 16.0,
        max_requests: int = 4096,
        axis_sizes: tuple[int, ...] = (),
    ) -> None:
        for name, count in (("num_buckets", num_buckets), ("max_length", max_length)):
            if count < 1:
                raise ValueError(f"{name} must be >= 1, got {count}")
        for name, weight in (
            ("window", window),
            ("prior_weight", prior_weight),
            ("bucket_weight", bucket_weight),
            ("request_half_life", request_half_life),
            ("recent_half_life", recent_half_life),
            ("request_strength", request_strength),
            ("recent_strength", recent_strength),
            ("presence_half_life", presence_half_life),
        ):
            if not 0.0 < weight < math.inf:
                raise ValueError(f"{name} must be > 0, got {weight}")
        if not 0.0 < prior < 1.0:
            raise ValueError(f"prior must be in (0, 1), got {prior}")
        sizes = tuple(axis_sizes) or (num_buckets,)
        if min(sizes) < 1 or math.prod(sizes) != num_buckets:
            raise ValueError(f"axis_sizes {sizes} do not make num_buckets = {num_buckets}")
        self.num_buckets = num_buckets
        self.max_length = max_length
        self.window = window
        self.prior = prior
        self.prior_weight = prior_weight
        self.bucket_weight = bucket_weight
        self.request_half_life = request_half_life
        self.recent_half_life = recent_half_life
        self.request_strength = request_strength
        self.recent_strength = recent_strength
        self.presence_half_life = presence_half_life
        self.max_requests = max_requests
        self.axis_sizes = axis_sizes
        self._sizes = sizes
        self._groups = [first for first in self._group_starts if first < max_length]
        self._group_of_depth = np.searchsorted(self._groups, np.arange(max_length), "right") - 1
        self._effects: F64 = np.zeros((sum(sizes), len(self._groups)))
        self._turn = 0  # the axis fitted last
        ends = np.cumsum(sizes).tolist()
        # Rows of the effects that belong to each axis, and the shape that lays them along it.
        self._axes = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
        self._along = [
            (*(1,) * place, size, *(1,) * (len(sizes) - place - 1), max_length)
            for place, size in enumerate(sizes)
        ]
        self._fade = 0.5 ** (1.0 / np.array((request_half_life, recent_half_life)))
        self._presence_fade = 0.5 ** (1.0 / presence_half_life)
        # [reached, accepted]; the last row of the middle axis pools the buckets.
        self._counts = np.zeros((2, num_buckets + 1, max_length))
        self._presence = np.zeros(2)  # discounted hits and tries, over all requests
        self._requests = RequestRows(max_requests, num_columns=7)
        self._changes = CumulativeSum(threshold=CHANGE_THRESHOLD)
        self._strengths = request_strength * np.array(STRENGTHS)
        self._strength = request_strength
        self._scores = np.zeros(len(STRENGTHS) + 1)  # log-likelihoods; last: of how many drafts
        self._num_unscored = 0  # steps
        self._corrected = _NOBODY  # what `corrections` gave, and whom: learning wants it too
        self._log_survival: F32 | None = None
        self._hazard: F64 = np.zeros((0, 0))
        self._log_hazard: F64 = np.zeros((0, 0))
        self._cumulative: F64 = np.zeros((0, 0))

    # -- learning ---------------------------------------------------------------------------

    def rows(self, ids: npt.ArrayLike) -> Rows:
        """Rows of the requests ``ids`` [B], for the calls below; see `RequestRows.rows`."""
        self._corrected = _NOBODY
        return self._requests.rows(ids)

    def learn_many(
        self,
        rows: Rows,
        buckets: npt.ArrayLike,
        drafted: npt.ArrayLike,
        accepted: npt.ArrayLike,
    ) -> None:
        """Take in what became of one step's drafts; all [B] integers, ``rows`` without repeats.

        Requests with nothing drafted are no observation.
        """
        bucket, proposed, passed = self._outcomes(buckets, drafted, accepted)
        if not len(rows) == len(bucket) == len(proposed) == len(passed):
            raise ValueError("rows, buckets, drafted and accepted differ in length")
        self._requests.check(rows)
        some = proposed > 0
        if not some.all():
            rows, bucket, proposed, passed = rows[some], bucket[some], proposed[some], passed[some]
        if len(rows):
            self._refresh()
            counts = self._requests.counts[rows]
            of, c = self._corrected
            if of is not rows:
                c = self._posterior(counts, self._strength)
            self._corrected = _NOBODY
            self._watch(c, bucket, self._first(passed))
            new = self._histogram(bucket, proposed, passed)
            if self._tells_apart:
                new[1] += self._due_to_requests(c, bucket, proposed, passed)
                self._learn_strength(counts, bucket, proposed, passed)
            self._learn_requests(rows, counts, *self._events(c, bucket, proposed, passed))
            self._learn_table(new)

    @property
    def num_changes(self) -> int:
        """Times that acceptance was found to have changed for good, since the start."""
        return self._changes.num_alarms

    @property
    def strength(self) -> float:
        """Rejections that the expectation is worth that a request is average, as learned."""
        return self._strength

    def _first(self, passed: npt.NDArray[np.intp]) -> npt.NDArray[np.bool_]:
        """Whether the first draft was accepted."""
        first: npt.NDArray[np.bool_] = passed > 0
        return first

    def _watch(self, c: F64, bucket: npt.NDArray[np.intp], first: npt.NDArray[np.bool_]) -> None:
        """Compare first drafts with what was expected of them; forget when it is another world."""
        expected = np.exp(-c * self._cumulative[bucket, 1])
        surprise = float(np.count_nonzero(first) - expected.sum())
        variance = float(expected @ (1.0 - expected)) + (SMALL_CHANGE * len(c)) ** 2
        z = surprise / math.sqrt(variance)
        self._changes.update(min(max(z, -MAX_SURPRISE), MAX_SURPRISE))
        if self._changes.drift_detected:
            kept = np.minimum(1.0, KEPT_AFTER_CHANGE / np.maximum(self._counts[0, -1], 1.0))
            self._counts *= kept
            self._log_survival = None

    def _outcomes(self, *columns: npt.ArrayLike) -> list[npt.NDArray[np.intp]]:
        checked = []
        for name, column, limit in zip(
            ("buckets", "drafted", "accepted"),
            columns,
            (self.num_buckets - 1, self.max_length, self.max_length),
            strict=True,
        ):
            array = np.asarray(column)
            if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
                raise ValueError(f"{name} must be a column of integers")
            whole = array.astype(np.intp)
            # As unsigned numbers, negative ones are above any limit.
            if array.size and whole.view(np.uintp).max() > limit:
                raise ValueError(f"{name} must be in [0, {limit}]")
            checked.append(whole)
        if len(checked[1]) == len(checked[2]) and (checked[2] > checked[1]).any():
            raise ValueError("more drafts accepted than drafted")
        return checked

    def _events(
        self,
        c: F64,
        bucket: npt.NDArray[np.intp],
        proposed: npt.NDArray[np.intp],
        passed: npt.NDArray[np.intp],
    ) -> tuple[F64, F64]:
        """Rejections, and exposure to them, of each request's drafts: both [B].

        ``c``: their corrections.
        """
        self._refresh()
        rejected = passed < proposed
        # Column 0 of the cumulative hazards is depth 0; clipped, since depth passed + 1 may not be.
        before = self._cumulative[bucket, passed]
        after = self._cumulative[bucket, np.minimum(passed + 1, self.max_length)]
        exposure = before + rejected * time_of_event(c, after - before)
        return rejected.astype(np.float64), exposure

    def _learn_requests(self, rows: Rows, counts: F64, events: F64, exposure: F64) -> None:
        counts[:, _EVENTS:_EXPOSURE] *= self._fade
        counts[:, _EVENTS:_EXPOSURE] += events[:, None]
        counts[:, _EXPOSURE:_HITS] *= self._fade
        counts[:, _EXPOSURE:_HITS] += exposure[:, None]
        counts[:, _DRAFTED] += 1.0
        self._requests.counts[rows] = counts

    def _histogram(
        self,
        bucket: npt.NDArray[np.intp],
        proposed: npt.NDArray[np.intp],
        passed: npt.NDArray[np.intp],
    ) -> F64:
        """A step's counts, shaped as the table's: [reached, accepted], the last row pooled."""
        width = self.max_length + 1
        cells = self.num_buckets * width
        reached = np.minimum(passed + 1, proposed)
        base = bucket * width
        new = np.empty((2, self.num_buckets + 1, self.max_length))
        for i, depth in enumerate((reached, passed)):
            histogram = np.bincount(base + depth, minlength=cells).reshape(-1, width)
            # Requests whose depth is at least j, for j = 1 ... max_length.
            new[i, :-1] = histogram[:, :0:-1].cumsum(axis=1)[:, ::-1]
        new[:, -1] = new[:, :-1].sum(axis=1)
        return new

    def _due_to_requests(
        self,
        c: F64,
        bucket: npt.NDArray[np.intp],
        proposed: npt.NDArray[np.intp],
        passed: npt.NDArray[np.intp],
    ) -> F64:
        """How many more drafts average requests would have accepted: [num_buckets + 1, K].

        h - h ** c for each draft reached. What is counted with it is what the table alone explains.
        """
        log_hazard = self._log_hazard[bucket]
        more = self._hazard[bucket] - np.exp(c[:, None] * log_hazard)
        reached = np.minimum(passed + 1, proposed)
        more *= np.arange(self.max_length) < reached[:, None]
        cells = bucket[:, None] * self.max_length + np.arange(self.max_length)
        size = self.num_buckets * self.max_length
        due = np.empty((self.num_buckets + 1, self.max_length))
        due[:-1] = np.bincount(cells.ravel(), more.ravel(), size).reshape(due[:-1].shape)
        due[-1] = more.sum(axis=0)
        return due

    def _learn_strength(
        self,
        counts: F64,
        bucket: npt.NDArray[np.intp],
        proposed: npt.NDArray[np.intp],
        passed: npt.NDArray[np.intp],
    ) -> None:
        """Take in how likely each of `STRENGTHS` would have held what became of these drafts."""
        self._num_unscored += 1
        if self._num_unscored < SCORED_EVERY:
            return
        self._num_unscored = 0
        young = np.flatnonzero(counts[:, _DRAFTED] < SCORED_STEPS)
        counts, bucket = counts[young], bucket[young]
        proposed, passed = proposed[young], passed[young]
        c = self._posterior(counts, self._strengths[:, None])  # [strengths, B]
        before = self._cumulative[bucket, passed]
        after = self._cumulative[bucket, np.minimum(passed + 1, self.max_length)]
        rejection = np.log(-np.expm1(-c * np.maximum(after - before, 1e-9)))
        likelihood = np.where(passed < proposed, rejection, 0.0) - c * before
        self._scores *= (1.0 - 1.0 / STRENGTH_WINDOW) ** len(bucket)
        self._scores[:-1] += likelihood.sum(axis=1)
        self._scores[-1] += len(bucket)
        self._weigh_strengths()

    def _weigh_strengths(self) -> None:
        scores = self._scores[:-1]
        weight = np.exp(scores - scores.max())
        self._strength = float(np.exp(weight @ np.log(self._strengths) / weight.sum()))

    def _learn_table(self, new: F64) -> None:
        # m observations at once: what was there fades by (1 - 1 / window)^m, and they bring what
        # they would have brought one by one, so that counts never exceed the window.
        fade = (1.0 - 1.0 / self.window) ** new[0] if self.window > 1 else (new[0] == 0.0) * 1.0
        mass = self.window * (1.0 - fade) / np.maximum(new[0], 1.0)
        self._counts *= fade
        self._counts += new * mass
        np.minimum(self._counts[1], self._counts[0], out=self._counts[1])
        np.maximum(self._counts[1], 0.0, out=self._counts[1])
        settled = self._counts[0, -1, 0] > SETTLED * self.window
        if not settled or self._num_unscored == 0:
            self._fit_effects()
            self._log_survival = None

    def _logits(self, pooled: F64) -> F64:
        """The additive model, [*axis sizes, max_length]."""
        logit: F64 = np.log(pooled / (1.0 - pooled))
        effects = self._effects.take(self._group_of_depth, 1)
        for rows, along in zip(self._axes, self._along, strict=True):
            logit = logit + effects[rows].reshape(along)
        return logit

    def _fit_effects(self) -> None:
        """One axis, in turn."""
        if self.num_buckets == 1:
            return
        reached, accepted = self._counts[:, :-1].reshape(2, *self._sizes, self.max_length)
        place = self._turn = (self._turn + 1) % len(self._sizes)
        others = tuple(axis for axis in range(len(self._sizes)) if axis != place)
        mean = 1.0 / (1.0 + np.exp(-self._logits(self._pooled())))
        expected = reached * mean
        slope = self._by_group((accepted - expected).sum(axis=others))
        curvature = self._by_group((expected * (1.0 - mean)).sum(axis=others))
        effects = self._effects[self._axes[place]]
        step = (slope - EFFECT_RIDGE * effects) / (curvature + EFFECT_RIDGE)
        effects += _clipped(step, (-MAX_EFFECT_STEP, MAX_EFFECT_STEP))
        effects[:] = _clipped(effects, (-MAX_EFFECT, MAX_EFFECT))

    def _by_group(self, by_depth: F64) -> F64:
        """Sums [digits, groups] of [digits, max_length]."""
        sums: F64 = np.add.reduceat(by_depth, self._groups, axis=1)
        return sums

    def learn_presence(self, rows: Rows, available: npt.ArrayLike) -> None:
        """Take in for which requests drafts were to be had (a lookup matched); bools [B]."""
        hits = np.asarray(available)
        if hits.dtype != np.bool_ or hits.shape != rows.shape:
            raise ValueError("available must be one bool per row")
        self._requests.check(rows)
        if not len(rows):
            return
        counts = self._requests.counts
        counts[rows, _HITS] = counts[rows, _HITS] * self._presence_fade + hits
        counts[rows, _TRIES] = counts[rows, _TRIES] * self._presence_fade + 1.0
        kept = max(1.0 - 1.0 / self.window, 0.0) ** len(hits)
        self._presence *= kept
        self._presence += self.window * (1.0 - kept) * np.array((hits.mean(), 1.0))

    # -- what was learned -------------------------------------------------------------------

    def _pooled(self) -> F64:
        """Hazards over all buckets, [max_length], within `HAZARD_RANGE`."""
        reached, accepted = self._counts[:, -1].tolist()
        expected, weight = self.prior, self.prior_weight
        pooled = []
        for tried, passed in zip(reached, accepted, strict=True):
            expected = (passed + weight * expected) / (tried + weight)
            pooled.append(expected)
        return _clipped(np.array(pooled), HAZARD_RANGE)

    def _refresh(self) -> None:
        if self._log_survival is not None:
            return
        reached, accepted = self._counts
        pooled = self._pooled()
        hazard = np.empty((self.num_buckets + 1, self.max_length))
        hazard[-1] = pooled
        expected = 1.0 / (1.0 + np.exp(-self._logits(pooled)))
        hazard[:-1] = expected.reshape(self.num_buckets, self.max_length)
        hazard[:-1] = (accepted[:-1] + self.bucket_weight * hazard[:-1]) / (
            reached[:-1] + self.bucket_weight
        )
        self._hazard = _clipped(hazard, HAZARD_RANGE)
        self._log_hazard = np.log(self._hazard)
        self._cumulative = np.zeros((self.num_buckets + 1, self.max_length + 1))
        self._cumulative[:, 1:] = self._cumulate(self._hazard)
        self._log_survival = -self._cumulative[:-1, 1:].astype(np.float32)
        self._log_survival.flags.writeable = False

    def _cumulate(self, hazard: F64) -> F64:
        """-log of the survivals that these hazards make, in the same shape; rising."""
        cumulative: F64 = np.cumsum(-np.log(hazard), axis=1)
        return cumulative

    def forwards(self) -> tuple[float, ...]:
        """Forwards of a draft model for drafts of length 1, 2, ...; empty: the length itself."""
        return ()

    def log_survival(self) -> F32:
        """log P(at least j drafts are accepted), [num_buckets, max_length]; finite, falling.

        Read-only, and a new array when something was learned; once the table has settled, of every
        eighth step.
        """
        self._refresh()
        assert self._log_survival is not None
        return self._log_survival

    def hazards(self) -> F64:
        """P(draft j is accepted | it is reached), [num_buckets, max_length]."""
        self._refresh()
        return self._hazard[:-1].copy()

    def pooled_hazards(self) -> F64:
        """As `hazards`, over all buckets: [max_length]."""
        self._refresh()
        pooled: F64 = self._hazard[-1].copy()
        return pooled

    def hazard_std(self) -> F64:
        """Standard deviation of `pooled_hazards`, [max_length], from their Beta posteriors."""
        hazard = self.pooled_hazards()
        trials = self._counts[0, -1] + self.prior_weight
        std: F64 = np.sqrt(hazard * (1.0 - hazard) / (trials + 1.0))
        return std

    def num_observed(self) -> F64:
        """Discounted observations per cell, [num_buckets, max_length], each <= window."""
        return self._counts[0, :-1].copy()

    def _posterior(self, counts: F64, strength: float | F64) -> F64:
        alpha, recent = strength, self.recent_strength
        c: F64 = (alpha + counts[:, _EVENTS]) / (alpha + counts[:, _EXPOSURE])
        c *= (recent + counts[:, _RECENT_EVENTS]) / (recent + c * counts[:, _RECENT_EXPOSURE])
        return _clipped(c, CORRECTION_RANGE)

    def corrections(self, rows: Rows) -> F32:
        """c of each request, [B]: its survivals are its bucket's to this power; 1 when unknown."""
        self._requests.check(rows)
        c = self._posterior(self._requests.counts[rows], self._strength)
        self._corrected = rows, c
        return c.astype(np.float32)

    def pooled_presence(self) -> float:
        """Share of requests and steps for which drafts are to be had; 0.5 when unknown."""
        hits, tries = self._presence
        return float((hits + 1.0) / (tries + 2.0))

    def presence(self, rows: Rows) -> F32:
        """P(drafts are to be had), [B] in (0, 1): a request's own rate shrunk to the pooled one."""
        self._requests.check(rows)
        counts = self._requests.counts[rows]
        weight = PRESENCE_STRENGTH
        rate = (counts[:, _HITS] + weight * self.pooled_presence()) / (counts[:, _TRIES] + weight)
        return rate.astype(np.float32)

    # -- one at a time ----------------------------------------------------------------------

    def _one(self, x: Mapping[Any, Any]) -> tuple[int | None, int, int]:
        drafted = _whole("drafted", x.get("drafted", self.max_length))
        bucket = _whole("bucket", x.get("bucket", 0))
        request = x.get("request_id")
        if request is not None and (not isinstance(request, int | np.integer) or request < 0):
            raise ValueError(f"request_id must be an integer >= 0, got {request!r}")
        if drafted > self.max_length or bucket >= self.num_buckets:
            raise ValueError(f"bucket {bucket} or drafted {drafted} is outside the table")
        return None if request is None else int(request), bucket, drafted

    def learn_one(self, x: dict[Any, Any], y: Any) -> None:
        """Take in that ``y`` drafts of ``x["drafted"]`` were accepted.

        ``x`` may have "request_id", "bucket" (0) and "drafted" (max_length); the rest is ignored.
        """
        request, bucket, drafted = self._one(x)
        accepted = _whole("accepted", y)
        if accepted > drafted:
            raise ValueError(f"{accepted} of {drafted} drafts accepted")
        column = [np.array([value], np.intp) for value in (bucket, drafted)]
        column.append(self._outcome(accepted))
        if request is not None:
            self.learn_many(self.rows(np.array([request], np.uint64)), *column)
        elif drafted:
            self._learn_table(self._histogram(*column))

    def _outcome(self, accepted: int) -> npt.NDArray[Any]:
        """``accepted`` of one request as `learn_many` takes it."""
        return np.array([accepted], np.intp)

    def _survival(self, x: Mapping[Any, Any]) -> F64:
        request, bucket, drafted = self._one(x)
        correction = 1.0
        row = None if request is None else self._requests.find(request)
        if row is not None:
            correction = float(self._posterior(self._requests.counts[[row]], self._strength)[0])
        log_survival = self.log_survival()[bucket, :drafted].astype(np.float64)
        survival: F64 = np.exp(correction * log_survival)
        return survival

    def predict_one(self, x: dict[Any, Any]) -> float:
        """Expected number of the ``x["drafted"]`` drafts that are accepted."""
        return float(self._survival(x).sum())

    def predict_std(self, x: dict[Any, Any]) -> float:
        """Standard deviation of that number."""
        survival = self._survival(x)
        odd = 2.0 * np.arange(len(survival)) + 1.0
        return math.sqrt(max(float(odd @ survival) - float(survival.sum()) ** 2, 0.0))

    # -- state ------------------------------------------------------------------------------

    def state(self, *, requests: bool = True) -> State:
        """The table and, if wanted, the ``requests``, which end with their engine's epoch."""
        return {
            "kind": type(self).__name__,
            "params": {name: getattr(self, name) for name in self._params}
            | {"axis_sizes": list(self.axis_sizes)},
            "effects": pack(self._effects),
            "turn": self._turn,
            "counts": pack(self._counts),
            "presence": pack(self._presence),
            "changes": self._changes.state(),
            "scores": pack(self._scores),
            "num_unscored": self._num_unscored,
            "requests": self._requests.state() if requests else None,
        }

    def merge(self, other: Self) -> None:
        """Take in what another estimator of equal arguments knows of the same kind of engine.

        Cell by cell, as `shares_of_rivals` says: adds no evidence, since either may have started
        from the other. A copy of oneself changes nothing. Requests stay one's own.
        """
        if self.state(requests=False)["params"] != other.state(requests=False)["params"]:
            raise ValueError("estimators of different arguments cannot be merged")
        self._counts = _joined(self._counts, other._counts, of=0)
        self._presence = _joined(self._presence, other._presence, of=1)
        if other._scores[-1] > self._scores[-1]:
            self._scores = other._scores.copy()
            self._weigh_strengths()
        for _ in range(MERGE_SWEEPS * len(self._sizes)):  # the effects are a function of the counts
            self._fit_effects()
        self._log_survival = None

    def forget_requests(self) -> None:
        """Drop all requests, as when an engine starts anew and numbers them from the beginning."""
        self._corrected = _NOBODY
        self._requests = RequestRows(self.max_requests, num_columns=7)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The estimator that gave ``state``; raise ValueError when it is not such a state."""
        try:
            if state["kind"] != cls.__name__:
                raise ValueError(f"state of a {state['kind']}, expected {cls.__name__}")
            params = dict(state["params"])
            params["axis_sizes"] = tuple(params.get("axis_sizes", ()))
            model = cls(**params)
            model._effects = unpack(state, "effects", model._effects.shape)
            if np.abs(model._effects).max() > MAX_EFFECT:
                raise ValueError(f"effects are above {MAX_EFFECT}")
            model._turn = _whole("turn", state["turn"]) % len(model._sizes)
            counts = unpack(state, "counts", model._counts.shape)
            presence = unpack(state, "presence", (2,))
            if counts.min() < 0.0 or (counts[1] > counts[0] * (1 + 1e-9)).any():
                raise ValueError("counts are not of accepted among reached drafts")
            if not 0.0 <= presence[0] <= presence[1] * (1 + 1e-9):
                raise ValueError("presence is not of hits among tries")
            if max(counts.max(), presence[1]) > model.window * (1 + 1e-9):
                raise ValueError("counts are above the window")
            scores = unpack(state, "scores", model._scores.shape)
            if np.abs(scores).max() > MAX_SCORE or not 0.0 <= scores[-1] <= 1.01 * STRENGTH_WINDOW:
                raise ValueError("scores are not log-likelihoods of so many drafts")
            model._num_unscored = _whole("num_unscored", state["num_unscored"]) % SCORED_EVERY
            model._counts, model._presence, model._scores = counts, presence, scores
            model._weigh_strengths()
            model._changes.restore(state["changes"])
            if state["requests"] is not None:
                model._requests.restore(state["requests"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a state of {cls.__name__}: {error!r}") from None
        return model
