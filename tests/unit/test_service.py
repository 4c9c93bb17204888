"""The daemon as a process: one per directory, its signals, its child, and the systemd unit."""

from __future__ import annotations

import configparser
import os
import shlex
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from fakes import RecordingBus
from servers import eventually
from typer.main import get_command

from smartspec.daemon import config
from smartspec.daemon.cli import app
from smartspec.daemon.config import ConfigError, Settings
from smartspec.daemon.event_bus import BusEvent, NoteEvent, NullBus
from smartspec.daemon.process import service
from smartspec.daemon.process.service import InstanceLock, ServiceError, TelemetryChild

UNIT = Path(__file__).parents[2] / "systemd" / "smartspec.service"


class ListBus:
    def __init__(self) -> None:
        self.events: list[BusEvent] = []
        self.num_dropped = 0

    def publish(self, event: BusEvent) -> None:
        self.events.append(event)

    def close(self) -> None:
        pass


class FakeProcess:
    """As much of Popen as TelemetryChild uses."""

    def __init__(self) -> None:
        self.pid = 1
        self.returncode: int | None = None
        self.terminated = False
        self.killed = False

    def poll(self) -> int | None:
        return self.returncode

    def terminate(self) -> None:
        self.terminated = True

    def kill(self) -> None:
        self.killed = True

    def wait(self, timeout: float | None = None) -> int:
        return 0


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def settings_for(runtime_dir: Path, **overrides: Any) -> Settings:
    named = {name.replace("__", "."): value for name, value in overrides.items()}
    return config.load(env={}, overrides={"runtime_dir": str(runtime_dir), **named})


# -- the runtime directory ----------------------------------------------------------------------


