"""Draft trees in virtual time: their nodes, the path that an answer takes, costs and steering."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import product

import msgspec
import numpy as np
import pytest

from smartspec.engine_adapter.base import StepFacts
from smartspec.engine_adapter.simulator import acceptance, arrivals, profile
from smartspec.engine_adapter.simulator.requests import Traffic
from smartspec.engine_adapter.simulator.trees import (
    NUM_GUESSES,
    Shape,
    guess_chances,
    guesses,
    most_probable,
)
from smartspec.lab.simulation import experiment, tune, workload
from smartspec.lab.simulation.world import OF_CHAINS, Cell, Fleet, rival, simulate

MOST = 16


def cell(rate: float = 4.0, until_s: float = 8.0, seed: int = 1, **more: object) -> Cell:
    rng = np.random.default_rng(seed)
    traffic = arrivals.exponential_lengths(arrivals.poisson(rate, until_s, rng), 300, 60, rng)
    drawn = acceptance.draw(
        acceptance.BetaOverRequests(0.7), traffic.num_output, max_length=MOST, seed=2, trees=True
    )
    made = Cell(profile.load("h100_8b"), "eagle", traffic, drawn, max_length=MOST)
    return replace(made, **more)  # type: ignore[arg-type]


def paths_of(shape: Shape) -> list[tuple[int, ...]]:
    """Of every node, the guesses that lead to it."""
    paths = {0: ()}
    for node, row in enumerate(shape.child):
        for guess, child in enumerate(row.tolist()):
            if child:
                paths[child] = (*paths[node], guess)
    return [paths[node] for node in range(1, len(paths))]


@pytest.mark.parametrize("a", [0.1, 0.5, 0.9])
def test_a_tree_holds_the_most_probable_nodes_of_all_in_falling_order(a: float) -> None:
    chances = guess_chances(np.array(a)).tolist()
    shape = most_probable(chances, MOST)
    paths = paths_of(shape)
    assert len(set(paths)) == MOST
    probability = [float(np.prod([chances[guess - 1] for guess in path])) for path in paths]
    assert shape.gain.tolist() == pytest.approx(probability)
    assert probability == sorted(probability, reverse=True)
    deep = product(range(1, NUM_GUESSES + 1), repeat=5)  # all nodes of up to five levels
    known = {path[:size] for path in deep for size in range(1, 6)}
    best = sorted((float(np.prod([chances[g - 1] for g in path])) for path in known), reverse=True)
    assert all(mine >= other - 1e-12 for mine, other in zip(probability, best, strict=False))
    for at, path in enumerate(paths):  # whatever is cut off behind, a tree is left
        assert len(path) == 1 or path[:-1] in paths[:at]
    assert shape.num_levels.tolist() == [0, *np.maximum.accumulate([len(p) for p in paths])]


def test_guesses_come_as_often_as_their_chances_say() -> None:
    a = np.full(200_000, 0.6)
    found = np.bincount(guesses(np.random.default_rng(0).random(len(a)), a), minlength=6) / len(a)
    assert found[1:] == pytest.approx(guess_chances(np.array(0.6)), abs=0.005)
    # Assumed: of 62 to 70% for the first guess, 85 to 89% for the best five.
    for first, five in ((0.62, 0.85), (0.70, 0.89)):
        assert guess_chances(np.array(first)).sum() == pytest.approx(five, abs=0.015)
    falling = guess_chances(np.linspace(0, 1, 101))
    assert (np.diff(falling, axis=1) <= 0).all() and (falling.sum(axis=1) <= 1 + 1e-12).all()


def walked(shape: Shape, said: list[int], size: int) -> list[int]:
    """The nodes of the path, from what a node is said to be by its guesses."""
    number = {path: node for node, path in enumerate(paths_of(shape), 1) if node <= size}
    return [number[p] for d in range(1, len(said) + 1) if (p := tuple(said[:d])) in number]


def test_what_is_accepted_is_the_path_that_the_answer_takes() -> None:
    drawn = cell().outcomes
    assert drawn.trees is not None
    rng = np.random.default_rng(5)
    requests = rng.integers(len(drawn.offset), size=300)
    positions = drawn.offset[requests] + rng.integers(0, 3, size=300)
    sizes = rng.integers(0, MOST + 1, size=300).astype(np.uint8)
    found = drawn.accepted(requests, positions, sizes)
    assert found.ranks is not None
    lengths = Counter()
    for i, size in enumerate(sizes.tolist()):
        t, r = drawn.trees, requests[i]
        said = t.guess[positions[i] : positions[i] + MOST].tolist()
        path = walked(Shape(t.child[r], t.gain[r], t.num_levels[r]), said, size)
        assert [j + 1 for j in range(64) if int(found.ranks[i]) >> j & 1] == path
        assert found.num_accepted[i] == len(path)
        lengths[len(path)] += 1
    assert len(lengths) > 4


def test_trees_and_chains_meet_the_same_luck() -> None:
    both = cell().outcomes
    alone = acceptance.draw(
        acceptance.BetaOverRequests(0.7), cell().traffic.num_output, max_length=MOST, seed=2
    )
    assert both.run.tobytes() == alone.run.tobytes()
    assert both.trees is not None
    assert ((both.trees.guess == 1) == (both.run > 0)).all()


def test_gains_are_how_often_nodes_are_accepted() -> None:
    drawn = acceptance.draw(
        acceptance.Constant(0.6), np.full(50, 400), max_length=8, seed=0, trees=True
    )
    requests = np.repeat(np.arange(50), 400)
    positions = drawn.offset[requests] + np.tile(np.arange(400), 50)
    ranks = drawn.accepted(requests, positions, np.full(len(requests), 8, np.uint8)).ranks
    assert ranks is not None and drawn.trees is not None
    hits = ranks[:, None] >> np.arange(8, dtype=np.uint64) & np.uint64(1)
    assert hits.mean(axis=0) == pytest.approx(drawn.trees.gain[0], abs=0.015)


def test_a_tree_costs_a_pass_of_the_drafter_for_every_level_and_a_token_for_every_node() -> None:
    gpu = profile.load("h100_8b")
    traffic = Traffic(np.array([0.0]), np.array([10]), np.array([3]))
    never = acceptance.draw(
        acceptance.Constant(1e-9), traffic.num_output, max_length=4, seed=0, trees=True
    )
    assert never.trees is not None
    level, draft = int(never.trees.num_levels[0, 4]), gpu.draft("eagle")
    assert level < 4
    seen: list[StepFacts] = []
    made = Cell(gpu, "eagle", traffic, never, max_length=4, noise=0.0)
    simulate("static4", replace(made, watch=lambda now_s, facts: seen.append(facts)))
    decode = seen[1]
    assert decode.num_draft_forwards == level and decode.num_draft_tokens == 4
    expected = draft.fixed_s + draft.per_forward_s * level + draft.per_token_s * 4
    assert decode.draft_s == pytest.approx(expected)
    assert decode.target_s == pytest.approx(gpu.target_seconds(1, 5, 11))


@pytest.mark.parametrize("name", ["static8", "bandit", "switch_off", "informed", "smartspec"])
def test_every_request_is_served_whole_and_runs_repeat_bit_for_bit(name: str) -> None:
    first, second = (simulate(name, cell()).served for _ in range(2))
    assert np.isfinite(first.finished_s).all()
    assert first.finished_s.tobytes() == second.finished_s.tobytes()


def test_the_daemon_steers_sizes_by_ranks_over_the_wire() -> None:
    sizes: list[int] = []
    watched = cell(rate=10.0, watch=lambda now_s, facts: sizes.extend(facts.num_drafted.tolist()))
    fleet = Fleet([watched])
    engine = fleet.run()[0]
    stats = fleet.links[0].stats
    assert fleet.links[0].hello.limits.trees
    assert stats.num_policies > 10 and stats.num_errors == stats.num_bad_frames == 0
    assert fleet.loop.counters["frames_refused"] == 0
    assert not any(fleet.loop.counters[f"failures_{w}"] for w in ("deciding", "learning"))
    [session] = fleet.loop.sessions.by_name.values()
    learned = session.engine.acceptance.pooled_hazards()
    assert engine.outcomes.trees is not None
    # Requests of low acceptance decode in more steps, so that a step sees less than a mean request.
    gains = engine.outcomes.trees.gain.mean(axis=0)
    assert 0.7 * gains[0] < learned[0] < gains[0] and learned[7] < 0.5 * learned[0]
    assert len(set(sizes[len(sizes) // 2 :])) > 3


def test_informed_beats_every_size_and_every_chain() -> None:
    trees = cell(rate=20.0)
    chains = trees.chains(5)
    latency = simulate("informed", trees).served.latency_s.mean()
    for other in ("none", "static2", "static4", "static8", "static16"):
        assert latency < 1.01 * simulate(other, trees).served.latency_s.mean(), other
    assert latency < simulate("informed", chains).served.latency_s.mean()
    assert chains.outcomes.trees is None and chains.outcomes.run is trees.outcomes.run


def test_policies_for_chains_are_refused_by_name() -> None:
    for name in OF_CHAINS:
        with pytest.raises(ValueError, match=f"{name} is a policy for chains"):
            rival(name, cell())
    wanted = experiment.Experiment(trees=True, policies=("none", "tiers"), duration_s=2.0)
    with pytest.raises(ValueError, match="tiers is a policy for chains"):
        experiment.check(wanted)
    with pytest.raises(ValueError, match="other than lookup"):
        workload.Workload(trees=True, draft="lookup").check()
    with pytest.raises(ValueError, match="fitted to chains"):
        tune.ground(tune.Tuning(trees=True))


def test_an_experiment_drafts_trees_when_it_is_told_to() -> None:
    wanted = experiment.Experiment(trees=True, max_length=8, duration_s=2.0)
    assert wanted.cell(0.2, seed=0).outcomes.trees is not None
    plain = msgspec.structs.replace(wanted, trees=False)
    assert plain.cell(0.2, seed=0).outcomes.trees is None
    tree, chain = (experiment.play(one, "static8", 0.2, 0) for one in (wanted, plain))
    assert tree.num_accepted > chain.num_accepted
