"""Non-negative recursive least squares that forgets only what it is being told anew.

What the step-cost models are made of: `RecursiveLeastSquares` holds the coefficients,
`ResidualFilter` decides how far one observation is to be believed, `learn` joins the two.

Information form. With precision A and b = A theta, an observation y of row x and weight w does

    A <- A - (1 - f) u u' / (x' u) + w x x',      u = A x
    b <- b - (1 - f) u (x' b) / (x' u) + w x y

which is the directional forgetting of Cao and Schwartz (Automatica 36, 2000, 1725): only the
information along x is discounted, by the factor f, and theta stays put while that happens.
Exponential forgetting of the whole of A loses, in an idle engine, all that was learned under load,
and ends in a singular matrix; here the precision across x keeps its value for ever, and along x it
tends to w / (1 - f). Coefficients are kept >= 0 by solving min theta' A theta / 2 - b' theta over
theta >= 0 with an active set that starts from the last one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from operator import mul
from typing import Any, NamedTuple

import numpy as np

from smartspec.estimators.base import (
    F64,
    State,
    non_negative,
    pack,
    shares_of_rivals,
    unpack,
)
from smartspec.estimators.drift import CumulativeSum

LARGEST_PRECISION = 1e60  #: far above any, and its square still a number
#: Seconds; times below are noise of clock and operating system.
RESOLUTION_S = 2e-5

# After a change of level: precision kept, and deviation of the factor common to all coefficients.
# In simulation (+30%, x 2, / 2 over mixed shapes) these are back at a prediction error of 3% within
# 10 to 15 steps, and the least harmed by an outlier that follows.
_KEPT_PRECISION = 0.3
_COMMON_FACTOR = 0.3


def _inverse(matrix: F64) -> F64:
    """The inverse; NaN where there is none."""
    try:
        inverse: F64 = np.linalg.inv(matrix).astype(np.float64, copy=False)
    except np.linalg.LinAlgError:
        return np.full_like(matrix, np.nan)
    return inverse


class RecursiveLeastSquares:
    """Coefficients theta >= 0 of y ~ row @ theta, and their precision.

    ``covariance``, the inverse of observations' and prior's precision, is in units of the noise of
    an observation of weight 1. `add` takes observations in; `solve` then brings ``coef`` and
    ``covariance`` up to date, so that several observations pay for one solution.

    Parameters
    ----------
    prior_mean : [n] >= 0
    prior_precision : [n, n], positive definite; counts ``prior_weight`` (at first 1) times, for
        good: what was observed is forgotten, the prior is not
    forgetting : in (0, 1]; 1 / (1 - forgetting) observations are remembered along a direction
    """

    def __init__(self, prior_mean: F64, prior_precision: F64, forgetting: float) -> None:
        self.forgetting = forgetting
        self.num_loosened = 0
        self.prior_weight = 1.0
        self._prior = prior_precision.copy()
        self._prior_moment: F64 = prior_precision @ prior_mean
        self.precision: F64 = np.zeros_like(prior_precision)
        self.moment: F64 = np.zeros_like(prior_mean)
        self.coef = prior_mean.copy()
        self.covariance = _inverse(prior_precision)
        self._zero: list[int] = []
        self._is_solved = True

    def add(self, row: F64, y: float, weight: float) -> None:
        """Take in one observation; `solve` makes it count."""
        # `dot`: for arrays this small `@` takes up to twice as long.
        direction = self.precision.dot(row)
        known = float(row.dot(direction))
        forgotten = (1.0 - self.forgetting) / known if known > 0.0 else 0.0
        # Both rank-one terms in one product.
        change = np.array((direction, row))
        change_t = change.T * (-forgotten, weight)
        self.precision += change_t.dot(change)
        self.moment += change_t.dot((float(row.dot(self.moment)), y))
        self._is_solved = False

    def join(self, other: RecursiveLeastSquares) -> None:
        """Take in what another filter with the same prior knows; adds no evidence.

        What the two know may be one and the same, where a sum would count it twice. So in the
        directions v_i in which neither's knowledge depends on that of another direction,

            A = sum_i v_i v_i',   B = sum_i d_i v_i v_i'    (A, B > 0, prior included),

        evidence 1 and d_i are joined as `shares_of_rivals` says. A copy of itself changes nothing.
        Raises numpy's LinAlgError where numbers do not allow it.
        """
        prior = self.prior_weight * self._prior
        prior_moment = self.prior_weight * self._prior_moment
        root = np.linalg.cholesky(self.precision + prior)
        half = np.linalg.solve(root, other.precision + prior)
        evidence, rotation = np.linalg.eigh(np.linalg.solve(root, half.T))
        evidence = np.maximum(evidence, 0.0)
        basis = root @ rotation
        mine, others = shares_of_rivals(np.ones_like(evidence), evidence)
        moments = np.column_stack((self.moment + prior_moment, other.moment + prior_moment))
        along = np.linalg.solve(basis, moments)
        self.precision = (basis * (mine + others * evidence)) @ basis.T - prior
        self.moment = basis @ (mine * along[:, 0] + others * along[:, 1]) - prior_moment
        self.solve()

    def solve(self) -> None:
        """Bring ``covariance`` and ``coef`` up to date with what was added."""
        # Rounding leaves differences across the diagonal that an inverse would amplify.
        self.precision = 0.5 * (self.precision + self.precision.T)
        covariance = _inverse(self.precision + self.prior_weight * self._prior)
        if not covariance.diagonal().min() > 0.0:
            self._recover()
            return
        self.covariance = covariance
        self.coef = self._non_negative()
        self._is_solved = True

    def _recover(self) -> None:
        """Keep the coefficients, and know them as little as at first.

        Out of reach of sane input: it takes features some 1e7 times what they were scaled for.
        """
        self.precision = np.zeros_like(self._prior)
        self.moment = np.zeros_like(self.moment)
        self._prior_moment = self._prior @ self.coef
        self.covariance = _inverse(self.prior_weight * self._prior)
        self._is_solved = True

    def _free(self) -> F64:
        """The coefficients without their bounds."""
        free: F64 = self.covariance @ (self.moment + self.prior_weight * self._prior_moment)
        return free

    def _non_negative(self) -> F64:
        # In the dual: with coefficients Z held at 0, theta = free - P_Z mu where P_ZZ mu = free_Z,
        # and mu <= 0 for all of Z at the optimum. Z is small, and mostly that of the last step.
        free = self._free()
        if free.min() >= 0.0:
            self._zero = []
            return free
        zero, coef = self._zero, free
        tolerance = -1e-12 * float(free.min())
        for _ in range(3 * len(free)):
            columns = self.covariance[:, zero]
            pull = np.linalg.solve(columns[zero], free[zero])
            coef = free - columns @ pull
            coef[zero] = 0.0
            if coef.min() < -tolerance:
                zero = zero + np.flatnonzero(coef < -tolerance).tolist()
            elif not zero or pull.max() <= 0.0:
                break
            else:
                worst = int(pull.argmax())
                zero = zero[:worst] + zero[worst + 1 :]
        # Where it has cycled among nearly equal solutions, any of them will do.
        self._zero = zero
        return np.maximum(coef, 0.0)

    def leverage(self, row: F64) -> float:
        """Variance of row @ theta, in units of the noise of an observation of weight 1."""
        return float(row.dot(self.covariance).dot(row))

    def loosen(self, keep: float, scale_variance: float) -> None:
        """Doubt what is known: keep a share of the precision, and let all coefficients move as one.

        To what the observations say, the covariance becomes ``P / keep + scale_variance * theta
        theta'``; in terms of the precision, so that it need not have an inverse. When a machine
        slows down, everything does, by one factor: the first observations after a change settle
        that factor, later ones the rest.
        """
        if not self._is_solved:
            self.solve()
        self.num_loosened += 1
        free = self._free()
        precision, moment = keep * self.precision, keep * self.moment
        along = precision @ free
        share = scale_variance / (1.0 + scale_variance * float(free @ along))
        self.precision = precision - share * np.outer(along, along)
        self.moment = moment - share * along * float(free @ moment)
        self.covariance = _inverse(self.precision + self.prior_weight * self._prior)

    def restart(self, factor: float) -> None:
        """Begin anew, with all coefficients of the prior and their deviations times ``factor``."""
        self._prior_moment = self._prior_moment / factor
        self._prior = self._prior / factor**2
        self.precision = np.zeros_like(self._prior)
        self.moment = np.zeros_like(self.moment)
        self._zero = []
        self.solve()

    def state(self) -> State:
        """Everything but ``forgetting``, as plain values."""
        return {
            "prior": pack(self._prior),
            "prior_moment": pack(self._prior_moment),
            "prior_weight": self.prior_weight,
            "precision": pack(self.precision),
            "moment": pack(self.moment),
            "coef": pack(self.coef),
            "covariance": pack(self.covariance),
            "zero": list(self._zero),
            "num_loosened": self.num_loosened,
        }

    def restore(self, state: Mapping[str, Any], size: int) -> None:
        """Take over a `state` of ``size`` coefficients; raise ValueError when it is not one."""
        prior = unpack(state, "prior", (size, size))
        precision = unpack(state, "precision", (size, size))
        weight = non_negative("prior_weight", state["prior_weight"])
        if not max(np.abs(prior).max(), np.abs(precision).max(), weight) < LARGEST_PRECISION:
            raise ValueError("precision is larger than any that can be learned")
        if not min(_inverse(m).diagonal().min() for m in (prior, precision + weight * prior)) > 0.0:
            raise ValueError("precision is not positive definite")
        prior_moment = unpack(state, "prior_moment", (size,))
        moment = unpack(state, "moment", (size,))
        coef = unpack(state, "coef", (size,))
        covariance = unpack(state, "covariance", (size, size))
        spread = np.linalg.eigvalsh(0.5 * (covariance + covariance.T))
        if not spread.min(initial=0.0) >= -1e-9 * spread.max(initial=0.0):
            raise ValueError("covariance is not one")
        zero = [int(index) for index in state["zero"]]
        self.num_loosened = int(non_negative("num_loosened", state["num_loosened"]))
        if len(set(zero)) != len(zero) or not all(0 <= index < size for index in zero):
            raise ValueError("coefficients do not match their model")
        if coef.min(initial=0.0) < 0.0:
            raise ValueError("coefficients do not match their model")
        self._prior, self._prior_moment, self.prior_weight = prior, prior_moment, weight
        self.precision, self.moment, self.coef = precision, moment, coef
        self.covariance, self._zero = covariance, zero
        self._is_solved = False


class Verdict(NamedTuple):
    """What to make of one observation."""

    value: float  #: the observation, drawn in to the clipping limit
    trust: float  #: in (0, 1], what it counts of a usual observation
    clipped: bool
    shifted: bool  #: the level has changed for good: loosen the model, then learn ``value``


class ResidualFilter:
    """Learned relative noise, clipping of outliers, and recognition of a changed level.

    Residuals are divided by the deviation that they should have, noise and what the model does not
    know yet taken together. Beyond ``clip_at`` deviations an observation is drawn in, and counts
    the less the further out it was: a redescending influence (Hampel et al., Robust Statistics,
    1986). Huber's, full weight at the limit, lets an outlier of 50 times move a rarely seen shape
    by percents. What stays out is a changed level: `CumulativeSum` (drift.py) tells.

    Noise is learned apart for each band of sizes that the caller tells apart. What an engine that
    idles repeats, hour after hour, says nothing of how its larger steps spread; with one noise for
    all, the first steps of a new load were outliers, and soon a change of level.

    Parameters
    ----------
    clip_at : deviations, > 1
    noise : relative deviation assumed at first; worth 10 observations
    noise_floor : a clock that repeats itself exactly must not make everything else an outlier
    window : observations of a band that its learned noise remembers
    num_bands : bands; each is held to be as noisy as all are together, for 10 observations' worth
    """

    FIRST_COUNT = 10  #: observations that an assumption is worth

    def __init__(
        self,
        clip_at: float = 4.0,
        noise: float = 0.1,
        noise_floor: float = 0.01,
        window: int = 256,
        num_bands: int = 1,
    ) -> None:
        self.clip_at = clip_at
        self.noise_floor = noise_floor
        self.window = window
        self.variance = noise * noise  #: of all bands, each by what its noise remembers
        self.num_clipped = 0
        self._first = self.variance
        self._first_count = float(self.FIRST_COUNT)
        self._variances = [noise_floor**2] * num_bands
        self._counts = [0] * num_bands
        self._remembered = [0] * num_bands  # the counts, as far as the window goes
        self._drift = CumulativeSum()

    @property
    def count(self) -> int:
        """Observations judged."""
        return sum(self._counts)

    @property
    def noise(self) -> float:
        """Learned standard deviation of an observation over its expected value, on the whole."""
        return math.sqrt(self.variance)

    def noise_in(self, band: int) -> float:
        """The same of an observation in ``band``."""
        return math.sqrt(self._variance_in(band))

    def _variance_in(self, band: int) -> float:
        count = self._remembered[band]
        total = self.FIRST_COUNT * self.variance + count * self._variances[band]
        return total / (self.FIRST_COUNT + count)

    def judge(self, predicted: float, observed: float, leverage: float, band: int = 0) -> Verdict:
        """Judge ``observed``, and learn the noise of its ``band`` from it.

        ``predicted`` >= `RESOLUTION_S`; ``leverage``: variance of the prediction, in units of the
        noise of an observation. Less than the resolution is judged as that: an engine whose
        drafts take 0 s, as it says, has not changed its level.
        """
        variance = self._variance_in(band)
        spread = math.sqrt(variance + self.variance * leverage)
        z = (max(observed, RESOLUTION_S) - predicted) / (predicted * spread)
        drawn = min(max(z, -self.clip_at), self.clip_at)
        self._drift.update(drawn)
        shifted = self._drift.drift_detected
        self._counts[band] += 1
        self._remembered[band] = min(self._counts[band], self.window)
        own = self._variances[band]
        own += (drawn * drawn * variance - own) / self._remembered[band]
        self._variances[band] = max(own, self.noise_floor**2)
        self._first_count *= 1.0 - 1.0 / self.window
        self._join_bands()
        trust = 1.0
        if clipped := drawn != z:
            self.num_clipped += 1
            if not shifted:
                observed = predicted * (1.0 + drawn * spread)
                trust = drawn / z
        return Verdict(observed, trust, clipped, shifted)

    def _join_bands(self) -> None:
        remembered = sum(map(mul, self._remembered, self._variances))
        total = self._first_count * self._first + remembered
        self.variance = total / (self._first_count + sum(self._remembered))

    def state(self) -> State:
        """Everything but the constructor's arguments, as plain values."""
        return {
            "first_count": self._first_count,
            "variances": list(self._variances),
            "counts": list(self._counts),
            "num_clipped": self.num_clipped,
            "drift": self._drift.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over a `state`; raise ValueError when it is not one."""
        try:
            variances = [non_negative("variance", value) for value in state["variances"]]
            counts = [int(non_negative("count", count)) for count in state["counts"]]
            if not len(variances) == len(counts) == len(self._counts):
                raise ValueError("noise is not that of as many bands")
            first_count = non_negative("first_count", state["first_count"])
            if not first_count + sum(counts) > 0.0:
                raise ValueError("noise that rests on nothing")
            self._first_count, self._counts = first_count, counts
            self._remembered = [min(count, self.window) for count in counts]
            self._variances = [max(value, self.noise_floor**2) for value in variances]
            self._join_bands()
            self.num_clipped = int(non_negative("num_clipped", state["num_clipped"]))
            self._drift.restore(state["drift"])
        except KeyError as error:
            raise ValueError(f"filter state without {error}") from None


def learn(
    solver: RecursiveLeastSquares,
    residuals: ResidualFilter,
    row: F64,
    seconds: float,
    offset_s: float = 0.0,
    band: int = 0,
) -> Verdict:
    """Judge that ``row`` took ``seconds``, ``offset_s`` of them not the model's, and add it.

    Noise is relative: an observation weighs 1 / seconds^2. The caller calls `solve`.
    """
    predicted = max(offset_s + float(row.dot(solver.coef)), RESOLUTION_S)
    verdict = residuals.judge(predicted, seconds, solver.leverage(row) / predicted**2, band)
    if verdict.shifted:
        solver.loosen(_KEPT_PRECISION, (_COMMON_FACTOR / residuals.noise) ** 2)
    # By the larger of expected and observed: an outlier seen before the model knows better (a first
    # step that compiles) weighs next to nothing. The price is a bias of one noise variance.
    weight = verdict.trust * max(predicted, verdict.value) ** -2
    solver.add(row, max(verdict.value - offset_s, 0.0), weight)
    return verdict


class RobustMean:
    """Discounted mean of a skewed quantity, outliers drawn in to 3 mean deviations.

    A change of level drives every value to the limit, and so the limit up: it is followed.
    """

    def __init__(self, window: int = 100) -> None:
        self.window = window
        self.value = 0.0
        self.deviation = 0.0
        self.count = 0

    def add(self, value: float) -> None:
        """Take in one value."""
        self.count += 1
        step = 1.0 / min(self.count, self.window)
        error = value - self.value
        if self.count > 10:
            step = max(step, 0.05)
            limit = 3.0 * self.deviation + 0.01 * self.value
            error = min(max(error, -limit), limit)
        self.value += step * error
        self.deviation += step * (abs(error) - self.deviation)

    def state(self) -> State:
        """What was learned, as plain values."""
        return {"value": self.value, "deviation": self.deviation, "count": self.count}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over a `state`; raise ValueError when it is not one."""
        try:
            self.value = non_negative("value", state["value"])
            self.deviation = non_negative("deviation", state["deviation"])
            self.count = int(non_negative("count", state["count"]))
        except KeyError as error:
            raise ValueError(f"mean without {error}") from None
