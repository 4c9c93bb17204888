"""What is made of the runs of fixed kinds and the controller; what they meet."""

from __future__ import annotations

import json

import numpy as np
import pytest
from bench_kinds_shift import FIXED, OURS, PHASES, cell_for, figures_of
from kept_runs import Runs

CELL = ("a100_160m", 64)


def runs(ours: dict[str, float], num_seeds: int = 2) -> Runs:
    """All take 2 s but `tree_4`, 1 s, and in phase 3 `copies_5`, 0.5 s; ours as given, or 1 s."""
    made: Runs = {}
    for seed in range(num_seeds):
        for arm in FIXED:
            row = dict.fromkeys((*PHASES, "overall"), 1.0 if arm == "tree_4" else 2.0)
            row["phase3"] = 0.5 if arm == "copies_5" else row["phase3"]
            made[(*CELL, seed, arm)] = row
        made[(*CELL, seed, OURS)] = dict.fromkeys((*PHASES, "overall"), 1.0) | ours
    return made


def test_each_phase_is_against_the_choice_that_is_best_there() -> None:
    figures = figures_of(runs({"phase3": 0.6, "overall": 0.9}), [CELL], range(2))
    stem = "a100_160m_64"
    assert figures[f"{stem}_phase3_vs_best"] == pytest.approx(1.2)
    assert figures[f"{stem}_phase3_best_copies_size"] == 5
    assert figures[f"{stem}_phase0_vs_best"] == pytest.approx(1.0)
    assert figures[f"{stem}_phase0_vs_copies"] == pytest.approx(0.5)
    assert figures[f"{stem}_phase0_best_tree_size"] == 4
    assert figures["worst_phase_vs_best"] == pytest.approx(1.2)
    assert figures["overall_vs_best"] == pytest.approx(0.9)
    json.dumps(figures, allow_nan=False)


def test_what_was_not_played_by_all_seeds_is_left_out() -> None:
    made = runs({})
    del made[(*CELL, 1, "copies_5")]
    figures = figures_of(made, [CELL], range(2))
    assert figures["a100_160m_64_phase3_vs_best"] == pytest.approx(1.0)
    del made[(*CELL, 1, OURS)]
    assert figures_of(made, [CELL], range(2)) == {}


def test_all_kinds_meet_the_same_requests_and_luck() -> None:
    cells = {
        kind: cell_for(kind, *CELL, seed=1, phase_s=3.0)[0]
        for kind in ("none", "copies", "chain", "tree", "joined", OURS)
    }
    arrivals = {cell.traffic.arrival_s.tobytes() for cell in cells.values()}
    assert len(arrivals) == 1
    joined, copied = cells["joined"].outcomes, cells["copies"].outcomes
    assert joined.copies is not None and joined.trees is not None
    assert cells[OURS].outcomes.copies is not None
    tree, chain = cells["tree"].outcomes, cells["chain"].outcomes
    assert tree.trees is not None and tree.copies is chain.trees is None
    assert tree.trees.guess.tobytes() == joined.trees.guess.tobytes()
    assert chain.run.tobytes() == joined.run.tobytes()
    assert ((joined.trees.guess == 1) == (joined.run > 0)).all()
    for i, size in enumerate(cells["none"].traffic.num_output.tolist()):
        a, b = int(joined.offset[i]), int(copied.offset[i])
        assert np.array_equal(joined.copies.run[a : a + size], copied.run[b : b + size])
    assert cells["copies"].draft == "lookup" and cells["tree"].draft == "160m"
