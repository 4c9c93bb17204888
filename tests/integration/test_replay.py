"""A recording and its replay: the same settings decide the same, others differ."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import live_daemon
import msgspec
import numpy as np
import pytest
from fakes import Clock, FakeTransport, RecordingBus, step_report
from scripted_engine import hello
from typer.testing import CliRunner

from smartspec.daemon import cli, config, recording
from smartspec.daemon import record as command
from smartspec.daemon.control_loop import ControlLoop
from smartspec.daemon.event_bus import EventBus, FrameEvent, StepEvent, subscribe
from smartspec.daemon.process.stopping import Stop
from smartspec.daemon.recording import RecordingError, Writer, read
from smartspec.daemon.tap import LOOK_EVERY_S, Tap
from smartspec.engine_adapter import messages as wire
from smartspec.lab import replay

pytestmark = pytest.mark.integration


@pytest.fixture
def folder() -> Iterator[str]:
    with live_daemon.folder() as path:
        yield path


class Rig:
    """A tapped loop that an engine reports to; its answers do not matter here."""

    def __init__(self, **control: Any) -> None:
        self.clock = Clock()
        self.transport = FakeTransport()
        self.bus = RecordingBus()
        overrides = {f"control.{name}": value for name, value in control.items()}
        self.settings = config.load(None, {}, overrides)
        self.tap = Tap(self.transport, self.bus, self.clock)
        self.loop = ControlLoop(self.settings, self.tap, self.bus, self.clock, lambda: 7.0)

    def turn(self, *messages: wire.Message | bytes, peer: bytes = b"a") -> None:
        self.clock.now += 0.05
        self.transport.put(peer, *messages)
        self.loop.cycle(0.0)

    def work(self, steps: int, first: int = 1) -> None:
        rng = np.random.default_rng(first)
        for seq in range(first, first + steps):
            accepted = rng.integers(0, 3, 3)
            self.turn(
                step_report(
                    seq,
                    roster=seq == first,
                    num_accepted=wire.pack(accepted, "u8"),
                    num_emitted=wire.pack(accepted + 1, "u8"),
                    step_s=0.03 + 0.001 * float(rng.random()),
                )
            )

    def frames(self) -> list[FrameEvent]:
        self.tap.close()
        return self.bus.of(FrameEvent)


def recorded() -> list[FrameEvent]:
    rig = Rig()
    rig.bus.wanted = {FrameEvent}
    rig.turn()
    rig.turn(hello("gpu0", 1))
    rig.work(150)
    rig.turn(b"\xff no message")
    return rig.frames()


def test_the_same_settings_decide_what_was_decided() -> None:
    (one,) = replay.replay(recorded(), Rig().settings)
    assert one.engine == "gpu0"
    assert one.num_reports == 150 == one.replayed.num_decisions
    assert one.num_both == one.recorded.num_decisions > 5
    assert one.share_other_depth == 0.0
    assert one.mean_abs_log_value < 1e-12
    assert one.largest == []
    assert one.recorded.mean_length == 2.0
    assert one.goodput == pytest.approx(3 * 2 / 0.0305, rel=0.1)


def test_other_settings_are_told_apart() -> None:
    (one,) = replay.replay(recorded(), Rig(seed_sweep=False, probe_share=0.0).settings)
    assert one.share_other_depth > 0
    assert one.largest
    assert any("seed sweep" in told.recorded for told in one.largest)
    assert all("seed sweep" not in told.replayed for told in one.largest)
    assert one.replayed.num_decisions == 150


def test_nothing_is_shown_while_nobody_records() -> None:
    rig = Rig()
    rig.turn(hello("gpu0", 1))
    rig.work(20)
    assert rig.frames() == []


def test_engines_are_asked_to_introduce_themselves_when_a_recording_begins() -> None:
    rig = Rig()
    rig.turn(hello("gpu0", 1))
    rig.work(20)
    rig.transport.sent.clear()
    rig.bus.wanted = {FrameEvent}
    rig.clock.now += LOOK_EVERY_S
    rig.turn()
    (asked,) = rig.transport.take(b"a", wire.Resync)
    assert asked.daemon_epoch == rig.loop.epoch
    rig.turn(hello("gpu0", 1))
    rig.work(30, first=21)
    (one,) = replay.replay(rig.frames(), rig.settings)
    assert one.num_reports == 30


def test_policies_leave_before_they_are_shown() -> None:
    rig = Rig()
    rig.bus.wanted = {FrameEvent}
    rig.turn()
    rig.turn(hello("gpu0", 1))
    before = len(rig.bus.of(FrameEvent))
    rig.work(1)
    assert rig.transport.take(b"a", wire.Policy)
    assert not [f for f in rig.bus.of(FrameEvent)[before:] if not f.inbound and f.turn > 2]


# -- the file -----------------------------------------------------------------------------------


def written(path: Path, frames: list[FrameEvent]) -> bytes:
    writer = Writer(path, now=5.0)
    for frame in frames:
        writer.add(frame)
    writer.close()
    return path.read_bytes()


def test_file_gives_back_what_was_written(tmp_path: Path) -> None:
    frames = recorded()
    content = written(tmp_path / "r", frames)
    assert list(read(io.BytesIO(content))) == frames
    assert (tmp_path / "r").stat().st_mode & 0o777 == 0o600
    assert len(content) < sum(len(frame.frame) for frame in frames) / 2
    with pytest.raises(FileExistsError):
        Writer(tmp_path / "r", now=5.0)


def test_file_is_good_up_to_where_its_writer_was_killed(tmp_path: Path) -> None:
    frames = recorded()
    content = written(tmp_path / "r", frames)
    for size in (len(content) // 2, len(content) - 1):
        part = list(read(io.BytesIO(content[:size])))
        assert part == frames[: len(part)]
    assert len(part) > len(frames) // 2


@pytest.mark.parametrize("content", [b"", b"text", gzip.compress(b"\x00" * 9), gzip.compress(b"")])
def test_file_of_another_kind_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match="not a recording"):
        list(read(io.BytesIO(content)))
    path = tmp_path / "other"
    path.write_bytes(content)
    result = CliRunner().invoke(cli.app, ["replay", str(path)])
    assert result.exit_code == recording.EXIT_UNUSABLE
    assert str(path) in result.output


def test_file_of_another_version_is_refused() -> None:
    header = msgspec.msgpack.encode(recording.Header(version=9, release="9.0"))
    content = gzip.compress(len(header).to_bytes(4, "little") + header)
    with pytest.raises(RecordingError, match="of version 9"):
        list(read(io.BytesIO(content)))


def test_recorder_stops_at_its_bounds(folder: str) -> None:
    bus = EventBus.bind(f"ipc://{folder}/bus.sock")
    reader = subscribe(f"ipc://{folder}/bus.sock", ("frame", "loop"))
    writer = Writer(Path(folder) / "r", now=0.0)
    try:
        assert "0.1 s" in command.record(reader, writer, Stop(), 0.1, 1 << 20)
        assert "full" in command.record(reader, writer, Stop(), 9.0, 1)
        stop = Stop()
        stop.set()
        assert "told" in command.record(reader, writer, stop, 9.0, 1 << 20)
    finally:
        writer.close()
        reader.close()
        bus.close()


def test_bus_knows_who_asks_for_frames(folder: str) -> None:
    bus = EventBus.bind(f"ipc://{folder}/bus.sock")
    every = subscribe(f"ipc://{folder}/bus.sock")
    try:
        event = StepEvent(engine="a", seq=1, num_running=1, step_s=0.1)
        while every.poll(0.01) is None:
            bus.publish(event)
        assert not bus.wants(FrameEvent)
        named = subscribe(f"ipc://{folder}/bus.sock", ("frame",))
        while not bus.wants(FrameEvent):
            pass
        named.close()
        while bus.wants(FrameEvent):
            pass
    finally:
        every.close()
        bus.close()


def test_the_first_frame_heard_is_recorded(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = FrameEvent(turn=1, at_s=1.0, peer=b"gpu0", inbound=True, frame=b"hello")
    heard = iter([frame])

    class Silent:
        num_missed: ClassVar[dict[str, int]] = {}

        def poll(self, timeout_s: float) -> object:
            return next(heard, None)

        def close(self) -> None:
            pass

    monkeypatch.setattr(command, "subscribe", lambda *_: Silent())
    path = Path(folder) / "recording"
    settings = config.load(None, None, {"runtime_dir": folder})
    assert command.run(settings, path, 0.05, 1 << 20, Stop()) == 0
    with path.open("rb") as file:
        assert list(recording.read(file)) == [frame]


@pytest.mark.system
def test_record_and_replay_of_a_real_daemon(folder: str) -> None:
    path = Path(folder) / "recording"
    with live_daemon.daemon(folder, telemetry__enabled=False) as (settings, _):
        with live_daemon.engine(settings):
            options = ["--runtime-dir", folder, "--seconds", "3"]
            result = CliRunner().invoke(cli.app, ["record", str(path), *options])
    assert result.exit_code == 0, result.output
    shown = CliRunner().invoke(cli.app, ["replay", str(path)])
    assert shown.exit_code == 0, shown.output
    assert "replayed" in shown.output
    told = CliRunner().invoke(cli.app, ["replay", str(path), "--json"])
    (one,) = json.loads(told.output)["engines"]
    assert one["engine"] == "gpu0"
    assert one["num_reports"] > 20
    assert one["replayed"]["num_decisions"] > 20
