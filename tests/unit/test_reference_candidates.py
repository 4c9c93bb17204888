"""Candidates of several proposers are one tree, whose chances are those of what comes next."""

from __future__ import annotations

import numpy as np
import pytest

from smartspec.engine_adapter.reference.calibration import NUM_TEMPERATURES, Calibration
from smartspec.engine_adapter.reference.candidates import (
    NUM_EASES,
    WIDTH,
    Best,
    Candidates,
    Children,
    Ease,
    Kind,
    Level,
)
from smartspec.engine_adapter.reference.draft_tree import ROOT, DraftTree
from smartspec.engine_adapter.token_acceptance import TokenAcceptance

GREEDY = np.zeros(1, np.int64)


def candidates(calibration: Calibration | None = None) -> Candidates:
    """Of one greedy request."""
    return Candidates(calibration or Candidates.new_calibration(), GREEDY)


def chain(calibration: Calibration | None = None) -> Candidates:
    """Of one greedy request that is drafted one path."""
    return Candidates(calibration or Candidates.new_calibration(), GREEDY, chains=True)


def add(one: Candidates, node: int, tokens: list[int], own: list[float], place: int = 0) -> None:
    one.add(Level.of([place], node), Children(np.array([tokens]), np.array([own])))


def best(one: Candidates, most: int) -> Best:
    return one.best(np.full(one.size, most))


def open_at(one: Candidates, node: int) -> float:
    return float(one.open(Level.of([0], node))[0])


def frontier(one: Candidates, most: int) -> list[int]:
    nodes: list[int] = one.frontier(best(one, most)).nodes.tolist()
    return nodes


def first_chance(one: Candidates) -> float:
    """Of the node proposed first."""
    found = best(one, 9)
    return float(found.chances[found.nodes == 0][0])


def test_what_two_proposers_agree_on_is_one_node_and_surer_than_either() -> None:
    one = candidates()
    one.copy([[5, 6]], [[0.5, 0.9]])
    assert best(one, 2).chances[0] == pytest.approx([0.5, 0.45])
    add(one, ROOT, [7, 5], [0.1, 0.5])
    found = best(one, 9)
    assert one.trees(found) == [DraftTree([5, 6, 7], [ROOT, 0, ROOT])]
    # What follows it rises with it.
    assert found.chances[0, : found.sizes[0]] == pytest.approx([0.75, 0.675, 0.1])


def test_children_of_one_node_are_not_right_more_than_once() -> None:
    one = candidates()
    one.copy([[5]], [[0.9]])
    add(one, ROOT, [7], [0.9])
    assert best(one, 2).chances[0] == pytest.approx([0.5, 0.5])
    assert open_at(one, ROOT) == 0.0


def test_only_what_is_not_known_yet_is_left_to_the_drafter() -> None:
    one = candidates()
    one.copy([[5, 6]], [[0.75, 0.5]])
    assert open_at(one, ROOT) == pytest.approx(0.25)
    assert frontier(one, 9) == []  # it was not run from the root
    add(one, ROOT, [7], [0.25])
    assert open_at(one, 0) == pytest.approx(0.75 * 0.5)
    assert open_at(one, 1) == pytest.approx(0.375)
    assert frontier(one, 9) == [0, 2]  # not the copy's second token, before its first was run
    one.run(Level.of([0], 0), [9])
    assert frontier(one, 9) == [1, 2]
    # Nothing that follows the third could be among the best two.
    assert frontier(one, 2) == []


def test_nodes_are_run_while_there_is_room_and_each_in_the_next_slot() -> None:
    one = Candidates(Candidates.new_calibration(), np.zeros(3, np.int64))
    one.copy([[5], [], [6, 7]], [[0.5], [], [0.5, 0.5]])
    add(one, ROOT, [8], [0.2])
    add(one, ROOT, [9, 4], [0.3, 0.2], place=2)
    first = one.run(Level.of([0, 0, 2, 2], [0, 1, 0, 2]), [1, 9, 2])
    assert (first.places.tolist(), first.nodes.tolist()) == ([0, 2, 2], [0, 0, 2])
    assert one.lineages == [[ROOT], [], [ROOT, ROOT]]
    assert one.run(Level.of([2], 1), [9, 9, 9]).size == 1
    assert one.lineages[2] == [ROOT, ROOT, 0]
    assert one.slots[2, :4].tolist()[:3] == [0, 2, 1]


def test_each_kind_is_calibrated_by_itself() -> None:
    calibration = Candidates.new_calibration()
    for _ in range(200):
        one = candidates(calibration)
        one.copy([[5, 6]], [[0.5, 0.5]])
        add(one, ROOT, [7], [0.5])
        # The copy's first token is always right, its second and the draft never.
        one.learn([[5, 9]])
    kinds = np.arange(len(Kind)) * NUM_TEMPERATURES * NUM_EASES
    drafted, copied, copied_on, both = calibration.rates(np.full(4, 0.5), kinds)
    assert copied > 0.95
    assert copied_on < 0.1
    assert drafted < 0.1
    assert both == 0.5  # nothing is known of these yet
    one = candidates(calibration)
    one.copy([[5, 6]], [[0.5, 0.5]])
    add(one, ROOT, [5], [0.2])
    assert first_chance(one) == pytest.approx(0.6, abs=0.05)


