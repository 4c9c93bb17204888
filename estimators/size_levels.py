"""How far passes of so many tokens are off the smooth curve: a factor per small token count.

Kernels work in tiles, and on some machines a pass of four tokens is quicker than one of three
(113 and 84 ms, measured on one CPU: docs/results.md). Curves that never fall run between the two.
For each count up to `SIZES` the mean ratio of observed to smooth seconds is kept; by what it is off
1 beyond `NOISE` it is believed, the more the more often it was seen:

    level = 1 + c / (c + STRENGTH) (mean - 1 -+ NOISE),     c: passes of that size, at most `WINDOW`

A count that was not seen keeps the smooth curve, which is also all that is known beyond.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from smartspec.estimators.base import F64, State, pack, shares_of_rivals, unpack

SIZES = 16  #: token counts that have a factor of their own
STRENGTH = 8.0  #: passes that the smooth curve is worth
WINDOW = 64.0  #: passes of one size that its mean remembers
NOISE = 0.02  #: by which a mean may be off 1 without being believed
LIMITS = (0.7, 1.4)  #: of a factor: what is further off is not the kernels' doing


class SizeLevels:
    """Factors on the seconds of passes of 1 to `SIZES` tokens.

    >>> levels = SizeLevels()
    >>> for _ in range(8):
    ...     levels.learn(3, 1.2)
    >>> levels.at(np.array([2.0, 3.0, 500.0])).round(3).tolist()
    [1.0, 1.09, 1.0]
    """

    def __init__(self) -> None:
        self._means = np.ones(SIZES)
        self._counts = np.zeros(SIZES)
        self._factors = np.ones(SIZES + 2)  # of no tokens, of 1 to SIZES, and of more
        self.factors: list[float] = self._factors.tolist()

    def learn(self, size: int, ratio: float, trust: float = 1.0) -> None:
        """Take in that a pass took ``ratio`` of what the smooth curve says.

        ``size``: its tokens, 1 to `SIZES`; ``trust``: what it counts of a usual pass, in (0, 1].
        """
        i = size - 1
        self._counts[i] = min(self._counts[i] + trust, WINDOW)
        surprise = min(max(ratio, LIMITS[0]), LIMITS[1]) - self._means[i]
        self._means[i] += surprise * trust / self._counts[i]
        self._refresh()

    def _refresh(self) -> None:
        share = self._counts / (self._counts + STRENGTH)
        off = self._means - 1.0
        self._factors[1:-1] = 1.0 + share * (off - np.clip(off, -NOISE, NOISE))
        self.factors = self._factors.tolist()

    def of(self, size: float) -> float:
        """The factor for ``size`` tokens."""
        return self.factors[min(int(size), SIZES + 1)]

    def at(self, sizes: npt.NDArray[Any]) -> F64:
        """Factors for ``sizes``, of any shape."""
        found: F64 = self._factors[np.minimum(sizes, SIZES + 1).astype(np.intp)]
        return found

    def merge(self, other: SizeLevels) -> None:
        """Take in what another knows, size by size: see `shares_of_rivals`."""
        mine, others = shares_of_rivals(self._counts, other._counts)
        total = mine * self._counts + others * other._counts
        moment = mine * self._counts * self._means + others * other._counts * other._means
        self._means = np.divide(moment, total, out=np.ones(SIZES), where=total > 0.0)
        self._counts = total
        self._refresh()

    def state(self) -> State:
        """All that was learned, as plain values."""
        return {"means": pack(self._means), "counts": pack(self._counts)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over a `state`; raise ValueError when it is not one."""
        means, counts = (unpack(state, name, (SIZES,)) for name in ("means", "counts"))
        if means.min() < LIMITS[0] or means.max() > LIMITS[1]:
            raise ValueError(f"levels are outside {LIMITS}")
        if counts.min() < 0.0 or counts.max() > WINDOW:
            raise ValueError(f"levels stand on no or more than {WINDOW:.0f} passes")
        self._means, self._counts = means, counts
        self._refresh()
