"""What may come next in a batch's requests: a tree of candidates each, from all who propose.

A node's *rate* is the probability that it is right if its parent is: what its proposer holds it to
be, as calibrated against what became of earlier nodes of its kind. What a drafter and a copy both
propose is one node, of the confidence that not both are wrong, and of a kind of its own. Of a
node's children one at most is right, so that rates which add up to more are scaled down. The
product of the rates along a path is the *chance* of its last node.

All requests are in the same arrays [B, W + 1], a column per node in the order in which they were
proposed, so that an operation takes about as long for many requests as for one. The last column is
the root, whose index is thus `ROOT`.

Where drafts are to be *chains*, one path is taken: after each node its likeliest child. The
drafter then proposes one child of each, so that there is a choice only where a copy goes on too.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from smartspec.engine_adapter.reference.calibration import (
    F64,
    I64,
    NUM_TEMPERATURES,
    Calibration,
)
from smartspec.engine_adapter.reference.draft_tree import ROOT, DraftTree
from smartspec.engine_adapter.token_acceptance import TokenAcceptance

if TYPE_CHECKING:  # simulated trees grow where there is no torch
    from torch import Tensor

Bools = npt.NDArray[np.bool_]

NONE = -2  #: no such node, or no slot
WIDTH = 32  #: columns to begin with
NUM_EASES = 4  #: levels of how often the drafter is right after a token


class Kind(enum.IntEnum):
    """Who proposes a node."""

    DRAFTED = 0
    COPIED = 1  #: the first token of a copy
    COPIED_ON = 2  #: a later one
    BOTH = 3


class Level(NamedTuple):
    """Nodes of some requests, one request after the other."""

    places: I64  #: [M], of the requests in the batch
    nodes: I64  #: [M]

    @classmethod
    def of(cls, places: npt.ArrayLike, nodes: npt.ArrayLike = ROOT) -> Level:
        at = np.asarray(places, np.int64)
        return cls(at, np.broadcast_to(np.asarray(nodes, np.int64), at.shape))

    @property
    def size(self) -> int:
        return len(self.places)

    def where(self, chosen: Bools | npt.NDArray[np.intp]) -> Level:
        return Level(self.places[chosen], self.nodes[chosen])


class Ease(NamedTuple):
    """How easy it is to go on from a token: a drafter's confidence does not tell all of it."""

    rates: TokenAcceptance
    last: I64  #: [B], tokens that are known, the last of each request

    def levels(self, tokens: I64) -> I64:
        """Of these tokens, 0 to `NUM_EASES` - 1."""
        levels: I64 = (self.rates.rates(tokens) * NUM_EASES).astype(np.int64)
        return np.minimum(levels, NUM_EASES - 1)  # a rate may round to 1


class Children(NamedTuple):
    """What the drafter says may follow some nodes."""

    tokens: I64  #: [M, C], of a row all different
    confidences: F64  #: [M, C]; of 0: no child

    @classmethod
    def of(cls, tokens: Tensor, confidences: Tensor) -> Children:
        return cls(tokens.cpu().numpy(), confidences.cpu().numpy().astype(np.float64))

    @classmethod
    def stack(cls, rows: Sequence[Children]) -> Children:
        """Of several, one after the other."""
        tokens, confidences = zip(*rows, strict=True)
        return cls(np.concatenate(tokens), np.concatenate(confidences))

    def rows(self) -> list[Children]:
        """Of each node by itself."""
        return [Children(t[None], own[None]) for t, own in zip(*self, strict=True)]


class Best(NamedTuple):
    """The most probable candidates of each request, in falling order of their chances."""

    nodes: I64  #: [B, K]
    chances: F64  #: [B, K], 0 beyond the sizes
    sizes: I64  #: [B]
    least: F64  #: [B], the chance that another node must have to be among them


