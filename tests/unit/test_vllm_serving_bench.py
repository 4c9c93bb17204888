"""What the benchmark of vLLM works out from what it measured; no vLLM is needed."""

from __future__ import annotations

import pytest
from bench_vllm_serving import Rate, complete, figures_of, stretches, table_of

from smartspec.lab.demo.schedule import load_prompts

SPEEDS = {
    "none": {1: 20.0, 4: 70.0, 8: 100.0, 16: 130.0},
    "static_0": {1: 20.0, 4: 70.0, 8: 100.0, 16: 130.0},
    "static_1": {1: 30.0, 4: 80.0, 8: 110.0, 16: 125.0},
    "static_3": {1: 35.0, 4: 85.0, 8: 105.0, 16: 120.0},
    "static_5": {1: 40.0, 4: 75.0, 8: 90.0, 16: 110.0},
}


def row(repetition: int, arm: str, latency_s: float, part: str = "rate_0") -> dict[str, object]:
    return {
        "repetition": repetition,
        "part": part,
        "arm": arm,
        "latency_mean_s": latency_s,
        "ttft_mean_s": 0.1,
        "drafted": 5.0,
        "accepted": 3.0,
        "num_tokens": 10,
    }


def test_table_has_the_fastest_length_at_every_batch_size() -> None:
    rows = table_of(SPEEDS)
    length = {size: k for low, high, k in rows for size in range(low, high + 1)}
    assert sorted(length) == list(range(1, 17))  # no gap, no overlap
    assert [length[size] for size in (1, 4, 8, 16)] == [5, 3, 1, 0]


def test_table_does_not_rise_with_the_batch_where_the_pilot_does() -> None:
    speeds = {name: dict(values) for name, values in SPEEDS.items()}
    speeds["static_5"][16] = 131.0  # by luck
    assert [row[2] for row in table_of(speeds)] == [5, 3, 1, 0]


def test_best_other_is_the_arm_of_the_lowest_mean() -> None:
    rows = [
        row(i, arm, latency * (1.1 if i else 1.0))
        for i in range(2)
        for arm, latency in (("none", 2.0), ("static_5", 1.0), ("table", 1.2), ("smartspec", 0.9))
    ]
    figures = figures_of(rows)
    assert figures["rate_0_vs_best"] == pytest.approx(0.9)
    assert figures["rate_0_vs_none"] == pytest.approx(0.45)
    assert figures["rate_0_smartspec_drafted_per_token"] == pytest.approx(0.5)


def test_repetitions_cut_off_are_left_out() -> None:
    rows = [row(i, arm, 1.0) for i in range(2) for arm in ("none", "smartspec")]
    assert len(complete(rows[:-1])) == 2


def test_load_is_the_same_for_every_seed() -> None:
    prompts = load_prompts()
    for seed in range(5):
        quiet, busy = stretches(prompts, [Rate(10.0, 0.5), Rate(10.0, 20.0)], seed)
        assert (quiet.after_s, quiet.rate, len(quiet.prompts)) == (0.0, 0.5, 5)
        assert (busy.after_s, busy.rate, len(busy.prompts)) == (10.0, 20.0, 200)
        assert len({one.id for one in (*quiet.prompts, *busy.prompts)[:72]}) == 72
        assert quiet.seed != busy.seed
