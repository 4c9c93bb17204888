"""Copies among a simulated tree's branches: what prompt lookup would add to a drafter's guesses.

Copies are as recorded (recorded.py): when there is one, how sure of it a lookup is, and how many of
its tokens are right. How they and the drafter's guesses go together is assumed:

* whether a guess is right does not depend on whether the copy is. In our own traces (960 answers)
  the odds that a draft is right are 1.2 times those without a copy where the copy is right, and
  0.6 times where it is wrong, within an answer;
* a copied token that is wrong is what the drafter, knowing that, would guess: its first guess with
  the probability that it has for it, its second, and so on, or none of the five. So that both
  agree says less than if wrong ones never did.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from smartspec.engine_adapter.base import FEATURE_DRAFT_CONFIDENCE, FEATURE_MATCH_AGREEMENT
from smartspec.engine_adapter.simulator.recorded import Recorded
from smartspec.engine_adapter.simulator.requests import F32, F64, I64, U8, Outcomes
from smartspec.engine_adapter.simulator.trees import guess_chances

UNTOLD = 0.5  #: how sure a lookup is that does not tell how far its matches agree


@dataclass(frozen=True)
class Copies:
    """By position of every answer, [P]."""

    run: U8  #: copied tokens in a row that are right
    confidence: F32  #: of each of them; 0: nothing to copy
    miss: U8  #: which guess of the drafter's a wrong copied token is, from 1; 0: none


def among(outcomes: Outcomes, recorded: Recorded, num_output: I64, *, seed: int) -> Outcomes:
    """``outcomes`` of trees, with ``recorded`` copies among their branches.

    Raises ValueError where drafts are no trees.
    """
    if outcomes.trees is None:
        raise ValueError("copies are branches of trees: draft trees")
    max_length = outcomes.trees.gain.shape[1]
    which = recorded.nearest(num_output, seed)
    copied = recorded.outcomes(which, num_output, max_length=max_length)
    assert copied.match_length is not None and copied.features is not None
    confidence = np.full(len(copied.run), UNTOLD, np.float32)
    if FEATURE_MATCH_AGREEMENT in copied.feature_names:
        confidence = copied.features[copied.feature_names.index(FEATURE_MATCH_AGREEMENT)]
    confidence = np.where(copied.match_length > 0, np.clip(confidence, 0.01, 0.99), 0.0)
    sizes = num_output + max_length
    luck = np.concatenate(
        [np.random.default_rng((seed, i, 1)).random(size) for i, size in enumerate(sizes.tolist())]
        or [np.empty(0)]
    )
    miss = misses(luck, outcomes.probability.astype(np.float64), outcomes.trees.guess)
    return replace(
        outcomes,
        copies=Copies(copied.run, confidence.astype(np.float32), miss),
        feature_names=(FEATURE_DRAFT_CONFIDENCE,),
        features=np.where(confidence > 0, confidence, -1.0).astype(np.float32)[None],
    )


def misses(luck: F64, acceptance: F64, guess: U8) -> U8:
    """Which guess a copied token is that is not the target's, from 1; 0: none of them; all [P].

    ``luck`` in [0, 1); ``guess``: which one the target's is.

    >>> misses(np.array([0.1, 0.9]), np.array([0.5, 0.5]), np.array([0, 1], np.uint8)).tolist()
    [1, 0]
    """
    chances = guess_chances(acceptance)
    others = np.maximum(1.0 - chances.sum(axis=-1), 0.0)
    right = np.flatnonzero(guess)
    chances[right, guess[right].astype(np.int64) - 1] = 0.0
    total = chances.sum(axis=-1) + others
    beyond = np.cumsum(chances, axis=-1) <= (luck * total)[:, None]
    rank = 1 + beyond.sum(axis=-1)
    return np.where(rank > chances.shape[-1], 0, rank).astype(np.uint8)
