"""The figures of a schedule of change: from runs to ratios, bounds and the worst of all set-ups."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from bench_shift import ACCEPTANCE, UNCHECKED, Posterior, figures_of, set_up, share
from kept_runs import read

from smartspec.engine_adapter.base import DecodeBatch, StepFacts
from smartspec.engine_adapter.simulator.engine import Present
from smartspec.lab.simulation.world import serve

SEEDS = (0, 1, 2)


def runs(latency: dict[str, float], setting: str = "h100_eagle") -> dict[tuple, dict[str, float]]:
    """Runs of all seeds, each at a pace of its own that all policies share."""
    return {
        (setting, 64, seed, policy): {"mean": (1 + seed) * s, "geometric": (1 + seed) * s / 2}
        for policy, s in latency.items()
        for seed in SEEDS
    }


def test_ratios_are_against_the_best_of_each_kind_when_all_were_played() -> None:
    found = runs(
        {"none": 4.0, "static2": 2.0, "static5": 3.0, "tiers": 2.4, "bandit": 1.9}
        | {"smartspec": 1.7, "informed": 1.6, "clairvoyant": 1.0}
    )
    figures = figures_of(found, [("h100_eagle", 64)], SEEDS)
    assert figures["h100_eagle_64_mean_best_static"] == 2
    assert figures["mean_vs_best_static"] == pytest.approx(0.85)
    assert figures["geo_vs_best_online"] == pytest.approx(1.7 / 1.9)
    assert figures["mean_vs_informed"] == pytest.approx(1.7 / 1.6)
    assert figures["mean_vs_clairvoyant"] == pytest.approx(1.7)
    assert figures["share_to_informed"] == pytest.approx(0.75)
    # What seeds have in common cancels: all ratios are the same, so that the bound is the value.
    assert figures["h100_eagle_64_mean_vs_informed_upper95"] == pytest.approx(1.7 / 1.6)


def test_worst_set_up_counts_when_there_are_several() -> None:
    near = {"static2": 2.0, "smartspec": 1.0, "informed": 1.0}
    far = {"static2": 2.0, "smartspec": 1.9, "informed": 1.0}
    found = runs(near) | runs(far, "a100_160m")
    figures = figures_of(found, [("h100_eagle", 64), ("a100_160m", 64)], SEEDS)
    assert figures["mean_vs_informed"] == pytest.approx(1.9)
    assert figures["share_to_informed"] == pytest.approx(0.1)
    assert figures["h100_eagle_64_mean_vs_informed"] == pytest.approx(1.0)


def test_share_is_left_out_when_there_is_no_way_to_informed() -> None:
    found = runs({"static2": 1.0, "smartspec": 1.1, "informed": 1.2})
    assert "share_to_informed" not in figures_of(found, [("h100_eagle", 64)], SEEDS)


def test_runs_are_read_again_when_the_last_line_was_cut_off(tmp_path: Path) -> None:
    row = {"setting": "h100_eagle", "limit": 64, "seed": 0, "policy": "none", "phase_s": 40.0}
    raw = tmp_path / "raw.jsonl"
    raw.write_text(json.dumps(row | {"mean": 2.0}) + "\n" + json.dumps(row)[:30])
    assert read(raw, 40.0)["h100_eagle", 64, 0, "none"]["mean"] == 2.0
    assert read(raw, 120.0) == {}


def test_share_is_of_means_with_a_margin_over_seeds() -> None:
    static, informed = [2.0, 4.0, 3.0], [1.0, 2.0, 2.0]
    found = share([1.5, 3.0, 2.5], static, informed)
    assert found == pytest.approx((0.5, 0.0))  # the same part of the way with every seed
    uneven = share([1.0, 4.0, 2.5], static, informed)
    assert uneven is not None and uneven[0] == pytest.approx(1.5 / 4) and uneven[1] > 0.3
    single = share([1.5], [2.0], [1.0])
    assert single is not None and single[0] == 0.5 and math.isnan(single[1])
    assert share([1.0], [1.0], [1.0]) is None


def test_posterior_is_that_of_the_phase_and_of_what_a_request_has_had_accepted() -> None:
    cell, phase = set_up("h100_eagle", 16, 0, 4.0)
    policy = Posterior(cell.draft, np.array(ACCEPTANCE)[phase], 6.0)
    engine = serve(policy, cell)
    everyone = np.arange(cell.traffic.size)
    survival = policy.survival(Present(everyone, everyone, 0, (), 1.0))
    assert survival.shape == (5, cell.traffic.size) and (np.diff(survival, axis=0) < 0).all()
    true = cell.outcomes.probability[cell.outcomes.offset]
    after = np.abs(survival[0] - true).mean()
    before = np.abs(np.array(ACCEPTANCE)[phase] - true).mean()
    assert engine.num_drafted > 1000 and after < 0.5 * before
    # Two accepted, and then one refused, of a request in the first phase, where the mean is 0.9.
    fresh = Posterior(cell.draft, np.array([0.9]), 6.0)
    fresh.engine = engine
    column = np.array([1], np.uint8)
    batch = DecodeBatch(column.astype(np.uint64), 5 * column, np.zeros((1, 1), np.float32))
    fresh.report(StepFacts(batch, 3 * column, 2 * column, 3 * column, 0.01, 0.01, 0.0, 10))
    one = np.zeros(1, np.int64)
    found = fresh.survival(Present(one, one, 0, (), 1.0))
    assert found[:2, 0] == pytest.approx([7.4 / 9, 7.4 / 9 * 8.4 / 10])


def test_what_lies_between_is_told_of_further_policies_where_they_were_played() -> None:
    found = runs({"static2": 2.0, "informed": 1.0, "smartspec": 1.4, "posterior": 1.2})
    figures = figures_of(found, [("h100_eagle", 64)], SEEDS)
    assert figures["h100_eagle_64_mean_posterior_share_to_informed"] == pytest.approx(0.8)
    assert figures["h100_eagle_64_mean_share_to_informed"] == pytest.approx(0.6)
    assert figures["share_to_informed"] == pytest.approx(0.6)
    assert UNCHECKED.control.probe_share == UNCHECKED.adoption.check_loss == 0.0
