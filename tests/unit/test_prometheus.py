"""What is exported, of engines that work, rest and come back, and of the daemon itself."""

from __future__ import annotations

import re
import socket
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml
from fakes import Clock, free_port
from loop_rig import Rig
from prometheus_client import generate_latest

from smartspec.daemon.event_bus import (
    NOTES,
    BusEvent,
    EngineEvent,
    GainEvent,
    LoopEvent,
    NoteEvent,
    PresentEvent,
    StepEvent,
)
from smartspec.daemon.telemetry.engine_state import IDLE_S, EngineState
from smartspec.daemon.telemetry.process import PORT_RETRY_S, Port, Telemetry
from smartspec.daemon.telemetry.prometheus import PrometheusExporter
from smartspec.daemon.telemetry.redis_store import Keys


class Events:
    """A subscriber with events at hand."""

    def __init__(self) -> None:
        self.num_missed: dict[str, int] = {}
        self.waiting: deque[BusEvent] = deque()

    def poll(self, timeout_s: float = 0.0) -> BusEvent | None:
        return self.waiting.popleft() if self.waiting else None


class States:
    """As much of a store as is told of engines."""

    up, num_buffered, num_failures, num_lost = True, 0, 0, 0

    def __init__(self) -> None:
        self.of: dict[str, EngineState] = {}

    def add(self, event: BusEvent) -> None:
        pass

    def put_states(self, states: Iterable[EngineState]) -> None:
        self.of.update((state.engine, state) for state in states)


