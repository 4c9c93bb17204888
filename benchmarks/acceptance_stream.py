"""Recorded answers as an engine would meet them: steps of a batch, with lengths drawn at random.

Lengths come from a generator with a seed, not from a policy, so that every method sees the same
drafts and the same censoring: of a step that drafts k, nothing is known beyond the first rejection.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from acceptance_traces import MAX_LENGTH, Answer

from smartspec.engine_adapter.base import (
    FEATURE_DRAFT_CONFIDENCE,
    FEATURE_MATCH_AGREEMENT,
    FEATURE_SECOND_ACCEPTANCE,
    FEATURE_TOKEN_ACCEPTANCE,
)
from smartspec.engine_adapter.messages import NOT_RUN
from smartspec.engine_adapter.token_acceptance import CopyAcceptance, TokenAcceptance

BATCH = 8
STYLES = ("lookup", "draft")
I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]
Rates = TokenAcceptance | CopyAcceptance


class Step(NamedTuple):
    """The requests of one step for which drafts were to be had; columns [B]."""

    ids: I64  #: place of the answer in the list that was given
    features: dict[str, F64]  #: what the engine knew before it drafted
    drafted: I64  #: 0 to `MAX_LENGTH`
    accepted: I64


class Decoding:
    """One answer on its way."""

    def __init__(self, number: int, answer: Answer, style: str) -> None:
        self.number = number
        self.answer = answer
        self.is_lookup = style == "lookup"
        self.run = answer.lookup_run if self.is_lookup else answer.draft_run
        self.ceiling = answer.ceiling
        self.position = 1  # the first has no token before it in the record
        self.goes_on = False  # drafted for in the last step: its first draft is run beforehand

    @property
    def done(self) -> bool:
        return self.position >= self.answer.size

    @property
    def available(self) -> int:
        """Longest drafts possible now."""
        if self.is_lookup and not self.answer.match_length[self.position]:
            return 0
        return int(self.ceiling[self.position])

    @property
    def token_before(self) -> int:
        return int(self.answer.token[self.position - 1])

    @property
    def first_copied(self) -> int:
        """The first token that prompt lookup proposes."""
        answer, p = self.answer, self.position
        return int(answer.token[p] if answer.lookup_run[p] else answer.lookup_miss[p])

    def advance(self, drafted: int, rates: Rates | None) -> int:
        """Decode one step; returns how many drafts were accepted, of which ``rates`` learn."""
        p, run, token = self.position, int(self.run[self.position]), self.answer.token
        accepted = min(drafted, run)
        if isinstance(rates, TokenAcceptance):
            reached = min(accepted + 1, drafted)
            rates.learn(token[p - 1 : p - 1 + reached], np.arange(reached) < accepted)
        elif (
            rates is not None and self.available
        ):  # what a lookup would have copied is known without a draft
            passed = min(run, accepted + 1)
            copied = token[p : p + passed]
            if passed == accepted and run < MAX_LENGTH:
                copied = np.append(copied, self.answer.lookup_miss[p])
            rates.learn(token[p - 1 : p - 1 + len(copied)], copied, np.arange(len(copied)) < passed)
        self.position += accepted + 1
        self.goes_on = drafted > 0
        return accepted


def rates_for(style: str) -> Rates:
    """What an engine keeps of its tokens."""
    return CopyAcceptance() if style == "lookup" else TokenAcceptance()


def features(batch: Sequence[Decoding], rates: Rates) -> dict[str, F64]:
    """What the engine knows of each before it drafts, by name: [B]."""
    before = [one.token_before for one in batch]
    at = [(one.answer, one.position) for one in batch]
    known: dict[str, Any]
    if isinstance(rates, TokenAcceptance):
        known = {
            FEATURE_TOKEN_ACCEPTANCE: rates.rates(before),
            FEATURE_DRAFT_CONFIDENCE: [
                answer.draft_confidence[p] if one.goes_on else NOT_RUN
                for one, (answer, p) in zip(batch, at, strict=True)
            ],
        }
    else:
        first = [one.first_copied for one in batch]
        second = [answer.lookup_second[p] for answer, p in at]
        known = {
            FEATURE_TOKEN_ACCEPTANCE: rates.rates(before, first),
            FEATURE_SECOND_ACCEPTANCE: rates.rates(first, second),
            FEATURE_MATCH_AGREEMENT: [answer.match_agreement[p] for answer, p in at],
        }
    return {name: np.array(column, np.float64) for name, column in known.items()}


def steps(answers: Sequence[Answer], style: str, seed: int) -> list[Step]:
    """All steps of ``answers``, `BATCH` at a time in an order drawn by ``seed``.

    Lengths are uniform from 0 to `MAX_LENGTH`, cut to what is possible.
    """
    rng = np.random.default_rng(seed)
    rates = rates_for(style)
    waiting = [Decoding(int(i), answers[i], style) for i in rng.permutation(len(answers))]
    running: list[Decoding] = []
    found = []
    while running or waiting:
        running = [one for one in running if not one.done]
        while waiting and len(running) < BATCH:
            if not waiting[-1].done:
                running.append(waiting[-1])
            waiting.pop()
        wanted = rng.integers(0, MAX_LENGTH + 1, len(running))
        able = [one for one in running if one.available]
        known = features(able, rates) if able else {}
        drafted, accepted = [], []
        for one, length in zip(running, wanted.tolist(), strict=True):
            count = min(length, one.available)
            if one.available:
                drafted.append(count)
                accepted.append(one.advance(count, rates))
            else:
                one.advance(0, rates)
        if able:
            ids = np.array([one.number for one in able])
            found.append(Step(ids, known, np.array(drafted), np.array(accepted)))
    return found
