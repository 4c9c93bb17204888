"""The demonstration hears why the daemon decides what it decides."""

from __future__ import annotations

import time
from pathlib import Path

from smartspec.daemon.event_bus import DecisionEvent, EventBus, NoteEvent, StepEvent
from smartspec.lab.demo.monitor import Monitor


def test_reasons_and_warnings_are_kept_when_published(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/bus.sock"
    bus = EventBus.bind(endpoint)
    monitor = Monitor(endpoint)
    try:
        deadline = time.monotonic() + 10
        while not monitor.notes and time.monotonic() < deadline:  # until the connection stands
            bus.publish(StepEvent(engine="demo", seq=1, num_running=1, step_s=0.1))
            for seq, reason in enumerate(("first", "second")):
                bus.publish(
                    DecisionEvent(
                        engine="demo", policy_seq=seq, report_seq=seq, steering=True, reason=reason
                    )
                )
            bus.publish(NoteEvent(kind="detail", text="not worth a word", level="info"))
            bus.publish(NoteEvent(kind="drift", text="costs have changed", level="warning"))
            time.sleep(0.02)
            monitor.drain()
    finally:
        monitor.close()
        bus.close()
    assert monitor.reason == "second"
    assert set(monitor.notes) == {"costs have changed"}


def test_reason_is_empty_when_nothing_was_heard(tmp_path: Path) -> None:
    monitor = Monitor(f"ipc://{tmp_path}/nobody.sock")
    monitor.drain()
    assert monitor.reason == ""
    monitor.close()
