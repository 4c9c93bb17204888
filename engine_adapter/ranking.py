"""What `choose_lengths` would choose, found without arrays: for engines that prepare a step.

While a step runs there is time, and between it and the next there is none: numpy's calls, of one or
two microseconds when they follow each other, take five and more when caches have gone cold, and a
choice is a dozen of them. So a batch's items are sorted while there is time. What is left is how
many of them to take, which changes with the prompts that share the pass.

Where that is
-------------
On a straight piece of the cost curve every further token costs the same, and every further item
brings no more than the one before. So the best count there is where items begin to bring less than
a token costs (bisection), or the end of the piece that is next to it. The best of all is the best
of these, one per piece.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import islice
from operator import attrgetter

import numpy as np

from smartspec.engine_adapter.lengths import (
    I64,
    UNIFORM,
    Choice,
    CostCurve,
    DraftCost,
    Ladder,
    possible,
)

_begin = attrgetter("begin")


class Ranking:
    """A batch's items, best first: its lengths for any number of other tokens in the pass.

    Parameters: as of `choose_lengths`.

    >>> ladder = Ladder(np.array([[0.9, 0.2], [0.8, 0.1]]))
    >>> curve = CostCurve("ragged", [1.0, 5.0, 9.0], [1.0, 1.4, 5.4])
    >>> ranking = Ranking(ladder, 1.0, 2, [curve], DraftCost())
    >>> ranking.choose(0).lengths.tolist(), ranking.choose(3).lengths.tolist()
    ([2, 1], [0, 0])
    """

    def __init__(
        self,
        ladder: Ladder,
        value_of_time: float,
        depth: int,
        curves: Sequence[CostCurve],
        draft: DraftCost,
    ) -> None:
        self._size = ladder.size
        self._value_of_time = value_of_time
        self._curves = curves
        self._draft = draft
        self._by_depth_s = draft.by_depth(max(depth, ladder.deepest_floor))
        self._num_forced = int(ladder.forced_drafts)
        self._forced = ladder.lengths(0, depth)
        self._rows, loss, gains = ladder.ranked(depth)
        self._loss: list[float] = loss.tolist()  #: of the items: rising, as bisect wants it
        self._gains: list[float] = gains.tolist()  #: of the best 0, 1, 2, ... items
        self._num_items = bisect_left(self._loss, math.inf)
        self._lengths: dict[int, I64] = {}  #: of so many items
        self._uniform: list[tuple[I64, float, int, int]] = []  #: lengths, gain, longest, sum
        if any(curve.mode == UNIFORM for curve in curves):
            for length in range(min(depth, ladder.max_length) + 1):
                lengths, gain = ladder.at(length)
                longest = int(lengths.max(initial=0))
                self._uniform.append((lengths, gain, longest, int(lengths.sum())))

    def choose(self, num_other_tokens: int) -> Choice:
        """The best lengths, as `choose_lengths` has them."""
        best, best_value = None, -math.inf
        for curve in possible(self._curves, num_other_tokens):
            choose = self._best_uniform if curve.mode == UNIFORM else self._best_ragged
            choice = choose(curve, num_other_tokens)
            value = choice.gain - self._value_of_time * choice.seconds
            if value > best_value + 1e-12:
                best, best_value = choice, value
        assert best is not None, "no cost curve to choose by"
        return best

    def _best_uniform(self, curve: CostCurve, num_other_tokens: int) -> Choice:
        best, best_value, pieces = None, -math.inf, curve.pieces()
        for lengths, gain, longest, num_drafts in self._uniform:
            num_tokens = self._size * (1 + longest) + num_other_tokens
            piece = pieces[bisect_right(pieces, num_tokens, key=_begin) - 1]
            seconds = piece.at(num_tokens)
            if num_drafts:
                seconds += self._draft.by_depth(longest) + self._draft.per_token_s * num_drafts
            else:
                seconds += self._draft.sunk_s
            value = gain - self._value_of_time * seconds
            if value > best_value + 1e-12:
                best, best_value = Choice(lengths, UNIFORM, gain, seconds), value
        assert best is not None
        return best

    def _best_ragged(self, curve: CostCurve, num_other_tokens: int) -> Choice:
        price, gains, loss = self._value_of_time, self._gains, self._loss
        per_token_s, forced, most = self._draft.per_token_s, self._num_forced, self._num_items
        before = self._size + num_other_tokens + forced  # tokens of the pass beside the items
        pieces = curve.pieces()
        first = bisect_right(pieces, before, key=_begin) - 1
        drafting_s = self._by_depth_s + per_token_s * forced
        count, seconds = (
            0,
            pieces[first].at(before) + (drafting_s if forced else self._draft.sunk_s),
        )
        best_value = gains[0] - price * seconds
        for begin, end, begin_s, slope in islice(pieces, first, None):
            low, high = max(1, math.ceil(begin - before)), min(most, math.floor(end - before))
            if low > most:
                break
            if low > high:
                continue
            token_s = slope + per_token_s
            at = min(max(bisect_left(loss, -price * token_s), low), high)
            at_s = begin_s + slope * (before - begin) + drafting_s + token_s * at
            value = gains[at] - price * at_s
            if value > best_value:
                count, seconds, best_value = at, at_s, value
        return Choice(self._best(count), curve.mode, gains[count], seconds)

    def _best(self, count: int) -> I64:
        """The lengths that so many items make."""
        lengths = self._lengths.get(count)
        if lengths is None:
            lengths = np.bincount(self._rows[:count], minlength=self._size)
            if self._num_forced:
                lengths += self._forced
            self._lengths[count] = lengths
        return lengths
