"""Choose speculation lengths for a batch: pure numpy, run by engines at every step.

The choice maximises, over one length k_i per request,

    gain(k) - value_of_time * T(k),        gain(k) = sum_i w_i (1 + sum_{j<=k_i} S_i(j))

where the *survival* ``S_i(j)`` is the probability that at least j drafts of request i are
accepted, and T is the step's time. With ``value_of_time`` = max_k gain(k) / T(k) this is the
choice of greatest goodput (Dinkelbach 1967; the objective is SmartSpec's, arXiv 2406.14066,
section 4). The daemon's solver (optimum.py) finds that value, with the same `Ladder`.

Why sort-and-scan is exact
--------------------------
``w_i S_i(j)`` never rises with j. For a given depth limit D and a given number m of drafted
tokens in the batch, the greatest gain is that of the m largest items ``(i, j <= D)``; since items
of one request fall with j, taking the m largest takes a prefix of every request, so it *is* a
vector of lengths. T depends on the lengths only through D and m (N = tokens verified = B + m).
Sorting once and scanning the prefix sums against T(m) therefore visits, for every m, the best
lengths with that m: the best of these is the optimum, for any T(m), monotone or not.

Conditions: (1) survivals do not rise with j, weights are positive; (2) T depends on the lengths
only through their sum and D, the depth paid for, not on *which* request is drafted for. A floor
takes its items in advance, a ceiling removes items: both keep the prefixes.

Uniform execution (one length for all, padded) is max_length + 1 more candidates with a cost curve
of their own.

Trees
-----
Where drafts are a tree, its nodes are ranked by the probability of being on the accepted path; a
length is a number of nodes, and ``S_i(j)`` the probability of rank j. Every node on the path is a
token, so the expected gain of k nodes is the same sum, and the ranking makes it fall with j. Since
no node is likelier than its parent, the first k ranks are a tree: the best one of k nodes. All of
the above holds as it is; only, a drafter's forwards are fewer than nodes (`DraftCost`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

# `np.unique` imports it when first called, which takes 20 ms: no step is to wait for that.
import numpy.ma
import numpy.typing as npt

if TYPE_CHECKING:
    from smartspec.engine_adapter.prices import Prices

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
Worth = npt.NDArray[np.floating[Any]]
Breakpoints = Sequence[float] | F64

RAGGED = "ragged"  #: every request has its own length
UNIFORM = "uniform"  #: one length for all; shorter requests are padded to it


_DEPTHS = np.arange(256, dtype=np.uint8)[:, None]  #: lengths are u8 on the wire
_FAR = 1e15  #: tokens
LATE = 1e15  #: of value, per second of a step that is too late: beyond any gain


class Piece(NamedTuple):
    """A straight line between two breakpoints of a cost curve."""

    begin: float  #: tokens
    end: float
    seconds: float  #: at the begin
    slope: float  #: seconds per token

    def at(self, num_tokens: float) -> float:
        """Seconds."""
        return self.seconds + self.slope * (num_tokens - self.begin)


class CostCurve:
    """Seconds of one target pass by tokens verified: linear between breakpoints.

    A jump is two breakpoints at neighbouring token counts. Beyond the ends the curve goes on
    flat on the left and along the last segment on the right, where that rises.

    Parameters
    ----------
    mode : execution mode
    num_tokens : [M >= 1], rising
    seconds : [M], >= 0

    >>> curve = CostCurve("ragged", [1.0, 3.0], [1.0, 2.0])
    >>> curve.at(np.array([0, 2, 5])).tolist()
    [1.0, 1.5, 3.0]
    """

    __slots__ = ("_pieces", "_seconds", "_tokens", "mode")

    def __init__(self, mode: str, num_tokens: Breakpoints, seconds: Breakpoints) -> None:
        self.mode = mode
        self._pieces: list[Piece] | None = None  # made when asked for
        size = len(num_tokens)
        # One more breakpoint far out, so that interpolation is all there is to do at step time.
        self._tokens: F64 = np.empty(size + 1)
        self._tokens[:-1] = num_tokens
        self._seconds: F64 = np.empty(size + 1)
        self._seconds[:-1] = seconds
        slope = 0.0
        if size > 1:
            (n, last), (s, last_s) = num_tokens[-2:], seconds[-2:]
            slope = max((last_s - s) / (last - n), 0.0)
        self._tokens[-1] = num_tokens[-1] + _FAR
        self._seconds[-1] = seconds[-1] + slope * _FAR

    @property
    def least_s(self) -> float:
        """The fewest seconds there are."""
        return float(self._seconds.min())

    @property
    def num_tokens(self) -> tuple[float, ...]:
        """The breakpoints."""
        return tuple(self._tokens[:-1].tolist())

    @property
    def seconds(self) -> tuple[float, ...]:
        """Seconds at them."""
        return tuple(self._seconds[:-1].tolist())

    def pieces(self) -> list[Piece]:
        """The curve as straight lines, rising."""
        if self._pieces is None:
            tokens, seconds = self._tokens.tolist(), self._seconds.tolist()
            self._pieces = [Piece(-_FAR, tokens[0], seconds[0], 0.0)]
            for (begin, end), (low, high) in zip(pairwise(tokens), pairwise(seconds), strict=True):
                self._pieces.append(Piece(begin, end, low, (high - low) / (end - begin)))
        return self._pieces

    def at(self, num_tokens: Any) -> F64:
        """Seconds at ``num_tokens`` (any shape)."""
        seconds: F64 = np.interp(num_tokens, self._tokens, self._seconds)
        return seconds


class DraftCost(NamedTuple):
    """Seconds of drafting: ``fixed_s + per_forward_s * f(D) + per_token_s * sum(k)``.

    D is the greatest length. A chain of D drafts takes f(D) = D sequential forwards, or one less
    where the first is run anyway (`Limits.keeps_up`), a tree of D nodes fewer. At k = 0 it is
    ``sunk_s``.

    >>> DraftCost(0.5, 1.0, forwards=(1.0, 1.5)).by_depth(2)
    2.0
    """

    fixed_s: float = 0.0
    per_forward_s: float = 0.0
    per_token_s: float = 0.0
    forwards: tuple[float, ...] = ()  #: f(1), f(2), ..., beyond its end as there; empty: f(D) = D
    sunk_s: float = 0.0  #: of drafting that has been done before lengths are chosen
    #: Of a token that the drafter has missed, and must read before it drafts. Not a length's part:
    #: who decides on it is who knows what was missed (`Prices.join`).
    per_catch_up_s: float = 0.0

    def num_forwards(self, depth: int) -> float:
        """f(depth)."""
        if not self.forwards or not depth:
            return float(depth)
        return self.forwards[min(depth, len(self.forwards)) - 1]

    def by_depth(self, depth: int) -> float:
        """The part that ``depth`` decides, of steps that draft."""
        return self.fixed_s + self.per_forward_s * self.num_forwards(depth)

    def by_depths(self, depths: I64) -> F64:
        """`by_depth` of each of ``depths``."""
        forwards: Any = depths
        if self.forwards:
            forwards = np.array([self.num_forwards(depth) for depth in depths.tolist()])
        by_depth: F64 = self.fixed_s + self.per_forward_s * forwards
        return by_depth

    def begun(self) -> DraftCost:
        """Of a step whose first drafts have been run already: choosing none would not save that."""
        return self._replace(sunk_s=self.by_depth(1))


class Choice(NamedTuple):
    """Lengths for one step, and what they are expected to bring."""

    lengths: I64  #: [B]
    mode: str = RAGGED
    gain: float = 0.0  #: expected weighted tokens of the step, drafts at what they are worth
    seconds: float = 0.0  #: expected time of the step
    source: str = "policy"  #: "policy", "probe", "fallback" or "own"
    policy_seq: int = 0  #: the policy that chose; 0: none did, or not known here
    prices: Prices | None = None  #: by which drafting goes on and drafts are cut, within lengths

    @classmethod
    def fixed(cls, lengths: I64, source: str) -> Choice:
        return cls(lengths, source=source)


def request_survivals(log_survival: Any, buckets: Any, correction: Any) -> Any:
    """Survivals of each request: its bucket's, raised to the power of its correction.

    ``S_i(j) = S_bucket(j) ** c_i``: a proportional-hazards model in which c_i = 0 never rejects,
    1 is as the bucket and 2 is rejected as often again. Falls with j whenever the bucket's does.

    Parameters: ``log_survival`` [K, num_buckets] <= 0; ``buckets`` [B] ints; ``correction`` [B]
    >= 0. Returns [K, B] in [0, 1], in the type of the first.

    >>> table = np.log([[0.5], [0.25]])
    >>> request_survivals(table, np.array([0, 0]), np.array([1.0, 2.0])).round(4).tolist()
    [[0.5, 0.25], [0.25, 0.0625]]
    """
    survival = log_survival.take(buckets, 1)
    survival *= correction
    return np.exp(survival, out=survival)


def request_weights(weight: Any, worth: Any, buckets: Any) -> Any:
    """Weights of each request's drafts: its own times what a draft is worth in its bucket.

    Parameters: ``weight`` [B] or None for all 1; ``worth`` [num_buckets], tokens per accepted
    draft, or None for all 1; ``buckets`` [B] ints. Returns [B], or None for all 1.

    >>> request_weights(np.array([1.0, 2.0]), np.array([1.5, 0.5]), np.array([1, 1])).tolist()
    [0.5, 1.0]
    """
    if worth is None:
        return weight
    return worth[buckets] if weight is None else worth[buckets] * weight


def bucket_index(edges: Sequence[npt.NDArray[Any]], features: Sequence[npt.NDArray[Any]]) -> I64:
    """Bucket of each request: one digit per axis, the first slowest.

    A digit is the number of an axis' ``edges`` that the request's feature reaches.
    ``edges``: per axis, rising; ``features``: per axis, [B]. Returns [B] (a single 0 without axes).

    >>> edges = [np.array([0.5]), np.array([2.0, 4.0])]
    >>> bucket_index(edges, [np.array([0.1, 0.9]), np.array([4, 3])]).tolist()
    [2, 4]
    """
    index: Any = None
    for axis, feature in zip(edges, features, strict=True):
        digit = axis.searchsorted(feature, side="right")
        index = digit if index is None else index * (len(axis) + 1) + digit
    return np.zeros(1, np.int64) if index is None else index


@cache
def _within(deepest: int) -> npt.NDArray[np.bool_]:
    """Whether a depth of 0 to ``deepest`` includes a draft's: [deepest + 1, deepest, 1]."""
    return _DEPTHS[:deepest] < np.arange(deepest + 1)[:, None, None]


