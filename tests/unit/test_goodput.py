"""The solver against brute force, and a policy's worth on a batch that has changed since."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable

import late_policy
import numpy as np
import pytest

from smartspec.daemon.goodput import best_by_batch
from smartspec.engine_adapter import optimum
from smartspec.engine_adapter.lengths import (
    RAGGED,
    UNIFORM,
    CostCurve,
    DraftCost,
    Ladder,
    choose_lengths,
)
from smartspec.engine_adapter.optimum import at_price, depths_tried, solve

NUM_CASES = 10_000


def random_curve(rng: np.random.Generator, most: int, mode: str = RAGGED) -> CostCurve:
    """A positive T(N), defined at every whole number: linear, stepped, powers of two, or wild."""
    n = np.arange(most + 1, dtype=np.float64)
    shape = rng.integers(4)
    if shape == 0:
        seconds = 1 + rng.uniform(0, 0.3) * n
    elif shape == 1:
        seconds = 1 + rng.uniform(0, 0.3) * np.ceil(n / rng.integers(2, 6))
    elif shape == 2:
        seconds = 1 + rng.uniform(0, 0.3) * 2.0 ** np.ceil(np.log2(np.maximum(n, 1)))
    else:
        seconds = rng.uniform(0.5, 3.0, most + 1)  # not even monotone
    return CostCurve(mode, n, seconds)


def brute_force(
    survival: np.ndarray,
    weight: np.ndarray,
    floor: np.ndarray,
    ceiling: np.ndarray,
    curves: list[CostCurve],
    draft: DraftCost,
    other: int,
    worth: Callable[[float, float], float] = operator.truediv,
) -> float:
    """The greatest goodput over all vectors of lengths, from the definition.

    Or the greatest ``worth``, of gain and seconds. A pass that carries prompts is not uniform.
    """
    size = len(survival)
    low = np.minimum(floor, ceiling)
    best = -np.inf
    ranges = [range(low[i], ceiling[i] + 1) for i in range(size)]
    for lengths in itertools.product(*ranges):
        k = np.array(lengths)
        gain = sum(weight[i] * (1 + survival[i, : k[i]].sum()) for i in range(size))
        depth, total = k.max(), k.sum()
        forwards = draft.forwards[depth - 1] if draft.forwards and depth else depth
        speculating = draft.fixed_s + draft.per_forward_s * forwards + draft.per_token_s * total
        for curve in curves:
            if curve.mode == RAGGED:
                seconds = curve.seconds[size + total + other]
            elif not other and any(
                (k == np.clip(c, low, ceiling)).all() for c in range(survival.shape[1] + 1)
            ):
                seconds = curve.seconds[size * (1 + depth) + other]
            else:
                continue
            best = max(best, worth(gain, seconds + (speculating if total else draft.sunk_s)))
    return best


@pytest.mark.parametrize("block", range(4))
def test_solve_equals_brute_force_when_batches_are_small(block: int) -> None:
    rng = np.random.default_rng(block)
    for case in range(NUM_CASES // 4):
        size, max_length = int(rng.integers(1, 5)), int(rng.integers(1, 4))
        survival = np.cumprod(rng.uniform(0, 1, (size, max_length)), axis=1)
        weight = rng.uniform(0.2, 3.0, size) if rng.random() < 0.5 else np.ones(size)
        floor = rng.integers(0, 2, size) if rng.random() < 0.3 else np.zeros(size, np.int64)
        ceiling = (
            rng.integers(0, max_length + 1, size)
            if rng.random() < 0.5
            else np.full(size, max_length)
        )
        other = int(rng.integers(0, 4)) * int(rng.integers(2))
        most = size * (1 + max_length) + other
        curves = [random_curve(rng, most)]
        if rng.random() < 0.4:
            curves.append(random_curve(rng, most, UNIFORM))
        forwards = tuple(np.sort(rng.uniform(0.0, 3.0, max_length))) if rng.random() < 0.5 else ()
        draft = DraftCost(*(rng.uniform(0, 0.3, 3) * rng.integers(0, 2, 3)), forwards)
        if rng.random() < 0.3:
            draft = draft.begun()
        ladder = Ladder(survival.T, weight, floor, ceiling)
        optimum = solve(ladder, curves, draft, other)
        expected = brute_force(survival, weight, floor, ceiling, curves, draft, other)
        assert optimum.goodput == pytest.approx(expected, rel=1e-9), f"case {case}"
        # The lengths are those of that goodput, not only its number.
        choice = optimum.choice
        assert (choice.lengths >= np.minimum(floor, ceiling)).all()
        assert (choice.lengths <= ceiling).all()
        gain = float((weight * 1.0).sum())
        for i, k in enumerate(choice.lengths):
            gain += weight[i] * survival[i, :k].sum()
        assert choice.gain == pytest.approx(gain)
        assert choice.gain / choice.seconds == pytest.approx(expected, rel=1e-9)
        assert optimum.value_of_time == optimum.goodput
        price = optimum.goodput * float(rng.uniform(0.0, 3.0))
        priced = at_price(ladder, price, curves, draft, other)
        expected = brute_force(
            *(survival, weight, floor, ceiling, curves, draft, other),
            lambda gain, seconds, price=price: gain - price * seconds,
        )
        value = priced.choice.gain - price * priced.choice.seconds
        assert value == pytest.approx(expected, rel=1e-9, abs=1e-9), f"case {case}"
        assert priced.goodput == pytest.approx(priced.choice.gain / priced.choice.seconds)
        assert priced.value_of_time == price


def subtrees(parents: list[int]) -> list[list[int]]:
    """All sets of nodes that hold every node's parent; ``parents`` -1: the root."""
    sets: list[list[int]] = [[]]
    for node, parent in enumerate(parents):
        sets += [[*kept, node] for kept in sets if parent < 0 or parent in kept]
    return sets