class Watched:
    """A telemetry process without the process."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.events = Events()
        self.states = States()
        self.exporter = PrometheusExporter()
        store: Any = self.states
        subscriber: Any = self.events
        self.telemetry = Telemetry(subscriber, store, self.exporter, clock=self.clock)

    def hear(self, *events: BusEvent, after_s: float = 0.0) -> dict[str, float]:
        """Take in events; returns all that is exported then."""
        self.clock.now += after_s
        self.events.waiting.extend(events)
        self.telemetry.turn()
        return exported(self.exporter)


def exported(exporter: PrometheusExporter) -> dict[str, float]:
    lines = generate_latest(exporter.registry).decode().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {series: float(value) for series, value in pairs}


def step(t_s: float = 50.0) -> StepEvent:
    return StepEvent(
        engine="a",
        seq=1,
        num_running=4,
        num_waiting=2,
        step_s=0.05,
        num_emitted=16,
        t_s=t_s,
    )


def loop_event(**more: Any) -> LoopEvent:
    return LoopEvent(num_engines=1, **{"started_s": 1_790_000_000.123456, **more})


@pytest.fixture
def watched() -> Watched:
    return Watched()


# -- what alerts stand on -------------------------------------------------------------------------


def test_first_of_whatever_is_alerted_on_is_an_increase(repository: Path) -> None:
    """To Prometheus, a counter that appears at 1 has not increased: it has to be there at 0."""
    rig = Rig()
    rig.cycle()
    exporter = PrometheusExporter()
    exporter.note(rig.bus.of(LoopEvent)[-1], None)
    there = exported(exporter)
    rules = (repository / "dashboards" / "alerts.yml").read_text("utf-8")
    expressions = [r["expr"] for g in yaml.safe_load(rules)["groups"] for r in g["rules"]]
    counters = [
        found
        for expression in expressions
        for found in re.findall(r"increase\(\s*(\w+)(?:\{([^}]*)\})?\[", expression)
    ]
    assert len(counters) >= 7
    for name, matchers in counters:
        labels = re.findall(r'(\w+)(=~|!~|=)"([^"]*)"', matchers)
        for label, how, values in labels:
            for value in values.split("|") if how != "!~" else ():
                series = [
                    s for s in there if s.startswith(name + "{") and f'{label}="{value}"' in s
                ]
                assert series, f"{name} with {label}={value}"
                assert all(there[one] == 0 for one in series)
        assert labels or there[name] == 0


def test_every_note_on_the_bus_is_of_a_known_kind(repository: Path) -> None:
    """Those of `narration.tell` are typed; the service publishes its own."""
    modules = [*(repository / "daemon").glob("*.py"), *(repository / "daemon/process").glob("*.py")]
    found = {
        pair
        for module in modules
        for pair in re.findall(r'NoteEvent\(\s*kind="(\w+)", level="(\w+)"', module.read_text())
    }
    assert found and found <= set(NOTES.items())


# -- engines --------------------------------------------------------------------------------------

LOAD = {
    'smartspec_running_requests{engine="a"}': 4,
    'smartspec_waiting_requests{engine="a"}': 2,
    'smartspec_goodput_tokens_per_second{engine="a"}': 320,
}


def test_idle_engine_has_nothing_to_do_and_does_nothing(watched: Watched) -> None:
    assert watched.hear(step()).items() >= LOAD.items()
    assert watched.hear(after_s=IDLE_S - 1).items() >= LOAD.items(), "a long step is no idleness"
    assert watched.hear(after_s=1).items() >= dict.fromkeys(LOAD, 0).items()
    state = watched.states.of["a"]
    assert (state.num_running, state.num_waiting, state.goodput) == (0, 0, 0.0)
    assert state.updated_s == 50.0, "that it is idle is no word of it"
    assert watched.hear(step()).items() >= LOAD.items()


def test_nothing_is_exported_of_an_engine_that_leaves_when_it_turns_idle(watched: Watched) -> None:
    watched.hear(step())
    there = watched.hear(EngineEvent(engine="a", epoch=1, state="left"), after_s=IDLE_S)
    assert not [series for series in there if 'engine="a"' in series]


def test_idle_engine_is_known_to_those_who_come_later_and_is_no_news(watched: Watched) -> None:
    present = PresentEvent(
        engine="a", epoch=7, state="connected", fingerprint={"target": "m"}, t_s=60.0
    )
    gain = GainEvent(engine="a", stance="control", arm="smartspec", t_s=60.0)
    there = watched.hear(present, gain)
    assert there['smartspec_engine_connected{engine="a"}'] == 1
    assert there['smartspec_stance{engine="a",stance="control"}'] == 1
    assert there['smartspec_engine_events_total{state="connected"}'] == 0
    assert watched.states.of["a"].fingerprint == {"target": "m"}
    assert Keys("").stream_of(present) is None, "nothing has happened"
    there = watched.hear(after_s=IDLE_S)
    assert there['smartspec_running_requests{engine="a"}'] == 0
    watched.hear(step(t_s=61.0))
    later = PresentEvent(engine="a", epoch=7, state="connected", t_s=99.0)
    watched.hear(later, GainEvent(engine="a", stance="control", arm="own", t_s=99.0))
    assert watched.states.of["a"].updated_s == 61.0, "nothing was heard of it since"
    watched.hear(EngineEvent(engine="a", epoch=7, state="left", t_s=100.0))
    assert watched.states.of["a"].updated_s == 100.0


# -- the daemon -----------------------------------------------------------------------------------


def test_process_of_the_daemon_is_told_apart_from_that_of_telemetry(watched: Watched) -> None:
    usage = {"cpu_user_s": 3.5, "cpu_system_s": 0.25, "resident_bytes": 64 << 20}
    there = watched.hear(loop_event(version="1.2", protocol=1, **usage))
    assert there['smartspec_daemon_cpu_seconds_total{mode="user"}'] == 3.5
    assert there['smartspec_daemon_cpu_seconds_total{mode="system"}'] == 0.25
    assert there["smartspec_daemon_resident_memory_bytes"] == 64 << 20
    assert there["process_resident_memory_bytes"] != 64 << 20
    assert there["smartspec_daemon_start_time_seconds"] == 1_790_000_000.123456
    assert there['smartspec_build_info{protocol="1",version="1.2"}'] == 1
    there = watched.hear(loop_event(version="1.3", protocol=1))
    builds = {series for series in there if series.startswith("smartspec_build_info")}
    assert builds == {'smartspec_build_info{protocol="1",version="1.3"}'}


def test_failed_reload_is_shown_until_one_goes_well(watched: Watched) -> None:
    name = "smartspec_config_reload_success"
    assert exported(watched.exporter)[name] == 1
    assert watched.hear(loop_event(is_reloaded=False))[name] == 0
    assert watched.hear(loop_event())[name] == 1


def test_notes_are_counted_by_kind_and_level(watched: Watched) -> None:
    there = watched.hear(NoteEvent(kind="fault", level="error", text="x"))
    assert there['smartspec_notes_total{kind="fault",level="error"}'] == 1
    assert there['smartspec_notes_total{kind="drift",level="warning"}'] == 0


# -- the port -------------------------------------------------------------------------------------


def test_port_is_asked_for_again_when_it_was_taken(caplog: pytest.LogCaptureFixture) -> None:
    clock, exporter, number = Clock(), PrometheusExporter(), free_port()
    port = Port(exporter, number, "127.0.0.1", clock)
    try:
        with socket.create_server(("127.0.0.1", number)):
            for _ in range(2):
                port.open()
                clock.now += PORT_RETRY_S
        assert caplog.text.count("cannot listen") == 1
        clock.now -= 1.0
        port.open()
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", number), timeout=1.0)
        clock.now += 1.0
        port.open()
        socket.create_connection(("127.0.0.1", number), timeout=5.0).close()
        clock.now += PORT_RETRY_S
        port.open()  # it is: nothing more is to be done
    finally:
        exporter.close()
