"""The player: open loop, and latencies from the scheduled arrival on its own clock."""

from __future__ import annotations

import math
from typing import Any

import pytest
from virtual_engine import VirtualEngine

from smartspec.lab.demo import calibration
from smartspec.lab.demo.player import Played, PlayError, RequestRecord, burst, play
from smartspec.lab.demo.schedule import Arrival, Prompt


def prompt(number: int, max_tokens: int = 4) -> Prompt:
    return Prompt(f"p{number}", "chat", "?", max_tokens)


def play_on(engine: VirtualEngine, arrivals: list[Arrival]) -> Played:
    return play(arrivals, engine, tag="t", clock=engine.clock)


def test_requests_are_sent_on_time_when_the_engine_is_full() -> None:
    engine = VirtualEngine(fixed_s=0.5, max_num_running=1)
    arrivals = [Arrival(0.6 * i, prompt(i), "busy") for i in range(8)]
    play_on(engine, arrivals)
    for arrival in arrivals:
        late_s = engine.submitted_at[f"t/{arrival.prompt.id}"] - arrival.at_s
        assert 0 <= late_s < 0.52  # at most the step under way: never held back by answers


def test_latency_counts_from_the_scheduled_arrival_when_sent_late() -> None:
    engine = VirtualEngine(fixed_s=1.0, each_s=0.0, max_num_running=1)
    played = play_on(
        engine, [Arrival(0.0, prompt(0, 2), "quiet"), Arrival(0.5, prompt(1, 2), "quiet")]
    )
    first, second = played.requests
    assert first.ttft_s == pytest.approx(1.005)
    assert first.latency_s == pytest.approx(2.005)
    assert first.tpot_s == pytest.approx(1.0)
    assert second.arrived_s == 0.5
    assert second.latency_s == pytest.approx(2.005 + 2.005 - 0.5)


def test_answers_are_complete_when_played() -> None:
    engine = VirtualEngine()
    played = play_on(engine, burst([prompt(i, 3 + i) for i in range(6)], "burst"))
    assert [r.num_tokens for r in played.requests] == [3 + i for i in range(6)]
    assert played.requests[0].text == "t1 t2 t3 "
    assert played.num_tokens == sum(3 + i for i in range(6))
    assert played.num_finished == 6
    assert max(step.num_running for step in played.steps) <= 4
    assert any(step.num_waiting for step in played.steps)


def test_events_of_another_play_are_ignored_when_they_come_late() -> None:
    engine = VirtualEngine()
    engine.events.append((0.0, {"event": "token", "id": "old/p0", "text": "x", "num_tokens": 9}))
    engine.events.append((0.0, {"event": "finished", "id": "old/p0", "reason": "length"}))
    assert play_on(engine, burst([prompt(0)], "burst")).num_tokens == 4


class Busy(VirtualEngine):
    """Says nothing to the first polls."""

    polls = 3

    def poll(self, timeout_s: float) -> tuple[float, dict[str, Any]] | None:
        if not self.events and self.polls:
            self.polls -= 1
            self.now_s += timeout_s
            return None
        return super().poll(timeout_s)


def test_play_goes_on_when_what_is_left_of_another_play_is_long_ago() -> None:
    engine = Busy()
    engine.now_s = 1000.0
    engine.events.append((2.0, {"event": "stats"}))
    assert play_on(engine, burst([prompt(0)], "burst")).num_tokens == 4


@pytest.mark.parametrize(
    "said",
    [
        {"event": "error", "id": "t/p0", "message": "no room"},
        {"event": "finished", "id": "t/p0", "reason": "cancelled"},
    ],
)
def test_play_fails_when_a_request_is_not_answered(said: dict[str, str]) -> None:
    engine = VirtualEngine()
    engine.fail = said
    with pytest.raises(PlayError, match=r"no room|cancelled"):
        play_on(engine, burst([prompt(0)], "burst"))


def test_play_fails_when_the_engine_stalls() -> None:
    engine = VirtualEngine()
    engine.stalled = True
    with pytest.raises(PlayError, match="1 requests open"):
        play_on(engine, burst([prompt(0)], "burst"))


def test_play_waits_when_nothing_arrives_for_long() -> None:
    played = play_on(VirtualEngine(), [Arrival(500.0, prompt(0), "quiet")])
    assert played.requests[0].latency_s < 1


def test_time_per_token_is_unknown_when_the_answer_is_one_token() -> None:
    assert math.isnan(RequestRecord("a", "chat", "quiet", 0.0, 1.0, 1.0, num_tokens=1).tpot_s)


def test_capacity_equals_that_of_a_steady_stream_when_calibrated_on_a_burst() -> None:
    """The engine's own arithmetic: what a long full batch really serves."""
    prompts = [prompt(i, 10 + i % 3) for i in range(12)]
    burst_engine, steady_engine = VirtualEngine(), VirtualEngine()
    seen = play_on(burst_engine, burst(prompts, "calibration"))
    found = calibration.calibrate(seen.requests, seen.steps, max_num_running=4)
    many = [prompt(i, 10 + i % 3) for i in range(400)]
    steady = play_on(steady_engine, burst(many, "steady"))
    assert found.capacity_requests_per_s == pytest.approx(400 / steady.end_s, rel=0.03)
    assert found.capacity_requests_per_s > 1.01 * 12 / seen.end_s
    assert found.single_step_s == pytest.approx(0.03)


def test_calibration_is_refused_when_there_is_too_little_to_see() -> None:
    seen = play_on(VirtualEngine(), burst([prompt(0, 2)], "calibration"))
    with pytest.raises(ValueError, match="to calibrate on"):
        calibration.calibrate(seen.requests, seen.steps, max_num_running=4)
