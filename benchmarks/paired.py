"""Ratios of two arms that were measured side by side, several times over."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats


class Ratio(NamedTuple):
    """Geometric mean of the paired ratios, and its one-sided 95% upper bound."""

    value: float
    upper95: float  #: NaN for a single pair

    def figures(self, name: str) -> dict[str, float]:
        """As they are recorded: ``<name>`` and ``<name>_upper95``."""
        return {name: self.value, f"{name}_upper95": self.upper95}


def paired_ratio(measured: Sequence[float], reference: Sequence[float]) -> Ratio:
    """``measured`` over ``reference``, pair by pair.

    The upper bound is exp(m + t s / sqrt(n)), where m and s are mean and standard deviation of the
    n logarithms of the ratios and t is Student's 95% quantile with n - 1 degrees of freedom: what
    pairs have in common (the machine's pace at the time, the arrivals) cancels. With the handful
    of pairs that a benchmark can afford, a bootstrap would be too sure of itself.

    Raises ValueError when there are no pairs or one is not positive.
    """
    if not measured or len(measured) != len(reference):
        raise ValueError(f"expected pairs, got {len(measured)} and {len(reference)} values")
    if min(*measured, *reference) <= 0:
        raise ValueError("ratios need positive values")
    logs = np.log(measured) - np.log(reference)
    mean, num = float(logs.mean()), len(logs)
    if num == 1:
        return Ratio(math.exp(mean), math.nan)
    margin = float(stats.t.ppf(0.95, num - 1) * logs.std(ddof=1)) / math.sqrt(num)
    return Ratio(math.exp(mean), math.exp(mean + margin))