def after(calibration: Calibration, rates: TokenAcceptance, last: int) -> Candidates:
    """Of one greedy request, whose last token is known."""
    return Candidates(calibration, GREEDY, ease=Ease(rates, np.array([last])))


def test_the_token_before_tells_what_a_confidence_does_not() -> None:
    calibration, rates = Candidates.new_calibration(), TokenAcceptance()
    for _ in range(100):
        for last in (1, 2):  # all goes well after 1, and nothing after 2
            one = after(calibration, rates, last)
            add(one, ROOT, [7], [0.5])
            one.learn([[7 if last == 1 else 8]])
    chances = []
    for last in (1, 2):
        one = after(calibration, rates, last)
        add(one, ROOT, [last], [0.5])
        one.run(Level.of([0], 0), [9])
        add(one, 0, [7], [0.5])
        found = best(one, 2).chances[0]
        chances.append([found[0], found[1] / found[0]])
    assert np.array(chances) == pytest.approx(np.array([[0.9, 0.9], [0.1, 0.1]]), abs=0.05)


def test_a_token_after_which_all_is_right_is_of_the_easiest() -> None:
    rates = TokenAcceptance()
    rates.learn([1] * 512 + [2] * 8192, [True] * 512 + [False] * 8192)
    for _ in range(40):
        rates.learn([3] * 8192, [True] * 8192)
    assert rates.rates([1])[0] == 1.0
    assert Ease(rates, np.array([1])).levels(np.array([1])).tolist() == [NUM_EASES - 1]


def test_chains_given_beforehand_are_judged_by_the_tokens_before_each_draft() -> None:
    calibration, rates = Candidates.new_calibration(), TokenAcceptance()
    for _ in range(200):
        one = after(calibration, rates, 1)
        one.draft([[2, 3]], [[0.5, 0.5]])
        one.learn([[2, 9]])  # after 1 a draft is right, after 2 it is not
    one = after(calibration, rates, 1)
    one.draft([[2, 3]], [[0.5, 0.5]])
    first, both = best(one, 2).chances[0]
    assert first > 0.9 and both / first < 0.1


def test_tokens_are_learned_of_by_all_drafts_after_them_but_not_by_copies() -> None:
    rates = TokenAcceptance()
    for _ in range(40):
        one = after(Candidates.new_calibration(), rates, 1)
        one.copy([[5, 6]], [[0.5, 0.5]])
        add(one, ROOT, [7], [0.01])  # none of which may have been verified
        one.learn([[5, 6]])  # the copy is right, so that the draft was not
    told, untold = rates.rates([1, 5])
    assert told < 0.05
    assert untold == pytest.approx(rates.pooled)


def test_nothing_is_learned_of_what_stands_on_a_wrong_guess_or_was_not_reached() -> None:
    calibration = Candidates.new_calibration()
    for _ in range(200):
        both = Candidates(calibration, np.zeros(2, np.int64))
        both.draft([[5, 6, 8], [4, 6]], [[0.3, 0.5, 0.7], [0.9, 0.1]])
        both.learn([[5], [5, 6]])  # the first goes on, but nobody has said how
    right, unreached, beyond, wrong, after_wrong = calibration.rates([0.3, 0.5, 0.7, 0.9, 0.1])
    assert right > 0.9 and wrong < 0.1
    assert (unreached, beyond, after_wrong) == (0.5, 0.7, 0.1)


def test_no_node_is_likelier_than_its_parent_whatever_was_learned() -> None:
    rng = np.random.default_rng(3)
    calibration = Candidates.new_calibration()
    for _ in range(300):
        one = candidates(calibration)
        one.copy([rng.integers(0, 3, 4).tolist()], [rng.random(4).tolist()])
        for parent in (ROOT, 0, 1):
            add(one, parent, [0, 1, 2], rng.dirichlet(np.ones(3)).tolist())
        found = best(one, 12)
        tree, chances = one.trees(found)[0], found.chances[0].tolist()
        for chance, parent in zip(chances, tree.parents, strict=False):
            assert chance <= (1.0 if parent == ROOT else chances[parent])
        at_root = [c for c, p in zip(chances, tree.parents, strict=False) if p == ROOT]
        assert sum(at_root) <= 1 + 1e-9
        one.learn([rng.integers(0, 3, 3).tolist()])


@pytest.mark.parametrize(
    ("own", "tokens"), [(0.4, [5, 6, 7]), (0.6, [8])], ids=["copy_likelier", "draft_likelier"]
)
def test_a_chain_takes_the_likelier_of_draft_and_copy(own: float, tokens: list[int]) -> None:
    one = chain()
    one.copy([[5, 6, 7]], [[0.5, 0.9, 0.9]])
    add(one, ROOT, [8], [own])
    assert one.trees(best(one, 9)) == [DraftTree.chain(tokens)]
    assert one.trees(best(one, 1)) == [DraftTree.chain(tokens[:1])]
    assert best(one, 0).sizes.tolist() == [0]


