"""A draft model's trees: of all that it can think of, the most probable nodes.

A node's chance of being on the accepted path is the product of the chances along its path, each of
them what the draft model gives the token (`sampling.likeliest`), as calibrated against what became
of earlier drafts. Chances fall along a path. So the children of a node outside the best k stay
outside, and running, level by level, the nodes that are among the best k known so far finds the
best k of all (up to `NUM_CHILDREN` children per node). EAGLE-2 (Li et al. 2024) grows such trees
with a fixed width and depth; here neither is set, and a tree is as deep as the drafts are certain.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from smartspec.engine_adapter.base import F32
from smartspec.engine_adapter.reference.calibration import Calibration
from smartspec.engine_adapter.reference.draft_model import DraftModel
from smartspec.engine_adapter.reference.draft_tree import (
    MAX_NODES,
    NO_DRAFTS,
    ROOT,
    DraftTree,
    most_probable,
    outcomes,
)
from smartspec.engine_adapter.reference.model_runner import ModelRunner, Segment
from smartspec.engine_adapter.reference.proposer import Availability, Proposal
from smartspec.engine_adapter.reference.sampling import Draws, likeliest
from smartspec.engine_adapter.reference.sequence import Sequence

NUM_CHILDREN = 8  #: the ninth likeliest token is seldom among the best nodes

Children = tuple[list[int], list[float]]  #: tokens and the model's own confidences, [C] each


class Growth:
    """One request's tree while it grows.

    Parameters
    ----------
    size : nodes wanted
    calibration : of the draft model's confidences
    """

    def __init__(self, size: int, calibration: Calibration) -> None:
        self.tree: DraftTree = NO_DRAFTS  #: the best nodes of those known
        self._size = size
        self._calibration = calibration
        self._tokens: list[int] = []  # of all nodes known
        self._parents: list[int] = []
        self._depths: list[int] = []
        self._own: list[float] = []
        self._chances: list[float] = []
        self._slots: dict[int, int] = {}  # of nodes run, counted from the sequence's own tokens
        self._best: list[int] = []
        self._num_seen = 0  # nodes that have been looked at for being run

    def add(self, parents: list[int], children: list[Children]) -> None:
        """What may follow each of ``parents``."""
        own = [confidences for _, confidences in children]
        rates = self._calibration.rates(own).tolist()
        for parent, (tokens, _), sure, rate in zip(parents, children, own, rates, strict=True):
            chance = 1.0 if parent == ROOT else self._chances[parent]
            depth = 1 if parent == ROOT else self._depths[parent] + 1
            some = [at for at, confidence in enumerate(sure) if confidence > 0]
            self._tokens += [tokens[at] for at in some]
            self._own += [sure[at] for at in some]
            self._chances += [chance * min(rate[at], 1.0) for at in some]
            self._parents += [parent] * len(some)
            self._depths += [depth] * len(some)
        self.tree, self._best = most_probable(
            self._tokens, self._parents, self._chances, self._size
        )

    def next_level(self, room: int) -> list[int]:
        """Nodes whose children could be among the best: to be run, in ``room`` slots at most."""
        begin, self._num_seen = self._num_seen, len(self._tokens)
        least = self._chances[self._best[-1]] if self.tree.size == self._size else 0.0
        level = [node for node in self._best if node >= begin and self._chances[node] > least]
        level = level[: max(0, room - len(self._slots))]
        for node in level:
            self._slots[node] = len(self._slots)
        return level

    def segment(self, sequence: Sequence, level: list[int]) -> Segment:
        """The pass that runs ``level``, the nodes last given."""
        first = sequence.num_tokens + len(self._slots) - len(level)
        tokens = [self._tokens[node] for node in level]
        parents = [self._slots.get(self._parents[node], ROOT) for node in self._slots]
        return Segment(sequence.row, first, tokens, len(level), parents)

    def positions(self, sequence: Sequence, level: list[int]) -> list[int]:
        """Of what follows each node of ``level``."""
        return [sequence.num_tokens + self._depths[node] for node in level]

    @property
    def confidences(self) -> list[float]:
        """The draft model's own, of the tree's nodes."""
        return [self._own[node] for node in self._best]

    def slots(self, path: list[int]) -> list[int]:
        """Where in the draft model's cache the accepted nodes are, as far as they were run."""
        nodes = [self._best[node] for node in path]
        return [self._slots[node] for node in nodes if node in self._slots]


