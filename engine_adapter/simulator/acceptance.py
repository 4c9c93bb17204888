"""Acceptance processes: whether a draft would be right, at every position of every answer.

Each request has a generator of its own, keyed to (seed, request), so that what one request meets
does not depend on how many came before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from smartspec.engine_adapter.simulator.requests import F64, I64, U8, Outcomes
from smartspec.engine_adapter.simulator.trees import Trees, guess_chances, guesses, most_probable

MAX_RUN = 64  #: no longer run is told apart
MATCHED = 4  #: tokens that a lookup matches where it matches


class Acceptance(Protocol):
    """Probability that a draft is accepted, position by position."""

    def probability(self, rng: np.random.Generator, request: int, size: int) -> F64:
        """[size], of one request."""


@dataclass(frozen=True)
class Constant:
    """The same at every position of every request."""

    mean: float

    def probability(self, rng: np.random.Generator, request: int, size: int) -> F64:
        return np.full(size, self.mean)


@dataclass(frozen=True)
class BetaOverRequests:
    """Constant within a request, and Beta(m c, (1 - m) c) over requests: mean m, concentration c.

    ``mean``: one for all, or one for each request [R], in (0, 1).
    """

    mean: float | F64
    concentration: float = 6.0

    def probability(self, rng: np.random.Generator, request: int, size: int) -> F64:
        mean = float(self.mean[request]) if isinstance(self.mean, np.ndarray) else self.mean
        c = self.concentration
        return np.full(size, rng.beta(mean * c, (1 - mean) * c))


@dataclass(frozen=True)
class Bursty:
    """Two states, easy and hard, that a text stays in for ``stay`` tokens on average."""

    easy: float
    hard: float
    stay: float = 20.0

    def probability(self, rng: np.random.Generator, request: int, size: int) -> F64:
        changes = rng.random(size) < 1 / self.stay
        is_easy = (np.cumsum(changes) + int(rng.integers(2))) % 2 == 0
        return np.where(is_easy, self.easy, self.hard)


def draw(
    acceptance: Acceptance,
    num_output: I64,
    *,
    max_length: int,
    seed: int,
    presence: float | None = None,
    trees: bool = False,
) -> Outcomes:
    """Outcomes of all requests.

    ``max_length``: positions past an answer's end that a step may draft for; ``presence``: the
    probability that a lookup has something to draft, at each position; None: drafts always exist.
    ``trees``: drafts are trees of up to ``max_length`` nodes (trees.py), most probable first for
    the mean of the request's probabilities; their first guesses are as right as a chain's drafts.
    """
    sizes = num_output + max_length
    offset = np.concatenate([[0], np.cumsum(sizes)])
    run = np.empty(int(offset[-1]), np.uint8)
    probability = np.empty(len(run), np.float32)
    match = None if presence is None else np.empty(len(run), np.uint8)
    guess, shapes = np.empty(len(run) if trees else 0, np.uint8), []
    for i, size in enumerate(sizes.tolist()):
        rng = np.random.default_rng((seed, i))
        at = slice(int(offset[i]), int(offset[i + 1]))
        chance = acceptance.probability(rng, i, size)
        luck = rng.random(size)
        probability[at] = chance
        run[at] = runs(luck < chance)
        if trees:
            guess[at] = guesses(luck, chance)
            mean = np.array(float(chance.mean()))
            shapes.append(most_probable(guess_chances(mean).tolist(), max_length))
        if match is not None and presence is not None:
            match[at] = np.where(rng.random(size) < presence, MATCHED, 0)
    return Outcomes(
        offset[:-1].astype(np.int64),
        run,
        probability,
        match,
        trees=Trees.of(guess, shapes, max_length) if trees else None,
    )


def runs(accepted: np.ndarray) -> U8:
    """From each position, how many are accepted in a row.

    >>> runs(np.array([True, True, False, True])).tolist()
    [2, 1, 0, 1]
    """
    size = len(accepted)
    rejected_at = np.where(accepted, size, np.arange(size))
    next_rejected = np.minimum.accumulate(rejected_at[::-1])[::-1]
    return np.minimum(next_rejected - np.arange(size), MAX_RUN).astype(np.uint8)
