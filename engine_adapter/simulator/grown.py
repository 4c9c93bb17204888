"""Trees that grow while they are drafted, copies among their branches, at a policy's prices.

By the reference worker's own code (growth.py): before each pass of the drafter, whether what it may
add is worth its time; at the end, which nodes are worth their verification. Only what it would read
from models is put in their place. A drafter's confidences are the true probabilities of its guesses
after each right token, and the same after wrong ones.

Tokens are names. `RIGHT` is the target's after a path that is right; 1 to 5 are the drafter's
guesses that are wrong; `OTHER`, a copied token that is wrong and none of these.
"""

from __future__ import annotations

import numpy as np

from smartspec.engine_adapter.lengths import Choice
from smartspec.engine_adapter.reference.candidates import Candidates, Children, Level
from smartspec.engine_adapter.reference.draft_tree import agreeing_path
from smartspec.engine_adapter.reference.growth import Cut, Growth
from smartspec.engine_adapter.simulator.requests import I64, U8, Drafted, Outcomes
from smartspec.engine_adapter.simulator.trees import NUM_GUESSES, guess_chances

RIGHT, OTHER = 0, NUM_GUESSES + 1


class Grown:
    """The drafters of one engine; learns how far confidences of drafts and copies can be trusted.

    ``outcomes`` : of trees with copies
    """

    def __init__(self, outcomes: Outcomes, seed: int) -> None:
        assert outcomes.trees is not None and outcomes.copies is not None
        self._guess, self._copies = outcomes.trees.guess, outcomes.copies
        self._probability = outcomes.probability.astype(np.float64)
        self._calibration = Candidates.new_calibration()
        self._luck = np.random.default_rng((seed, 4))

    def draft(self, requests: I64, positions: I64, choice: Choice, lengths: U8) -> Drafted:
        """Up to ``lengths`` nodes of each request, or what is worth it at the choice's prices."""
        size, most = len(positions), lengths.astype(np.int64)
        growth = Growth(self._calibration, np.zeros(size, np.int64), most, choice.prices)
        candidates, num_forwards, num_run = growth.candidates, 0, 0
        candidates.copy(*self._copied(positions, int(most.max(initial=0))))
        level = Level.of(growth.starting())
        while level.size:
            growth.add(level, self._children(candidates, level, positions))
            num_forwards, num_run = num_forwards + 1, num_run + level.size
            level = growth.next_level(np.full(size, np.iinfo(np.int64).max))
        cut = growth.cut(self._luck.random(size))
        drafted = _outcome(cut, num_forwards, num_run)
        candidates.learn([[RIGHT] * (n + 1) for n in drafted.num_accepted.tolist()])
        return drafted

    def _copied(self, positions: I64, most: int) -> tuple[list[list[int]], list[list[float]]]:
        """By request, tokens of its copy and how sure a lookup is of each."""
        runs, sure = self._copies.run[positions], self._copies.confidence[positions]
        wrong_at = positions + np.minimum(runs, most)
        misses = self._copies.miss[np.minimum(wrong_at, len(self._copies.miss) - 1)]
        tokens, confidences = [], []
        for run, own, miss in zip(runs.tolist(), sure.tolist(), misses.tolist(), strict=True):
            text = [RIGHT] * run + [miss or OTHER] + [OTHER] * most
            tokens.append(text[:most] if own else [])
            confidences.append([own] * len(tokens[-1]))
        return tokens, confidences

    def _children(self, candidates: Candidates, level: Level, positions: I64) -> Children:
        """The drafter's guesses after each node of ``level``."""
        depths = candidates.depths[level]
        at = positions[level.places] + depths
        tokens = np.tile(np.arange(1, NUM_GUESSES + 1), (level.size, 1))
        guess = self._guess[at].astype(np.int64)
        is_right = (depths == 0) | (candidates.tokens[level] == RIGHT)
        rows = np.flatnonzero(is_right & (guess > 0))
        tokens[rows, guess[rows] - 1] = RIGHT
        return Children(tokens, guess_chances(self._probability[at]))


def _outcome(cut: Cut, num_forwards: int, num_run: int) -> Drafted:
    """What the target says of what was drafted: the right token wherever there is one."""
    trees = cut.verified
    drawn = [[RIGHT] * (tree.size + 1) for tree in trees]
    paths = [agreeing_path(tree, said) for tree, said in zip(trees, drawn, strict=True)]
    told = cut.accepted(drawn, paths)
    accepted = np.array([len(path) for path in paths], np.uint8)
    return Drafted(
        num_verified=cut.num_verified.astype(np.uint8),
        num_accepted=accepted,
        ranks=np.array([sum(1 << node for node in path) for path in told], np.uint64),
        num_forwards=num_forwards,
        num_draft_tokens=num_run,
        num_cut=cut.num_cut,
        num_cut_accepted=np.array([len(path) for path in told], np.uint8) - accepted,
    )
