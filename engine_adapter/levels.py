"""Lengths for drafts that a lookup has yet to find, chosen as soon as they are there.

A lookup's drafts are known right before the step that verifies them, when there is no time to look
at each of them, let alone to sort them. But all that a request may find is known before: as many
drafts as there can be, in each of the buckets of the acceptance table. So all these *possible*
items are sorted while a step runs, and divided into levels: one for each worth, or, of more than
`NUM_LEVELS` worths, of one in `NUM_LEVELS` of the items each. What was found is then so many items
of each level, which a string of bytes can hold and count: the lengths are found by counting,
without an array.

What that loses
---------------
Items of one level are worth nearly the same, and count as if they were worth the same. Whole levels
are taken, but where a piece of the cost curve ends within one; of that one it does not matter much
which items are taken. Of up to `NUM_LEVELS` worths each is a level of its own, and nothing is lost.
Items that are worth less than a token costs anywhere on the curve are never taken, and have no
level.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from smartspec.engine_adapter.lengths import (
    CostCurve,
    DraftCost,
    request_survivals,
    request_weights,
)
from smartspec.engine_adapter.ranking import Stretch, best_count, freely, stretches

NUM_LEVELS = 16
NEVER = 255  #: in the place of the level of a draft that is never worth it, or beyond the depth

#: The levels of a request's drafts in one bucket: of the first 0, 1, 2, ... of them.
Beginnings = tuple[bytes, ...]


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
        self._terms = value_of_time, draft.by_depth(depth), draft.per_token_s
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
        step = -(-len(rising) // NUM_LEVELS) or 1
        rising = rising[rising.searchsorted(least) :]
        bounds = rising[np.diff(rising, prepend=-1.0) > 0]
        if len(bounds) > NUM_LEVELS:
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
        self._losses = [-worth for worth in self._worths]
        self._last = [0.0, *self._worths]  #: worth of an item of the last of so many levels
        self._size, self._most = size, size * depth
        self._where: tuple[int, list[Stretch]] = -1, []  #: with so many other tokens
        self._freely = 0  #: the same: up to so many drafts all are worth it
        self._weight_sum = float(size if weight is None else weight.sum())
        self._curve = curve

    def expect(self, buckets: npt.NDArray[np.integer]) -> None:
        """The bucket of each value that the features of a request may have, [V]."""
        self.buckets: list[int] = buckets.tolist()

    def of(self, row: int, value: int, count: int) -> bytes:
        """The levels of the ``count`` drafts of a request."""
        return self.table[row][self.buckets[value]][count]

    def prepare(self, num_other_tokens: int) -> list[Stretch]:
        """Where a step with so many other tokens may end: `split` need not find it again."""
        known, where = self._where
        if known != num_other_tokens:
            price, by_depth_s, per_draft_s = self._terms
            before = self._size + num_other_tokens
            where = stretches(
                self._curve, price, before, self._most, by_depth_s, per_draft_s, self._losses
            )
            self._where = num_other_tokens, where
            self._freely = freely(where, self._last[-1])
        return where

    def split(self, found: Sequence[bytes], num_other_tokens: int) -> tuple[int, int]:
        """What is to be verified: drafts of how many levels, and how many of the next besides.

        Parameters
        ----------
        found : levels of the drafts of each request, as of `of`
        num_other_tokens : as of `choose_lengths`
        """
        every = b"".join(found)
        where = self.prepare(num_other_tokens)
        if len(every) <= self._freely:
            return len(self._worths), 0
        count, gain = 0, self._weight_sum
        counts, gains = [count], [gain]
        for level, worth in enumerate(self._worths):
            number = every.count(level)
            count += number
            gain += number * worth
            counts.append(count)
            gains.append(gain)
        best, _, _ = best_count(where, counts, gains, self._last)
        if best == count:
            return len(self._worths), 0
        split = bisect_right(counts, best) - 1
        return split, best - counts[split]


class _Shared(dict[bytes, Beginnings]):
    """Beginnings of strings. Equal strings share theirs: they are few, and stay in caches."""

    def __missing__(self, string: bytes) -> Beginnings:
        self[string] = made = tuple([string[:count] for count in range(len(string) + 1)])
        return made


def _table(levels: npt.NDArray[np.uint8], num_buckets: int) -> list[tuple[Beginnings, ...]]:
    """Of ``levels``, [B * num_buckets, longest], by request and bucket."""
    longest, every = levels.shape[1], levels.tobytes()
    strings = [every[i * longest : (i + 1) * longest] for i in range(len(levels))]
    return list(zip(*[map(_Shared().__getitem__, strings)] * num_buckets, strict=True))
