"""Turns: each arm on a clock of its own, which stands still while others work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from virtual_engine import VirtualEngine

from smartspec.lab.demo import turns
from smartspec.lab.demo.player import Play, PlayError, play
from smartspec.lab.demo.schedule import Arrival, Prompt
from smartspec.lab.demo.turns import Lane, take_turns


class Machine:
    """What the arms' engines share: its time, its pace, and who works."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.turns: list[Shared] = []

    @property
    def pace(self) -> float:
        """Half as fast for 10 s out of 20."""
        return 2.0 if self.now_s % 20.0 < 10.0 else 1.0


class Shared(VirtualEngine):
    """An engine that moves the machine's clock, and works only while it is not held."""

    def __init__(self, machine: Machine, changing: bool = False, **how: Any) -> None:
        self.machine, self.changing = machine, changing
        super().__init__(**how)
        self.held = True
        self.deaf = False  # to ``hold``
        self.left_s = 0.0  # of the step under way, when it is told to hold
        self.told: list[str] = []
        self._fixed_s = self.fixed_s

    @property
    def now_s(self) -> float:
        return self.machine.now_s

    @now_s.setter
    def now_s(self, value: float) -> None:
        if value:  # set to 0 in the beginning
            self.machine.now_s = value

    def submit(self, request_id: str, prompt: Prompt, max_tokens: int) -> None:
        super().submit(request_id, prompt, max_tokens)
        self.told.append("submit")

    def hold(self) -> None:
        if self.deaf:
            self.stalled = True
            return
        self.now_s += self.left_s
        self._say(event="held", t_s=0.0)  # after what its last step brought
        self.held = True
        self.told.append("hold")

    def resume(self) -> None:
        self.held = False
        self.machine.turns.append(self)
        self.told.append("resume")

    def _step(self) -> None:
        assert not self.held, "worked in another's turn"
        if self.changing:
            self.fixed_s = self._fixed_s * self.machine.pace
        super()._step()


ARRIVALS = [
    Arrival(0.4 * i, Prompt(f"p{i}", "chat", "?", 5 + 7 * i % 30), "busy") for i in range(40)
]


class OnLane:
    """A contender."""

    def __init__(self, engine: Shared, arrivals: Sequence[Arrival] = ARRIVALS) -> None:
        self.lane = Lane(engine, engine.clock)
        self.playing = Play(arrivals, self.lane, tag="t", clock=self.lane.clock)


def latencies(player: OnLane) -> list[float]:
    return [request.latency_s for request in player.playing.played.requests]


def no_look(place: int) -> None:
    pass


def test_arms_measure_what_they_would_alone_when_they_take_turns() -> None:
    costs = ({"each_s": 0.01}, {"each_s": 0.03}, {"fixed_s": 0.1})
    alone = []
    for cost in costs:
        engine = Shared(Machine(), **cost)
        engine.held = False
        played = play(ARRIVALS, engine, tag="t", clock=engine.clock)
        alone.append([request.latency_s for request in played.requests])
    machine = Machine()
    players = [OnLane(Shared(machine, **cost)) for cost in costs]
    looked: list[int] = []
    take_turns(players, np.random.default_rng(0), looked.append, turn_s=0.5)
    for player, expected in zip(players, alone, strict=True):
        assert latencies(player) == pytest.approx(expected, abs=1e-6)
        assert player.playing.played.end_s == player.playing.now_s
    assert set(looked) == {0, 1, 2}
    assert len(machine.turns) > 60


def test_equal_arms_are_equal_when_the_machine_changes_its_pace() -> None:
    machine = Machine()
    players = [OnLane(Shared(machine, changing=True)) for _ in range(2)]
    take_turns(players, np.random.default_rng(0), no_look, turn_s=0.5)
    one, other = (np.mean(latencies(player)) for player in players)
    assert one == pytest.approx(other, rel=0.05)
    after = []
    for begin_s in (100.0, 110.0):  # one after the other they meet another machine each
        engine = Shared(Machine(), changing=True)
        engine.held, engine.machine.now_s = False, begin_s
        played = play(ARRIVALS, engine, tag="t", clock=engine.clock)
        after.append(np.mean([request.latency_s for request in played.requests]))
    assert max(after) / min(after) > 1.1


def test_order_is_drawn_anew_for_each_round() -> None:
    machine = Machine()
    engines = [Shared(machine) for _ in range(3)]
    take_turns([OnLane(one) for one in engines], np.random.default_rng(0), no_look, turn_s=0.5)
    order = [engines.index(one) for one in machine.turns[:30]]
    rounds = [tuple(order[i : i + 3]) for i in range(0, 30, 3)]
    assert all(sorted(one) == [0, 1, 2] for one in rounds)
    assert len(set(rounds)) > 2


def test_a_turn_is_as_long_as_the_step_that_it_ends_with() -> None:
    machine = Machine()
    engine = Shared(machine)
    engine.left_s = 3.0
    one = OnLane(engine)
    one.lane.go_on()
    one.lane.poll(0.1)
    began = one.lane.clock()
    one.lane.hold()
    assert one.lane.clock() == pytest.approx(began + 3.0)
    machine.now_s += 50.0
    assert one.lane.clock() == pytest.approx(began + 3.0)
    one.lane.go_on()
    machine.now_s += 1.0
    assert one.lane.clock() == pytest.approx(began + 4.0)


def test_what_is_due_when_a_turn_begins_is_in_its_first_step() -> None:
    machine = Machine()
    engine = Shared(machine)
    engine.left_s = 1.0  # in which the second request arrives
    arrivals = [Arrival(at_s, Prompt(f"p{at_s}", "chat", "?", 40), "busy") for at_s in (0.0, 0.9)]
    contenders = [OnLane(engine, arrivals), OnLane(Shared(machine))]
    take_turns(contenders, np.random.default_rng(0), no_look, turn_s=0.5)
    assert engine.told[:5] == ["submit", "resume", "hold", "submit", "resume"]


def test_who_is_left_alone_is_not_held() -> None:
    machine = Machine()
    short, long = Shared(machine), Shared(machine)
    contenders = [OnLane(short, ARRIVALS[:3]), OnLane(long)]
    take_turns(contenders, np.random.default_rng(0), no_look, turn_s=0.5)
    assert 0 < short.told.count("hold") < 10
    assert long.told.count("hold") <= short.told.count("hold") + 1


def test_worker_is_left_free_when_all_is_answered() -> None:
    engine = Shared(Machine())
    take_turns([OnLane(engine)], np.random.default_rng(0), no_look)
    assert not engine.held


def test_turns_end_with_an_error_when_a_worker_cannot_be_held(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(turns, "STALLED_S", 3.0)
    engine = Shared(Machine())
    engine.deaf = True
    with pytest.raises(PlayError, match="has not finished its step for 3 s"):
        contenders = [OnLane(engine), OnLane(Shared(engine.machine))]
        take_turns(contenders, np.random.default_rng(0), no_look, turn_s=0.5)
