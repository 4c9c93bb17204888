"""Interpolation in measured tables."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping


class Line:
    """y over x: straight between measured points, and on beyond the outermost two.

    >>> Line({1: 10.0, 3: 20.0})(2)
    15.0
    """

    def __init__(self, points: Mapping[int, float]) -> None:
        if not points:
            raise ValueError("a table without rows")
        self._x = sorted(points)
        self._y = [points[x] for x in self._x]

    def __call__(self, x: float) -> float:
        xs, ys = self._x, self._y
        if len(xs) == 1:
            return ys[0]
        i = min(max(bisect_right(xs, x), 1), len(xs) - 1)
        slope = (ys[i] - ys[i - 1]) / (xs[i] - xs[i - 1])
        # Noise of the last two points must not turn a cost negative far outside.
        return max(ys[i - 1] + slope * (x - xs[i - 1]), 0.0)


class Surface:
    """z over x and y: a `Line` in y for every measured x, and straight between these."""

    def __init__(self, points: Iterable[tuple[int, int, float]]) -> None:
        rows: dict[int, dict[int, float]] = {}
        for x, y, z in points:
            rows.setdefault(x, {})[y] = z
        if not rows:
            raise ValueError("a table without rows")
        self._x = sorted(rows)
        self._lines = [Line(rows[x]) for x in self._x]

    def __call__(self, x: float, y: float) -> float:
        xs = self._x
        i = min(max(bisect_right(xs, x), 1), len(xs) - 1)
        if len(xs) == 1:
            return self._lines[0](y)
        low, high = self._lines[i - 1](y), self._lines[i](y)
        return max(low + (high - low) * (x - xs[i - 1]) / (xs[i] - xs[i - 1]), 0.0)
