"""What a lookup's drafts are worth, by the tokens around them.

vLLM tells nothing of how a lookup came by a draft, but the draft itself is there before lengths are
chosen. How often drafts were right after the same token, and how often the same token was right as
a draft, says more of the next one than all that a daemon, which sees no tokens, can know.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence, Sized
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from smartspec.engine_adapter.base import F32
from smartspec.engine_adapter.levels import Levels
from smartspec.engine_adapter.token_acceptance import TokenAcceptance

STEPS = 16.0  #: of log odds, in which lifts are kept: rates are right to within 0.016
MOST = 127  #: of a lift; Python keeps all numbers that the sum of two can be
NOTHING = b""  #: the levels of no draft
MIDDLE = 64  #: in the place of no lift
#: Odds over those of any token, by the sum of two lifts.
_ODDS = np.exp((np.arange(2 * MOST + 1) - 2 * MIDDLE) / STEPS)

_name = attrgetter("request_id")


def _latest(requests: list[Any]) -> list[int]:
    return [request._all_token_ids[-1] for request in requests]


class Found(NamedTuple):
    """What a lookup found for a batch, and what was left of it."""

    before: list[int]  #: [B], the latest token of each request; empty: see `noted`
    drafts: list[list[int]]  #: [B], those that were not cut off
    whole: Sequence[Sized]  #: [B], as long as what was found
    beyond: list[int | None]  #: [B], the first draft that was cut off

    @classmethod
    def uncut(cls, before: list[int], drafts: list[list[int]]) -> Found:
        return cls(before, drafts, drafts, [None] * len(drafts))

    @classmethod
    def of(cls, requests: list[Any]) -> Found:
        """Before ``schedule()``: all of it."""
        return cls.uncut(_latest(requests), [request.spec_token_ids for request in requests])

    @classmethod
    def scheduled(cls, requests: list[Any], output: Any) -> Found:
        """After ``schedule()``, of a step that nobody has cut: as far as vLLM had room for it."""
        drafts = output.scheduled_spec_decode_tokens
        return cls.uncut(_latest(requests), [drafts.get(name, []) for name in map(_name, requests)])

    def noted(self, requests: list[Any]) -> Found:
        """With the latest tokens: the device runs, and they are still the same."""
        return self if self.before else self._replace(before=_latest(requests))

    def take(self, rows: npt.NDArray[np.intp]) -> Found:
        kept = rows.tolist()
        return Found(*([column[i] for i in kept] for column in self))

    def first(self) -> list[int]:
        """The first draft of each request; 0: it has none."""
        return [
            drafts[0] if drafts else beyond or 0
            for drafts, beyond in zip(self.drafts, self.beyond, strict=True)
        ]


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
        for token, lift in zip(seen, lifts.clip(0, MOST).astype(np.uint8).tolist(), strict=True):
            self.lifts[token] = lift

    def make_room(self, token: int) -> None:
        """For ids up to this."""
        missing = token + 1 - len(self.lifts)
        if missing > 0:
            self.lifts.extend(bytes([MIDDLE]) * max(missing, len(self.lifts)))


def cut(drafts: list[list[int]], levels: list[bytes], split: int, surplus: int) -> list[int | None]:
    """Cut drafts to those of the best ``split`` levels, and ``surplus`` of the next one.

    In place: Python counts the lists that are alive, and collects garbage when there are more.

    Parameters
    ----------
    drafts : [B]
    levels : [B], of the drafts; the surplus goes to whoever comes first

    Returns the first draft that was cut off, [B]; None: none was.
    """
    beyond: list[int | None] = [None] * len(drafts)
    for i, its in enumerate(levels):
        if its and its[-1] >= split:
            length = bisect_left(its, split) if its[0] < split else 0
            if surplus:
                more = min(bisect_right(its, split) - length, surplus)
                surplus -= more
                length += more
                if length == len(its):
                    continue
            theirs = drafts[i]
            beyond[i] = theirs[length]
            del theirs[length:]
    return beyond


class Copies:
    """Learns from what became of drafts, those that were cut off included.

    What the token before a draft says and what the draft itself says are joined as if independent
    given the outcome (naive Bayes): the odds of all drafts, times what either lifts them by. The
    sum of the two lifts is all that there is to know of a draft.

    >>> copies = Copies()
    >>> copies.learn(Found.uncut([1, 1], [[5, 6], [7]]), [[5, 6, 8], [9]])
    >>> rates = copies.features(Found.uncut([1, 1], [[5], [7]]))
    >>> [round(rate, 2) for rate in rates[0].tolist()]
    [0.7, 0.36]
    """

    def __init__(self) -> None:
        self._before = Lifts()
        self._drafted = Lifts()
        self._rates: F32 | None = None  #: since something was learned

    def rates(self) -> F32:
        """P(the first draft is accepted) by the sum of its two lifts, [1, 255]."""
        if self._rates is None:
            odds = _ODDS * self._before.odds
            self._rates = (odds / (1.0 + odds)).astype(np.float32)[None]
        return self._rates

    def features(self, found: Found) -> F32:
        """P(the first draft is accepted), [1, B]; of no meaning where there is none."""
        self._make_room(found)
        before, drafted = self._before.lifts, self._drafted.lifts
        sums = [before[a] + drafted[b] for a, b in zip(found.before, found.first(), strict=True)]
        return self.rates()[:, sums]

    def cut(self, requests: list[Any], levels: Levels, num_other_tokens: int) -> Found:
        """Cut what was found, in place, to what is worth it, where ``levels`` goes by `rates`.

        The device waits: what `Found.noted` can read later is left to it.
        """
        drafts = [request.spec_token_ids for request in requests]
        try:
            theirs = self._levels(requests, drafts, levels)
        except IndexError:  # a token that was never seen, or more drafts than there should be
            self._make_room(Found.uncut(_latest(requests), drafts))
            for its in drafts:
                del its[levels.longest :]
            theirs = self._levels(requests, drafts, levels)
        beyond = cut(drafts, theirs, *levels.split(theirs, num_other_tokens))
        return Found([], drafts, theirs, beyond)

    def _levels(self, requests: list[Any], drafts: list[list[int]], levels: Levels) -> list[bytes]:
        """Levels of the drafts of each request."""
        before, drafted, buckets = self._before.lifts, self._drafted.lifts, levels.buckets
        return [
            row[buckets[before[request._all_token_ids[-1]] + drafted[its[0]]]][len(its)]
            if its
            else NOTHING
            for row, request, its in zip(levels.table, requests, drafts, strict=True)
        ]

    def _make_room(self, found: Found) -> None:
        self._before.make_room(max(found.before, default=0))
        self._drafted.make_room(max(found.first(), default=0))

    def learn(self, found: Found, came: list[list[int]]) -> None:
        """Compare drafts with the tokens that came in their place, [B], as far as they agree.

        The token after the last one verified tells of the draft after it, although that was cut.
        """
        before: list[int] = []
        drafted: list[int] = []
        accepted: list[bool] = []
        for last, drafts, beyond, tokens in zip(
            found.before, found.drafts, found.beyond, came, strict=True
        ):
            for draft, token in zip(drafts, tokens, strict=False):
                before.append(last)
                drafted.append(draft)
                accepted.append(draft == token)
                if draft != token:
                    break
                last = token
            else:
                if beyond is not None and len(tokens) > len(drafts):
                    before.append(last)
                    drafted.append(beyond)
                    accepted.append(beyond == tokens[len(drafts)])
        self._rates = None
        self._before.learn(before, accepted)
        self._drafted.learn(drafted, accepted)