def test_a_chain_goes_on_from_a_copied_token_as_from_a_draft() -> None:
    one = chain()
    one.copy([[5, 6, 7]], [[0.5, 0.3, 0.9]])
    add(one, ROOT, [5], [0.5])
    assert frontier(one, 3) == [0]
    one.run(Level.of([0], 0), [9])
    add(one, 0, [8], [0.6])
    assert frontier(one, 3) == [3]  # nor the copied token that was passed over
    one.run(Level.of([0], 3), [9])
    add(one, 3, [9], [0.8])
    assert one.trees(best(one, 3)) == [DraftTree.chain([5, 8, 9])]


def test_what_a_chain_passed_over_is_learned_of_too() -> None:
    calibration = Candidates.new_calibration()
    for own in (0.2, 0.8) * 100:
        one = chain(calibration)
        one.copy([[5]], [[0.5]])
        add(one, ROOT, [7], [own])
        one.learn([[5]] if own > 0.5 else [[7]])  # whichever was not taken is right
    drafted = calibration.rates([0.2, 0.8])
    assert drafted[0] > 0.8 and drafted[1] < 0.2


def test_a_chain_is_one_path_on_which_no_other_child_is_likelier() -> None:
    rng = np.random.default_rng(5)
    calibration = Candidates.new_calibration()
    num_mixed = 0
    for _ in range(400):
        one = chain(calibration)
        copy = rng.integers(0, 3, 5).tolist()
        one.copy([copy], [rng.random(5).tolist()])
        level = Level.of([0])
        while level.size:
            said = Children(rng.integers(0, 3, (level.size, 1)), rng.random((level.size, 1)))
            one.add(level, said)
            level = one.run(one.frontier(best(one, 5)), [9])
        found = best(one, 5)
        nodes = found.nodes[0, : found.sizes[0]].tolist()
        assert one.trees(found) == [DraftTree.chain(one.tokens[0, nodes].tolist())]
        for parent, node in zip([ROOT, *nodes], nodes, strict=False):
            children = np.flatnonzero(one.parents[0, :-1] == parent)
            assert one._chances[0, node] == one._chances[0, children].max()
        copied = [node < 5 for node in nodes]
        num_mixed += copied[0] and not copied[-1]
        one.learn([rng.integers(0, 3, 6).tolist()])
    assert num_mixed > 50


@pytest.mark.parametrize("chains", [False, True], ids=["trees", "chains"])
def test_a_batch_is_as_each_of_its_requests_by_itself(chains: bool) -> None:
    """Whatever the others have, and however many nodes there are in all."""
    num_children = 1 if chains else 8
    rng = np.random.default_rng(8)
    calibration = Candidates.new_calibration()
    for fill in range(40):
        calibration.learn(rng.random(30), rng.random(30) < 0.4, rng.integers(0, 16, 30) * NUM_EASES)
        size, most = 5, rng.integers(0, 9, 5)
        temperatures = rng.integers(0, NUM_TEMPERATURES, size)
        copies = [rng.integers(0, 9, n).tolist() for n in rng.integers(0, 5, size)]
        sure = [rng.random(len(copy)).tolist() for copy in copies]
        batch = Candidates(calibration, temperatures, chains)
        batch.copy(copies, sure)
        alone = [Candidates(calibration, temperatures[i : i + 1], chains) for i in range(size)]
        for one, copy, own in zip(alone, copies, sure, strict=True):
            one.copy([copy], [own])
        level = Level.of(np.flatnonzero(rng.random(size) < 0.7))
        for _ in range(1 + fill % 6):
            drawn = [rng.permutation(9)[:num_children] for _ in range(level.size)]
            tokens = np.array(drawn, np.int64).reshape(-1, num_children)
            own = rng.dirichlet(np.full(9, 0.3), level.size)[:, :num_children]
            batch.add(level, Children(tokens, own))
            for at, (place, node) in enumerate(zip(*level, strict=True)):
                here = Children(tokens[at : at + 1], own[at : at + 1])
                alone[place].add(Level.of([0], node), here)
            found = batch.best(most)
            level = batch.run(batch.frontier(found), np.full(size, 20))
            for place, one in enumerate(alone):
                mine = one.best(most[place : place + 1])
                part = mine.chances.shape[1]
                assert mine.chances[0] == pytest.approx(found.chances[place, :part])
                assert one.trees(mine)[0] == batch.trees(found)[place]
                ran = one.run(one.frontier(mine), [20])
                assert ran.nodes.tolist() == level.nodes[level.places == place].tolist()
                assert one.lineages[0] == batch.lineages[place]
    assert chains or batch.tokens.shape[1] > WIDTH + 1  # columns were added on the way
