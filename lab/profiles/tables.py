"""Interpolation in measured tables."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping


class Line:
    """y over x: straight between measured points, and on beyond them.

    Below the first point, the slope of the first two; above the last, that of the upper half of
    what was measured, since neighbouring points may differ by their noise alone.

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
        at = i - 1 if x <= xs[-1] else max(bisect_right(xs, xs[-1] / 2) - 1, 0)
        slope = (ys[i] - ys[at]) / (xs[i] - xs[at])
        return max(ys[i] + slope * (x - xs[i]), 0.0)

    @property
    def last(self) -> int:
        """The largest x that was measured."""
        return self._x[-1]


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
