"""The figures of a schedule of change: from runs to ratios, bounds and the worst of all set-ups."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench_shift import figures_of, read

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
