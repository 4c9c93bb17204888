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
from collections.abc import Iterator, Sequence
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
#: the most; how many drafts bring more than one costs here; the step's price in tokens but for the
#: drafts, and each draft's.
Stretch = tuple[int, int, int, float, float]


class PricedCurve:
    """A cost curve in tokens, at what a second is worth: what can be known of it before a step.

    Parameters
    ----------
    curve, value_of_time : as of `choose_lengths`
    drafting_s, per_draft_s : what drafting costs where there is any, and for each draft
    losses : of the drafts: their worths with the sign turned, rising
    sunk_s : what drafting costs where there is none
    """

    def __init__(
        self,
        curve: CostCurve,
        value_of_time: float,
        drafting_s: float,
        per_draft_s: float,
        losses: Sequence[float] = (),
        sunk_s: float = 0.0,
    ) -> None:
        self._drafting = value_of_time * drafting_s
        self._sunk = value_of_time * sunk_s
        self._begins: list[float] = []
        #: First and last number of tokens, drafts that pay, price of none, of each, of each draft.
        self._pieces: list[tuple[int, int, int, float, float, float]] = []
        for begin, end, begin_s, slope in curve.pieces():
            draft_price = value_of_time * (slope + per_draft_s)
            paying = bisect_left(losses, -draft_price)
            of_none, of_each = value_of_time * (begin_s - slope * begin), value_of_time * slope
            priced = math.ceil(begin), math.floor(end), paying, of_none, of_each, draft_price
            self._begins.append(begin)
            self._pieces.append(priced)

    def stretches(self, before: int, most: int) -> Iterator[Stretch]:
        """Where a step may end. The first is no piece: it is the step without drafts.

        Parameters
        ----------
        before : tokens of the pass without the drafts
        most : drafts that there can be
        """
        first = bisect_right(self._begins, before) - 1
        _, _, _, of_none, of_each, _ = self._pieces[first]
        yield 0, 0, 0, of_none + of_each * before + self._sunk, 0.0
        drafting, furthest = self._drafting, before + most
        for begin, end, paying, of_none, of_each, draft_price in islice(self._pieces, first, None):
            if begin > furthest:
                break
            low = begin - before if begin > before else 1
            high = end - before if end < furthest else most
            if low <= high:
                yield low, high, paying, of_none + of_each * before + drafting, draft_price


def freely(where: Sequence[Stretch], least: float) -> int:
    """Up to how many drafts each one more costs no more than ``least``, what any brings."""
    (count, _, _, price, _), *pieces = where
    for low, high, _, at_0, draft_price in pieces:
        begins = at_0 + low * draft_price
        if draft_price > least or begins - price > (low - count) * least + TINY * abs(price):
            break
        count, price = high, at_0 + high * draft_price
    return count


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
        rows, loss, gains = ladder.ranked(depth)
        self._rows: list[int] = rows.tolist()
        #: lengths that so many of the items make
        self._known: tuple[int, list[int]] = 0, ladder.lengths(0, depth).tolist()
        losses: list[float] = loss.tolist()
        self._most = bisect_left(losses, math.inf)
        self._gains: list[float] = gains.tolist()
        by_depth_s = draft.by_depth(max(depth, ladder.deepest_floor))
        # What floors take is paid for whatever is chosen.
        self._forced = forced = int(ladder.forced_drafts)
        self._forced_price = value_of_time * draft.per_token_s * forced
        sunk_s = by_depth_s if forced else draft.sunk_s
        self._priced = {
            curve: PricedCurve(curve, value_of_time, by_depth_s, draft.per_token_s, losses, sunk_s)
            for curve in curves
            if curve.mode != UNIFORM
        }
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
        before = self._size + self._forced + num_other_tokens
        where = self._priced[curve].stretches(before, self._most)
        best, best_gain, best_price, best_value = 0, 0.0, 0.0, -math.inf
        for low, high, count, price, draft_price in where:
            if count < low:
                count = low
            elif count > high:
                count = high
            gain = self._gains[count]
            price += draft_price * count
            if gain - price > best_value:
                best, best_gain, best_price, best_value = count, gain, price, gain - price
        return Ranked(self._lengths(best), curve.mode, best_gain, best_price + self._forced_price)

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
