"""What the loop tells of itself and of its engines, to whoever listens."""

from __future__ import annotations

from importlib.metadata import version

import pytest
from fakes import step_report
from loop_rig import Rig

from smartspec.daemon.admission.curve_keys import KeyFileError
from smartspec.daemon.event_bus import GainEvent, LoopEvent, PresentEvent
from smartspec.daemon.sessions import REMIND_S
from smartspec.engine_adapter import messages as wire


def test_daemon_says_which_it_is_and_what_it_uses(rig: Rig) -> None:
    rig.clock.now += 1.1
    rig.cycle()
    event = rig.bus.of(LoopEvent)[-1]
    assert event.started_s == 7.0
    assert (event.version, event.protocol) == (version("smartspec"), wire.PROTOCOL_VERSION)
    assert event.cpu_user_s > 0
    assert event.resident_bytes is not None and 10 << 20 < event.resident_bytes < 10 << 30
    assert event.counters["telemetry_restarts"] == event.counters["frames_refused"] == 0
    rig.loop.vitals.num_telemetry_restarts = 2
    rig.clock.now += 1.1
    rig.cycle()
    assert rig.bus.of(LoopEvent)[-1].counters["telemetry_restarts"] == 2


def test_reload_has_failed_when_the_list_of_engines_cannot_be_read(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise KeyFileError("no such file")

    monkeypatch.setattr(rig.transport, "reload", refuse)
    rig.loop.apply(rig.settings)
    rig.clock.now += 1.1
    rig.cycle()
    assert not rig.bus.of(LoopEvent)[-1].is_reloaded


def test_readers_who_come_later_are_told_of_idle_engines(rig: Rig) -> None:
    rig.bus.events.clear()
    for _ in range(60):
        rig.clock.now += 1.0
        rig.cycle()
    (first, *more) = rig.bus.of(PresentEvent)
    assert (first.engine, first.epoch, first.state) == ("gpu0", 1, "connected")
    assert first.limits["max_length"] and first.fingerprint
    assert len(more) + 1 == len(rig.bus.of(GainEvent)) == pytest.approx(60 / REMIND_S, abs=1)
    rig.cycle(b"a", wire.Goodbye(epoch=1))
    rig.bus.events.clear()
    rig.clock.now += 2 * REMIND_S
    rig.cycle()
    assert not rig.bus.of(PresentEvent)


def test_every_decision_is_a_line_with_its_engine_at_debug(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    reason = rig.cycle(b"a", step_report(1))
    (record,) = [r for r in caplog.records if r.levelname == "DEBUG"]
    assert record.message == f"engine gpu0: {reason}"
    assert (record.__dict__["event"], record.__dict__["engine"]) == ("decision", "gpu0")
