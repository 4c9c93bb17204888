"""Whether the level of a stream has changed for good: a detector on river's contract.

    above <- max(above + z - slack, 0),  below <- max(below - z - slack, 0),  alarm over threshold

Page's cumulative sum (Biometrika 41, 1954, 100) of residuals z in deviations. river's Page-Hinkley
test is the same sum about the running mean of its input; the mean of residuals is known to be 0.
With equal settings it finds shifts about as soon, and raised alarms on noise alone where this one
raised none (benchmarks/bench_step_cost.py, docs/results.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from river.base import DriftDetector

from smartspec.estimators.base import State, non_negative


class CumulativeSum(DriftDetector):
    """Alarm when standardised residuals keep to one side.

    With the defaults and residuals drawn in to 4 deviations: after 7 outliers in a row to the same
    side, after 17 residuals of two deviations, and by chance, were the noise normal, once in some
    1e13 observations. ``drift_detected`` holds for the observation that raised the alarm; the sums
    start anew with the next.

    Parameters
    ----------
    slack : deviations per observation that are no drift, > 0
    threshold : deviations, > 0

    >>> detector = CumulativeSum()
    >>> for z in [2.0] * 17:
    ...     detector.update(z)
    >>> detector.drift_detected
    True
    """

    def __init__(self, slack: float = 0.75, threshold: float = 20.0) -> None:
        super().__init__()
        self.slack = slack
        self.threshold = threshold
        self.num_alarms = 0
        self._above = 0.0
        self._below = 0.0

    def update(self, x: float) -> None:
        """Take in one residual, in deviations; raise ValueError unless it is finite."""
        if not math.isfinite(x):
            raise ValueError(f"a residual must be finite, got {x!r}")
        self._above = max(self._above + x - self.slack, 0.0)
        self._below = max(self._below - x - self.slack, 0.0)
        self._drift_detected = max(self._above, self._below) > self.threshold
        if self._drift_detected:
            self._above = self._below = 0.0
            self.num_alarms += 1

    def state(self) -> State:
        """Everything but the constructor's arguments, as plain values."""
        return {"num_alarms": self.num_alarms, "above": self._above, "below": self._below}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over a `state`; raise ValueError when it is not one."""
        try:
            self.num_alarms = int(non_negative("num_alarms", state["num_alarms"]))
            self._above = non_negative("above", state["above"])
            self._below = non_negative("below", state["below"])
        except KeyError as error:
            raise ValueError(f"detector state without {error}") from None
