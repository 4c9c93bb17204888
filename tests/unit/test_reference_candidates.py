"""Candidates of several proposers are one tree, whose chances are those of what comes next."""

from __future__ import annotations

import numpy as np
import pytest

from smartspec.engine_adapter.reference.calibration import Calibration
from smartspec.engine_adapter.reference.candidates import Candidates
from smartspec.engine_adapter.reference.draft_tree import ROOT, DraftTree


def candidates(calibration: Calibration | None = None) -> Candidates:
    return Candidates(calibration or Calibration(Candidates.num_bands()), 0)


def test_what_two_proposers_agree_on_is_one_node_and_surer_than_either() -> None:
    one = candidates()
    one.copy([5, 6], [0.5, 0.9])
    before = one.chance(1)
    one.add(ROOT, [7, 5], [0.1, 0.5])
    best = one.best(9)
    assert best.tree == DraftTree([5, 6, 7], [ROOT, 0, ROOT])
    assert best.chances == pytest.approx([0.75, 0.675, 0.1])
    assert before == pytest.approx(0.45)  # what follows it rises with it


def test_children_of_one_node_are_not_right_more_than_once() -> None:
    one = candidates()
    one.copy([5], [0.9])
    one.add(ROOT, [7], [0.9])
    assert one.best(2).chances == pytest.approx([0.5, 0.5])
    assert one.open(ROOT) == 0.0


def test_only_what_is_not_known_yet_is_left_to_the_drafter() -> None:
    one = candidates()
    one.copy([5, 6], [0.75, 0.5])
    assert one.open(ROOT) == pytest.approx(0.25)
    one.add(ROOT, [7], [0.25])
    assert one.open(0) == pytest.approx(0.75 * 0.5)
    assert one.open(1) == pytest.approx(0.375)
    assert one.frontier(9) == [0, 2]  # not the copy's second token, before its first was run
    one.run(0)
    assert one.frontier(9) == [1, 2]
    # Nothing that follows the third could be among the best two.
    assert one.frontier(2) == []


def test_each_kind_is_calibrated_by_itself() -> None:
    calibration = Calibration(Candidates.num_bands())
    for _ in range(200):
        one = candidates(calibration)
        one.copy([5, 6], [0.5, 0.5])
        one.add(ROOT, [7], [0.5])
        one.learn([5, 9])  # the copy's first token is always right, its second and the draft never
    one = candidates(calibration)
    one.copy([5, 6], [0.5, 0.5])
    assert one.chance(0) > 0.95
    assert one.chance(1) < 0.1
    one.add(ROOT, [7], [0.5])
    assert one.chance(2) < 0.1
    one.add(ROOT, [5], [0.2])
    assert one.chance(0) == pytest.approx(0.6, abs=0.05)  # of both: nothing is known of these yet


def test_nothing_is_learned_of_what_stands_on_a_wrong_guess_or_was_not_reached() -> None:
    calibration = Calibration(Candidates.num_bands())
    for _ in range(200):
        one = candidates(calibration)
        one.draft([5, 6, 8], [0.3, 0.5, 0.7])
        one.learn([5])  # the answer goes on, but nobody has said how
        other = candidates(calibration)
        other.draft([4, 6], [0.9, 0.1])
        other.learn([5, 6])
    right, unreached, beyond, wrong, after_wrong = calibration.rates([0.3, 0.5, 0.7, 0.9, 0.1])
    assert right > 0.9 and wrong < 0.1
    assert (unreached, beyond, after_wrong) == (0.5, 0.7, 0.1)


def test_no_node_is_likelier_than_its_parent_whatever_was_learned() -> None:
    rng = np.random.default_rng(3)
    calibration = Calibration(Candidates.num_bands())
    for _ in range(300):
        one = candidates(calibration)
        one.copy(rng.integers(0, 3, 4).tolist(), rng.random(4).tolist())
        for parent in (ROOT, 0, 1):
            one.add(parent, [0, 1, 2], rng.dirichlet(np.ones(3)).tolist())
        best = one.best(12)
        for chance, parent in zip(best.chances, best.tree.parents, strict=True):
            assert chance <= (1.0 if parent == ROOT else best.chances[parent])
        assert sum(c for c, p in zip(best.chances, best.tree.parents) if p == ROOT) <= 1 + 1e-9  # noqa: B905
        one.learn(rng.integers(0, 3, 3).tolist())
