"""What may come next in one request: a tree of candidates, from all who have something to propose.

A node's *rate* is the probability that it is right if its parent is: what its proposer holds it to
be, as calibrated against what became of earlier nodes of its kind. What a drafter and a copy both
propose is one node, of the confidence that not both are wrong, and of a kind of its own. Of a
node's children one at most is right, so that rates which add up to more are scaled down. The
product of the rates along a path is the *chance* of its last node.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from smartspec.engine_adapter.reference.calibration import NUM_BANDS, Calibration
from smartspec.engine_adapter.reference.draft_tree import ROOT, DraftTree, known, most_probable

Children = tuple[Sequence[int], Sequence[float]]  #: tokens and their proposer's confidences, [C]


class Kind(enum.IntEnum):
    """Who proposes a node."""

    DRAFTED = 0
    COPIED = 1  #: the first token of a copy
    COPIED_ON = 2  #: a later one
    BOTH = 3


class Best(NamedTuple):
    """The most probable candidates, in falling order of their chances."""

    tree: DraftTree
    nodes: list[int]  #: which candidates they are
    chances: list[float]


class Candidates:
    """Of one request.

    Parameters
    ----------
    calibration : of all kinds, with `num_bands` bands
    band : of the request's temperature

    >>> candidates = Candidates(Calibration(Candidates.num_bands()), 0)
    >>> candidates.copy([7, 8], [0.5, 0.8])
    >>> candidates.add(ROOT, [9, 7], [0.4, 0.5])
    >>> candidates.best(3).tree
    DraftTree(tokens=[7, 8, 9], parents=[-1, 0, -1])
    >>> [round(chance, 3) for chance in candidates.best(3).chances]  # 0.75 and 0.4: over 1
    [0.652, 0.522, 0.348]
    """

    def __init__(self, calibration: Calibration, band: int) -> None:
        self.is_begun = False  #: whether the drafter has said what may follow the root
        self.slots: dict[int, int] = {}  #: of nodes run, counted from the request's own tokens
        self._calibration = calibration
        self._band = band
        self._tokens: list[int] = []
        self._parents: list[int] = []
        self._own: list[float] = []
        self._bands: list[int] = []
        self._node: dict[tuple[int, int], int] = {}  # (parent, token)
        self._chances: list[float] = []
        self._held: dict[int, float] = {}  # rates of a node's children together
        self._is_settled = True  # whether these are of all candidates
        self._best: Best | None = None

    @staticmethod
    def num_bands() -> int:
        """Of a calibration of all kinds in all bands of temperature."""
        return len(Kind) * NUM_BANDS

    def copy(self, tokens: Sequence[int], confidences: Sequence[float]) -> None:
        """What would be copied, each token of which follows the one before."""
        parent, kind = ROOT, Kind.COPIED
        for token, own in zip(tokens, confidences, strict=True):
            parent, kind = self._put(parent, token, own, kind), Kind.COPIED_ON

    def draft(self, tokens: Sequence[int], confidences: Sequence[float]) -> None:
        """A chain of drafts."""
        parent = ROOT
        for token, own in zip(tokens, confidences, strict=True):
            parent = self._put(parent, token, own, Kind.DRAFTED)

    def add(self, parent: int, tokens: Sequence[int], confidences: Sequence[float]) -> None:
        """What the drafter says may follow ``parent``."""
        self.is_begun = True
        for token, own in zip(tokens, confidences, strict=True):
            if own > 0:
                self._put(parent, token, own, Kind.DRAFTED)

    def _put(self, parent: int, token: int, own: float, kind: Kind) -> int:
        self._best, self._is_settled = None, False
        node = self._node.get((parent, token))
        if node is None:
            node = self._node[parent, token] = len(self._tokens)
            self._tokens.append(token)
            self._parents.append(parent)
            self._own.append(own)
            self._bands.append(kind * NUM_BANDS + self._band)
        else:
            self._own[node] = 1.0 - (1.0 - self._own[node]) * (1.0 - own)
            self._bands[node] = Kind.BOTH * NUM_BANDS + self._band
        return node

    def _settle(self) -> None:
        if self._is_settled:
            return
        self._is_settled = True
        bands = np.array(self._bands, np.int64)
        rates = np.minimum(self._calibration.rates(self._own, bands), 1.0).tolist()
        held: dict[int, float] = {}
        for parent, rate in zip(self._parents, rates, strict=True):
            held[parent] = held.get(parent, 0.0) + rate
        chances: list[float] = []
        for parent, rate in zip(self._parents, rates, strict=True):
            above = 1.0 if parent == ROOT else chances[parent]
            chances.append(above * rate / max(1.0, held[parent]))
        self._held, self._chances = held, chances

    def chance(self, node: int) -> float:
        """That it is accepted."""
        self._settle()
        return 1.0 if node == ROOT else self._chances[node]

    def open(self, node: int) -> float:
        """The chance that it is accepted, and what follows is not known yet."""
        return self.chance(node) * max(0.0, 1.0 - self._held.get(node, 0.0))

    def best(self, most: int) -> Best:
        """The ``most`` of the greatest chances; all, where there are not so many."""
        self._settle()
        if self._best is None or len(self._best.nodes) != min(most, len(self._tokens)):
            tree, nodes = most_probable(self._tokens, self._parents, self._chances, most)
            self._best = Best(tree, nodes, [self._chances[node] for node in nodes])
        return self._best

    def least(self, most: int) -> float:
        """The chance that a node must have to be among the best ``most``."""
        if not most:
            return 1.0
        chances = self.best(most).chances
        return chances[-1] if len(chances) == most else 0.0

    def frontier(self, most: int) -> list[int]:
        """Nodes that the drafter can run, and whose children could be among the best ``most``.

        It can if it has run their parents; the most probable first.
        """
        if not self.is_begun:
            return []
        least = self.least(most)
        return [
            node
            for node in self.best(most).nodes
            if node not in self.slots
            and (self._parents[node] == ROOT or self._parents[node] in self.slots)
            and self.open(node) > least
        ]

    def run(self, node: int) -> None:
        """Note that the drafter runs it now, in the next slot."""
        self.slots[node] = len(self.slots)

    def slots_of_best(self, size: int) -> dict[int, int]:
        """Slots of the best ``size`` nodes, by their places among these, of those that were run."""
        nodes = self.best(size).nodes
        return {at: self.slots[node] for at, node in enumerate(nodes) if node in self.slots}

    def token(self, node: int) -> int:
        return self._tokens[node]

    def parent(self, node: int) -> int:
        return self._parents[node]

    def depth(self, node: int) -> int:
        """Tokens up to it, itself included; 0: the root."""
        depth = 0
        while node != ROOT:
            depth, node = depth + 1, self._parents[node]
        return depth

    @property
    def lineage(self) -> list[int]:
        """Parents of the nodes run, by slot."""
        return [self.slots.get(self._parents[node], ROOT) for node in self.slots]

    def learn(self, said: Sequence[int]) -> None:
        """Take in what came next: of all nodes that this tells of, verified or not."""
        tried, right = known(DraftTree(self._tokens, self._parents), said)
        if tried:
            own, bands = np.array(self._own), np.array(self._bands)
            self._calibration.learn(own[tried], right, bands[tried])
