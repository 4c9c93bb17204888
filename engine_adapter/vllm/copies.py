"""What a lookup's drafts are worth, by the tokens around them.

vLLM tells nothing of how a lookup came by a draft, but the draft itself is there before lengths are
chosen. How often drafts were right after the same token, and how often the same token was right as
a draft, says more of the next one than all that a daemon, which sees no tokens, can know.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from smartspec.engine_adapter.base import F32
from smartspec.engine_adapter.token_acceptance import CopyAcceptance

_drafts = attrgetter("spec_token_ids")
_tokens = attrgetter("_all_token_ids")
_name = attrgetter("request_id")


def _latest(requests: list[Any]) -> list[int]:
    return [tokens[-1] for tokens in map(_tokens, requests)]


class Found(NamedTuple):
    """What a lookup found for a batch."""

    before: list[int]  #: [B], the latest token of each request
    drafts: list[list[int]]  #: [B]

    @classmethod
    def of(cls, requests: list[Any]) -> Found:
        """Before ``schedule()``: all of it."""
        return cls(_latest(requests), list(map(_drafts, requests)))

    @classmethod
    def scheduled(cls, requests: list[Any], output: Any) -> Found:
        """After ``schedule()``, of a step that nobody has cut: as far as vLLM had room for it."""
        drafts = output.scheduled_spec_decode_tokens
        return cls(_latest(requests), [drafts.get(name, []) for name in map(_name, requests)])

    def take(self, rows: npt.NDArray[np.intp]) -> Found:
        kept = rows.tolist()
        return Found([self.before[i] for i in kept], [self.drafts[i] for i in kept])


class Copies:
    """Learns from what became of drafts, those that were cut off included.

    >>> copies = Copies()
    >>> copies.learn(Found([1, 1], [[5, 6], [7]]), [[5, 6, 8], [9]])
    >>> [round(rate, 2) for rate in copies.features(Found([1, 1], [[5], [7]]))[0].tolist()]
    [0.69, 0.35]
    """

    def __init__(self) -> None:
        self._rates = CopyAcceptance()

    def features(self, found: Found) -> F32:
        """P(the first draft is accepted), [1, B]; of no meaning where there is none."""
        first = [drafts[0] if drafts else 0 for drafts in found.drafts]
        return self._rates.rates(found.before, first)[None]

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
        self._rates.learn(before, drafted, accepted)