class Candidates:
    """Of one step.

    Parameters
    ----------
    calibration : of all kinds, as `new_calibration` makes it
    temperatures : [B], bands of the requests'
    chains : whether one path alone is drafted; of nodes that are run there is then one child each
    ease : of the tokens that drafts come after; None: not known

    >>> candidates = Candidates(Candidates.new_calibration(), np.array([0]))
    >>> candidates.copy([[7, 8]], [[0.5, 0.8]])
    >>> candidates.add(Level.of([0]), Children(np.array([[9, 7]]), np.array([[0.4, 0.5]])))
    >>> best = candidates.best(np.array([3]))
    >>> candidates.trees(best)
    [DraftTree(tokens=[7, 8, 9], parents=[-1, 0, -1])]
    >>> best.chances.round(3).tolist()  # 0.75 and 0.4: over 1
    [[0.652, 0.522, 0.348]]
    >>> chain = Candidates(Candidates.new_calibration(), np.array([0]), chains=True)
    >>> chain.copy([[7, 8]], [[0.5, 0.8]])
    >>> chain.add(Level.of([0]), Children(np.array([[9]]), np.array([[0.4]])))
    >>> chain.trees(chain.best(np.array([3])))
    [DraftTree(tokens=[7, 8], parents=[-1, 0])]
    """

    tokens: I64  #: [B, W + 1]
    parents: I64
    depths: I64  #: tokens up to a node, itself included; 0: the root
    slots: I64  #: of nodes run, counted from the request's own tokens; `ROOT`: the root, once run
    _bands: I64  #: of the calibration
    _chances: F64  #: that a node is accepted; -1: there is none
    _left: F64  #: share of that which no child has
    _own: F64  #: confidences

    def __init__(
        self,
        calibration: Calibration,
        temperatures: I64,
        chains: bool = False,
        ease: Ease | None = None,
    ) -> None:
        size = len(temperatures)
        self._chains = chains
        self.lineages: list[list[int]] = [[] for _ in temperatures]  #: of nodes run: parents' slots
        self._calibration = calibration
        self._temperatures = temperatures
        self._ease = ease
        self._rows = np.arange(size)[:, None]
        self._num: I64 = np.zeros(size, np.int64)
        self._num_run: I64 = np.zeros(size, np.int64)
        self._num_copied: I64 = np.zeros(size, np.int64)  # the first nodes
        self._shares: F64 = np.empty((size, 0))  # of their parents' chances
        self._ints: I64 = np.full((5, size, 1), NONE, np.int64)
        self._floats: F64 = np.ones((3, size, 1))
        self._allot(WIDTH)
        self.depths[:, ROOT] = 0
        if ease is not None:
            self.tokens[:, ROOT] = ease.last

    def _allot(self, width: int) -> None:
        """Make room for so many nodes of each request."""
        before = self._ints.shape[-1] - 1
        ints = np.full((*self._ints.shape[:2], width + 1), NONE, np.int64)
        floats = np.ones((*self._floats.shape[:2], width + 1))
        floats[0] = -1.0
        ints[..., :before], ints[..., ROOT] = self._ints[..., :-1], self._ints[..., ROOT]
        floats[..., :before], floats[..., ROOT] = self._floats[..., :-1], self._floats[..., ROOT]
        self._ints, self._floats = ints, floats
        self.tokens, self.parents, self.depths, self.slots, self._bands = ints
        self._chances, self._left, self._own = floats

    @property
    def size(self) -> int:
        """Requests."""
        return len(self._num)

    @staticmethod
    def new_calibration() -> Calibration:
        """Of all kinds, at all temperatures."""
        return Calibration(len(Kind) * NUM_TEMPERATURES, NUM_EASES)

    def bands_after(self, level: Level) -> I64:
        """Of what the drafter says may follow each node of ``level``, [M]."""
        groups = _groups(Kind.DRAFTED, self._temperatures[level.places])
        return groups + self._levels(self.tokens[level])

    def _levels(self, tokens: I64) -> I64 | int:
        return 0 if self._ease is None else self._ease.levels(tokens)

    def copy(self, tokens: Sequence[Sequence[int]], confidences: Sequence[Sequence[float]]) -> None:
        """By request, what would be copied, each token after the one before; ahead of drafts."""
        self._chain(tokens, confidences, Kind.COPIED, Kind.COPIED_ON)
        self._num_copied = self._num.copy()

    def draft(
        self, tokens: Sequence[Sequence[int]], confidences: Sequence[Sequence[float]]
    ) -> None:
        """By request, a chain of drafts; there is nothing else."""
        self._chain(tokens, confidences, Kind.DRAFTED, Kind.DRAFTED)

    def _chain(
        self,
        tokens: Sequence[Sequence[int]],
        confidences: Sequence[Sequence[float]],
        first: Kind,
        later: Kind,
    ) -> None:
        self._num[:] = [len(one) for one in tokens]
        width = int(self._num.max(initial=0))
        if not width:
            return
        if width >= self.tokens.shape[1]:
            self._allot(width)
        columns = np.arange(width)
        part, held = np.s_[:, :width], columns < self._num[:, None]
        self.tokens[part][held] = [token for one in tokens for token in one]
        self._own[part][held] = [own for one in confidences for own in one]
        bands = _groups(np.where(columns, later, first), self._temperatures[:, None])
        if first == Kind.DRAFTED:
            before = self.tokens[:, [ROOT, *range(width - 1)]]
            bands = bands + self._levels(np.where(held, before, 0))
        self._bands[part][held] = bands[held]
        self.parents[part][held] = np.broadcast_to(columns - 1, held.shape)[held]
        self.depths[part] = columns + 1
        self._shares = np.zeros(held.shape)
        self._shares[held] = self._rates(self._own[part][held], bands[held])
        self._left[:, [ROOT, *range(width - 1)]] = 1.0 - self._shares
        self._chances[part] = np.where(held, self._shares.cumprod(axis=1), -1.0)

    def _rates(self, own: F64, bands: I64) -> F64:
        rates: F64 = np.minimum(self._calibration.rates(own, bands), 1.0)
        return rates

    def add(self, level: Level, children: Children) -> None:
        """What the drafter says may follow each node of ``level``: what follows parents first."""
        if not level.size:
            return
        places, nodes = level
        own = children.confidences
        self.slots[places[nodes == ROOT], ROOT] = ROOT
        bands = self.bands_after(level)
        rates = self._calibration.note(own, bands)
        rates = np.where(own > 0, np.minimum(rates, 1.0), 0.0)
        copied = nodes + 1  # a copy goes on with the next node
        on = np.flatnonzero(copied < self._num_copied[places])
        mine = places[on], copied[on]
        if len(on):
            alike = (children.tokens[on] == self.tokens[mine][:, None]) & (own[on] > 0)
            self._agree(level.where(on), alike.any(axis=1), own[on][alike])
            rates[on] = np.where(alike, 0.0, rates[on])
        held = rates.sum(axis=1)
        held[on] += self._shares[mine]
        scale = np.maximum(1.0, held)
        self._left[places, nodes] = np.maximum(0.0, 1.0 - held)
        if len(on):
            self._shares[mine] /= scale[on]
            is_copy = np.arange(self._shares.shape[1]) < self._num_copied[:, None]
            chances = self._shares.cumprod(axis=1)
            self._chances[:, : is_copy.shape[1]][is_copy] = chances[is_copy]
        chances = self._chances[places, nodes][:, None] * rates / scale[:, None]
        self._append(level, children, chances, bands)

    def _agree(self, level: Level, agreed: Bools, own: F64) -> None:
        """The drafter has proposed what a copy has after these nodes too."""
        places, copied = level.places[agreed], level.nodes[agreed] + 1
        joint = 1.0 - (1.0 - self._own[places, copied]) * (1.0 - own)
        bands = _groups(Kind.BOTH, self._temperatures[places])
        self._own[places, copied], self._bands[places, copied] = joint, bands
        self._shares[places, copied] = self._rates(joint, bands)

    def _append(self, level: Level, children: Children, chances: F64, bands: I64) -> None:
        """New nodes, wherever there is a chance; ``bands`` : [M], of these."""
        rows, order = np.nonzero(chances > 0)
        places, parents = level.places[rows], level.nodes[rows]
        columns = self._num[places] + _within(places)
        self._num += np.bincount(places, minlength=self.size)
        if (most := int(self._num.max())) >= self.tokens.shape[1]:
            self._allot(2 * most)
        at = places * self.tokens.shape[1] + columns
        depths = self.depths[level][rows] + 1
        self.tokens.ravel()[at] = children.tokens[rows, order]
        self.parents.ravel()[at] = parents
        self.depths.ravel()[at] = depths
        self._bands.ravel()[at] = bands[rows]
        self._own.ravel()[at] = children.confidences[rows, order]
        self._chances.ravel()[at] = chances[rows, order]

    def open(self, level: Level) -> F64:
        """The chance that a node is accepted, and what follows is not known yet, [M]."""
        open_: F64 = self._chances[level] * self._left[level]
        return open_

    @property
    def begun(self) -> Bools:
        """[B], whether the drafter has said what may follow the root."""
        begun: Bools = self.slots[:, ROOT] != NONE
        return begun

    def best(self, most: I64) -> Best:
        """The ``most`` [B] of the greatest chances; all, where there are not so many."""
        width = max(1, int(most.max(initial=0)), int(self._num.max(initial=0)))
        if width >= self.tokens.shape[1]:
            self._allot(width)
        of_all = self._chances[:, :width]
        if self._chains:
            of_all = np.where(self._passed_over(width), -1.0, of_all)
        sizes = np.minimum(most, (of_all >= 0).sum(axis=1))
        order = (-of_all).argsort(axis=1, kind="stable")
        nodes: I64 = order[:, : max(1, int(most.max(initial=0)))]
        chances = np.where(
            np.arange(nodes.shape[1]) < sizes[:, None], of_all[self._rows, nodes], 0.0
        )
        least = np.where(sizes == most, chances[self._rows[:, 0], sizes - 1], 0.0)
        return Best(nodes, chances, sizes, np.where(most > 0, least, 1.0))

    def _passed_over(self, width: int) -> Bools:
        """[B, width], what a chain does not take: beside it, or before it, another is likelier.

        What a draft is passed over for is the copy that goes on from its parent, and the other way
        round; with a copied token goes the rest of the copy. None of these was run.
        """
        columns, num_copied = np.arange(width), self._num_copied[:, None]
        rivals = self.parents[:, :width] + 1  # a copy goes on with the next node
        is_copy = columns < num_copied
        beside = ~is_copy & (rivals < num_copied) & (rivals >= 0)
        likelier = self._chances[:, :width] > self._chances[self._rows, rivals]
        left_at = np.where(beside & likelier, rivals, width).min(axis=1)
        passed_over: Bools = np.where(is_copy, columns >= left_at[:, None], beside & ~likelier)
        return passed_over

    def frontier(self, best: Best) -> Level:
        """Of the best, those that the drafter can run, and whose children could be among them.

        It can if it has run their parents; the most probable first.
        """
        parents = self.parents[self._rows, best.nodes]
        able = self.slots[self._rows, best.nodes] == NONE
        able &= self.slots[self._rows, parents] != NONE
        able &= best.chances * self._left[self._rows, best.nodes] > best.least[:, None]
        places, ranks = np.nonzero(able & (best.chances > 0))
        return Level(places, best.nodes[places, ranks])

    def run(self, level: Level, room: npt.ArrayLike) -> Level:
        """Note that the drafter runs them now, those for which ``room`` [B] has slots; these."""
        slots = self._num_run[level.places] + _within(level.places)
        fits = slots < np.asarray(room)[level.places]
        level, slots = level.where(fits), slots[fits]
        parents = self.slots[level.places, self.parents[level]]
        self.slots[level] = slots
        self._num_run += np.bincount(level.places, minlength=self.size)
        for place, parent in zip(level.places.tolist(), parents.tolist(), strict=True):
            self.lineages[place].append(parent)
        return level

    def slots_of(self, best: Best) -> list[list[int]]:
        """By request the slots of the best; `NONE`: not run."""
        slots: list[list[int]] = self.slots[self._rows, best.nodes].tolist()
        return slots

    def trees(self, best: Best) -> list[DraftTree]:
        """By request, the best as a tree."""
        ranks = np.full(self.tokens.shape, ROOT)
        ranks[self._rows, best.nodes] = np.arange(best.nodes.shape[1])
        ranks[:, ROOT] = ROOT
        parents = ranks[self._rows, self.parents[self._rows, best.nodes]].tolist()
        tokens = self.tokens[self._rows, best.nodes].tolist()
        rows = zip(tokens, parents, best.sizes.tolist(), strict=True)
        return [DraftTree(said[:size], after[:size]) for said, after, size in rows]

    def learn(self, said: Sequence[Sequence[int]]) -> None:
        """By request, what came next: of all nodes that this tells of, verified or not.

        That is all those of which the parent was right, if so much was said.
        """
        width = int(self._num.max(initial=0))
        parents, tokens = self.parents[:, :width], self.tokens[:, :width]
        sizes = np.array([len(one) for one in said])
        told = np.full((self.size, int(sizes.max(initial=0))), NONE)
        told[np.arange(told.shape[1]) < sizes[:, None]] = [t for one in said for t in one]
        tried, right = np.zeros(parents.shape, np.bool_), np.zeros(parents.shape, np.bool_)
        kinds = self._bands[:, :width] // (NUM_TEMPERATURES * NUM_EASES)
        drafted = (kinds == Kind.DRAFTED) | (kinds == Kind.BOTH)
        before: list[I64] = []
        found: list[Bools] = []
        at, goes_on = np.full(self.size, ROOT), np.ones(self.size, np.bool_)
        for depth, next_token in enumerate(told.T):
            goes_on &= depth < sizes
            if not goes_on.any():
                break
            children = (parents == at[:, None]) & goes_on[:, None]
            hits = children & (tokens == next_token[:, None])
            tried |= children
            right |= hits
            after = np.flatnonzero((children & drafted).any(axis=1))
            before.append(self.tokens[after, at[after]])
            found.append((hits & drafted)[after].any(axis=1))
            goes_on = hits.any(axis=1)
            at = hits.argmax(axis=1) if width else at
        if tried.any():
            own, bands = self._own[:, :width], self._bands[:, :width]
            self._calibration.learn(own[tried], right[tried], bands[tried])
            if self._ease is not None:
                self._ease.rates.learn(np.concatenate(before), np.concatenate(found))


def _groups(kinds: I64 | int, temperatures: I64) -> I64:
    """The first band of each."""
    groups: I64 = (kinds * NUM_TEMPERATURES + temperatures) * NUM_EASES
    return groups


def _within(places: I64) -> I64:
    """Of entries in rising order, the how manieth of its place each is.

    >>> _within(np.array([0, 0, 2, 2, 2])).tolist()
    [0, 1, 0, 1, 2]
    """
    within: I64 = np.arange(len(places)) - places.searchsorted(places)
    return within