class TreeDraftModel(DraftModel):
    """Drafts trees with a model that shares the target's vocabulary, and its noise when sampling.

    Its cache is kept in step as by `DraftModel`; what was accepted of a tree is moved together in
    it too. Parameters are those of `DraftModel`; lengths are numbers of nodes.
    """

    name = "draft-tree"
    trees = True

    def __init__(
        self, runner: ModelRunner, max_length: int = 16, max_pass_tokens: int = 512
    ) -> None:
        if not 1 <= max_length <= MAX_NODES:
            raise ValueError(f"max_length must be in [1, {MAX_NODES}], got {max_length}")
        super().__init__(runner, max_length, max_pass_tokens)
        self._calibration = Calibration()
        self._openings: dict[int, Children] = {}  # first levels known before lengths are chosen
        self._growths: dict[int, Growth] = {}  # of the last drafts

    def available(self, sequences: list[Sequence]) -> Availability:
        self._openings = {}
        return super().available(sequences)

    def _look(self, sequences: list[Sequence]) -> F32:
        positions = [[s.num_tokens] for s in sequences]
        opened = self._children(self._begin(sequences), sequences, positions)
        self._openings = dict(zip((s.id for s in sequences), opened, strict=True))
        return np.array([confidences[0] for _, confidences in opened], np.float32)

    def propose(self, sequences: list[Sequence], lengths: npt.NDArray[np.int64]) -> Proposal:
        chosen = [s for s, length in zip(sequences, lengths, strict=True) if length]
        self._goes_on = {s.id for s in chosen}
        self._growths = {
            s.id: Growth(int(length), self._calibration)
            for s, length in zip(sequences, lengths, strict=True)
            if length
        }
        if new := [s for s in chosen if s.id not in self._openings]:
            self._look_again(new)
        for sequence in chosen:
            self._growths[sequence.id].add([ROOT], [self._openings[sequence.id]])
        while chosen:
            chosen = self._grow(chosen)
        trees = [
            self._growths[s.id].tree if s.id in self._growths else NO_DRAFTS for s in sequences
        ]
        return Proposal(trees, *self._spent)

    def _look_again(self, sequences: list[Sequence]) -> None:
        """Open the trees of those who were not looked at, beside those who were."""
        known = self._openings
        self._look(sequences)
        self._openings.update(known)

    def _grow(self, sequences: list[Sequence]) -> list[Sequence]:
        """Run the next level of each tree in one pass; returns those that had one."""
        growing: list[tuple[Sequence, Growth, list[int]]] = []
        for sequence in sequences:
            growth = self._growths[sequence.id]
            room = self._runner.cache.max_model_len - sequence.num_tokens
            if level := growth.next_level(room):
                growing.append((sequence, growth, level))
        if not growing:
            return []
        chosen = [sequence for sequence, _, _ in growing]
        logits = self._runner.forward([g.segment(s, level) for s, g, level in growing])
        self._spent = self._spent.plus(num_forwards=1)
        positions = [growth.positions(sequence, level) for sequence, growth, level in growing]
        children = iter(self._children(logits, chosen, positions))
        for _, growth, level in growing:
            growth.add(level, [next(children) for _ in level])
        return chosen

    def _children(
        self, logits: torch.Tensor, sequences: list[Sequence], positions: list[list[int]]
    ) -> list[Children]:
        """What may follow, by row of the logits: each sequence has one per position."""
        self._spent = self._spent.plus(num_draft_tokens=len(logits))
        asked = zip(sequences, positions, strict=True)
        draws = Draws.of((s.request.sampling, s.seed, places) for s, places in asked)
        tokens, chances = likeliest(logits, draws, NUM_CHILDREN)
        return list(zip(tokens.tolist(), chances.tolist(), strict=True))

    def accepted(self, sequences: list[Sequence], paths: list[list[int]]) -> None:
        before: list[int] = []
        outcome: list[bool] = []
        kept = []
        for sequence, path in zip(sequences, paths, strict=True):
            growth = self._growths.get(sequence.id)
            if growth is None:
                continue
            self._calibration.learn(growth.tree, growth.confidences, path)
            start = self._num_computed[sequence.id]
            tried, right = outcomes(growth.tree, path, sequence.tokens, start)
            before += tried
            outcome += right
            slots = growth.slots(path)
            kept.append((sequence.row, start, slots))
            self._num_computed[sequence.id] += len(slots)
        self._runner.cache.compact(kept)
        self._rates.learn(before, outcome)

    def forget(self, sequence: Sequence) -> None:
        super().forget(sequence)
        self._openings.pop(sequence.id, None)
        self._growths.pop(sequence.id, None)
