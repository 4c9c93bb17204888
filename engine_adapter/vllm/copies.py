"""What a lookup's drafts are worth, by the tokens around them.

vLLM tells nothing of how a lookup came by a draft, but the draft itself is there before lengths are
chosen. How often drafts were right after the same token, and how often the same token was right as
a draft, says more of the next one than all that a daemon, which sees no tokens, can know.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from smartspec.engine_adapter.base import F32
from smartspec.engine_adapter.levels import Levels
from smartspec.engine_adapter.token_acceptance import TokenAcceptance

STEPS = 16.0  #: of log odds, in which lifts are kept: rates are right to within 0.016
MIDDLE = 128  #: in the place of no lift, in a byte
_ODDS = np.exp((np.arange(511) - 2 * MIDDLE) / STEPS)  #: over those of any token, by sum of lifts

_name = attrgetter("request_id")


def _latest(requests: list[Any]) -> list[int]:
    return [request._all_token_ids[-1] for request in requests]


class Found(NamedTuple):
    """What a lookup found for a batch."""

    before: list[int]  #: [B], the latest token of each request
    drafts: list[list[int]]  #: [B]

    @classmethod
    def of(cls, requests: list[Any]) -> Found:
        """Before ``schedule()``: all of it."""
        return cls(_latest(requests), [request.spec_token_ids for request in requests])

    @classmethod
    def scheduled(cls, requests: list[Any], output: Any) -> Found:
        """After ``schedule()``, of a step that nobody has cut: as far as vLLM had room for it."""
        drafts = output.scheduled_spec_decode_tokens
        return cls(_latest(requests), [drafts.get(name, []) for name in map(_name, requests)])

    def take(self, rows: npt.NDArray[np.intp]) -> Found:
        kept = rows.tolist()
        return Found([self.before[i] for i in kept], [self.drafts[i] for i in kept])


def _first(found: Found) -> list[int]:
    return [drafts[0] if drafts else 0 for drafts in found.drafts]


class Lifts:
    """By how much each token lifts the odds of a draft: in a byte, read without an array."""

    def __init__(self) -> None:
        self._acceptance = TokenAcceptance()
        self.lifts = bytearray()  #: log odds over those of any token, in `STEPS`, from `MIDDLE` on

    @property
    def odds(self) -> float:
        """Of acceptance, over all tokens."""
        return self._acceptance.odds

    def learn(self, tokens: list[int], accepted: list[bool]) -> None:
        """Take in drafts that were reached, and whether they were accepted."""
        self._acceptance.learn(tokens, accepted)
        seen = list(set(tokens))
        self.make_room(max(seen, default=-1))
        lifts = np.rint(np.log(self._acceptance.lift(seen)) * STEPS) + MIDDLE
        for token, lift in zip(seen, lifts.clip(0, 255).astype(np.uint8).tolist(), strict=True):
            self.lifts[token] = lift

    def make_room(self, token: int) -> None:
        """For ids up to this."""
        missing = token + 1 - len(self.lifts)
        if missing > 0:
            self.lifts.extend(bytes([MIDDLE]) * max(missing, len(self.lifts)))


def cut(requests: list[Any], found: Found, levels: list[bytes], split: int, surplus: int) -> None:
    """Cut drafts to those of the best ``split`` levels, and ``surplus`` of the next one.

    ``levels`` : of each request's drafts; the surplus goes to whoever comes first
    """
    for request, drafts, its in zip(requests, found.drafts, levels, strict=True):
        if its and its[-1] >= split:
            length = bisect_left(its, split)
            if surplus:
                more = min(bisect_right(its, split) - length, surplus)
                surplus -= more
                length += more
            request.spec_token_ids = drafts[:length]


class Copies:
    """Learns from what became of drafts, those that were cut off included.

    What the token before a draft says and what the draft itself says are joined as if independent
    given the outcome (naive Bayes): the odds of all drafts, times what either lifts them by. The
    sum of the two lifts is all that there is to know of a draft.

    >>> copies = Copies()
    >>> copies.learn(Found([1, 1], [[5, 6], [7]]), [[5, 6, 8], [9]])
    >>> [round(rate, 2) for rate in copies.features(Found([1, 1], [[5], [7]]))[0].tolist()]
    [0.7, 0.36]
    """

    def __init__(self) -> None:
        self._before = Lifts()
        self._drafted = Lifts()
        self._rates: F32 | None = None  #: since something was learned

    def rates(self) -> F32:
        """P(the first draft is accepted) by the sum of its two lifts, [1, 511]."""
        if self._rates is None:
            odds = _ODDS * self._before.odds
            self._rates = (odds / (1.0 + odds)).astype(np.float32)[None]
        return self._rates

    def features(self, found: Found) -> F32:
        """P(the first draft is accepted), [1, B]; of no meaning where there is none."""
        first = _first(found)
        self._make_room(found.before, first)
        before, drafted = self._before.lifts, self._drafted.lifts
        sums = [before[a] + drafted[b] for a, b in zip(found.before, first, strict=True)]
        return self.rates()[:, sums]

    def levels(self, found: Found, levels: Levels) -> list[bytes]:
        """Levels of the drafts of each request, if ``levels`` goes by `rates`."""
        try:
            return self._levels(found, levels)
        except IndexError:  # a token that was never seen
            self._make_room(found.before, _first(found))
            return self._levels(found, levels)

    def _levels(self, found: Found, levels: Levels) -> list[bytes]:
        before, drafted = self._before.lifts, self._drafted.lifts
        table, buckets = levels.levels, levels.buckets
        return [
            table[row + buckets[before[last] + drafted[drafts[0]]]][: len(drafts)]
            if drafts
            else b""
            for last, drafts, row in zip(*found, levels.rows, strict=True)
        ]

    def _make_room(self, before: list[int], drafted: list[int]) -> None:
        self._before.make_room(max(before, default=0))
        self._drafted.make_room(max(drafted, default=0))

    def learn(self, found: Found, came: list[list[int]]) -> None:
        """Compare drafts with the tokens that came in their place, [B], as far as they agree.

        The token after the last one verified tells of the draft after it, although that was cut.
        """
        before: list[int] = []
        drafted: list[int] = []
        accepted: list[bool] = []
        for last, drafts, tokens in zip(found.before, found.drafts, came, strict=True):
            for draft, token in zip(drafts, tokens, strict=False):
                before.append(last)
                drafted.append(draft)
                accepted.append(draft == token)
                if draft != token:
                    break
                last = token
        self._rates = None
        self._before.learn(before, accepted)
        self._drafted.learn(drafted, accepted)
