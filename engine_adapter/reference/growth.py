"""A batch's trees while they are drafted: who is drafted for further, and what is verified.

Wherever a draft comes from, it is a node of its request's tree of candidates (candidates.py). So to
draft nothing, a copy, a chain or a tree is one decision, taken twice: before each pass of the
drafter, whether what it may add is worth its time, and at the end which nodes are worth their
verification. Of nodes in falling order of their chances the first k are a tree, since none is
likelier than its parent.

Prices (prices.py) decide; without them each tree gets as many nodes as it was given beforehand, the
most probable of all: nodes are run, level by level, as long as their children could be among these.
EAGLE-2 (Li et al. 2024) grows trees so with a fixed width and depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from smartspec.engine_adapter.base import U8
from smartspec.engine_adapter.prices import Prices
from smartspec.engine_adapter.reference.calibration import F64, I64, Calibration
from smartspec.engine_adapter.reference.candidates import Best, Candidates, Children
from smartspec.engine_adapter.reference.draft_tree import ROOT, DraftTree, agreeing_path

Level = list[tuple[int, int]]  #: (place of the request in the batch, node): what one pass runs


class Cut(NamedTuple):
    """What was drafted in a step, and how much of it is verified; by request."""

    drafted: list[DraftTree]
    chances: list[list[float]]  #: of these nodes
    num_verified: I64  #: [B], the first of them
    luck: F64  #: [B], in [0, 1): decides what is told of what cannot be known

    @property
    def num_cut(self) -> U8:
        """[B], behind those that are verified."""
        sizes = np.array([tree.size for tree in self.drafted], np.int64)
        return (sizes - self.num_verified).astype(np.uint8)

    @property
    def verified(self) -> list[DraftTree]:
        pairs = zip(self.drafted, self.num_verified.tolist(), strict=True)
        return [tree.first(size) for tree, size in pairs]

    def accepted(self, drawn: Sequence[Sequence[int]]) -> list[list[int]]:
        """Of all nodes, verified or not, those that would be accepted, from the root.

        What the target said after the last node accepted tells which of the nodes there is right,
        verified or not. What follows one that was not is drawn by the chances.

        ``drawn`` : by request, the target's token after the last known one, then after each node
        that was verified

        >>> chain = DraftTree.chain([5, 6, 7])
        >>> cut = Cut([chain], [[0.9, 0.8, 0.2]], np.array([1]), np.array([0.3]))
        >>> cut.accepted([[5, 6]]), cut.accepted([[5, 9]])
        ([[0, 1]], [[0]])
        """
        return [
            self._accepted(place, tree, said)
            for place, (tree, said) in enumerate(zip(self.drafted, drawn, strict=True))
        ]

    def _accepted(self, place: int, tree: DraftTree, said: Sequence[int]) -> list[int]:
        size, chances = int(self.num_verified[place]), self.chances[place]
        path = agreeing_path(tree.first(size), said)
        last = path[-1] if path else ROOT
        token: int | None = said[last + 1]
        low = at = 0.0  # the chances of a node's children are shares of its own
        for node in range(size, tree.size):
            if tree.parents[node] != last:
                continue
            if token is None:
                if at >= low + chances[node]:
                    low += chances[node]
                    continue
            elif tree.tokens[node] != token:
                continue
            else:
                token, at = None, float(self.luck[place]) * chances[node]
            path.append(node)
            last = node
        return path


class Growth:
    """Of one step.

    Parameters
    ----------
    calibration : of confidences, by kind and temperature band (candidates.py)
    bands : [B], of temperature
    most : [B], nodes
    prices : of the step; None: as many nodes as there may be
    """

    def __init__(
        self,
        calibration: Calibration,
        bands: I64,
        most: npt.NDArray[np.int64],
        prices: Prices | None = None,
    ) -> None:
        self.requests = [Candidates(calibration, int(band)) for band in bands]
        self._calibration = calibration
        self._bands = bands
        self._most = most
        self._prices = prices

    def starting(self) -> list[int]:
        """Whom the drafter should be run for, of those whose root it was not run from yet."""
        begun = [one.is_begun for one in self.requests]
        roots = [
            (place, ROOT)
            for place, one in enumerate(self.requests)
            if not begun[place] and one.open(ROOT) > one.least(int(self._most[place]))
        ]
        return [place for place, _ in self._worth_running(roots, not any(begun))]

    def next_level(self, room: Sequence[int]) -> Level:
        """What the drafter should run next: nodes whose parents it has run.

        ``room`` : [B], nodes of each request that it has room for, in all
        """
        level = [
            (place, node)
            for place, one in enumerate(self.requests)
            for node in one.frontier(int(self._most[place]))
        ]
        chosen: Level = []
        for place, node in self._worth_running(level, False):
            if len(self.requests[place].slots) < room[place]:
                self.requests[place].run(node)
                chosen.append((place, node))
        return chosen

    def add(self, level: Level, children: Sequence[Children]) -> None:
        """What the drafter says may follow each node of ``level``, which it has run."""
        if not level:
            return
        places = np.array([place for place, _ in level])
        self._calibration.note([own for _, own in children], self._bands[places])
        for (place, node), (tokens, own) in zip(level, children, strict=True):
            self.requests[place].add(node, tokens, own)

    def cut(self, luck: F64) -> Cut:
        """What was drafted, and what of it is verified."""
        best = self._best()
        trees, chances = [one.tree for one in best], [one.chances for one in best]
        return Cut(trees, chances, self._verified(chances), luck)

    def _best(self) -> list[Best]:
        """All that could be verified."""
        return [
            one.best(most) for one, most in zip(self.requests, self._most.tolist(), strict=True)
        ]

    def _verified(self, chances: list[list[float]]) -> I64:
        sizes: I64 = np.array([len(column) for column in chances], np.int64)
        if self._prices is None or not sizes.any():
            return sizes
        table = np.zeros((int(sizes.max()), len(sizes)))
        for place, column in enumerate(chances):
            table[: len(column), place] = column
        return self._prices.verified(table, sizes)

    def _worth_running(self, level: Level, starting: bool) -> Level:
        """Those of ``level`` that should be run, all in one pass."""
        if self._prices is None or not level:
            return level
        prices, size = self._prices, len(self.requests)
        weight = np.ones(size) if prices.weight is None else prices.weight
        places = np.array([place for place, _ in level])
        chances = [best.chances for best in self._best()]
        num_drafts = int(self._verified(chances).sum())
        price = prices.of_token(size, num_drafts) / weight[places]
        opening = np.array([self.requests[place].open(node) for place, node in level])
        outlook = self._calibration.outlook(opening, price, self._bands[places])
        paying = prices.pay(weight[places] * outlook, starting)
        if prices.floor is not None:
            lacking = np.array([len(column) for column in chances]) < prices.floor
            for place in np.flatnonzero(lacking):
                mine = np.flatnonzero(places == place)
                if len(mine):
                    paying[mine[opening[mine].argmax()]] = True
        return [level[at] for at in np.flatnonzero(paying)]
