"""The demonstration's benchmark: paired statistics, and what is kept of an interrupted run."""

from __future__ import annotations

import io
import json
import math
import time
from collections import deque
from pathlib import Path
from typing import Any

import bench_demo
import numpy as np
import pytest
from paired import paired_ratio
from rich.console import Console

from smartspec.lab.demo import session as sessions
from smartspec.lab.demo.live import Display
from smartspec.lab.demo.schedule import Arrival, Phase, Prompt, Schedule


def test_ratio_is_geometric_and_bounded_when_paired() -> None:
    ratio = paired_ratio([1.0, 4.0], [2.0, 2.0])
    assert ratio.value == pytest.approx(1.0)
    # t(0.95, 1) = 6.3138; the logs are -ln 2 and ln 2, so s / sqrt(2) = ln 2.
    assert ratio.upper95 == pytest.approx(math.exp(6.313752 * math.log(2)), rel=1e-5)


def test_common_noise_cancels_when_paired() -> None:
    pace = np.array([1.0, 1.7, 0.6, 2.2, 1.1, 0.9])
    ratio = paired_ratio((0.8 * pace).tolist(), pace.tolist())
    assert ratio.value == pytest.approx(0.8)
    assert ratio.upper95 == pytest.approx(0.8)


def test_bound_covers_the_truth_when_drawn_many_times() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        logs = rng.normal(math.log(0.95), 0.05, 6)
        covered += paired_ratio(np.exp(logs).tolist(), [1.0] * 6).upper95 >= 0.95
    assert 0.93 <= covered / 1000 <= 0.97


def test_bound_is_unknown_when_there_is_one_pair() -> None:
    assert math.isnan(paired_ratio([1.0], [2.0]).upper95)


@pytest.mark.parametrize(("one", "other"), [([], []), ([1.0], [1.0, 2.0]), ([0.0], [1.0])])
def test_ratio_is_refused_when_there_are_no_proper_pairs(
    one: list[float], other: list[float]
) -> None:
    with pytest.raises(ValueError):
        paired_ratio(one, other)


def row(repetition: int, latencies: dict[str, tuple[float, float]]) -> dict[str, Any]:
    """A repetition: mean latency by arm of the phases quiet and busy."""
    return {
        "repetition": repetition,
        "num_different_answers": 1,
        "arms": {
            name: {
                "overall": {"latency_mean_s": (quiet + busy) / 2},
                "phases": {"quiet": {"latency_mean_s": quiet}, "busy": {"latency_mean_s": busy}},
            }
            for name, (quiet, busy) in latencies.items()
        },
    }


def test_worst_phase_is_reported_when_another_one_is_better() -> None:
    rows = [
        row(i, {"none": (2, 8), "static_3": (1, 9), "static_5": (1.5, 20), "smartspec": (1.1, 4)})
        for i in range(6)
    ]
    figures = bench_demo.figures_of(rows)
    assert figures["quiet_vs_best"] == pytest.approx(1.1)  # static_3 is the best there
    assert figures["busy_vs_best"] == pytest.approx(0.5)  # and none here
    assert figures["worst_phase_vs_best"] == pytest.approx(1.1)
    assert figures["worst_phase_vs_best_upper95"] == pytest.approx(1.1)
    assert figures["overall_vs_best"] == pytest.approx(2.55 / 5.0)
    assert figures["num_repetitions"] == 6
    assert figures["num_different_answers"] == 6


def test_best_is_the_best_over_all_repetitions_when_luck_changes() -> None:
    lucky = {
        "none": (1.0, 1.0),
        "static_3": (3.0, 3.0),
        "static_5": (9.0, 9.0),
        "smartspec": (2.0, 2.0),
    }
    unlucky = lucky | {"none": (4.0, 4.0), "static_3": (1.0, 1.0)}
    figures = bench_demo.figures_of([row(0, lucky), row(1, unlucky)])
    assert figures["quiet_vs_best"] == pytest.approx(math.sqrt(2 / 3 * 2 / 1))  # static_3: mean 2
    assert figures["quiet_vs_best_each"] == pytest.approx(2.0)


def test_repetitions_are_read_when_the_last_line_was_cut_off(tmp_path: Path) -> None:
    raw = tmp_path / "demo_raw.jsonl"
    assert bench_demo.read(raw) == []
    kept = "\n".join(json.dumps({"repetition": i, "by_turns": True}) for i in (1, 0))
    raw.write_text(kept + '\n{"rep')
    assert [one["repetition"] for one in bench_demo.read(raw)] == [0, 1]


def test_repetitions_are_refused_when_their_arms_were_played_one_after_the_other(
    tmp_path: Path,
) -> None:
    raw = tmp_path / "demo_raw.jsonl"
    raw.write_text(json.dumps({"repetition": 0}) + "\n")
    with pytest.raises(ValueError, match="move it away"):
        bench_demo.read(raw)


class Answering:
    """A worker that answers at once."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        self.proposer = arguments[arguments.index("--proposer") + 1]
        self.told: list[tuple[str, int | None]] = []
        self.asked: list[str] = []
        self._events: deque[dict[str, Any]] = deque()

    def wait_ready(self, on_wait: Any) -> dict[str, Any]:
        return {"proposer": self.proposer}

    def hold(self) -> None:
        self._events.append({"event": "held"})

    def resume(self) -> None:
        pass

    def set_speculation(self, mode: str, length: int | None = None) -> None:
        self.told.append((mode, length))

    def submit(self, request_id: str, prompt: Prompt, max_tokens: int) -> None:
        self.asked.append(prompt.id)
        self._events.append({"event": "token", "id": request_id, "text": "a", "num_tokens": 1})
        finished = {"event": "finished", "id": request_id, "reason": "length"}
        self._events.append(finished | {"num_drafted": 0, "num_accepted": 0})

    def poll(self, timeout_s: float) -> tuple[float, dict[str, Any]] | None:
        return (time.monotonic(), self._events.popleft()) if self._events else None

    def stop(self) -> None:
        pass


def test_each_arm_is_played_by_a_worker_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "WorkerProcess", Answering)
    prompt = Prompt("p0", "chat", "?", 4)
    phases = (Phase("quiet", 0.0, 0.1, 1.0),)
    schedule = Schedule(phases, (Arrival(0.0, prompt, "quiet"),))
    arms = [arm for arm in bench_demo.ARM_SETS["kinds"] if arm.length is not None]
    with sessions.Session(tmp_path, Display(Console(file=io.StringIO())), arms) as session:
        assert session.ready == {"proposer": "lookup"}
        for seed in range(2):
            played = session.play(schedule, [prompt], seed)
        workers: dict[str, Any] = dict(session._workers)
    assert [len(one.played.requests) for one in played] == [1] * 4
    assert [one.arm for one in played] == arms
    for arm in arms:
        assert workers[arm.name].proposer == arm.proposer
        assert workers[arm.name].told == [("static", arm.length)] * 2
        assert workers[arm.name].asked == ["p0"] * 4
