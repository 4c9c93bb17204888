"""A tree's accepted path is found by asking the target node after node."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smartspec.engine_adapter.reference.draft_tree import (
    NO_DRAFTS,
    ROOT,
    DraftTree,
    agreeing_path,
    lineage,
)


@st.composite
def trees(draw: st.DrawFn) -> DraftTree:
    """Up to 12 nodes of four tokens; siblings may hold the same token."""
    tokens = draw(st.lists(st.integers(0, 3), max_size=12))
    return DraftTree(tokens, [draw(st.integers(ROOT, node - 1)) for node in range(len(tokens))])


@pytest.mark.parametrize(
    ("drafts", "drawn", "expected"),
    [([], [1], 0), ([1], [1, 2], 1), ([2], [1, 2], 0), ([1, 2, 3], [1, 9, 3, 4], 1)],
)
def test_only_first_agreeing_drafts_count_when_they_are_a_chain(
    drafts: list[int], drawn: list[int], expected: int
) -> None:
    assert agreeing_path(DraftTree.chain(drafts), drawn) == list(range(expected))


@given(trees(), st.lists(st.integers(0, 3), min_size=13, max_size=13))
def test_path_goes_to_the_child_that_the_target_draws_as_long_as_there_is_one(
    tree: DraftTree, answers: list[int]
) -> None:
    """The target as a function of the context: of equal siblings all see the same future."""

    def context(node: int) -> tuple[int, ...]:
        return () if node == ROOT else (*context(tree.parents[node]), tree.tokens[node])

    def target(tokens: tuple[int, ...]) -> int:
        return answers[hash(tokens) % len(answers)]

    drawn = [target(context(node)) for node in range(ROOT, tree.size)]
    path = agreeing_path(tree, drawn)
    said: tuple[int, ...] = ()
    for node in path:
        assert tree.parents[node] == (path[path.index(node) - 1] if said else ROOT)
        assert tree.tokens[node] == target(said)
        said = context(node)
    end = path[-1] if path else ROOT
    unique = len({context(node) for node in range(tree.size)}) == tree.size
    if unique:  # a twin of the path's end may have children that it has not
        children = [t for t, p in zip(*tree, strict=True) if p == end]
        assert target(said) not in children


@given(trees())
def test_lineage_and_depths_are_those_of_walking_up(tree: DraftTree) -> None:
    related = lineage(tree.parents)
    for node in range(tree.size):
        line, at = set(), node
        while at != ROOT:
            line.add(at)
            at = tree.parents[at]
        assert set(np.flatnonzero(related[node]).tolist()) == line
        assert tree.depths[node] == len(line)


def test_no_drafts_agree_when_there_are_none() -> None:
    assert agreeing_path(NO_DRAFTS, [4]) == []
