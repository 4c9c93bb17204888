"""Drafts as they were recorded: what came of them at every position of other answers.

Long answers may be those that copy, and drafts that are right come in runs: what is drawn from
probabilities (acceptance.py) knows nothing of either. So each request takes the drafts of a
recorded answer of the nearest length, one of them at random where several are as near. What it is
longer than that begins the answer anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from smartspec.engine_adapter.simulator.requests import F32, I64, U8, Outcomes


class Answer(NamedTuple):
    """Columns [P] over its tokens. The prompt's pass drew the first: nothing is drafted there."""

    run: U8  #: drafts in a row that are right from here
    match: U8  #: tokens that a lookup matched, or what stands for it; 0: nothing to draft
    features: F32  #: [F, P], what the engine tells of a position

    @property
    def size(self) -> int:
        return len(self.run)


class Tried(NamedTuple):
    """What drafting at every step brought; by answer [A], and in all."""

    accepted: I64
    tried: I64  #: those accepted, and the first that was not
    num_steps: int
    num_with_drafts: int


@dataclass(frozen=True)
class Recorded:
    """Recorded answers, one at least."""

    answers: Sequence[Answer]
    feature_names: tuple[str, ...] = ()

    @property
    def sizes(self) -> I64:
        """Tokens of each answer, [A]."""
        return np.array([answer.size for answer in self.answers], np.int64)

    def nearest(self, num_output: I64, seed: int, own: I64 | None = None) -> list[int]:
        """For each request an answer of the length nearest to its own, [R].

        ``own`` : [R], of each request the answer that it must not get, its own: to validate

        >>> zeros = np.zeros(9, np.uint8)
        >>> answers = [Answer(zeros[:size], zeros[:size], np.empty((0, size))) for size in (3, 9)]
        >>> Recorded(answers).nearest(np.array([1, 5, 7, 90]), seed=0)
        [0, 0, 1, 1]
        """
        sizes, chosen = self.sizes, []
        for i, wanted in enumerate(num_output.tolist()):
            far = np.abs(sizes - wanted)
            if own is not None:
                far[own[i]] = np.iinfo(np.int64).max
            near = np.flatnonzero(far == far.min())
            at = np.random.default_rng((seed, i)).integers(len(near)) if len(near) > 1 else 0
            chosen.append(int(near[at]))
        return chosen

    def outcomes(self, which: Sequence[int], num_output: I64, *, max_length: int) -> Outcomes:
        """Of requests that have the drafts of the answers ``which`` [R], repeated to their length.

        What a step would draft beyond an answer's end is not right.
        """
        sizes = num_output + max_length
        offset = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        run, match = np.zeros(offset[-1], np.uint8), np.zeros(offset[-1], np.uint8)
        features = np.zeros((len(self.feature_names), offset[-1]), np.float32)
        for begin, size, chosen in zip(offset, num_output.tolist(), which, strict=False):
            answer = self.answers[chosen]
            if answer.size < 2:
                continue
            source = 1 + np.arange(size - 1) % (answer.size - 1)
            at = slice(begin + 1, begin + size)
            run[at], match[at] = answer.run[source], answer.match[source]
            features[:, at] = answer.features[:, source]
        unknown = np.full(len(run), np.nan, np.float32)
        return Outcomes(offset[:-1], run, unknown, match, self.feature_names, features)

    def tried(self, max_length: int) -> Tried:
        """Of an engine that drafts all it can, up to ``max_length``, at every step."""
        accepted = np.zeros(len(self.answers), np.int64)
        tried, num_steps, num_with_drafts = accepted.copy(), 0, 0
        for i, answer in enumerate(self.answers):
            run, match, at = answer.run.tolist(), answer.match.tolist(), 1
            while at < answer.size:
                num_steps += 1
                most = min(max_length, answer.size - 1 - at) if match[at] else 0
                right = min(run[at], most)
                num_with_drafts += match[at] > 0
                accepted[i] += right
                tried[i] += right + (right < most)
                at += right + 1
        return Tried(accepted, tried, num_steps, num_with_drafts)