class Ladder:
    """All draftable items (depth, request), from which the best so many are to be taken.

    Arrays run depth by depth, [K, B]: numpy is fast along the last axis, and there are more
    requests than depths.

    Parameters
    ----------
    survival : [K, B], columns not rising, in [0, 1]
    weight : [B] > 0, or None for all 1
    floor, ceiling : [B] ints, or None; a floor above the ceiling is clipped to it
    presence : [B] in (0, 1], or None for all 1. Probability that drafts exist at all (prompt
        lookup finds a match); an item then gains and costs only that share. With None the scan is
        exact; otherwise it optimises the expected tokens against the time at the expected count.
    """

    def __init__(
        self,
        survival: Worth,
        weight: npt.NDArray[Any] | None = None,
        floor: npt.NDArray[Any] | None = None,
        ceiling: npt.NDArray[Any] | None = None,
        presence: npt.NDArray[Any] | None = None,
    ) -> None:
        self.max_length, self.size = survival.shape
        self.worth: Worth = survival if weight is None else survival * weight
        self.presence = presence
        self.weight_sum = float(self.size if weight is None else weight.sum())
        self.ceiling = ceiling
        self.floor = floor
        self._most: I64 | None = None  #: lengths that ceilings allow
        self._gains: F64 | None = None  #: by length, [K + 1, B]
        self.deepest_floor = 0
        self._forced_gain = 0.0
        self.forced_drafts = 0.0  #: by floors
        self._free = self.worth  # -inf where an item may not be chosen
        if ceiling is not None:
            self._free = np.where(_DEPTHS[: self.max_length] < ceiling, self._free, -np.inf)
        if floor is not None:
            self.floor = self.clip(floor)
            self.deepest_floor = int(self.floor.max(initial=0))
        if self.floor is not None and self.deepest_floor:
            forced = _DEPTHS[: self.max_length] < self.floor
            self._forced_gain = float(self._expected(self.worth)[forced].sum())
            self.forced_drafts = float(self._expected(self.floor).sum())
            self._free = np.where(forced, -np.inf, self._free)
        self._scans: dict[int, tuple[F64, F64, Worth]] = {}
        self._by_depth: tuple[F64, Worth] | None = None  #: gains and items, a row for each depth
        self._timed: tuple[tuple[CostCurve, DraftCost, int], F64, F64] | None = None

    def clip(self, lengths: npt.ArrayLike) -> I64:
        """``lengths`` (one, or [B]) as they can be: within ceilings and `max_length`."""
        if self._most is None:
            self._most = np.full(self.size, self.max_length, np.int64)
            if self.ceiling is not None:
                np.minimum(self._most, self.ceiling, out=self._most)
        clipped: I64 = np.minimum(lengths, self._most)
        return clipped

    def _expected(self, values: Any) -> Any:
        return values if self.presence is None else values * self.presence

    def prefixes(self, depth: int) -> tuple[F64, F64]:
        """Gain and drafted tokens of the best 0, 1, 2, ... items within ``depth``, floors included.

        Returns two arrays [depth * B + 1]; the gain is -inf where there are fewer to choose.
        """
        return self._scan(depth)[:2]

    def gains_by_depth(self, deepest: int) -> F64:
        """Gains of `prefixes` within each depth up to ``deepest``: [deepest + 1, deepest * B + 1].

        All in one go, for few items: numpy takes longer to be called than to sort these. Without
        presences only.
        """
        if self._by_depth is not None and len(self._by_depth[0]) == deepest + 1:
            return self._by_depth[0]
        items = np.where(_within(deepest), self._free[:deepest], -np.inf)
        items = items.reshape(deepest + 1, -1)
        items.sort(axis=1)
        falling = items[:, ::-1]
        gains = np.zeros((deepest + 1, items.shape[1] + 1))
        falling.cumsum(axis=1, out=gains[:, 1:])
        gains += self.weight_sum + self._forced_gain
        self._by_depth = gains, falling
        return gains

    def ranked(self, depth: int) -> tuple[I64, Worth, F64]:
        """Items within ``depth``, best first: their requests, what they lose, gains of so many.

        A loss is a worth with its sign turned, infinite where the item may not be chosen; gains are
        of the best 0, 1, 2, ... items. Among equals the shallower come first, as `lengths` takes
        them. Without presences only.
        """
        loss = -self._free[:depth].ravel()
        order = loss.argsort(kind="stable")
        loss = loss[order]
        gains = np.zeros(len(loss) + 1)
        loss.cumsum(out=gains[1:])
        return order % self.size, loss, self.weight_sum + self._forced_gain - gains

    def _scan(self, depth: int) -> tuple[F64, F64, Worth]:
        """Prefixes, and the worth of the items in falling order: of one depth, once."""
        scan = self._scans.get(depth)
        if scan is None:
            scan = self._scans[depth] = self._sort_and_sum(depth)
        return scan

    def _sort_and_sum(self, depth: int) -> tuple[F64, F64, Worth]:
        num_items = min(depth, self.max_length) * self.size
        if self._by_depth is not None and depth < len(self._by_depth[0]):
            gains, falling = self._by_depth
            return gains[depth, : num_items + 1], self.drafts(num_items), falling[depth, :num_items]
        gain = np.empty(num_items + 1)
        gain[0] = 0.0
        if self.presence is None:
            worth = np.sort(self._free[:depth], axis=None)[::-1]
            worth.cumsum(out=gain[1:])
            drafts = self.drafts(num_items)
        else:
            free = self._free[:depth].ravel()
            order = free.argsort()[::-1]
            worth = free[order]
            share = self.presence.take(order, mode="wrap")  # of the item's request, depth by depth
            (worth * share).cumsum(out=gain[1:])
            drafts = np.empty(num_items + 1)
            drafts[0] = 0.0
            share.cumsum(out=drafts[1:])
            drafts += self.forced_drafts
        gain += self.weight_sum + self._forced_gain
        return gain, drafts, worth

    def drafts(self, num_items: int) -> F64:
        """Drafted tokens of 0, 1, ... ``num_items`` items, floors included; without presences."""
        return np.arange(self.forced_drafts, self.forced_drafts + num_items + 0.5)

    def seconds_by_drafts(
        self, curve: CostCurve, draft: DraftCost, drafts: F64, num_other_tokens: int
    ) -> F64:
        """The part of a ragged step's seconds that depends on ``drafts``, not on the depth.

        ``drafts`` : those of `prefixes`. Not to be written to: what was worked out last is kept.
        """
        given = curve, draft, num_other_tokens
        if self._timed is not None and self._timed[0] == given:
            known, seconds = self._timed[1:]
            # Where all drafts are there, those of a smaller depth are the first of these.
            if known is drafts or (self.presence is None and len(drafts) <= len(known)):
                return seconds[: len(drafts)]
        seconds = curve.at(drafts + (self.size + num_other_tokens))
        if draft.per_token_s:
            seconds += draft.per_token_s * drafts
        self._timed = given, drafts, seconds
        return seconds

    def add_depth(self, seconds: F64, draft: DraftCost, depth: int, drafts: F64) -> F64:
        """All seconds: with what drafting to ``depth``, or to the deepest floor, costs."""
        by_depth = draft.by_depth(max(depth, self.deepest_floor))
        if not by_depth and not draft.sunk_s:
            return seconds
        total = seconds + by_depth
        if drafts[0] == 0:
            total[0] = seconds[0] + draft.sunk_s
        return total

    def add_depths(self, seconds: F64, draft: DraftCost, deepest: int, drafts: F64) -> F64:
        """As `add_depth`, of each depth up to ``deepest``, a row each."""
        depths = np.maximum(np.arange(deepest + 1), self.deepest_floor)
        total: F64 = seconds + draft.by_depths(depths)[:, None]
        if drafts[0] == 0:
            total[:, 0] = seconds[0] + draft.sunk_s
        return total

    def lengths(self, count: int, depth: int) -> I64:
        """The lengths that the best ``count`` items within ``depth`` make."""
        lengths = np.zeros(self.size, np.int64)
        if count > 0:
            worth, free = self._scan(depth)[2], self._free[:depth]
            least = worth[count - 1]
            (free >= least).sum(0, out=lengths)
            if count < len(worth) and worth[count] == least:
                # Of items worth the same, which there are too many of, the deepest stay out.
                tied = np.flatnonzero(free == least)
                surplus = tied[count - int(lengths.sum()) :]
                lengths -= np.bincount(surplus % self.size, minlength=self.size)
        if self.floor is not None and self.deepest_floor:
            lengths += self.floor
        return lengths

    def at(self, lengths: npt.ArrayLike) -> tuple[I64, float]:
        """Given lengths (one for all, or [B]) within floors and ceilings: (lengths, gain)."""
        clipped = self.clip(lengths)
        if self.floor is not None:
            clipped = np.maximum(clipped, self.floor)
        if self._gains is None:
            self._gains = np.zeros((self.max_length + 1, self.size))
            self._expected(self.worth).cumsum(axis=0, out=self._gains[1:])
        gain = self._gains[clipped, np.arange(self.size)].sum()
        return clipped, self.weight_sum + float(gain)


