"""How likely drafts are to be accepted, per bucket, depth and request.

A table of hazards by bucket and depth (survival_table.py) says what an average request may expect,
and a correction of each request how it differs (frailty.py). The table is that of a request with
c = 1: a draft that is reached counts, beside its outcome, with h - h ** c_i, so that the table
comes to rest where sum(outcomes) = sum(h ** c_i). Raw outcomes would have in the hazards of deep
drafts, which good requests alone reach and bad ones are not drafted for, what c says already, and
lengths were too long. (Requests Beta over 0.4 with concentration 6: of old ones 1.13 and 1.27 times
as many were expected to have 4 and 5 drafts accepted as had.) Of trees, whose nodes are not
independent, the table has the raw outcomes.

What is due to requests teaches the table nothing. When other requests come, their corrections soon
say so, and the table would learn it from the first drafts of new ones alone: under low load hardly
within minutes. So the mean c of late is watched, and once it is off 1 by `OTHERS` the table follows
it for a while: all hazards are raised to that power, and the requests' exposures with them, so that
what is expected of those who are known stays as it was. That is for a change only: for ever it
costs 0.02 to 0.16% of log-loss on recorded answers, where requests are those they always were.

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

from smartspec.estimators.base import F64, State, pack, shares_of_rivals, unpack, whole
from smartspec.estimators.drift import CumulativeSum
from smartspec.estimators.frailty import NUM_COLUMNS, Frailty, time_of_event
from smartspec.estimators.request_rows import RequestRows, Rows
from smartspec.estimators.survival_table import F32, SurvivalTable

PRESENCE_STRENGTH = 2.0  #: steps that the pooled presence is worth in a request's
CHANGE_THRESHOLD = 12.0  #: deviations in sum: four surprises in a row of MAX_SURPRISE
MAX_SURPRISE = 4.0  #: deviations that one step may count for
SMALL_CHANGE = 0.1  #: of a hazard: the window follows such changes by itself
MAX_LEVEL = 0.5  #: of log hazard, that the table follows at once
OTHERS = 0.25  #: mean c beyond 1 by which requests have become others: three deviations
FOLLOWED = 2.0  #: memories of the mean c, for which the table then follows it
SCORED_EVERY = 8  #: steps: how alike requests are changes slowly, and so does a settled table

# Columns of a request's counts after those of its frailty: matches and tries.
_HITS, _TRIES = NUM_COLUMNS, NUM_COLUMNS + 1

_NOBODY: tuple[Rows | None, F64] = (None, np.zeros(0))  # whose corrections are known: nobody's


class AcceptanceEstimator:
    """Survivals per bucket and depth, corrections and match rates per request.

    Parameters
    ----------
    num_buckets, max_length : the table's shape [num_buckets, max_length], both >= 1
    window, prior, prior_weight, bucket_weight : as of `SurvivalTable`
    request_half_life, recent_half_life, request_strength, recent_strength : as of `Frailty`
    presence_half_life : steps after which a request's matches and misses count half
    max_requests : requests remembered; the least recently seen are forgotten
    axis_sizes : digits per axis of a bucket's index, the first axis slowest; their product is
        ``num_buckets``. Empty: one axis
    """

    _table_type: ClassVar[type[SurvivalTable]] = SurvivalTable
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
        self._table = self._table_type(
            num_buckets,
            max_length,
            tuple(axis_sizes) or (num_buckets,),
            window=window,
            prior=prior,
            prior_weight=prior_weight,
            bucket_weight=bucket_weight,
        )
        self._frailty = Frailty(
            request_half_life, recent_half_life, request_strength, recent_strength
        )
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
        self._presence_fade = 0.5 ** (1.0 / presence_half_life)
        self._presence = np.zeros(2)  # discounted hits and tries, over all requests
        self._requests = RequestRows(max_requests, num_columns=NUM_COLUMNS + 2)
        self._changes = CumulativeSum(threshold=CHANGE_THRESHOLD)
        self._num_unscored = 0  # steps
        self._level = 0.0  # mean c of late less 1, as far as the table has not followed
        self._following = 0.0  # memories of that, for which it still will
        self._corrected = _NOBODY  # what `corrections` gave, and whom: learning wants it too

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
        if len(rows) != len(bucket):
            raise ValueError("rows, buckets, drafted and accepted differ in length")
        self._requests.check(rows)
        some = proposed > 0
        if not some.all():
            rows, bucket, proposed, passed = rows[some], bucket[some], proposed[some], passed[some]
        if len(rows):
            self._table.refresh()
            counts = self._requests.counts.take(rows, 0)
            of, c = self._corrected
            if of is not rows:
                c = self._frailty.corrections(counts)
            self._corrected = _NOBODY
            self._watch(c, bucket, self._first(passed))
            new = self._table.histogram(bucket, proposed, passed)
            if self._tells_apart:
                new[1] += self._table.due_to_requests(c, bucket, proposed, passed)
                self._score_frailty(counts, bucket, proposed, passed)
            events = self._events(c, bucket, proposed, passed)
            if self._tells_apart and not self._num_unscored:  # of another strength c is another
                c = self._frailty.corrections(counts)
            self._frailty.note(counts, *events)
            self._requests.counts[rows] = counts
            if self._tells_apart:
                self._follow(*self._frailty.news_of_mean(c, counts))
            self._table.learn(new, fit=self._num_unscored == 0)

    @property
    def num_changes(self) -> int:
        """Times that acceptance was found to have changed for good, since the start."""
        return self._changes.num_alarms

    @property
    def strength(self) -> float:
        """Rejections that the expectation is worth that a request is average, as learned."""
        return self._frailty.strength

    def _first(self, passed: npt.NDArray[np.intp]) -> npt.NDArray[np.bool_]:
        """Whether the first draft was accepted."""
        first: npt.NDArray[np.bool_] = passed > 0
        return first

    def _watch(self, c: F64, bucket: npt.NDArray[np.intp], first: npt.NDArray[np.bool_]) -> None:
        """Compare first drafts with what was expected of them; forget when it is another world."""
        expected = np.exp(-c * self._table.cumulative[:, 1].take(bucket))
        surprise = float(np.count_nonzero(first) - expected.sum())
        variance = float(expected.dot(1.0 - expected)) + (SMALL_CHANGE * len(c)) ** 2
        z = surprise / math.sqrt(variance)
        self._changes.update(min(max(z, -MAX_SURPRISE), MAX_SURPRISE))
        if self._changes.drift_detected:
            self._table.forget()

    def _outcomes(self, *columns: npt.ArrayLike) -> list[npt.NDArray[np.intp]]:
        names = "buckets", "drafted", "accepted"
        limits = self.num_buckets - 1, self.max_length, self.max_length
        arrays = [np.asarray(column) for column in columns]
        for name, array in zip(names, arrays, strict=True):
            if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
                raise ValueError(f"{name} must be a column of integers")
        if not len(arrays[0]) == len(arrays[1]) == len(arrays[2]):
            raise ValueError("buckets, drafted and accepted differ in length")
        checked = np.array(arrays, np.intp)
        # As unsigned numbers, negative ones are above any limit.
        highest = checked.view(np.uintp).max(axis=1, initial=0).tolist()
        for name, most, limit in zip(names, highest, limits, strict=True):
            if most > limit:
                raise ValueError(f"{name} must be in [0, {limit}]")
        if (checked[2] > checked[1]).any():
            raise ValueError("more drafts accepted than drafted")
        return list(checked)

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
        self._table.refresh()
        before, after = self._table.around(bucket, passed)
        rejected = passed < proposed
        exposure = before + rejected * time_of_event(c, after - before)
        return rejected.astype(np.float64), exposure

    def _score_frailty(
        self,
        counts: F64,
        bucket: npt.NDArray[np.intp],
        proposed: npt.NDArray[np.intp],
        passed: npt.NDArray[np.intp],
    ) -> None:
        self._num_unscored += 1
        if self._num_unscored < SCORED_EVERY:
            return
        self._num_unscored = 0
        before, after = self._table.around(bucket, passed)
        self._frailty.score(counts, before, after - before, passed < proposed)

    def _follow(self, news: float, fresh: float) -> None:
        """Let the table be that of an average request again, once requests have become others.

        Parameters: what the mean c has moved by, and the share of its memory that is new.
        """
        level = self._level * (1.0 - fresh) + news
        self._level = min(max(level, -MAX_LEVEL), MAX_LEVEL)
        self._following = max(self._following - fresh, 0.0)
        if abs(self._level) > OTHERS:
            self._following = FOLLOWED
        if self._num_unscored or not self._following:
            return
        factor = math.exp(self._level)
        self._level = 0.0
        self._table.rescale(factor)
        self._frailty.rescale(self._requests.counts, factor)

    def learn_presence(self, rows: Rows, available: npt.ArrayLike) -> None:
        """Take in for which requests drafts were to be had (a lookup matched); bools [B]."""
        hits = np.asarray(available)
        if hits.dtype != np.bool_ or hits.shape != rows.shape:
            raise ValueError("available must be one bool per row")
        self._requests.check(rows)
        if not len(rows):
            return
        counts = self._requests.counts.take(rows, 0)
        counts[:, _HITS:] *= self._presence_fade
        counts[:, _HITS] += hits
        counts[:, _TRIES] += 1.0
        self._requests.counts[rows] = counts
        kept = max(1.0 - 1.0 / self.window, 0.0) ** len(hits)
        self._presence *= kept
        self._presence += self.window * (1.0 - kept) * np.array((hits.mean(), 1.0))

    # -- what was learned -------------------------------------------------------------------

    def forwards(self) -> tuple[float, ...]:
        """Forwards of a draft model for drafts of length 1, 2, ...; empty: the length itself."""
        return ()

    def log_survival(self) -> F32:
        """log P(at least j drafts are accepted), [num_buckets, max_length]; finite, falling.

        Read-only, and a new array when something was learned; once the table has settled, of every
        eighth step.
        """
        return self._table.log_survival()

    def hazards(self) -> F64:
        """P(draft j is accepted | it is reached), [num_buckets, max_length]."""
        self._table.refresh()
        return self._table.hazard[:-1].copy()

    def pooled_hazards(self) -> F64:
        """As `hazards`, over all buckets: [max_length]."""
        self._table.refresh()
        pooled: F64 = self._table.hazard[-1].copy()
        return pooled

    def pooled_survivals(self) -> F64:
        """P(at least j drafts are accepted), over all buckets: [max_length], falling."""
        self._table.refresh()
        pooled: F64 = np.exp(-self._table.cumulative[-1, 1:])
        return pooled

    def hazard_std(self) -> F64:
        """Standard deviation of `pooled_hazards`, [max_length]."""
        return self._table.pooled_std()

    def num_observed(self) -> F64:
        """Discounted observations per cell, [num_buckets, max_length], each <= window."""
        return self._table.num_observed()

    def corrections(self, rows: Rows) -> F32:
        """c of each request, [B]: its survivals are its bucket's to this power; 1 when unknown."""
        self._requests.check(rows)
        c = self._frailty.corrections(self._requests.counts.take(rows, 0))
        self._corrected = rows, c
        return c.astype(np.float32)

    def pooled_presence(self) -> float:
        """Share of requests and steps for which drafts are to be had; 0.5 when unknown."""
        hits, tries = self._presence
        return float((hits + 1.0) / (tries + 2.0))

    def presence(self, rows: Rows) -> F32:
        """P(drafts are to be had), [B] in (0, 1): a request's own rate shrunk to the pooled one."""
        self._requests.check(rows)
        counts = self._requests.counts.take(rows, 0)
        weight = PRESENCE_STRENGTH
        rate = (counts[:, _HITS] + weight * self.pooled_presence()) / (counts[:, _TRIES] + weight)
        return rate.astype(np.float32)

    # -- one at a time ----------------------------------------------------------------------

    def _one(self, x: Mapping[Any, Any]) -> tuple[int | None, int, int]:
        drafted = whole("drafted", x.get("drafted", self.max_length))
        bucket = whole("bucket", x.get("bucket", 0))
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
        accepted = whole("accepted", y)
        if accepted > drafted:
            raise ValueError(f"{accepted} of {drafted} drafts accepted")
        column = [np.array([value], np.intp) for value in (bucket, drafted)]
        column.append(self._outcome(accepted))
        if request is not None:
            self.learn_many(self.rows(np.array([request], np.uint64)), *column)
        elif drafted:
            self._table.learn(self._table.histogram(*column), fit=self._num_unscored == 0)

    def _outcome(self, accepted: int) -> npt.NDArray[Any]:
        """``accepted`` of one request as `learn_many` takes it."""
        return np.array([accepted], np.intp)

    def _survival(self, x: Mapping[Any, Any]) -> F64:
        request, bucket, drafted = self._one(x)
        correction = 1.0
        row = None if request is None else self._requests.find(request)
        if row is not None:
            correction = float(self._frailty.corrections(self._requests.counts[[row]])[0])
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
            "presence": pack(self._presence),
            "changes": self._changes.state(),
            "num_unscored": self._num_unscored,
            "level": self._level,
            "following": self._following,
            "requests": self._requests.state() if requests else None,
            **self._table.state(),
            **self._frailty.state(),
        }

    def merge(self, other: Self) -> None:
        """Take in what another estimator of equal arguments knows of the same kind of engine.

        Cell by cell, as `shares_of_rivals` says: adds no evidence, since either may have started
        from the other. A copy of oneself changes nothing. Requests stay one's own.
        """
        if self.state(requests=False)["params"] != other.state(requests=False)["params"]:
            raise ValueError("estimators of different arguments cannot be merged")
        self._table.merge(other._table)
        self._frailty.merge(other._frailty)
        shares = shares_of_rivals(self._presence[1], other._presence[1])
        self._presence = self._presence * shares[0] + other._presence * shares[1]

    def forget_requests(self) -> None:
        """Drop all requests, as when an engine starts anew and numbers them from the beginning."""
        self._corrected = _NOBODY
        self._requests = RequestRows(self.max_requests, num_columns=NUM_COLUMNS + 2)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The estimator that gave ``state``; raise ValueError when it is not such a state."""
        try:
            if state["kind"] != cls.__name__:
                raise ValueError(f"state of a {state['kind']}, expected {cls.__name__}")
            params = dict(state["params"])
            params["axis_sizes"] = tuple(params.get("axis_sizes", ()))
            model = cls(**params)
            model._table.restore(state)
            model._frailty.restore(state)
            presence = unpack(state, "presence", (2,))
            if not 0.0 <= presence[0] <= presence[1] * (1 + 1e-9):
                raise ValueError("presence is not of hits among tries")
            if presence[1] > model.window * (1 + 1e-9):
                raise ValueError("presence is above the window")
            model._presence = presence
            model._num_unscored = whole("num_unscored", state["num_unscored"]) % SCORED_EVERY
            # Older ones have none.
            level, following = (float(state.get(key, 0.0)) for key in ("level", "following"))
            if not (abs(level) <= MAX_LEVEL and 0.0 <= following <= FOLLOWED):
                raise ValueError("level is not of a mean, or followed for too long")
            model._level, model._following = level, following
            model._changes.restore(state["changes"])
            if state["requests"] is not None:
                model._requests.restore(state["requests"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a state of {cls.__name__}: {error!r}") from None
        return model
