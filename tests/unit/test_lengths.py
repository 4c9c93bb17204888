"""Choosing lengths for a given value of time, against brute force; curves, buckets, survivals."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from smartspec.engine_adapter.lengths import (
    RAGGED,
    UNIFORM,
    Choice,
    CostCurve,
    DraftCost,
    Ladder,
    batch_seconds,
    bucket_index,
    choose_lengths,
    request_survivals,
)

LINE = CostCurve(RAGGED, [1.0, 100.0], [1.0, 10.9])  # 0.9 + 0.1 N


def value_of(
    lengths: np.ndarray,
    survival: np.ndarray,
    weight: np.ndarray,
    value_of_time: float,
    seconds_at: np.ndarray,
    draft: DraftCost,
    depth: int,
    other: int,
    padded: bool,
) -> float:
    """``gain - value_of_time * T`` from the definition."""
    size, total = len(lengths), int(lengths.sum())
    gain = sum(weight[i] * (1 + survival[i, :k].sum()) for i, k in enumerate(lengths))
    num_tokens = size * (1 + int(lengths.max())) if padded else size + total
    seconds = seconds_at[num_tokens + other]
    if total:
        paid = int(lengths.max()) if padded else depth
        forwards = draft.forwards[paid - 1] if draft.forwards and paid else paid
        seconds += draft.fixed_s + draft.per_forward_s * forwards + draft.per_token_s * total
    else:
        seconds += draft.sunk_s
    return float(gain - value_of_time * seconds)


def test_choice_equals_brute_force_when_batches_are_small() -> None:
    rng = np.random.default_rng(3)
    for case in range(1500):
        size, longest = int(rng.integers(1, 5)), int(rng.integers(1, 4))
        survival = np.cumprod(rng.uniform(0, 1, (size, longest)), axis=1, dtype=np.float64)
        weight = rng.uniform(0.2, 3.0, size)
        ceiling = rng.integers(0, longest + 1, size)
        floor = rng.integers(0, 3, size) * (rng.random() < 0.3)
        low = np.minimum(floor, ceiling)
        depth = int(rng.integers(0, longest + 1))
        other = int(rng.integers(0, 3)) * int(rng.integers(2))
        n = np.arange(size * (1 + longest) + other + 1, dtype=np.float64)
        ragged_s, uniform_s = rng.uniform(0.5, 3.0, (2, len(n)))
        with_uniform = bool(rng.random() < 0.5)
        curves = [CostCurve(RAGGED, n, ragged_s)]
        if with_uniform:
            curves.append(CostCurve(UNIFORM, n, uniform_s))
        forwards = tuple(np.sort(rng.uniform(0.0, 3.0, longest))) if rng.random() < 0.5 else ()
        draft = DraftCost(*(rng.uniform(0, 0.3, 3) * rng.integers(0, 2, 3)), forwards)
        if rng.random() < 0.3:
            draft = draft.begun()
        price = float(rng.uniform(0, 4))
        paid = max(depth, int(low.max()))
        ladder = Ladder(survival.T, weight, floor, ceiling)
        choice = choose_lengths(ladder, price, depth, curves, draft, other)

        tops = np.maximum(np.minimum(ceiling, depth), low)
        best = max(
            value_of(np.array(k), survival, weight, price, ragged_s, draft, paid, other, False)
            for k in itertools.product(*(range(a, b + 1) for a, b in zip(low, tops, strict=True)))
        )
        if with_uniform and not other:  # a pass that carries prompts is not uniform
            best = max(
                best,
                *(
                    value_of(
                        np.clip(k, low, ceiling),
                        *(survival, weight, price, uniform_s, draft, paid, other, True),
                    )
                    for k in range(depth + 1)
                ),
            )
        padded = choice.mode == UNIFORM
        seconds_at = uniform_s if padded else ragged_s
        found = value_of(
            choice.lengths, survival, weight, price, seconds_at, draft, paid, other, padded
        )
        assert found == pytest.approx(best, abs=1e-9), f"case {case}"
        assert choice.gain - price * choice.seconds == pytest.approx(best, abs=1e-9)
        assert (choice.lengths >= low).all() and (choice.lengths <= ceiling).all()


def test_uniform_mode_is_no_candidate_when_the_step_carries_prompts() -> None:
    ladder = Ladder(np.array([[0.9, 0.9], [0.8, 0.8]]))
    cheap = CostCurve(UNIFORM, [1.0, 100.0], [0.1, 0.2])
    given = ladder, 1.0, 2
    assert choose_lengths(*given, [LINE, cheap], DraftCost()).mode == UNIFORM
    assert choose_lengths(*given, [LINE, cheap], DraftCost(), 1).mode == RAGGED
    # An engine that runs nothing else pads its prompts, too.
    assert choose_lengths(*given, [cheap], DraftCost(), 1).mode == UNIFORM


def test_seconds_are_of_padded_lengths_when_the_mode_is_uniform() -> None:
    uniform = CostCurve(UNIFORM, LINE.num_tokens, LINE.seconds)
    lengths, draft = np.array([3, 1]), DraftCost(0.5, 0.25)
    by_depth = 0.5 + 3 * 0.25
    assert batch_seconds(LINE, draft, lengths, 2, 4.0) == pytest.approx(LINE.at(8) + by_depth)
    assert batch_seconds(uniform, draft, lengths, 0, 4.0) == pytest.approx(LINE.at(8) + by_depth)


def test_fewest_drafts_are_chosen_when_choices_are_equal() -> None:
    flat = CostCurve(RAGGED, [1.0, 9.0], [1.0, 1.0])
    ladder = Ladder(np.array([[0.5], [0.0], [0.0]]))  # depths 2 and 3 gain nothing and cost nothing
    assert choose_lengths(ladder, 1.0, 3, [flat], DraftCost()).lengths.tolist() == [1]


def test_every_length_is_the_longest_allowed_when_time_is_worth_nothing() -> None:
    ladder = Ladder(np.full((4, 3), 0.1), ceiling=np.array([4, 2, 9]))
    choice = choose_lengths(ladder, 0.0, 3, [LINE], DraftCost(1.0, 1.0, 1.0))
    assert choice.lengths.tolist() == [3, 2, 3]


def test_deepest_of_equal_items_stay_out_when_there_is_room_for_some() -> None:
    room_for_5 = CostCurve(RAGGED, [0.0, 8.0, 9.0], [1.0, 1.0, 9.0])
    ladder = Ladder(np.full((3, 3), 0.5))
    choice = choose_lengths(ladder, 1.0, 3, [room_for_5], DraftCost())
    assert choice.lengths.tolist() == [2, 2, 1]
    few = Ladder(np.full((3, 3), 0.5), ceiling=np.array([3, 0, 1]))
    assert choose_lengths(few, 1.0, 3, [room_for_5], DraftCost()).lengths.tolist() == [3, 0, 1]


def test_floor_is_clipped_when_the_ceiling_is_lower() -> None:
    ladder = Ladder(np.full((4, 2), 0.01), floor=np.array([3, 3]), ceiling=np.array([1, 4]))
    assert choose_lengths(ladder, 100.0, 4, [LINE], DraftCost()).lengths.tolist() == [1, 3]


def test_weights_decide_when_survivals_are_equal() -> None:
    survival = np.array([[0.5, 0.5], [0.25, 0.25]])
    choice = choose_lengths(
        Ladder(survival, weight=np.array([1.0, 4.0])), 10.0, 2, [LINE], DraftCost()
    )
    assert choice.lengths.tolist() == [0, 1]  # a token costs 1; worth 0.5, 0.25 and 2, 1


def test_prefill_moves_the_choice_when_the_pass_is_full() -> None:
    full_at_8 = CostCurve(RAGGED, [0.0, 8.0, 9.0], [1.0, 1.0, 3.0])
    ladder = Ladder(np.full((1, 4), 0.5))
    assert choose_lengths(ladder, 2.0, 1, [full_at_8], DraftCost(), 0).lengths.sum() == 4
    assert choose_lengths(ladder, 2.0, 1, [full_at_8], DraftCost(), 2).lengths.sum() == 2


def test_gain_and_cost_shrink_alike_when_drafts_may_not_exist() -> None:
    survival = np.full((2, 4), 0.6)
    sure = choose_lengths(Ladder(survival), 1.0, 2, [LINE], DraftCost())
    half = choose_lengths(Ladder(survival, presence=np.full(4, 0.5)), 1.0, 2, [LINE], DraftCost())
    assert half.gain - 4 == pytest.approx((sure.gain - 4) / 2)
    assert half.seconds == pytest.approx(float(LINE.at(4 + sure.lengths.sum() / 2)))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
def test_choice_is_empty_or_zero_when_there_is_nothing_to_draft(shape: tuple[int, int]) -> None:
    choice = choose_lengths(Ladder(np.zeros(shape)), 5.0, 4, [LINE], DraftCost(0.1, 0.1, 0.1))
    assert choice.lengths.tolist() == [0] * shape[1]


def test_choosing_is_refused_when_there_is_no_curve() -> None:
    with pytest.raises(ValueError, match="no cost curve"):
        choose_lengths(Ladder(np.ones((1, 1))), 1.0, 1, [], DraftCost())


def test_inputs_are_left_alone_when_lengths_are_chosen() -> None:
    survival = np.cumprod(np.full((3, 3), 0.8), axis=0)
    weight, floor, ceiling = np.ones(3), np.array([1, 0, 2]), np.array([3, 3, 1])
    given = (survival, weight, floor, ceiling)
    before = [array.copy() for array in given]
    choose_lengths(Ladder(*given), 2.0, 3, [LINE], DraftCost())
    assert all((a == b).all() for a, b in zip(given, before, strict=True))


def test_curve_goes_on_when_asked_beyond_its_ends() -> None:
    curve = CostCurve(RAGGED, [2.0, 4.0, 8.0], [1.0, 1.0, 3.0])
    assert curve.at([0, 2, 3, 6, 8, 10]).tolist() == [1.0, 1.0, 1.0, 2.0, 3.0, 4.0]
    falling = CostCurve(RAGGED, [1.0, 2.0], [3.0, 2.0])
    assert falling.at([5]).tolist() == [2.0]  # never on to nothing
    single = CostCurve(RAGGED, [4.0], [2.0])
    assert single.at([[1, 9]]).tolist() == [[2.0, 2.0]]


def test_survivals_keep_their_order_when_corrected() -> None:
    rng = np.random.default_rng(0)
    table = np.log(np.cumprod(rng.uniform(0.05, 1, (5, 6)), axis=0)).astype(np.float32)
    buckets = rng.integers(0, 6, 50)
    correction = rng.uniform(0, 8, 50).astype(np.float32)
    survival = request_survivals(table, buckets, correction)
    assert survival.shape == (5, 50)
    assert (np.diff(survival, axis=0) <= 0).all()
    assert (survival >= 0).all() and (survival <= 1).all()
    never_rejected = request_survivals(table, buckets, np.zeros(50, np.float32))
    assert (never_rejected == 1).all()


def test_buckets_are_digits_by_edges_reached() -> None:
    rng = np.random.default_rng(1)
    edges = [np.array([-0.5, 0.34, 0.99]), np.array([3.0, 5.0])]
    features = [rng.choice([-1, -0.5, 0, 0.34, 1.0], 200), rng.choice([0, 3, 4, 5, 9.0], 200)]
    expected = [
        3 * sum(a >= e for e in edges[0]) + sum(b >= e for e in edges[1])
        for a, b in zip(*features, strict=True)
    ]
    assert bucket_index(edges, features).tolist() == expected
    assert bucket_index([], []).tolist() == [0]


def test_fixed_choice_promises_nothing() -> None:
    choice = Choice.fixed(np.array([1, 2]), "own")
    assert (choice.source, choice.gain, choice.mode) == ("own", 0.0, RAGGED)
