"""Where answers go on, and so what an accepted draft is worth.

By goodput an accepted draft is worth a token, and a token what the batch's tokens take on average.
But what a draft saves is a token of the place where its answer goes on. Behind drafts that a copied
passage has had accepted more of them will be, and tokens can be had there for little time, with or
without this draft; in other text a token saved is one that takes long. So in the first a draft is
worth less than goodput says, and in the second more.

What tokens take, where requests are in bucket b with probability p_b:

    c(p) = (slot + per_draft sum_b p_b k_b) / (1 + sum_b p_b G_b),

with ``slot`` a request's share of a step without drafts, ``per_draft`` what each adds, ``k_b`` the
length that pays in bucket b, and ``G_b`` what it brings. Lengths are decided by their last draft,
which counts only if all before it were accepted. So it is counted where requests are in the steps
after those in which none of their drafts was rejected (where none was verified, all that is known),
and drafts in bucket b are worth c(after b) / c(after any).

With steps alike, as goodput has it, all this is 1. Where they are not, the sum of the times of all
steps is least not by the greatest goodput of each, but by what each leaves to be done (the relative
values of a Markov decision process; here looked ahead by one step).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from smartspec.estimators.base import F64

MEMORY = 4000.0  #: steps of a request that are remembered
STRENGTH = 20.0  #: steps that all requests' places are worth in those behind one bucket
MOST_BUCKETS = 256  #: more are not told apart: every pair of them is counted
_LARGE = 1e9


class Pace(NamedTuple):
    """What a request's part of a step takes."""

    slot_s: float  #: of a step without drafts, > 0
    per_draft_s: float  #: that each adds

    def token_s(self, length: Any, gain: Any) -> Any:
        """Of a token, at ``length`` drafts of which ``gain`` are accepted."""
        return (self.slot_s + self.per_draft_s * length) / (1.0 + gain)


class Places(NamedTuple):
    """What tokens take in each bucket, at some costs; the last element where nothing is found."""

    pace: Pace
    lengths: F64  #: [num_buckets + 1], that pay
    gains: F64  #: [num_buckets + 1], expected of these
    token_s: float  #: of a token, behind any bucket
    worth: npt.NDArray[np.float32]  #: [num_buckets], of an accepted draft, in tokens

    def ease(
        self,
        buckets: npt.NDArray[np.integer],
        presence: npt.NDArray[np.floating],
        weight: npt.NDArray[np.floating] | None = None,
    ) -> float:
        """Seconds of a token where requests are now, [B] each, over `token_s`.

        Divided by it, worths are in tokens of that batch, as goodput is: tokens count by ``weight``
        (None: all 1), seconds do not.
        """
        length = float((self.lengths[buckets] * presence).sum()) / len(buckets)
        gains = self.gains[buckets] * presence
        share = np.average(gains, weights=weight) if weight is not None else gains.mean()
        gain = float(share)
        return float(self.pace.token_s(length, gain) / self.token_s)


class Continuation:
    """Counts of the buckets that requests go on in.

    >>> where = Continuation(num_buckets=2)
    >>> stays = np.array([0, 1]), np.ones(2, bool), np.array([0, 1])
    >>> for _ in range(1000):
    ...     where.note(*stays)
    >>> survival = np.array([[0.9, 0.3], [0.8, 0.1]])
    >>> worth = where.places(survival, Pace(1.0, 0.1)).worth
    >>> [round(float(one), 2) for one in worth]
    [0.78, 1.45]
    """

    def __init__(self, num_buckets: int) -> None:
        self._num_buckets = num_buckets
        self.is_kept = 1 < num_buckets <= MOST_BUCKETS  #: else there is nothing to tell apart
        size = num_buckets if self.is_kept else 0
        #: Of steps behind each bucket; the last column where nothing was found to draft.
        self._counts = np.zeros((size, size + 1))
        self._news = 1.0  #: what a step counts: ever more, in place of all others ever less

    @property
    def is_known(self) -> bool:
        """Whether there are counts: never of one bucket, of too many, or of trees."""
        return bool(self._counts.any())

    def note(
        self,
        buckets: npt.NDArray[np.integer],
        able: npt.NDArray[np.bool_],
        behind: npt.NDArray[np.integer],
    ) -> None:
        """Take in a step; all [B].

        ``able`` : there was something to draft; ``behind`` : bucket of the step before, -1 where
        a draft was rejected, none was to be had, or nothing is known
        """
        if not self.is_kept or not len(buckets):
            return
        self._news /= (1.0 - 1.0 / MEMORY) ** len(buckets)
        places = np.where(able, buckets, self._num_buckets) + (self._num_buckets + 1) * behind
        np.add.at(self._counts.reshape(-1), places[behind >= 0], self._news)
        if self._news > _LARGE:
            self._counts /= self._news
            self._news = 1.0

    def places(self, survival: npt.NDArray[np.floating], pace: Pace) -> Places | None:
        """What tokens take, by survivals [K, num_buckets]; None while nothing `is_known`."""
        if not self.is_known:
            return None
        every = self._counts.sum(axis=0)
        depths = np.arange(len(survival) + 1.0)
        by_depth = np.zeros((len(depths), self._num_buckets + 1))
        survival.cumsum(axis=0, out=by_depth[1:, :-1])
        share, token_s = every / every.sum(), pace.slot_s
        lengths, gains = np.zeros(self._num_buckets + 1, np.intp), by_depth[0]
        for _ in range(4):  # Dinkelbach's: lengths that pay at this price, and the price of these
            value = by_depth * token_s - pace.per_draft_s * depths[:, None]
            lengths = value.argmax(axis=0)
            gains = by_depth[lengths, np.arange(len(lengths))]
            token_s = float(pace.token_s(share @ lengths, share @ gains))
        after = self._counts / self._news + STRENGTH * share
        after /= after.sum(axis=1, keepdims=True)
        of_next = pace.token_s(after @ lengths, after @ gains)
        worth = (of_next / token_s).astype(np.float32)
        return Places(pace, lengths.astype(np.float64), gains, token_s, worth)
