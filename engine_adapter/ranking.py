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
from collections.abc import Iterable, Sequence
from itertools import islice
from operator import attrgetter
from typing import NamedTuple

from smartspec.engine_adapter.lengths import UNIFORM, CostCurve, DraftCost, Ladder, possible

TINY = 1e-12  #: of a price: what two pieces that meet may differ by

_begin = attrgetter("begin")


class Ranked(NamedTuple):
    """What a `Choice` tells, in a list."""

    lengths: list[int]  #: [B]
    mode: str
    gain: float  #: expected weighted tokens of the step
    price: float  #: of the step's expected time, in tokens


#: A piece of the cost curve that the step may end in: the fewest drafts (but 0) that end in it, and
#: the most; how many levels of drafts bring more than a draft costs here; the step's price in
#: tokens but for the drafts, and each draft's.
Stretch = tuple[int, int, int, float, float]


def stretches(
    curve: CostCurve,
    value_of_time: float,
    before: int,
    most: int,
    drafting_s: float,
    per_draft_s: float,
    losses: Sequence[float],
    sunk_s: float = 0.0,
) -> list[Stretch]:
    """Where a step may end.

    The first is no piece: it is the step without drafts.

    Parameters
    ----------
    before : tokens of the pass without the drafts
    most : drafts that there can be
    drafting_s, per_draft_s : what drafting costs where there is any, and for each draft
    losses : of the levels of drafts: their worths with the sign turned, rising
    sunk_s : what drafting costs where there is none
    """
    pieces = curve.pieces()
    first = bisect_right(pieces, before, key=_begin) - 1
    without_s = pieces[first].at(before) + sunk_s
    found: list[Stretch] = [(0, 0, 0, value_of_time * without_s, 0.0)]
    for begin, end, begin_s, slope in islice(pieces, first, None):
        low, high = max(1, math.ceil(begin - before)), min(most, math.floor(end - before))
        if low > most:
            break
        if low <= high:
            draft_price = value_of_time * (slope + per_draft_s)
            at_0_s = begin_s + slope * (before - begin) + drafting_s
            level = bisect_left(losses, -draft_price)
            found.append((low, high, level, value_of_time * at_0_s, draft_price))
    return found


def freely(where: Sequence[Stretch], least: float) -> int:
    """Up to how many drafts each one more costs no more than ``least``, what any brings."""
    (count, _, _, price, _), *pieces = where
    for low, high, _, at_0, draft_price in pieces:
        begins = at_0 + low * draft_price
        if draft_price > least or begins - price > (low - count) * least + TINY * abs(price):
            break
        count, price = high, at_0 + high * draft_price
    return count


def best_count(
    where: Iterable[Stretch],
    counts: Sequence[int],
    gains: Sequence[float],
    worths: Sequence[float],
) -> tuple[int, float, float]:
    """How many drafts to take, what the step brings then, and its price in tokens.

    Parameters
    ----------
    where : of `stretches`
    counts, gains : drafts of the best 0, 1, 2, ... levels, and what the step brings with them
    worths : of a draft of the last of these
    """
    most = counts[-1]
    best, best_value = (0, 0.0, 0.0), -math.inf
    for low, high, level, price, draft_price in where:
        if low > most:
            break
        count = counts[level]
        if count < low or count > high:
            count = low if count < low else min(high, most)
            level = bisect_left(counts, count)
        gain = gains[level] - (counts[level] - count) * worths[level]
        price += draft_price * count
        if gain - price > best_value:
            best, best_value = (count, gain, price), gain - price
    return best


class Ranking:
    """A batch's items, best first: its lengths for any number of other tokens in the pass.

    Parameters: as of `choose_lengths`.

    >>> import numpy as np
    >>> ladder = Ladder(np.array([[0.9, 0.2], [0.8, 0.1]]))
    >>> curve = CostCurve("ragged", [1.0, 5.0, 9.0], [1.0, 1.4, 5.4])
    >>> ranking = Ranking(ladder, 1.0, 2, [curve], DraftCost())
    >>> ranking.choose(0).lengths, ranking.choose(3).lengths
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
        rows, loss, gains = ladder.ranked(depth)
        self._rows: list[int] = rows.tolist()
        #: lengths that so many of the items make
        self._known: tuple[int, list[int]] = 0, ladder.lengths(0, depth).tolist()
        self._losses: list[float] = loss.tolist()
        self._counts = range(bisect_left(self._losses, math.inf) + 1)
        self._gains: list[float] = gains.tolist()
        self._worths = [0.0, *(-loss).tolist()]
        self._uniform: list[tuple[list[int], float]] = []  #: lengths, gain
        if any(curve.mode == UNIFORM for curve in curves):
            for length in range(min(depth, ladder.max_length) + 1):
                lengths, gain = ladder.at(length)
                self._uniform.append((lengths.tolist(), gain))
        self._chosen: tuple[int, Ranked] | None = None  #: with so many other tokens

    def choose(self, num_other_tokens: int) -> Ranked:
        """The best lengths, as `choose_lengths` has them; the last ones if it is asked again."""
        if self._chosen is None or self._chosen[0] != num_other_tokens:
            self._chosen = num_other_tokens, self._choose(num_other_tokens)
        return self._chosen[1]

    def _choose(self, num_other_tokens: int) -> Ranked:
        best, best_value = None, -math.inf
        for curve in possible(self._curves, num_other_tokens):
            choose = self._best_uniform if curve.mode == UNIFORM else self._best_ragged
            choice = choose(curve, num_other_tokens)
            value = choice.gain - choice.price
            if value > best_value + 1e-12:
                best, best_value = choice, value
        assert best is not None, "no cost curve to choose by"
        return best

    def _best_uniform(self, curve: CostCurve, num_other_tokens: int) -> Ranked:
        best, best_value, pieces = None, -math.inf, curve.pieces()
        for lengths, gain in self._uniform:
            longest, num_drafts = max(lengths, default=0), sum(lengths)
            num_tokens = self._size * (1 + longest) + num_other_tokens
            piece = pieces[bisect_right(pieces, num_tokens, key=_begin) - 1]
            seconds = piece.at(num_tokens)
            if num_drafts:
                seconds += self._draft.by_depth(longest) + self._draft.per_token_s * num_drafts
            else:
                seconds += self._draft.sunk_s
            price = self._value_of_time * seconds
            if gain - price > best_value + 1e-12:
                best, best_value = Ranked(lengths, UNIFORM, gain, price), gain - price
        assert best is not None
        return best

    def _best_ragged(self, curve: CostCurve, num_other_tokens: int) -> Ranked:
        per_draft_s, forced = self._draft.per_token_s, self._num_forced
        # What floors take is paid for whatever is chosen.
        fixed_s = self._by_depth_s + per_draft_s * forced if forced else 0.0
        drafting_s = 0.0 if forced else self._by_depth_s
        before, most = self._size + num_other_tokens + forced, self._counts[-1]
        price, sunk_s = self._value_of_time, 0.0 if forced else self._draft.sunk_s
        given = drafting_s, per_draft_s, self._losses, sunk_s
        where = stretches(curve, price, before, most, *given)
        count, gain, step_price = best_count(where, self._counts, self._gains, self._worths)
        return Ranked(self._lengths(count), curve.mode, gain, step_price + price * fixed_s)

    def _lengths(self, count: int) -> list[int]:
        """The lengths that so many items make: the last ones, but for the items in between."""
        known, lengths = self._known
        lengths = lengths.copy()
        for row in self._rows[known:count]:
            lengths[row] += 1
        for row in self._rows[count:known]:
            lengths[row] -= 1
        self._known = count, lengths
        return lengths