def test_ranks_of_trees_equal_brute_force_over_all_subtrees() -> None:
    rng = np.random.default_rng(11)
    for case in range(300):
        size, most = int(rng.integers(1, 3)), 5
        chances = np.zeros((size, most))
        candidates = []
        for i in range(size):
            parents = [int(rng.integers(-1, node)) for node in range(most)]
            for node, parent in enumerate(parents):
                chances[i, node] = rng.uniform() * (1.0 if parent < 0 else chances[i, parent])
            candidates.append(subtrees(parents))
        ranked = -np.sort(-chances, axis=1)
        curve = random_curve(rng, size * (1 + most))
        draft = DraftCost(*rng.uniform(0, 0.1, 3), forwards=(1.0, 1.6, 2.0, 2.2, 2.3))
        best = -np.inf
        for chosen in itertools.product(*candidates):
            total, longest = sum(map(len, chosen)), max(map(len, chosen))
            gain = size + sum(chances[i, nodes].sum() for i, nodes in enumerate(chosen))
            seconds = curve.seconds[size + total]
            if total:
                seconds += draft.by_depth(longest) + draft.per_token_s * total
            best = max(best, gain / seconds)
        assert solve(Ladder(ranked.T), [curve], draft).goodput == pytest.approx(best), case


@pytest.mark.parametrize("worth", [operator.truediv, lambda gain, s: gain - 3.0 * s])
def test_optimum_is_that_of_all_depths_where_few_are_looked_at(
    worth: Callable[[float, float], float],
) -> None:
    """Trees of up to 40 nodes: how deep to look is told by the depths before."""
    rng = np.random.default_rng(21)
    fewest = 99
    for _ in range(400):
        size = int(rng.integers(1, 9))
        survival = np.sort(rng.beta(1, 2, (40, size)), axis=0)[::-1] * rng.random(size)
        ladder = Ladder(survival, ceiling=rng.integers(0, 41, size))
        curve = random_curve(rng, size * 41)
        per_doubling = float(rng.uniform(0, 2))
        forwards = tuple(1 + per_doubling * np.log2(np.arange(1, 41)))
        draft = DraftCost(0.1, float(rng.choice((0.001, 0.03, 0.3))), forwards=forwards)
        best = -np.inf
        for depth in depths_tried(40):
            gain, drafts = ladder.prefixes(depth)
            seconds = ladder.seconds_by_drafts(curve, draft, drafts, 0)
            seconds = ladder.add_depth(seconds, draft, depth, drafts)
            best = max(best, float(np.max(worth(gain, seconds))))  # type: ignore[arg-type]
        looked_at = Ladder(survival, ceiling=ladder.ceiling)
        if worth is operator.truediv:
            found = solve(looked_at, [curve], draft).goodput
        else:
            choice = at_price(looked_at, 3.0, [curve], draft).choice
            found = choice.gain - 3.0 * choice.seconds
        assert found == pytest.approx(best, rel=1e-12, abs=1e-12)
        fewest = min(fewest, len(looked_at._scans))
    assert fewest < 12


