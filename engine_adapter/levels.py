"""Lengths for drafts that a lookup has yet to find, chosen as soon as they are there.

A lookup's drafts are known right before the step that verifies them, when there is no time to look
at each of them, let alone to sort them. But all that a request may find is known before: as many
drafts as there can be, in each of the buckets of the acceptance table. So all these *possible*
items are sorted while a step runs, and divided into levels: one for each worth, or, of more worths
than levels, of as large a share of the items each. What was found is then so many items
of each level, which a string of bytes can hold and count: the lengths are found by counting,
without an array.

What that loses
---------------
Items of one level are worth nearly the same, and count as if they were worth the same. Whole levels
are taken, but where a piece of the cost curve ends within one; of that one it does not matter much
which items are taken. Of no more worths than levels each is a level of its own: nothing is lost.
Items that are worth less than a token costs anywhere on the curve are never taken, and have no
level.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from smartspec.engine_adapter.lengths import (
    CostCurve,
    DraftCost,
    request_survivals,
    request_weights,
)
from smartspec.engine_adapter.ranking import PricedCurve, freely

NUM_LEVELS = 16
FAST_LEVELS = 8  #: of more than `MANY` requests: counting takes time, and precision is there anyway
MANY = 32
NEVER = 255  #: in the place of the level of a draft that is never worth it, or beyond the depth

#: The levels of a request's drafts in one bucket: of the first 0, 1, 2, ... of them.
Beginnings = tuple[bytes, ...]

#: A step's price in tokens, up to so many drafts: but for them, and of each.
Line = tuple[int, float, float]


class Levels:
    """What each request may find, by level: the best is 0.

    The levels of the first n drafts of request i, should its features have value v, are
    ``table[i][buckets[v]][n]``. Until `expect` says otherwise, values are buckets.

    Parameters
    ----------
    log_survival : [K, num_buckets], of the acceptance table
    correction : [B], of the requests
    weight : [B] > 0, or None for all 1
    worth : [num_buckets] >= 0, of an accepted draft in tokens, or None for all 1
    longest : drafts that may be found for one request
    value_of_time, depth, curve, draft : as of `choose_lengths`

    >>> curve = CostCurve("ragged", [1.0, 5.0, 9.0], [1.0, 1.4, 5.4])
    >>> table = np.log(np.array([[0.9, 0.5], [0.6, 0.2]]))
    >>> levels = Levels(table, np.ones(2), None, None, 2, 1.0, 2, curve, DraftCost())
    >>> found = [levels.of(0, 0, 2), levels.of(1, 1, 2)]
    >>> [list(drafts) for drafts in found], levels.split(found, 0), levels.split(found, 2)
    ([[0, 1], [2, 3]], (3, 0), (1, 0))
    """

    def __init__(
        self,
        log_survival: npt.NDArray[np.floating],
        correction: npt.NDArray[np.floating],
        weight: npt.NDArray[np.floating] | None,
        worth: npt.NDArray[np.floating] | None,
        longest: int,
        value_of_time: float,
        depth: int,
        curve: CostCurve,
        draft: DraftCost,
    ) -> None:
        size, (max_length, num_buckets) = len(correction), log_survival.shape
        by_depth_s = draft.by_depth(depth)
        depth = min(depth, max_length, longest)
        buckets = np.tile(np.arange(num_buckets), size)
        items = request_survivals(log_survival[:depth], buckets, np.repeat(correction, num_buckets))
        repeated = None if weight is None else np.repeat(weight, num_buckets)
        weights = request_weights(repeated, worth, buckets)
        if weights is not None:
            items *= weights
        cheapest = min(piece.slope for piece in curve.pieces() if piece.end > size)
        least = value_of_time * (cheapest + draft.per_token_s)
        rising = np.sort(items, axis=None)
        most = FAST_LEVELS if size > MANY else NUM_LEVELS
        step = -(-len(rising) // most) or 1
        rising = rising[rising.searchsorted(least) :]
        bounds = rising[np.diff(rising, prepend=-1.0) > 0]
        if len(bounds) > most:
            bounds = np.unique(rising[::step])
        place = bounds.searchsorted(items, side="right")  # 0: never
        total = np.bincount(place.ravel(), items.ravel(), minlength=len(bounds) + 1)[:0:-1]
        number = np.bincount(place.ravel(), minlength=len(bounds) + 1)[:0:-1]
        levels = np.full((size * num_buckets, longest), NEVER, np.uint8)
        levels[:, :depth] = np.where(place, len(bounds) - place, NEVER).T
        self.longest = longest
        self.table = _table(levels, num_buckets)
        self.expect(np.arange(num_buckets))
        self._worths: list[float] = (total / number).tolist()  #: mean of each level, falling
        self._priced = PricedCurve(curve, value_of_time, by_depth_s, draft.per_token_s)
        self._size, self._most = size, size * depth
        self._prepared_for = -1  #: other tokens. With so many:
        self._lines: list[Line] = []
        self._freely = 0  #: up to so many drafts all are worth it

    def expect(self, buckets: npt.NDArray[np.integer]) -> None:
        """The bucket of each value that the features of a request may have, [V]."""
        self.buckets: list[int] = buckets.tolist()

    def of(self, row: int, value: int, count: int) -> bytes:
        """The levels of the ``count`` drafts of a request."""
        return self.table[row][self.buckets[value]][count]

    def prepare(self, num_other_tokens: int) -> None:
        """Find what a step with so many other tokens costs: `split` need not find it again."""
        if num_other_tokens == self._prepared_for:
            return
        self._prepared_for = num_other_tokens
        where = list(self._priced.stretches(self._size + num_other_tokens, self._most))
        self._freely = freely(where, self._worths[-1] if self._worths else 0.0)
        self._lines, last = [], -1
        for low, high, _, price, draft_price in where:
            for end in (low, high):
                if end > last:
                    self._lines.append((end, price, draft_price))
                    last = end

    def split(self, found: Sequence[bytes], num_other_tokens: int) -> tuple[int, int]:
        """What is to be verified: drafts of how many levels, and how many of the next besides.

        Gain and price are straight between the ends of levels and those of pieces of the curve, so
        that one of these is the best.

        Parameters
        ----------
        found : levels of the drafts of each request, as of `of`
        num_other_tokens : as of `choose_lengths`
        """
        every = b"".join(found)
        self.prepare(num_other_tokens)
        if len(every) <= self._freely:
            return len(self._worths), 0
        lines = iter(self._lines)
        end, price, draft_price = next(lines)
        count, gain = 0, 0.0
        best, best_value = (0, 0), -price
        for level, worth in enumerate(self._worths):
            number = every.count(level)
            if not number:
                continue
            begin, count = count, count + number
            gain += number * worth
            while end < count:
                value = gain - (count - end) * worth - price - draft_price * end
                if value > best_value:
                    best, best_value = (level, end - begin), value
                end, price, draft_price = next(lines)
            value = gain - price - draft_price * count
            if value > best_value:
                best, best_value = (level + 1, 0), value
        return best


class _Shared(dict[bytes, Beginnings]):
    """Beginnings of strings."""

    def __missing__(self, string: bytes) -> Beginnings:
        self[string] = made = tuple([string[:count] for count in range(len(string) + 1)])
        return made


def _table(levels: npt.NDArray[np.uint8], num_buckets: int) -> list[tuple[Beginnings, ...]]:
    """Of ``levels``, [B * num_buckets, longest], by request and bucket.

    Equal strings are one, and so are equal rows: they are few, and stay in caches.
    """
    longest, every = levels.shape[1], levels.tobytes()
    width = num_buckets * longest
    shared, made, table = _Shared(), dict[bytes, tuple[Beginnings, ...]](), []
    for i in range(len(levels) // num_buckets):
        row = every[i * width : (i + 1) * width]
        if row not in made:
            strings = [row[j * longest : (j + 1) * longest] for j in range(num_buckets)]
            made[row] = tuple(map(shared.__getitem__, strings))
        table.append(made[row])
    return table
