"""Copies among simulated trees: drafted where they pay, without a drafter, and accepted."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from typer.testing import CliRunner

from smartspec.daemon.cli import app
from smartspec.engine_adapter.base import StepFacts
from smartspec.engine_adapter.lengths import Choice, CostCurve, DraftCost
from smartspec.engine_adapter.prices import Prices
from smartspec.engine_adapter.reference.candidates import Candidates, Level
from smartspec.engine_adapter.simulator import acceptance, copies
from smartspec.engine_adapter.simulator.copies import Copies
from smartspec.engine_adapter.simulator.grown import Grown
from smartspec.engine_adapter.simulator.requests import Drafted, Outcomes
from smartspec.engine_adapter.simulator.trees import guess_chances, guesses
from smartspec.lab.profiles import answers
from smartspec.lab.simulation import experiment
from smartspec.lab.simulation.workload import Workload, made
from smartspec.lab.simulation.world import Fleet, rival, simulate

TRACES = Path(__file__).parents[2] / "benchmarks" / "data" / "acceptance.npz"
MOST = 8
JOINED = Workload(
    profile="a100_7b", draft="160m", trees=True, copies=str(TRACES), max_length=MOST,
    duration_s=3.0, mean_output=40, acceptance=0.5,
)  # fmt: skip


def outcomes(guess: list[int], run: int = 0, sure: float = 0.0, miss: int = 0) -> Outcomes:
    """One request of which step 0 is at position 0, with a copy there."""
    size = len(guess) + MOST
    column = np.zeros(size, np.uint8)
    drawn = acceptance.draw(
        acceptance.Constant(0.6), np.array([len(guess)]), max_length=MOST, seed=0, trees=True
    )
    assert drawn.trees is not None
    guessed = column.copy()
    guessed[: len(guess)] = guess
    runs, missed, own = column.copy(), column.copy(), np.zeros(size, np.float32)
    runs[0], missed[run], own[0] = run, miss, sure
    return replace(
        drawn, trees=replace(drawn.trees, guess=guessed), copies=Copies(runs, own, missed)
    )


def draft(told: Outcomes, most: int, forward_s: float | None = None) -> Drafted:
    """One step; ``forward_s``: at prices, of which this is a pass of the drafter."""
    prices = None
    if forward_s is not None:
        curve = CostCurve("ragged", [0.0, 100.0], [1.0, 2.0])  # a token costs 0.01
        prices = Prices(1.0, (curve,), DraftCost(per_forward_s=forward_s))
    choice = Choice(np.array([most]), prices=prices)
    where, lengths = np.zeros(1, np.int64), np.array([most], np.uint8)
    return told.drafter(seed=0).draft(where, where, choice, lengths)


def test_a_sure_copy_is_verified_without_a_pass_of_the_drafter_that_does_not_pay() -> None:
    drafted = draft(outcomes([0] * 9, run=4, sure=0.95), MOST, forward_s=5.0)
    assert (drafted.num_forwards, drafted.num_draft_tokens) == (0, 0)
    assert drafted.num_verified.tolist() == [MOST]
    assert drafted.num_accepted.tolist() == [4]
    assert drafted.ranks is not None and drafted.ranks.tolist() == [0b1111]


def test_nothing_is_drafted_where_neither_pays() -> None:
    drafted = draft(outcomes([1] * 9), MOST, forward_s=5.0)
    assert (drafted.num_forwards, drafted.num_verified.tolist()) == (0, [0])
    drafted = draft(outcomes([1] * 9, run=1, sure=0.009), MOST, forward_s=5.0)
    assert drafted.num_verified.tolist() == [0]  # not worth a token's 0.01


def test_the_drafter_goes_on_from_the_target_where_the_copy_is_wrong() -> None:
    told = outcomes([1, 1, 0, 0, 0], run=0, sure=0.2, miss=3)
    drafted = draft(told, MOST, forward_s=0.01)
    assert drafted.num_accepted.tolist() == [2]
    assert drafted.num_forwards >= 2
    assert drafted.num_draft_tokens >= drafted.num_forwards


@pytest.mark.parametrize(
    ("run", "guess", "miss", "nodes"), [(1, 1, 0, 5), (0, 2, 3, 5), (0, 2, 0, 6)]
)
def test_what_copy_and_drafter_both_say_is_one_node(
    run: int, guess: int, miss: int, nodes: int
) -> None:
    grown, where = Grown(outcomes([guess, 0, 0], run, 0.5, miss), seed=0), np.zeros(1, np.int64)
    candidates, root = Candidates(Candidates.new_calibration(), where), Level.of([0])
    candidates.copy(*grown._copied(where, 1))
    candidates.add(root, grown._children(candidates, root, where))
    [tree] = candidates.trees(candidates.best(np.array([20])))
    assert tree.size == len(set(tree.tokens)) == nodes  # five guesses, and the copy's if another


def test_fixed_sizes_are_filled_with_the_most_probable_of_both() -> None:
    for size in (1, 4, MOST):
        drafted = draft(outcomes([1] * 9, run=2, sure=0.3), size)
        assert drafted.num_verified.tolist() == [size]
        assert drafted.num_forwards > 0
    assert draft(outcomes([1] * 9, run=2, sure=0.3), 0).num_forwards == 0


def test_wrong_copies_are_what_the_drafter_would_guess_knowing_that_they_are() -> None:
    rng = np.random.default_rng(0)
    a = np.full(40_000, 0.4)
    guess = guesses(rng.random(len(a)), a)
    miss = copies.misses(rng.random(len(a)), a, guess)
    assert not (miss[guess > 0] == guess[guess > 0]).any()
    chances = guess_chances(np.array(0.4)).ravel()
    second = miss[guess == 2]
    others = 1 - chances[1]
    for rank in (1, 3, 4, 5):
        assert (second == rank).mean() == pytest.approx(chances[rank - 1] / others, abs=0.02)
    assert (second == 0).mean() == pytest.approx((1 - chances.sum()) / others, abs=0.02)


def test_copies_are_as_recorded_and_leave_the_drafters_luck_alone() -> None:
    joined = JOINED.cell(0.4, seed=3)
    plain = msgspec.structs.replace(JOINED, copies="").cell(0.4, seed=3)
    alone = joined.alone()
    assert alone.outcomes.trees is not None and plain.outcomes.trees is not None
    assert alone.outcomes.copies is None and alone.outcomes.features is None
    assert alone.outcomes.trees.guess.tobytes() == plain.outcomes.trees.guess.tobytes()
    assert alone.outcomes.run.tobytes() == plain.outcomes.run.tobytes()
    recorded = answers.load(TRACES, is_lookup=True)
    which = recorded.nearest(joined.traffic.num_output, seed=3)
    told = joined.outcomes.copies
    assert told is not None
    for i, offset in enumerate(joined.outcomes.offset.tolist()):
        size = min(int(joined.traffic.num_output[i]), recorded.answers[which[i]].size)
        assert told.run[offset : offset + size].tolist() == (
            recorded.answers[which[i]].run[:size].tolist()
        )
    chains = joined.chains(3)
    assert chains.outcomes.copies is chains.outcomes.trees is None
    assert chains.outcomes.run is joined.outcomes.run
    with pytest.raises(ValueError, match="draft trees"):
        copies.among(chains.outcomes, recorded, joined.traffic.num_output, seed=0)


@pytest.mark.parametrize("policy", ["none", "static4", "smartspec"])
def test_runs_with_copies_serve_everyone_and_repeat_bit_for_bit(policy: str) -> None:
    first, second = (simulate(policy, JOINED.cell(0.3, seed=1)).served for _ in range(2))
    assert np.isfinite(first.finished_s).all()
    assert first.finished_s.tobytes() == second.finished_s.tobytes()


def test_the_daemon_leaves_the_kind_to_prices_and_all_kinds_are_run() -> None:
    seen: list[StepFacts] = []
    longer = msgspec.structs.replace(JOINED, duration_s=6.0, mean_output=60)
    cell = replace(longer.cell(0.5, seed=1), watch=lambda now_s, facts: seen.append(facts))
    fleet = Fleet([cell])
    [engine] = fleet.run()
    limits, stats = fleet.links[0].hello.limits, fleet.links[0].stats
    assert limits.trees and limits.confidences
    assert stats.num_policies > 10 and stats.num_errors == stats.num_bad_frames == 0
    assert fleet.loop.counters["frames_refused"] == 0
    assert not any(fleet.loop.counters[f"failures_{w}"] for w in ("deciding", "learning"))
    decoding = [facts for facts in seen if facts.batch.size]
    copied = [f for f in decoding if f.num_drafted.any() and not f.num_draft_forwards]
    drafted = [f for f in decoding if f.num_draft_forwards]
    assert copied and drafted and any(not f.num_drafted.any() for f in decoding)
    assert all(not f.draft_s for f in copied)
    assert engine.num_accepted > 0


def test_copies_want_trees_and_lookups(tmp_path: Path) -> None:
    for change, words in (
        ({"trees": False}, "copies are branches of trees: set trees, or name draft lookup"),
        ({"copies": str(tmp_path / "none.rec")}, "none.rec: No such file"),
    ):
        options = {"draft": "eagle", "trees": True, "copies": str(TRACES)} | change
        with pytest.raises(ValueError, match=words):
            experiment.check(made(experiment.Experiment, options))
    with pytest.raises(ValueError, match=r"informed knows .* not of copies"):
        rival("informed", JOINED.cell(0.3, seed=1))
    wanted = made(experiment.Experiment, {"trees": True, "copies": str(TRACES)})
    assert "informed" not in wanted.policies


def test_simulate_plays_trees_with_copies() -> None:
    asked = ["simulate", "--trees", "--copies", str(TRACES), "--policies", "none,static4", "--json"]
    done = CliRunner().invoke(
        app, [*asked, "--loads", "0.1", "--duration-s", "2", "--num-workers", "1"]
    )
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["experiment"]["copies"] == str(TRACES)
    wanted = msgspec.convert(told["experiment"], experiment.Experiment)
    alone = msgspec.structs.replace(wanted, copies="")
    with_copies, without = (experiment.play(one, "static4", 0.1, 0) for one in (wanted, alone))
    assert with_copies.num_accepted != without.num_accepted
    [played] = [run for run in told["runs"] if (run["policy"], run["seed"]) == ("static4", 0)]
    assert played["num_accepted"] == with_copies.num_accepted


def test_what_is_told_of_nodes_that_were_cut_is_drawn_by_the_seed() -> None:
    def told(seed: int) -> list[int]:
        # Three tokens of the copy are right; what is less certain of it costs too much to verify.
        drafter = outcomes([0] * 9, run=3, sure=0.6).drafter(seed)
        curve = CostCurve("ragged", [0.0, 100.0], [1.0, 101.0])
        choice = Choice(np.array([MOST]), prices=Prices(0.45, (curve,), DraftCost(1e6)))
        request, most, cut = np.zeros(1, np.int64), np.array([MOST], np.uint8), []
        for _ in range(60):
            step = drafter.draft(request, request, choice, most)
            assert step.num_cut is not None and step.num_cut_accepted is not None
            assert step.num_cut_accepted[0] <= step.num_cut[0]
            cut.append(int(step.num_cut_accepted[0]))
        assert any(cut)
        return cut

    assert told(1) == told(1) != told(2)


def test_simulated_trees_grow_where_there_is_no_torch() -> None:
    code = "import sys, smartspec.engine_adapter.simulator.grown; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