def step_seconds(
    curve: CostCurve, draft: DraftCost, num_tokens: npt.ArrayLike, drafts: F64, depth: int
) -> F64:
    """Seconds of steps that verify ``num_tokens``, ``drafts`` of them drafted, to ``depth``."""
    speculating = draft.by_depth(depth) + draft.per_token_s * drafts
    return curve.at(num_tokens) + np.where(drafts > 0, speculating, draft.sunk_s)


def batch_seconds(
    curve: CostCurve, draft: DraftCost, lengths: I64, num_other_tokens: int, drafts: float
) -> float:
    """Seconds of a step of ``lengths`` [B], with ``drafts`` to be expected of them.

    In uniform mode all are padded to the longest.
    """
    longest = int(lengths.max(initial=0))
    verified = len(lengths) * longest if curve.mode == UNIFORM else drafts
    # As `step_seconds`, in plain numbers: of one step arrays take five times as long.
    speculating = draft.by_depth(longest) + draft.per_token_s * drafts
    seconds = curve.at(len(lengths) + num_other_tokens + verified)
    return float(seconds + (speculating if drafts > 0 else draft.sunk_s))


def possible(curves: Sequence[CostCurve], num_other_tokens: int) -> Sequence[CostCurve]:
    """The curves of a step with so many prompt tokens: none is uniform that carries any.

    Engines have graphs of one length for all for passes of decoding requests alone.
    """
    if not num_other_tokens or len(curves) == 1:
        return curves
    return [curve for curve in curves if curve.mode != UNIFORM]