def test_optimum_is_the_same_when_all_depths_are_looked_at_in_one_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(5)
    found: dict[int, list[object]] = {0: [], 10**9: []}
    for _ in range(400):
        depth, size = int(rng.integers(1, 9)), int(rng.integers(1, 12))
        survival = np.sort(rng.random((depth, size)), axis=0)[::-1]
        some = [
            rng.uniform(0.5, 2.0, size) if rng.random() < 0.5 else None,
            rng.integers(0, depth + 1, size) if rng.random() < 0.3 else None,
            rng.integers(0, depth + 1, size) if rng.random() < 0.5 else None,
        ]
        draft = DraftCost(
            *rng.uniform(0.0, 0.2, 3),
            forwards=tuple(np.sqrt(np.arange(1.0, depth + 1))) if rng.random() < 0.5 else (),
            sunk_s=float(rng.uniform(0.0, 0.2)) if rng.random() < 0.5 else 0.0,
        )
        curves = [random_curve(rng, 200)]
        other = int(rng.integers(0, 9))
        for at_once, optima in found.items():
            monkeypatch.setattr(optimum, "AT_ONCE", at_once)
            for best in (
                solve(Ladder(survival, *some), curves, draft, other),
                at_price(Ladder(survival, *some), 2.0, curves, draft, other),
            ):
                choice = best.choice._replace(lengths=best.choice.lengths.tolist())
                optima.append(best._replace(choice=choice))
    assert found[0] == found[10**9]


def test_engine_and_daemon_choose_alike_when_nothing_has_changed() -> None:
    rng = np.random.default_rng(5)
    for _ in range(500):
        size = int(rng.integers(1, 40))
        survival = np.cumprod(rng.uniform(0.2, 0.98, (6, size)), axis=0)
        curve = random_curve(rng, size * 7)
        draft = DraftCost(*rng.uniform(0, 0.1, 3))
        ladder = Ladder(survival)
        optimum = solve(ladder, [curve], draft)
        again = choose_lengths(
            Ladder(survival.copy()), optimum.value_of_time, optimum.depth, [curve], draft
        )
        assert (again.lengths == optimum.choice.lengths).all()


@pytest.mark.parametrize("shape", sorted(late_policy.CURVES))
def test_late_policy_loses_little_when_a_fifth_of_the_batch_is_new(shape: str) -> None:
    lost = late_policy.losses(shape)
    assert min(lost) > -1e-9
    assert np.mean(lost) <= 0.005


def test_presence_counts_drafts_that_may_not_exist() -> None:
    survival = np.array([[0.9], [0.8]])
    curve = CostCurve(RAGGED, [1.0, 3.0], [1.0, 1.5])
    optimum = solve(Ladder(survival, presence=np.array([0.5])), [curve], DraftCost())
    assert optimum.choice.gain == pytest.approx(1 + 0.5 * 1.7)
    assert optimum.choice.seconds == pytest.approx(1.25)


def test_no_speculation_when_drafts_cost_more_than_they_bring() -> None:
    survival = np.full((4, 8), 0.4) ** np.arange(1, 5)[:, None]
    curve = CostCurve(RAGGED, [1.0, 100.0], [1.0, 100.0])
    optimum = solve(Ladder(survival), [curve], DraftCost(per_forward_s=0.9))
    assert optimum.choice.lengths.tolist() == [0] * 8


def test_solve_refuses_when_a_step_takes_no_time() -> None:
    curve = CostCurve(RAGGED, [1.0], [0.0])
    with pytest.raises(ValueError, match="must take time"):
        solve(Ladder(np.array([[0.5]])), [curve], DraftCost())


def test_fallback_table_equals_the_solver_when_requests_are_alike() -> None:
    survival = 0.7 ** np.arange(1, 6)
    n = np.arange(600.0)
    curve = CostCurve(RAGGED, n, 10 + np.maximum(0.05 * n, 0.4 * (n - 30)))
    batches = np.array([1, 4, 16, 64])
    draft = DraftCost(0.5, 0.3, 0.01)
    table = best_by_batch(survival, 1.0, batches, [curve] * 4, draft)
    for batch, length in zip(batches, table, strict=True):
        goodputs = []
        for k in range(6):
            drafts = batch * k
            extra = (0.5 + 0.3 * k + 0.01 * drafts) if k else 0.0
            seconds = curve.seconds[batch + drafts] + extra
            goodputs.append(batch * (1 + survival[:k].sum()) / seconds)
        assert goodputs[length] == max(goodputs)


def test_step_with_prompts_is_kept_shorter_at_the_price_of_one_without() -> None:
    ladder = Ladder(np.full((4, 8), 0.7) ** np.arange(1, 5)[:, None])
    curve = CostCurve("ragged", [1.0, 1000.0], [1.0, 61.0])
    alone = solve(ladder, [curve], DraftCost())
    greedy = solve(ladder, [curve], DraftCost(), 400)
    priced = at_price(ladder, alone.value_of_time, [curve], DraftCost(), 400)
    assert greedy.value_of_time < alone.value_of_time
    assert priced.choice.lengths.sum() < greedy.choice.lengths.sum()
    assert priced.goodput < greedy.goodput
    # A token costs as much with prompts as without: so the lengths are those of the batch alone.
    assert priced.choice.lengths.tolist() == alone.choice.lengths.tolist()
