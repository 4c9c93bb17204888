"""A batch's trees while they are drafted: who is drafted for further, and what is verified.

Wherever a draft comes from, it is a node of its request's tree of candidates (candidates.py). So to
draft nothing, a copy, a chain or a tree is one decision, taken twice: before each pass of the
drafter, whether what it may add is worth its time, and at the end which nodes are worth their
verification. Of nodes in falling order of their chances the first k are a tree, since none is
likelier than its parent.

Prices (prices.py) decide; without them each tree gets as many nodes as it was given beforehand, the
most probable of all: nodes are run, level by level, as long as their children could be among these.
EAGLE-2 (Li et al. 2024) grows trees so with a fixed width and depth. A chain is the likeliest child
of each node in turn, and grows in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from smartspec.engine_adapter.base import U8
from smartspec.engine_adapter.prices import Prices
from smartspec.engine_adapter.reference.calibration import F64, I64, Calibration
from smartspec.engine_adapter.reference.candidates import (
    Best,
    Bools,
    Candidates,
    Children,
    Ease,
    Level,
)
from smartspec.engine_adapter.reference.draft_tree import ROOT, DraftTree


class Cut(NamedTuple):
    """What was drafted in a step, and how much of it is verified; by request."""

    drafted: list[DraftTree]
    chances: list[list[float]]  #: of these nodes
    num_verified: I64  #: [B], the first of them
    luck: F64  #: [B], in [0, 1): decides what is told of what cannot be known
    slots: list[list[int]]  #: in the drafter's cache, of the nodes drafted; `NONE`: not run

    @property
    def num_cut(self) -> U8:
        """[B], behind those that are verified."""
        sizes = np.array([tree.size for tree in self.drafted], np.int64)
        return (sizes - self.num_verified).astype(np.uint8)

    @property
    def verified(self) -> list[DraftTree]:
        pairs = zip(self.drafted, self.num_verified.tolist(), strict=True)
        return [tree if size == tree.size else tree.first(size) for tree, size in pairs]

    def accepted(
        self, drawn: Sequence[Sequence[int]], paths: Sequence[list[int]]
    ) -> list[list[int]]:
        """Of all nodes, verified or not, those that would be accepted, from the root.

        What the target said after the last node accepted tells which of the nodes there is right,
        verified or not. What follows one that was not is drawn by the chances.

        ``drawn`` : by request, the target's token after the last known one, then after each node
        that was verified; ``paths`` : those of these that were accepted

        >>> chain = DraftTree.chain([5, 6, 7])
        >>> cut = Cut([chain], [[0.9, 0.8, 0.2]], np.array([1]), np.array([0.3]), [[0, 1, 2]])
        >>> cut.accepted([[5, 6]], [[0]]), cut.accepted([[5, 9]], [[0]])
        ([[0, 1]], [[0]])
        """
        told = [list(path) for path in paths]
        for place in np.flatnonzero(self.num_cut).tolist():
            told[place] += self._would_follow(place, drawn[place], paths[place])
        return told

    def _would_follow(self, place: int, said: Sequence[int], path: list[int]) -> list[int]:
        tree, chances = self.drafted[place], self.chances[place]
        last = path[-1] if path else ROOT
        token: int | None = said[last + 1]
        low = at = 0.0  # the chances of a node's children are shares of its own
        following: list[int] = []
        for node in range(int(self.num_verified[place]), tree.size):
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
            following.append(node)
            last = node
        return following


class Arrears(NamedTuple):
    """What the drafter has missed of each request, [B]; see `Prices.join`."""

    lag: F64  #: tokens
    waited: F64  #: weighted tokens that it might have brought since


class Growth:
    """Of one step.

    Parameters
    ----------
    calibration : of confidences (`Candidates.new_calibration`)
    temperatures : [B], bands of the requests'
    most : [B], nodes
    prices : of the step; None: as many nodes as there may be
    chains : whether one path alone is drafted
    arrears : of the drafter; None: it has missed nothing
    ease : of the tokens that drafts come after; None: not known
    """

    def __init__(
        self,
        calibration: Calibration,
        temperatures: I64,
        most: I64,
        prices: Prices | None = None,
        chains: bool = False,
        arrears: Arrears | None = None,
        ease: Ease | None = None,
    ) -> None:
        self.candidates = Candidates(calibration, temperatures, chains, ease)
        self._calibration = calibration
        self._most = most
        self._prices = prices
        none = np.zeros(len(temperatures))
        self._arrears = Arrears(none, none) if arrears is None else arrears
        self.waited = self._arrears.waited  #: when those that `starting` finds have been run
        # Of the candidates as they are.
        self._found: tuple[Best, I64] | None = None
        self._starting: I64 | None = None
        if prices is not None:
            weight = prices.weight
            calibration.curiosity.earn(len(temperatures) if weight is None else float(weight.sum()))

    def starting(self) -> I64:
        """Whom the drafter should be run for, of those whose root it was not run from yet."""
        if self._starting is None:
            self.waited = self._arrears.waited.copy()
            begun = self.candidates.begun
            roots = Level.of(np.flatnonzero(~begun))
            least = self._best()[0].least[roots.places]
            roots = roots.where(self.candidates.open(roots) > least)
            self._starting = roots.where(self._worth_starting(roots, not begun.any())).places
        return self._starting

    def next_level(self, room: npt.ArrayLike) -> Level:
        """What the drafter should run next: nodes whose parents it has run.

        ``room`` : [B], nodes of each request that it has room for, in all
        """
        level = self.candidates.frontier(self._best()[0])
        return self.candidates.run(level.where(self._worth_running(level)), room)

    def add(self, level: Level, children: Children) -> None:
        """What the drafter says may follow each node of ``level``, which it has run."""
        self.candidates.add(level, children)
        self._found = self._starting = None

    def cut(self, luck: F64) -> Cut:
        """What was drafted, and what of it is verified."""
        best, num_verified = self._best()
        columns = zip(best.chances.tolist(), best.sizes.tolist(), strict=True)
        chances = [column[:size] for column, size in columns]
        slots = self.candidates.slots_of(best)
        return Cut(self.candidates.trees(best), chances, num_verified, luck, slots)

    def _best(self) -> tuple[Best, I64]:
        """All that could be verified, and how much of it is worth that, [B]."""
        if self._found is None:
            best = self.candidates.best(self._most)
            self._found = best, self._verified(best)
        return self._found

    def _verified(self, best: Best) -> I64:
        if self._prices is None or not best.sizes.any():
            return best.sizes
        table = best.chances[:, : int(best.sizes.max())].T
        return self._prices.verified(np.ascontiguousarray(table), best.sizes)

    def _worth_running(self, level: Level) -> Bools:
        """Which of ``level`` should be run, all in one pass."""
        if self._prices is None or not level.size:
            return np.ones(level.size, np.bool_)
        return self._at_least(level, self._prices.pay(self._gains(level, self._prices), False))

    def _worth_starting(self, roots: Level, first: bool) -> Bools:
        """Which of ``roots`` should be run, in one pass, the step's ``first`` or not."""
        if self._prices is None or not roots.size:
            return np.ones(roots.size, np.bool_)
        gains = self._gains(roots, self._prices)
        lag, waited = (column[roots.places] for column in self._arrears)
        paying, waited = self._prices.join(gains, first, lag, waited)
        paying = self._at_least(roots, paying)
        if first and not paying.any():
            tried, lacking = self._prices.short(gains, lag)
            if self._calibration.curiosity.pay(lacking):
                paying = tried
        self.waited[roots.places] = np.where(paying, 0.0, waited)
        return paying

    def _gains(self, level: Level, prices: Prices) -> F64:
        """What may follow each node of ``level``, beyond its verification, weighted, [M]."""
        size, places = self.candidates.size, level.places
        _, num_verified = self._best()
        weight = np.ones(size) if prices.weight is None else prices.weight
        price = prices.of_token(size, int(num_verified.sum())) / weight[places]
        opening, bands = self.candidates.open(level), self.candidates.bands_after(level)
        gains: F64 = weight[places] * self._calibration.outlook(opening, price, bands)
        return gains

    def _at_least(self, level: Level, paying: Bools) -> Bools:
        """``paying``, and of each request that has fewer drafts than it must the likeliest."""
        floor = None if self._prices is None else self._prices.floor
        if floor is not None:
            opening = self.candidates.open(level)
            for place in np.flatnonzero(self._best()[0].sizes < floor):
                mine = np.flatnonzero(level.places == place)
                if len(mine):
                    paying[mine[opening[mine].argmax()]] = True
        return paying