def choose_lengths(
    ladder: Ladder,
    value_of_time: float,
    depth: int,
    curves: Sequence[CostCurve],
    draft: DraftCost,
    num_other_tokens: int = 0,
    latest_s: float = np.inf,
) -> Choice:
    """The lengths of greatest ``gain - value_of_time * T``; on ties the fewest drafts.

    Parameters
    ----------
    ladder : the batch's items
    value_of_time : tokens per second that a second is worth (lambda), >= 0
    depth : longest length to consider; what the drafter is run to
    curves : cost of the target's pass, one per execution mode that is a candidate (`possible`)
    num_other_tokens : tokens of the same pass that are not verified (prefill)
    latest_s : seconds that the step may take; where every choice takes longer, the shortest step

    >>> ladder = Ladder(np.array([[0.9, 0.2], [0.8, 0.1]]))
    >>> curve = CostCurve("ragged", [1.0, 9.0], [1.0, 5.0])
    >>> choose_lengths(ladder, 1.0, 2, [curve], DraftCost()).lengths.tolist()
    [2, 0]
    """
    best: Choice | None = None
    best_value = -np.inf
    for curve in possible(curves, num_other_tokens):
        if curve.mode == UNIFORM:
            for length in range(min(depth, ladder.max_length) + 1):
                lengths, gain = ladder.at(length)
                drafted = float(lengths.sum())
                seconds = batch_seconds(curve, draft, lengths, num_other_tokens, drafted)
                value = _value(gain, seconds, value_of_time, latest_s)
                if value > best_value + 1e-12:
                    best, best_value = Choice(lengths, UNIFORM, gain, seconds), value
        else:
            gains, drafts = ladder.prefixes(depth)
            by_drafts = ladder.seconds_by_drafts(curve, draft, drafts, num_other_tokens)
            times = ladder.add_depth(by_drafts, draft, depth, drafts)
            values = _value(gains, times, value_of_time, latest_s)
            m = int(np.argmax(values))
            if values[m] > best_value + 1e-12:
                best_value = float(values[m])
                lengths = ladder.lengths(m, depth)
                best = Choice(lengths, RAGGED, float(gains[m]), float(times[m]))
    if best is None:
        raise ValueError("no cost curve to choose by: give at least one")
    return best


def _value(gain: Any, seconds: Any, value_of_time: float, latest_s: float) -> Any:
    """What is maximised: a step that is late is worth less than any in time, and by its seconds."""
    value = gain - value_of_time * seconds
    if latest_s == np.inf:
        return value
    return np.where(seconds <= latest_s, value, -LATE * seconds + np.minimum(gain, 0.0))
