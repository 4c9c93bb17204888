"""How likely drafts are to be accepted by bucket and depth: hazards from censored counts.

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
to them by Newton's method, one axis at a time, and so forgets as they do, needs no learning rate
and samples nothing. (Ridge-penalised; within an axis the Hessian is diagonal.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from smartspec.estimators.base import F64, State, pack, shares_of_rivals, unpack, whole

F32 = npt.NDArray[np.float32]
Index = npt.NDArray[np.intp]

EFFECT_RIDGE = 5.0  #: precision of an effect's prior, of mean 0
MAX_EFFECT = 10.0  #: in logits
MAX_EFFECT_STEP = 1.0  #: of one sweep: Newton's method overshoots where little was seen
HAZARD_RANGE = (1e-3, 1.0 - 1e-4)  #: keeps logarithms finite and every depth worth a probe
MERGE_SWEEPS = 8  #: of Newton's method over all axes
SETTLED = 0.5  #: of the window: from then on a step moves the pooled hazard little
KEPT_AFTER_CHANGE = 4.0  #: observations that the counts of a depth are worth after a change


def clipped(values: F64, limits: tuple[float, float]) -> F64:
    """As np.clip, which takes four times as long for few values."""
    within: F64 = np.minimum(np.maximum(values, limits[0]), limits[1])
    return within


class SurvivalTable:
    """Hazards and survivals per bucket and depth, of counts that fade.

    Memory is counted in observations, never in time: a cell that is not observed keeps what it
    knows, and one that is observed for ever is worth at most ``window`` observations.

    Parameters
    ----------
    num_buckets, max_length : the table's shape
    axis_sizes : digits per axis of a bucket's index, the first axis slowest; their product is
        ``num_buckets``
    window : observations that a cell remembers
    prior, prior_weight : hazard expected at first, and the observations that it is worth
    bucket_weight : observations that the additive model is worth in a bucket's hazard

    Attributes
    ----------
    hazard, log_hazard : [num_buckets + 1, max_length], the last row over all buckets
    cumulative : [num_buckets + 1, max_length + 1], -log of survivals, from 0 at depth 0; rising.
        These three are of the last `refresh`
    """

    #: where groups of depths begin that share their effects: the first, the second, and the others
    group_starts: ClassVar[tuple[int, ...]] = (0, 1, 2)

    def __init__(
        self,
        num_buckets: int,
        max_length: int,
        axis_sizes: tuple[int, ...],
        *,
        window: int,
        prior: float,
        prior_weight: float,
        bucket_weight: float,
    ) -> None:
        if min(axis_sizes) < 1 or math.prod(axis_sizes) != num_buckets:
            raise ValueError(f"axis_sizes {axis_sizes} do not make num_buckets = {num_buckets}")
        self.num_buckets = num_buckets
        self.max_length = max_length
        self.window = window
        self.prior = prior
        self.prior_weight = prior_weight
        self.bucket_weight = bucket_weight
        self._sizes = axis_sizes
        self._groups = [first for first in self.group_starts if first < max_length]
        self._group_of_depth = np.searchsorted(self._groups, np.arange(max_length), "right") - 1
        self._effects: F64 = np.zeros((sum(axis_sizes), len(self._groups)))
        self._turn = 0  # the axis fitted last
        self._depths = np.arange(max_length)
        ends = np.cumsum(axis_sizes).tolist()
        # Rows of the effects that belong to each axis, and the shape that lays them along it.
        self._axes = [slice(end - size, end) for end, size in zip(ends, axis_sizes, strict=True)]
        self._along = [
            (*(1,) * place, size, *(1,) * (len(axis_sizes) - place - 1), max_length)
            for place, size in enumerate(axis_sizes)
        ]
        # [reached, accepted]; the last row of the middle axis pools the buckets.
        self._counts = np.zeros((2, num_buckets + 1, max_length))
        self._log_survival: F32 | None = None  # None: stale
        self.hazard: F64 = np.zeros((0, 0))
        self.log_hazard: F64 = np.zeros((0, 0))
        self.cumulative: F64 = np.zeros((0, 0))

    # -- learning ---------------------------------------------------------------------------

    @property
    def is_settled(self) -> bool:
        """Whether one step's drafts move the pooled hazard little."""
        return bool(self._counts[0, -1, 0] > SETTLED * self.window)

    def learn(self, new: F64, *, fit: bool) -> None:
        """Take in ``new`` counts, shaped as the table's: [reached, accepted], the last row pooled.

        ``fit``: let the additive model and what is read from the table follow at once.
        """
        # m observations at once: what was there fades by (1 - 1 / window)^m, and they bring what
        # they would have brought one by one, so that counts never exceed the window.
        fade = (1.0 - 1.0 / self.window) ** new[0] if self.window > 1 else (new[0] == 0.0) * 1.0
        mass = self.window * (1.0 - fade) / np.maximum(new[0], 1.0)
        self._counts *= fade
        self._counts += new * mass
        np.minimum(self._counts[1], self._counts[0], out=self._counts[1])
        np.maximum(self._counts[1], 0.0, out=self._counts[1])
        if fit or not self.is_settled:
            self._fit_effects()
            self._log_survival = None

    def histogram(
        self,
        bucket: Index,
        proposed: Index,
        passed: Index,
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

    def due_to_requests(
        self,
        c: F64,
        bucket: Index,
        proposed: Index,
        passed: Index,
    ) -> F64:
        """How many more drafts average requests would have accepted: [num_buckets + 1, K].

        h - h ** c for each draft reached. What is counted with it is what the table alone explains.
        """
        log_hazard = self.log_hazard.take(bucket, 0)
        more = self.hazard.take(bucket, 0) - np.exp(c[:, None] * log_hazard)
        reached = np.minimum(passed + 1, proposed)
        more *= self._depths < reached[:, None]
        cells = bucket[:, None] * self.max_length + self._depths
        size = self.num_buckets * self.max_length
        due = np.empty((self.num_buckets + 1, self.max_length))
        due[:-1] = np.bincount(cells.ravel(), more.ravel(), size).reshape(due[:-1].shape)
        due[-1] = more.sum(axis=0)
        return due

    def around(self, bucket: Index, passed: Index) -> tuple[F64, F64]:
        """Cumulative hazards of the drafts that were accepted, and with the next one: [B] each."""
        # Column 0 is depth 0; clipped, since depth passed + 1 may not be.
        next_one = np.minimum(passed + 1, self.max_length)
        return self.cumulative[bucket, passed], self.cumulative[bucket, next_one]

    def rescale(self, factor: float) -> None:
        """Raise all hazards to this power, of the same evidence."""
        reached, accepted = self._counts
        rate = clipped(accepted / np.maximum(reached, 1e-9), HAZARD_RANGE)
        np.minimum(reached * rate**factor, reached, out=accepted)
        self._log_survival = None

    def forget(self) -> None:
        """Keep of the counts of each depth what a few observations are worth."""
        self._counts *= np.minimum(1.0, KEPT_AFTER_CHANGE / np.maximum(self._counts[0, -1], 1.0))
        self._log_survival = None

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
        effects += clipped(step, (-MAX_EFFECT_STEP, MAX_EFFECT_STEP))
        effects[:] = clipped(effects, (-MAX_EFFECT, MAX_EFFECT))

    def _by_group(self, by_depth: F64) -> F64:
        """Sums [digits, groups] of [digits, max_length]."""
        sums: F64 = np.add.reduceat(by_depth, self._groups, axis=1)
        return sums

    # -- what was learned -------------------------------------------------------------------

    def _logits(self, pooled: F64) -> F64:
        """The additive model, [*axis sizes, max_length]."""
        logit: F64 = np.log(pooled / (1.0 - pooled))
        effects = self._effects.take(self._group_of_depth, 1)
        for rows, along in zip(self._axes, self._along, strict=True):
            logit = logit + effects[rows].reshape(along)
        return logit

    def _pooled(self) -> F64:
        """Hazards over all buckets, [max_length], within `HAZARD_RANGE`."""
        reached, accepted = self._counts[:, -1].tolist()
        expected, weight = self.prior, self.prior_weight
        pooled = []
        for tried, passed in zip(reached, accepted, strict=True):
            expected = (passed + weight * expected) / (tried + weight)
            pooled.append(expected)
        return clipped(np.array(pooled), HAZARD_RANGE)

    def _cumulate(self, hazard: F64) -> F64:
        """-log of the survivals that these hazards make, in the same shape; rising."""
        cumulative: F64 = np.cumsum(-np.log(hazard), axis=1)
        return cumulative

    def refresh(self) -> None:
        """Work out hazards and survivals of the present counts, if they are stale."""
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
        self.hazard = clipped(hazard, HAZARD_RANGE)
        self.log_hazard = np.log(self.hazard)
        self.cumulative = np.zeros((self.num_buckets + 1, self.max_length + 1))
        self.cumulative[:, 1:] = self._cumulate(self.hazard)
        self._log_survival = -self.cumulative[:-1, 1:].astype(np.float32)
        self._log_survival.flags.writeable = False

    def log_survival(self) -> F32:
        """log P(at least j drafts are accepted), [num_buckets, max_length]; finite, falling.

        Read-only, and a new array after each refresh that changed something.
        """
        self.refresh()
        assert self._log_survival is not None
        return self._log_survival

    def pooled_std(self) -> F64:
        """Standard deviation of the pooled hazards, [max_length], from their Beta posteriors."""
        self.refresh()
        hazard = self.hazard[-1]
        trials = self._counts[0, -1] + self.prior_weight
        std: F64 = np.sqrt(hazard * (1.0 - hazard) / (trials + 1.0))
        return std

    def num_observed(self) -> F64:
        """Discounted observations per cell, [num_buckets, max_length], each <= window."""
        return self._counts[0, :-1].copy()

    # -- state ------------------------------------------------------------------------------

    def merge(self, other: Self) -> None:
        """Take in another table of equal shape, cell by cell, as `shares_of_rivals` says."""
        shares = shares_of_rivals(self._counts[0], other._counts[0])
        self._counts = self._counts * shares[0] + other._counts * shares[1]
        for _ in range(MERGE_SWEEPS * len(self._sizes)):  # the effects are a function of the counts
            self._fit_effects()
        self._log_survival = None

    def state(self) -> State:
        return {"effects": pack(self._effects), "turn": self._turn, "counts": pack(self._counts)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what a table of equal arguments gave; ValueError leaves this one as it was."""
        effects = unpack(state, "effects", self._effects.shape)
        if np.abs(effects).max() > MAX_EFFECT:
            raise ValueError(f"effects are above {MAX_EFFECT}")
        turn = whole("turn", state["turn"]) % len(self._sizes)
        counts = unpack(state, "counts", self._counts.shape)
        if counts.min() < 0.0 or (counts[1] > counts[0] * (1 + 1e-9)).any():
            raise ValueError("counts are not of accepted among reached drafts")
        if counts.max() > self.window * (1 + 1e-9):
            raise ValueError("counts are above the window")
        self._effects, self._turn, self._counts = effects, turn, counts
        self._log_survival = None
