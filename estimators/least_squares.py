"""Non-negative recursive least squares that forgets only what it is being told anew.

The two parts that the step-cost models are made of: `RecursiveLeastSquares` holds the
coefficients, `ResidualFilter` decides how far one observation is to be believed.

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
from typing import Any, NamedTuple

import numpy as np

from smartspec.estimators.base import F64, State, non_negative, pack, unpack


class RecursiveLeastSquares:
    """Coefficients theta >= 0 of y ~ row @ theta, and their precision.

    ``covariance`` (the inverse of the precision) is in units of the noise of an observation of
    weight 1. `add` takes observations in; `solve` then brings ``coef`` and ``covariance`` up to
    date, so that several observations of one step pay for one solution.

    Parameters
    ----------
    prior_mean : [n] >= 0
    prior_precision : [n, n], positive definite
    forgetting : in (0, 1]; 1 / (1 - forgetting) observations are remembered along a direction
    """

    def __init__(self, prior_mean: F64, prior_precision: F64, forgetting: float) -> None:
        self.forgetting = forgetting
        self.precision = prior_precision.copy()
        self.moment: F64 = prior_precision @ prior_mean
        self.coef = prior_mean.copy()
        self.covariance: F64 = np.linalg.inv(prior_precision)
        self._active = np.ones(len(prior_mean), bool)

    def add(self, row: F64, y: float, weight: float) -> None:
        """Take in one observation; `solve` makes it count."""
        direction = self.precision @ row
        known = float(row @ direction)
        if known > 0.0:
            forgotten = (1.0 - self.forgetting) / known
            # One fused outer product per term; both are exactly symmetric in floating point.
            self.precision -= direction[:, None] * (direction * forgotten)
            self.moment -= direction * (forgotten * float(row @ self.moment))
        self.precision += row[:, None] * (row * weight)
        self.moment += row * (weight * y)

    def solve(self) -> None:
        """Bring ``covariance`` and ``coef`` up to date with what was added."""
        # (a + a') / 2: forgetting leaves rounding errors that an inverse would amplify.
        self.precision = 0.5 * (self.precision + self.precision.T)
        self.covariance = np.linalg.inv(self.precision)
        self.coef = self._non_negative()

    def _non_negative(self) -> F64:
        coef: F64 = self.covariance @ self.moment
        if coef.min() >= 0.0:
            self._active[:] = True
            return coef
        active = self._active
        tolerance = 1e-10 * float(np.abs(self.moment).max())
        for _ in range(3 * len(coef)):
            rows = np.flatnonzero(active)
            part = np.linalg.solve(self.precision[rows[:, None], rows], self.moment[rows])
            if part.size and part.min() < 0.0:
                active[rows[part < 0.0]] = False
                continue
            coef = np.zeros_like(coef)
            coef[rows] = part
            pull = self.moment - self.precision @ coef
            pull[rows] = 0.0
            worst = int(pull.argmax())
            if pull[worst] <= tolerance:
                return coef
            active[worst] = True
        return np.maximum(coef, 0.0)  # cycled among nearly equal solutions: any of them will do

    def leverage(self, row: F64) -> float:
        """Variance of row @ theta, in units of the noise of an observation of weight 1."""
        return float(row @ self.covariance @ row)

    def loosen(self, keep: float, scale_variance: float) -> None:
        """Doubt what is known: keep a share of the precision, and let all coefficients move as one.

        The covariance becomes ``P / keep + scale_variance * theta theta'``. When a machine slows
        down, everything does, by one factor: the first observations after a change settle that
        factor, later ones the rest.
        """
        free = self.covariance @ self.moment
        self.covariance = self.covariance / keep + scale_variance * np.outer(self.coef, self.coef)
        self.precision = np.linalg.inv(self.covariance)
        self.precision = 0.5 * (self.precision + self.precision.T)
        self.moment = self.precision @ free

    def rescale(self, factor: float) -> None:
        """Multiply all coefficients, and their deviations, by ``factor``."""
        self.coef = self.coef * factor
        self.moment = self.moment / factor
        self.precision = self.precision / factor**2
        self.covariance = self.covariance * factor**2

    def grow(self, precision: float) -> None:
        """Append a coefficient whose prior is 0 with ``precision``."""
        n = len(self.coef)
        widened = np.zeros((2, n + 1, n + 1))
        widened[0, :n, :n], widened[0, n, n] = self.precision, precision
        widened[1, :n, :n], widened[1, n, n] = self.covariance, 1.0 / precision
        self.precision, self.covariance = widened[0].copy(), widened[1].copy()
        self.moment = np.append(self.moment, 0.0)
        self.coef = np.append(self.coef, 0.0)
        self._active = np.append(self._active, True)

    def state(self) -> State:
        return {
            "forgetting": self.forgetting,
            "precision": pack(self.precision),
            "moment": pack(self.moment),
            "coef": pack(self.coef),
            "covariance": pack(self.covariance),
            "active": self._active.tolist(),
        }

    def restore(self, state: Mapping[str, Any], size: int) -> None:
        """Take over a `state` of ``size`` coefficients; raise ValueError when it is not one."""
        precision = unpack(state, "precision", (size, size))
        if np.linalg.eigvalsh(precision)[0] <= 0.0:
            raise ValueError("precision is not positive definite")
        moment = unpack(state, "moment", (size,))
        coef = unpack(state, "coef", (size,))
        covariance = unpack(state, "covariance", (size, size))
        active = np.array(state["active"], bool)
        if len(active) != size or coef.min(initial=0.0) < 0.0:
            raise ValueError("coefficients do not match their model")
        self.precision, self.moment, self.coef = precision, moment, coef
        self.covariance, self._active = covariance, active


class Verdict(NamedTuple):
    """What to make of one observation."""

    value: float  #: the observation, drawn in to the clipping limit
    clipped: bool
    shifted: bool  #: the level has changed for good: loosen the model, then learn ``value``


class ResidualFilter:
    """Learned relative noise, clipping of outliers, and recognition of a changed level.

    Residuals are divided by the deviation that they should have, noise and what the model does not
    know yet taken together. Beyond ``clip_at`` deviations an observation is drawn in (Huber). Page's
    cumulative sum of the drawn-in residuals, less a ``slack`` of 0.75 deviations per observation,
    exceeds ``alarm_at`` (20) after 7 outliers in a row to the same side, after 16 residuals of two
    deviations, and by chance once in 1e13 observations: then the level has changed.

    Parameters
    ----------
    clip_at : deviations, > 1
    noise : relative deviation assumed at first; worth 10 observations
    noise_floor : a clock that repeats itself exactly must not make everything else an outlier
    window : observations that the learned noise remembers
    """

    SLACK = 0.75
    ALARM_AT = 20.0
    FIRST_COUNT = 10

    def __init__(
        self,
        clip_at: float = 4.0,
        noise: float = 0.1,
        noise_floor: float = 0.01,
        window: int = 256,
    ) -> None:
        self.clip_at = clip_at
        self.noise_floor = noise_floor
        self.window = window
        self.variance = noise * noise
        self.count = 0
        self.num_clipped = 0
        self.num_shifts = 0
        self._above = 0.0
        self._below = 0.0

    @property
    def noise(self) -> float:
        """Learned standard deviation of an observation over its expected value."""
        return math.sqrt(self.variance)

    def judge(self, predicted: float, observed: float, leverage: float) -> Verdict:
        """Judge ``observed``, and learn the noise from it.

        ``predicted`` > 0; ``leverage``: variance of the prediction, in units of the noise of one
        observation there.
        """
        spread = math.sqrt(self.variance * (1.0 + leverage))
        z = (observed - predicted) / (predicted * spread)
        drawn = min(max(z, -self.clip_at), self.clip_at)
        self._above = max(self._above + drawn - self.SLACK, 0.0)
        self._below = max(self._below - drawn - self.SLACK, 0.0)
        shifted = max(self._above, self._below) > self.ALARM_AT
        if shifted:
            self._above = self._below = 0.0
            self.num_shifts += 1
        step = 1.0 / min(self.count + self.FIRST_COUNT, self.window)
        self.variance += step * (drawn * drawn - 1.0) * self.variance
        self.variance = max(self.variance, self.noise_floor**2)
        self.count += 1
        if clipped := drawn != z:
            self.num_clipped += 1
            if not shifted:
                observed = predicted * (1.0 + drawn * spread)
        return Verdict(observed, clipped, shifted)

    def state(self) -> State:
        return {
            "variance": self.variance,
            "count": self.count,
            "num_clipped": self.num_clipped,
            "num_shifts": self.num_shifts,
            "above": self._above,
            "below": self._below,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over a `state`; raise ValueError when it is not one."""
        try:
            self.variance = max(non_negative("variance", state["variance"]), self.noise_floor**2)
            self.count = int(non_negative("count", state["count"]))
            self.num_clipped = int(non_negative("num_clipped", state["num_clipped"]))
            self.num_shifts = int(non_negative("num_shifts", state["num_shifts"]))
            self._above = non_negative("above", state["above"])
            self._below = non_negative("below", state["below"])
        except KeyError as error:
            raise ValueError(f"filter state without {error}") from None
