"""Draft trees in the simulator: whose guesses are right, and which nodes a drafter takes.

After every token a drafter has guesses for the next, ranked. The target's token is the first guess
with probability a, the request's acceptance; of what that misses, 1 - a, the second guess has 0.32,
and each further one half of the one before, up to the fifth; none has more than the first. So the
five best guesses hold 1 - 0.4 (1 - a): an assumption, after what SpecInfer (Miao et al. 2023, arXiv
2305.09781) has for LLaMA-7B and drafts of LLaMA-68M as it is remembered, 62 to 70% for the first
guess and 85 to 89% for the best five; the paper was not at hand. Which guess it is, is
independent from token to token, and a drafter knows these probabilities of each request: its nodes
are the most probable paths of all, most probable first. Real drafters are surer of some tokens than
of others, and less well calibrated.

The first guess is right where a chain's draft would be, so that chains and trees meet the same
luck.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from smartspec.engine_adapter.simulator.requests import F64, I64, U8, Accepted

RANK_SHARES = (0.32, 0.16, 0.08, 0.04)  #: of what the first guess misses: second, third, ...
NUM_GUESSES = 1 + len(RANK_SHARES)
ROOT = 0  #: the last known token; nodes count from 1


def guess_chances(acceptance: F64) -> F64:
    """Probability that the target's token is the first guess, the second, ...: [..., 5].

    >>> guess_chances(np.array([0.5])).round(3).tolist()
    [[0.5, 0.16, 0.08, 0.04, 0.02]]
    """
    first = acceptance[..., None]
    return np.concatenate(
        [first, np.minimum((1.0 - first) * np.array(RANK_SHARES), first)], axis=-1
    )


def guesses(luck: F64, acceptance: F64) -> U8:
    """Which guess the target's token is, from 1; 0: none of them. Both [P], luck in [0, 1).

    >>> guesses(np.array([0.1, 0.6, 0.9]), np.array([0.5, 0.5, 0.5])).tolist()
    [1, 2, 0]
    """
    beyond = np.cumsum(guess_chances(acceptance), axis=-1) <= luck[:, None]
    rank = 1 + beyond.sum(axis=-1)
    return np.where(rank > NUM_GUESSES, 0, rank).astype(np.uint8)


@dataclass(frozen=True)
class Shape:
    """The nodes of a request's tree, the most probable first."""

    child: U8  #: [K + 1, 6], by node and guess: the child's node; 0: there is none
    gain: F64  #: [K], probability that a node is on the accepted path
    num_levels: U8  #: [K + 1], of the trees of the first 0, 1, ... nodes


def most_probable(chances: Sequence[float], size: int) -> Shape:
    """The ``size`` most probable nodes, where guesses are right with these ``chances``, falling.

    >>> shape = most_probable([0.6, 0.3], 4)
    >>> shape.gain.round(3).tolist(), shape.num_levels.tolist()
    ([0.6, 0.36, 0.3, 0.216], [0, 1, 2, 2, 3])
    """
    child = np.zeros((size + 1, NUM_GUESSES + 1), np.uint8)
    gain, levels, deepest = [1.0], [0], 0  # the root's among them
    # A node brings in its first child and its next sibling, neither likelier than itself. The
    # numbers of parent and guess break ties.
    heap = [(-chances[0], ROOT, 1, 1)]
    for node in range(1, size + 1):
        lost, parent, guess, level = heapq.heappop(heap)
        child[parent, guess] = node
        gain.append(-lost)
        deepest = max(deepest, level)
        levels.append(deepest)
        heapq.heappush(heap, (lost * chances[0], node, 1, level + 1))
        if guess < len(chances):
            heapq.heappush(heap, (-gain[parent] * chances[guess], parent, guess + 1, level))
    return Shape(child, np.array(gain[1:]), np.array(levels, np.uint8))


@dataclass(frozen=True)
class Trees:
    """The trees of all requests, and which guess is right at every position of every answer."""

    guess: U8  #: [P], of the target's token, from 1; 0: none
    child: U8  #: [R, K + 1, 6], as of `Shape`
    gain: F64  #: [R, K]
    num_levels: U8  #: [R, K + 1]

    @classmethod
    def of(cls, guess: U8, shapes: Sequence[Shape], size: int) -> Trees:
        """``shapes`` of all requests, of ``size`` nodes."""
        return cls(
            guess,
            np.array([s.child for s in shapes]).reshape(-1, size + 1, NUM_GUESSES + 1),
            np.array([s.gain for s in shapes]).reshape(-1, size),
            np.array([s.num_levels for s in shapes]).reshape(-1, size + 1),
        )

    def accepted(self, requests: I64, positions: I64, sizes: U8) -> Accepted:
        """The path that the target takes through trees of the first ``sizes`` nodes; all [B]."""
        count, ranks = np.zeros(len(requests), np.uint8), np.zeros(len(requests), np.uint64)
        going = np.flatnonzero(sizes)
        node = np.full(len(going), ROOT)
        ahead = 0
        while len(going):
            node = self.child[requests[going], node, self.guess[positions[going] + ahead]]
            is_there = (node > ROOT) & (node <= sizes[going])
            going, node, ahead = going[is_there], node[is_there], ahead + 1
            count[going] += 1
            ranks[going] |= np.uint64(1) << (node.astype(np.uint64) - np.uint64(1))
        return Accepted(count, ranks)

    def forwards(self, requests: I64, sizes: U8) -> int:
        """Passes of the drafter for the first ``sizes`` nodes of each: one for every level."""
        return int(self.num_levels[requests, sizes].max(initial=0))
