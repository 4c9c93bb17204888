"""Drafts of one request: a tree of guesses that grows from the last token that is known.

A node's token is a guess for what follows its parent. The target's token after every node comes
out of one pass (SpecInfer, Miao et al. 2023). With keyed noise that token is a function of the
node's context (sampling.py), so what the target would have said without drafts is found by walking
from the root to the child that holds the target's token, for as long as there is one. A chain is
the tree in which every node's parent is the node before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

MAX_NODES = 64  #: of a tree: which of them were accepted is reported as the bits of a u64
ROOT = -1  #: as a parent: the last known token


class DraftTree(NamedTuple):
    """Nodes in an order in which parents come before their children."""

    tokens: list[int]
    parents: list[int]  #: index of each node's parent, below its own; `ROOT`: the last known token

    @classmethod
    def chain(cls, tokens: list[int]) -> DraftTree:
        """Every token a guess for what follows the one before."""
        return cls(tokens, list(range(ROOT, len(tokens) - 1)))

    @property
    def size(self) -> int:
        return len(self.tokens)

    @property
    def depths(self) -> list[int]:
        """Guesses up to each node, itself included: from 1."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent == ROOT else depths[parent] + 1)
        return depths

    def first(self, size: int) -> DraftTree:
        """The tree of the first ``size`` nodes."""
        return DraftTree(self.tokens[:size], self.parents[:size])


NO_DRAFTS = DraftTree([], [])


def agreeing_path(tree: DraftTree, drawn: Sequence[int]) -> list[int]:
    """The acceptance rule: nodes that are the tokens which the target draws there, from the root.

    ``drawn`` [size + 1]: the target's token after the last known token, then after each node.

    >>> tree = DraftTree(tokens=[5, 6, 7, 8], parents=[ROOT, ROOT, 1, 0])
    >>> agreeing_path(tree, [6, 0, 7, 3, 0])
    [1, 2]
    >>> agreeing_path(DraftTree.chain([5, 6, 7]), [5, 6, 8, 9])
    [0, 1]
    """
    path: list[int] = []
    last = ROOT
    for node, (token, parent) in enumerate(zip(*tree, strict=True)):
        if parent == last and token == drawn[last + 1]:
            path.append(node)
            last = node
    return path


def most_probable(
    tokens: Sequence[int], parents: Sequence[int], chances: Sequence[float], size: int
) -> tuple[DraftTree, list[int]]:
    """The ``size`` nodes of the greatest chances, most probable first, and which they were.

    ``chances`` : that a node is on the accepted path, at most its parent's. So every node's parent
    comes before it, and the first nodes of a tree are the best tree of their number: the chances
    are what `lengths.Ladder` calls survivals.

    >>> most_probable([5, 6, 7, 8], [ROOT, ROOT, 0, 1], [0.6, 0.3, 0.2, 0.25], 3)
    (DraftTree(tokens=[5, 6, 8], parents=[-1, -1, 1]), [0, 1, 3])
    """
    best = sorted(range(len(tokens)), key=lambda node: -chances[node])[:size]
    place = {node: at for at, node in enumerate(best)}
    tree = DraftTree(
        [tokens[node] for node in best], [place.get(parents[node], ROOT) for node in best]
    )
    return tree, best


def lineage(parents: Sequence[int]) -> npt.NDArray[np.bool_]:
    """Who descends from whom, [n, n]: row i is True at node i and at its ancestors.

    >>> lineage([ROOT, 0, 0]).astype(int).tolist()
    [[1, 0, 0], [1, 1, 0], [1, 0, 1]]
    """
    descends = np.eye(len(parents), dtype=np.bool_)
    for node, parent in enumerate(parents):
        if parent != ROOT:
            descends[node] |= descends[parent]
    return descends