def test_runtime_dir_is_created_for_its_owner_only(runtime_dir: Path) -> None:
    path = runtime_dir / "a" / "b"
    service.prepare_runtime_dir(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    service.prepare_runtime_dir(path)


def test_runtime_dir_is_refused_when_everyone_may_write_it(runtime_dir: Path) -> None:
    runtime_dir.chmod(0o777)
    with pytest.raises(ServiceError, match="written by everyone"):
        service.prepare_runtime_dir(runtime_dir)


def test_runtime_dir_is_refused_when_it_is_a_link_or_a_file(runtime_dir: Path) -> None:
    target, link, file = runtime_dir / "t", runtime_dir / "l", runtime_dir / "f"
    target.mkdir()
    link.symlink_to(target)
    file.touch()
    for path in (link, file):
        with pytest.raises(ServiceError, match="runtime_dir"):
            service.prepare_runtime_dir(path)


def test_second_holder_is_refused_and_told_the_first_when_the_lock_is_held(
    runtime_dir: Path,
) -> None:
    first, second = (InstanceLock(runtime_dir / "daemon.lock") for _ in range(2))
    first.acquire()
    with pytest.raises(ServiceError, match=f"process {os.getpid()}"):
        second.acquire()
    first.release()
    second.acquire()
    second.release()


# -- the telemetry child ------------------------------------------------------------------------


def test_telemetry_is_restarted_with_growing_delays_when_it_dies() -> None:
    clock, bus, started = Clock(), ListBus(), list[FakeProcess]()

    def start() -> Any:
        started.append(FakeProcess())
        return started[-1]

    child = TelemetryChild(start, bus, clock)
    delays = []
    for _ in range(8):
        child.check()
        started[-1].returncode = -9
        child.check()
        died_at, count = clock.now, len(started)
        while len(started) == count:
            clock.now += 0.125
            child.check()
        delays.append(clock.now - died_at)
    assert delays == [0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 30.0, 30.0]
    notes = [event for event in bus.events if isinstance(event, NoteEvent)]
    assert len(notes) == child.num_restarts == 8
    assert notes[0].kind == "telemetry_down"
    assert "signal 9" in notes[0].text
    clock.now += service.STABLE_S + 1
    started[-1].returncode = 1
    child.check()
    clock.now += 0.5
    child.check()
    assert child.pid is not None, "after a long life the next restart is quick again"
    child.close()
    assert started[-1].terminated


def test_steering_goes_on_when_telemetry_cannot_be_started() -> None:
    clock, bus = Clock(), ListBus()

    def start() -> Any:
        raise OSError("no more processes")

    child = TelemetryChild(start, bus, clock)
    for _ in range(20):
        child.check()
    assert len(bus.events) == 1
    child.close()


# -- reloading ----------------------------------------------------------------------------------


def test_reload_takes_what_can_change_and_names_what_needs_a_restart(
    runtime_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = settings_for(runtime_dir)
    caplog.set_level("INFO")
    new = settings_for(runtime_dir, control__ttl_s=3.0, redis__ttl_s=60, state__max_kept=5)
    in_force, how = service.reload_settings(old, lambda: new, NullBus())
    assert (in_force.control.ttl_s, in_force.redis.ttl_s) == (3.0, 60)
    assert in_force.state.max_kept == old.state.max_kept
    assert how == {"now", "telemetry"}
    assert "control.ttl_s: 1.0 -> 3.0" in caplog.text
    assert "state.max_kept: 64 -> 5 takes effect after a restart" in caplog.text


def test_reload_says_so_when_nothing_has_changed(
    runtime_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    old = settings_for(runtime_dir)
    assert service.reload_settings(old, lambda: settings_for(runtime_dir), NullBus()) == (
        old,
        set(),
    )
    assert "no setting has changed" in caplog.text


class Reloading:
    """A child that was started with old settings, and asked to start with new ones."""

    def __init__(self, *, wanted: bool = True) -> None:
        self.clock, self.bus = Clock(), ListBus()
        self.started: list[str] = []
        self.processes: list[FakeProcess] = []
        self.child = TelemetryChild(lambda: self.start("old"), self.bus, self.clock)
        self.child.check()
        self.child.restart((lambda: self.start("new")) if wanted else None)

    def start(self, name: str) -> Any:
        self.started.append(name)
        self.processes.append(FakeProcess())
        return self.processes[-1]

    def check(self, after_s: float = 0.0) -> None:
        self.clock.now += after_s
        self.child.check()


def test_telemetry_is_started_otherwise_when_it_has_ended_after_a_reload() -> None:
    reloading = Reloading()
    assert reloading.processes[0].terminated
    reloading.check()
    assert reloading.started == ["old"], "two at once"
    reloading.processes[0].returncode = 0
    reloading.check()
    reloading.check()
    assert reloading.started == ["old", "new"]
    assert not reloading.bus.events, "it was told as a failure"
    assert reloading.child.num_restarts == 0
    reloading.processes[1].returncode = 1
    reloading.check()
    assert reloading.bus.events, "nothing was told of a death that nobody asked for"


def test_telemetry_is_killed_when_it_does_not_end_after_a_reload() -> None:
    reloading = Reloading()
    reloading.check(service.STOP_TIMEOUT_S - 0.1)
    reloading.child.restart(lambda: reloading.start("newest"))  # another reload grants no more time
    assert not reloading.processes[0].killed
    reloading.check(0.1)
    assert reloading.processes[0].killed
    reloading.processes[0].returncode = -9
    reloading.check()
    reloading.check()
    assert reloading.started == ["old", "newest"]


def test_telemetry_stays_away_when_it_is_no_longer_wanted() -> None:
    reloading = Reloading(wanted=False)
    reloading.check(service.STOP_TIMEOUT_S)
    assert reloading.processes[0].killed
    reloading.processes[0].returncode = -9
    for _ in range(3):
        reloading.check(60.0)
    assert reloading.started == ["old"]


def test_settings_stay_when_the_reloaded_file_is_wrong(
    runtime_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = settings_for(runtime_dir)

    def load() -> Settings:
        raise ConfigError("control.ttl_s: got -1")

    bus = RecordingBus()
    assert service.reload_settings(old, load, bus) == (old, None)
    assert "control.ttl_s: got -1" in caplog.text
    (note,) = bus.of(NoteEvent)
    assert (note.kind, note.level) == ("reload_failed", "error")
    assert "control.ttl_s: got -1" in note.text


# -- the process --------------------------------------------------------------------------------

# A daemon whose loop only waits: what is tested here is everything around the loop.
_DAEMON = """
    import os, pathlib, sys, time
    from smartspec.daemon import config
    from smartspec.daemon.process import logs, service
    from smartspec.daemon.vitals import Vitals

    class IdleLoop:
        vitals = Vitals(0.0)
        def cycle(self, timeout_s):
            time.sleep(timeout_s)
            while pathlib.Path(sys.argv[1]).with_name("stuck").exists():
                time.sleep(0.01)
        def apply(self, settings):
            print("ttl_s", settings.control.ttl_s, self.vitals.is_reloaded, flush=True)
        def obey(self, command):
            raise NotImplementedError
        def checkpoints(self):
            return []
        def close(self):
            print("closed", flush=True)

    def load():
        return config.load(sys.argv[1])

    settings = load()
    logs.configure(settings.log)
    try:
        limit_s = float(os.environ.get("EXIT_WHEN_STUCK_S", "0"))
        service.run(settings, load, lambda settings, bus: IdleLoop(), limit_s)
    except service.ServiceError as error:
        sys.exit(f"refused: {error}")
"""


class Daemon:
    """The process, with what it prints and logs collected."""

    def __init__(self, runtime_dir: Path, text: str, **env: str) -> None:
        self.config = runtime_dir / "smartspec.toml"
        self.config.write_text(f"runtime_dir = '{runtime_dir}'\n{text}", "utf-8")
        self.process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(_DAEMON), str(self.config)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **env},
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout:
            self.lines.extend(iter(self.process.stdout.readline, ""))

    def says(self, part: str) -> bool:
        return any(part in line for line in self.lines)

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def stop(self) -> int:
        self.process.terminate()
        code = self.process.wait(15)
        self._reader.join(5)
        return code


@pytest.fixture
def daemons(runtime_dir: Path) -> Iterator[Callable[..., Daemon]]:
    started: list[Daemon] = []

    def start(text: str, **env: str) -> Daemon:
        started.append(Daemon(runtime_dir, text, **env))
        return started[-1]

    yield start
    for daemon in started:
        daemon.process.kill()
        daemon.process.wait()
        daemon._reader.join(5)


QUIET = "[telemetry]\nenabled = false\n"
WITH_TELEMETRY = "[telemetry]\nprometheus_port = 0\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_daemon_closes_and_exits_with_0_when_asked_to_stop(
    daemons: Callable[[str], Daemon], number: signal.Signals
) -> None:
    daemon = daemons(QUIET)
    eventually(lambda: daemon.says("control mode"))
    daemon.process.send_signal(number)
    assert daemon.process.wait(5) == 0
    eventually(lambda: daemon.says("closed"))


def test_second_daemon_is_refused_when_one_serves_the_directory(
    daemons: Callable[[str], Daemon],
) -> None:
    first = daemons(QUIET)
    eventually(lambda: first.says("control mode"))
    second = daemons(QUIET)
    assert second.process.wait(10) == 1
    eventually(lambda: second.says("refused: another daemon"))
    assert second.says(f"process {first.process.pid}")
    first.process.kill()
    first.process.wait()
    third = daemons(QUIET)
    eventually(lambda: third.says("control mode"))


def test_daemon_applies_settings_and_says_what_needs_a_restart_when_sent_sighup(
    daemons: Callable[[str], Daemon],
) -> None:
    daemon = daemons(QUIET)
    eventually(lambda: daemon.says("control mode"))
    text = daemon.config.read_text("utf-8")
    more = "[control]\nttl_s = 9\n[log]\nlevel = 'debug'\n[state]\nmax_kept = 9"
    daemon.config.write_text(f"{text}\n{more}", "utf-8")
    daemon.process.send_signal(signal.SIGHUP)
    eventually(lambda: daemon.says("state.max_kept: 64 -> 9 takes effect after a restart"))
    eventually(lambda: daemon.says("ttl_s 9.0"))
    assert daemon.says('log.level: "info" -> "debug"')
    assert daemon.says("ttl_s 9.0 True")
    daemon.config.write_text(f"{text}\n[control]\nttl_s = -1\n", "utf-8")
    daemon.process.send_signal(signal.SIGHUP)
    eventually(lambda: daemon.says("ttl_s 9.0 False"))
    daemon.config.write_text(f"{text}\n[control]\nttl_s = 8\n", "utf-8")
    daemon.process.send_signal(signal.SIGHUP)
    eventually(lambda: daemon.says("ttl_s 8.0 True"))
    assert daemon.stop() == 0


def test_service_manager_is_told_the_life_of_the_daemon(
    daemons: Callable[..., Daemon], runtime_dir: Path
) -> None:
    """The stand-in for systemd: readiness, a watchdog that the loop feeds, reload and stop."""
    manager = Manager(runtime_dir / "notify")
    daemon = daemons(QUIET, NOTIFY_SOCKET=str(manager.path), WATCHDOG_USEC="600000")
    try:
        eventually(lambda: manager.heard("READY=1"))
        assert manager.heard("STATUS=control mode")
        manager.forget()
        eventually(lambda: manager.heard("WATCHDOG=1"))
        stuck = runtime_dir / "stuck"
        stuck.touch()
        time.sleep(0.5)  # a beat may be on its way
        manager.forget()
        time.sleep(0.6)
        assert not manager.heard("WATCHDOG=1"), "a stuck loop was said to be alive"
        stuck.unlink()
        eventually(lambda: manager.heard("WATCHDOG=1"))
        manager.forget()
        daemon.process.send_signal(signal.SIGHUP)
        eventually(lambda: manager.heard("READY=1"))
        reloading, ready = manager.lines.index("RELOADING=1"), manager.lines.index("READY=1")
        assert reloading < ready
        assert manager.lines[reloading + 1].startswith("MONOTONIC_USEC=")
        assert daemon.stop() == 0
        eventually(lambda: manager.heard("STOPPING=1"))
    finally:
        manager.close()


def test_daemon_ends_by_itself_when_its_loop_is_stuck(
    daemons: Callable[..., Daemon], runtime_dir: Path
) -> None:
    daemon = daemons("[telemetry]\nenabled = false\n", EXIT_WHEN_STUCK_S="1")
    eventually(lambda: daemon.says("process"))
    time.sleep(2.0)  # twice the limit, with a loop that turns
    assert daemon.process.poll() is None
    (runtime_dir / "stuck").touch()
    assert daemon.process.wait(10) == 1
    eventually(lambda: daemon.says("in cycle"))  # the traceback of where it stood


class Manager:
    """A service manager's end of the notify socket."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.setblocking(False)
        self.lines: list[str] = []

    def heard(self, line: str) -> bool:
        try:
            while True:
                self.lines += self._socket.recv(4096).decode().splitlines()
        except BlockingIOError:
            return line in self.lines

    def forget(self) -> None:
        self.heard("")
        self.lines.clear()

    def close(self) -> None:
        self._socket.close()


def test_telemetry_comes_back_when_killed_and_goes_with_the_daemon(
    daemons: Callable[[str], Daemon], runtime_dir: Path
) -> None:
    daemon = daemons(WITH_TELEMETRY)
    valkey = runtime_dir / "valkey.sock"
    eventually(valkey.exists)
    [first] = psutil.Process(daemon.process.pid).children()
    first.kill()
    eventually(lambda: daemon.says("telemetry process ended (signal 9)"))
    eventually(lambda: any(c.pid != first.pid for c in daemon.children()))
    eventually(lambda: len(daemon.children()) == 2)
    children = daemon.children()
    assert daemon.stop() == 0
    eventually(lambda: not any(child.is_running() for child in children))


def test_no_process_is_left_when_the_daemon_is_killed(
    daemons: Callable[[str], Daemon],
) -> None:
    daemon = daemons(WITH_TELEMETRY)
    eventually(lambda: len(daemon.children()) == 2)
    children = daemon.children()
    daemon.process.kill()
    eventually(lambda: not any(child.is_running() for child in children))


# -- systemd ------------------------------------------------------------------------------------


def unit(name: str = UNIT.name) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None, comment_prefixes=("#",))
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(UNIT.with_name(name), "utf-8")
    return parser


def test_unit_runs_a_command_that_exists() -> None:
    path, *arguments = shlex.split(unit()["Service"]["ExecStart"])
    assert Path(path).name == "smartspec"
    command = get_command(app)
    context = command.make_context("smartspec", arguments, resilient_parsing=True)
    name, found, rest = command.resolve_command(context, arguments)  # type: ignore[attr-defined]
    assert (name, rest) == ("run", ["--config", "/etc/smartspec/smartspec.toml"])
    assert found is not None


def test_unit_gives_the_directory_that_the_settings_expect() -> None:
    section = unit()["Service"]
    name = section["RuntimeDirectory"]
    settings = config.load(env={"RUNTIME_DIRECTORY": f"/run/{name}"})
    assert settings.endpoint == f"ipc:///run/{name}/engines.sock"
    assert section["RestartPreventExitStatus"] == "2"
    assert section["Type"] == "notify"
    state = config.load(env={"STATE_DIRECTORY": f"/var/lib/{section['StateDirectory']}"}).state
    assert state.enabled and state.directory == "/var/lib/smartspec"
    for hardening in ("NoNewPrivileges", "ProtectHome", "PrivateTmp"):
        assert section[hardening] == "yes"


def test_directory_is_the_same_whether_boot_or_the_unit_makes_it() -> None:
    section = unit()["Service"]
    line = UNIT.with_name("tmpfiles.conf").read_text("utf-8").splitlines()[-1]
    path, mode = f"/run/{section['RuntimeDirectory']}", section["RuntimeDirectoryMode"]
    assert line.split() == ["d", path, mode, section["User"], section["Group"]]
    made = UNIT.with_name("sysusers.conf").read_text("utf-8")
    assert f"u {section['User']} " in made and f"g {section['Group']} " in made


def test_worker_s_unit_may_connect_to_the_daemon_and_looks_where_it_is() -> None:
    section = unit("smartspec-worker.service")["Service"]
    assert section["SupplementaryGroups"] == unit()["Service"]["Group"]
    lines = UNIT.with_name("smartspec-worker.service").read_text("utf-8").splitlines()
    words = [
        word for line in lines if line.startswith("Environment=") for word in line[12:].split()
    ]
    environment = dict(word.split("=", 1) for word in words)
    there = config.load(env={"RUNTIME_DIRECTORY": f"/run/{unit()['Service']['RuntimeDirectory']}"})
    assert config.load(env=environment).endpoint == there.endpoint
    cache = section["CacheDirectory"]
    assert environment["SMARTSPEC_CACHE"] == f"/var/cache/{cache}"
    assert environment["HF_HOME"].startswith(f"/var/cache/{cache}/")


def test_unit_names_only_variables_that_exist() -> None:
    known = {key.env for key in config.keys().values()} | {"SMARTSPEC_CONFIG"}
    words = UNIT.read_text("utf-8").replace("=", " ").replace(",", " ").split()
    named = {w for w in words if w.startswith("SMARTSPEC_") and "<" not in w}
    assert named
    assert named <= known
