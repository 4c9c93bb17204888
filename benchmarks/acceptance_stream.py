"""Recorded answers as an engine would meet them: steps of a batch, with lengths drawn at random.

Lengths come from a generator with a seed, not from a policy, so that every method sees the same
drafts and the same censoring: of a step that drafts k, nothing is known beyond the first rejection.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from acceptance_traces import MAX_LENGTH, Answer

from smartspec.engine_adapter.base import (
    FEATURE_DRAFT_CONFIDENCE,
    FEATURE_MATCH_LENGTH,
    FEATURE_TOKEN_ACCEPTANCE,
)
from smartspec.engine_adapter.reference.draft_model import NOT_DRAFTED
from smartspec.engine_adapter.token_acceptance import TokenAcceptance

BATCH = 8
STYLES = ("lookup", "draft")
I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]


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

    def advance(self, drafted: int, rates: TokenAcceptance) -> int:
        """Decode one step; returns how many drafts were accepted."""
        p = self.position
        accepted = min(drafted, int(self.run[p]))
        # What a lookup would have copied is known without a draft.
        passed = min(int(self.run[p]), accepted + 1) if self.is_lookup else accepted
        reached = min(passed + 1, accepted + 1) if self.is_lookup else min(accepted + 1, drafted)
        reached *= self.available > 0
        rates.learn(self.answer.token[p - 1 : p - 1 + reached], np.arange(reached) < passed)
        self.position += accepted + 1
        self.goes_on = drafted > 0
        return accepted


def features(batch: Sequence[Decoding], rates: TokenAcceptance) -> dict[str, F64]:
    """What the engine knows of each before it drafts, by name: [B]."""
    known = {
        FEATURE_TOKEN_ACCEPTANCE: rates.rates([one.token_before for one in batch]),
        FEATURE_MATCH_LENGTH: np.array([one.answer.match_length[one.position] for one in batch]),
        FEATURE_DRAFT_CONFIDENCE: np.array(
            [
                one.answer.draft_confidence[one.position] if one.goes_on else NOT_DRAFTED
                for one in batch
            ]
        ),
    }
    return {name: column.astype(np.float64) for name, column in known.items()}


def steps(answers: Sequence[Answer], style: str, seed: int) -> list[Step]:
    """All steps of ``answers``, `BATCH` at a time in an order drawn by ``seed``.

    Lengths are uniform from 0 to `MAX_LENGTH`, cut to what is possible.
    """
    rng = np.random.default_rng(seed)
    rates = TokenAcceptance()
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
