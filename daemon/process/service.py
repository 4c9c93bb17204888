"""The daemon as a process: one instance per runtime directory, signals, its child, the loop."""

from __future__ import annotations

import fcntl
import gc
import logging
import math
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, Protocol

import msgspec

from smartspec.daemon import commands, config, config_text
from smartspec.daemon.config import ConfigError, Settings
from smartspec.daemon.event_bus import Bus, CheckpointEvent, EventBus, NoteEvent
from smartspec.daemon.process import logs, notify
from smartspec.daemon.process.notify import Notifier
from smartspec.daemon.process.stuck import StuckExit
from smartspec.daemon.vitals import Vitals

if TYPE_CHECKING:
    from smartspec.daemon.admission.curve_keys import DaemonKeys

log = logging.getLogger(__name__)

CYCLE_TIMEOUT_S = 0.1  #: how late a signal may be noticed when no engine reports
RESTART_DELAYS_S = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)  #: of the telemetry process
STABLE_S = 30.0  #: having lived this long, the next restart is a quick one again
STOP_TIMEOUT_S = 5.0


class ServiceError(RuntimeError):
    """The daemon cannot start. The message says what is in the way, and what to do."""


class Loop(Protocol):
    """What is run: control_loop.ControlLoop, or a stand-in."""

    vitals: Vitals

    def cycle(self, timeout_s: float) -> str | None: ...

    def apply(self, settings: Settings) -> None: ...

    def obey(self, command: commands.Command) -> commands.Answer: ...

    def checkpoints(self) -> list[CheckpointEvent]: ...

    def close(self) -> None: ...


def prepare_runtime_dir(path: Path) -> None:
    """Create the directory of the sockets with mode 0700, or make sure that it is safe.

    In a shared place such as /tmp another user may have created it first, to listen in or to steer
    the engines: refused. Raises `ServiceError`.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise ServiceError(
            f"runtime_dir: {path} cannot be created ({error.strerror}): choose another one"
        ) from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid not in (os.geteuid(), 0):
        raise ServiceError(
            f"runtime_dir: {path} is not a directory of ours (owner {found.st_uid}): "
            "remove it or choose another one"
        )
    if found.st_mode & stat.S_IWOTH:
        raise ServiceError(
            f"runtime_dir: {path} may be written by everyone: `chmod o-w {path}`, or choose "
            "another one"
        )


class InstanceLock:
    """Held by the one daemon of a runtime directory; released by the kernel when it dies."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[str] | None = None

    def acquire(self) -> None:
        """Raises `ServiceError` when another process holds it."""
        file = os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = file.read().strip() or "unknown"
            file.close()
            raise ServiceError(
                f"another daemon (process {holder}) serves {self.path.parent}: stop it, or give "
                "this one its own runtime_dir"
            ) from error
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        self._file = file

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


Start = Callable[[], subprocess.Popen[bytes]]


class TelemetryChild:
    """Keeps the telemetry process running beside the loop, at the price of a system call a turn.

    The loop never waits for it, however long it takes to end: only `close` does.

    Parameters
    ----------
    start : starts the process; None: none is wanted
    bus : told of deaths and restarts
    clock : monotonic seconds

    Attributes
    ----------
    num_restarts : times that it was started again after it had ended by itself
    """

    def __init__(
        self,
        start: Start | None,
        bus: Bus,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._start = start
        self._bus = bus
        self._clock = clock
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0
        self._restart_at = clock()
        self._kill_at = math.inf  #: finite: it was asked to end
        self._num_failures = 0
        self._has_failed = False
        self.num_restarts = 0

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def check(self) -> None:
        """Note a death, restart when it is time. Call it every turn."""
        now = self._clock()
        if self._process is not None:
            code = self._process.poll()
            if code is None:
                if now >= self._kill_at:
                    self._process.kill()
                return
            self._process = None
            was_asked, self._kill_at = self._kill_at < math.inf, math.inf
            if not was_asked:
                self._failed(now, f"telemetry process ended ({_describe(code)})")
        elif self._start is not None and now >= self._restart_at:
            try:
                self._process = self._start()
                self._started_at = now
            except OSError as error:
                self._failed(now, f"telemetry process could not be started ({error})")
            else:
                self.num_restarts += self._has_failed
                self._has_failed = False

    def _failed(self, now: float, what: str) -> None:
        if now - self._started_at > STABLE_S:
            self._num_failures = 0
        delay_s = RESTART_DELAYS_S[min(self._num_failures, len(RESTART_DELAYS_S) - 1)]
        self._num_failures += 1
        self._has_failed = True
        self._restart_at = now + delay_s
        text = f"{what}; it is started again in {delay_s:g} s, steering goes on"
        log.warning("%s", text, extra={"event": "telemetry_down"})
        self._bus.publish(NoteEvent(kind="telemetry_down", level="warning", text=text))

    def restart(self, start: Start | None) -> None:
        """Ask it to end; `check` starts it otherwise when it has, and kills it when it does not."""
        now = self._clock()
        self._start, self._restart_at = start, now
        if self._process is not None:
            self._process.terminate()
            self._kill_at = min(self._kill_at, now + STOP_TIMEOUT_S)

    def close(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _describe(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def telemetry_of(settings: Settings) -> Start | None:
    """What starts the telemetry process that these settings ask for, if they do."""
    return partial(start_telemetry, settings) if settings.telemetry.enabled else None


def start_telemetry(settings: Settings) -> subprocess.Popen[bytes]:
    """The telemetry process, with these very settings.

    They travel by a pipe: a command line would show the Redis password to every user. A session of
    its own: Ctrl-C in a terminal is for the daemon, which then stops it.
    """
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "smartspec.daemon.cli", "telemetry"),
            *("--settings-from-stdin", "--parent", str(os.getpid())),
        ],
        stdin=subprocess.PIPE,
        start_new_session=True,
        # The service manager is the daemon's to talk to.
        env={name: v for name, v in os.environ.items() if name not in notify.VARIABLES},
    )
    assert process.stdin is not None
    try:
        process.stdin.write(msgspec.json.encode(settings))  # less than a pipe holds: no waiting
        process.stdin.close()
    except BrokenPipeError:
        pass  # it died at once: `check` will notice
    return process


class Signals:
    """SIGTERM and SIGINT ask to stop, SIGHUP to reload; handlers only take note."""

    def __init__(self) -> None:
        self.stop = False
        self.reload = False

    def install(self) -> None:
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)
        signal.signal(signal.SIGHUP, self._reload)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stop = True

    def _reload(self, number: int, frame: FrameType | None) -> None:
        self.reload = True


def reload_settings(
    current: Settings, load: Callable[[], Settings], bus: Bus
) -> tuple[Settings, set[config.Applies] | None]:
    """The settings to go on with, and how those that differ apply ("now", "telemetry").

    The log says what has changed, and what waits for a restart. A file that cannot be used changes
    nothing, which None says, and is told as an error: the daemon would not start with it.
    """
    try:
        new = load()
    except ConfigError as error:
        text = f"SIGHUP: the settings in force stay, and the next start would fail: {error}"
        log.error("%s", text, extra={"event": "reload_failed"})
        bus.publish(NoteEvent(kind="reload_failed", level="error", text=text))
        return current, None
    changed = config_text.differences(current, new)
    if not changed:
        log.info("SIGHUP: no setting has changed")
    known = config.keys()
    taken = {}
    for name, (before, after) in changed.items():
        what = config_text.change(name, before, after)
        if known[name].applies == "restart":
            log.warning("SIGHUP: %s takes effect after a restart", what)
        else:
            log.info("SIGHUP: %s", what)
            taken[name] = after
    return config.replace(current, taken), {known[name].applies for name in taken}


def make_loop(settings: Settings, bus: Bus) -> Loop:
    """The control loop on its sockets. Raises `ServiceError`."""
    import zmq

    from smartspec.daemon.admission.curve_keys import KeyFileError
    from smartspec.daemon.adoption.pauses import Pauses
    from smartspec.daemon.control_loop import ControlLoop
    from smartspec.daemon.state.warm_start import load
    from smartspec.daemon.tap import Tap
    from smartspec.daemon.transport import Server

    library = load(settings)  # this may wait for a disk, or a second for Redis: no engine does
    try:
        transport = Server(
            settings.endpoint,
            max_frame_bytes=settings.limits.max_frame_bytes,
            keys=_keys_of(settings),
        )
    except KeyFileError as error:
        raise ServiceError(f"curve.directory: {error}") from error
    except (zmq.ZMQError, OSError) as error:
        raise ServiceError(f"endpoint: cannot listen at {settings.endpoint} ({error})") from error
    # Not in the runtime directory, which a service manager may remove between two runs.
    kept = settings.state.directory if settings.state.enabled else settings.runtime_dir
    pauses = Pauses(Path(kept) / "paused.json")
    return ControlLoop(
        settings, Tap(transport, bus), bus, time.monotonic, library=library, pauses=pauses
    )


def _keys_of(settings: Settings) -> Callable[[], DaemonKeys] | None:
    from smartspec.daemon.admission import curve_keys

    if not settings.endpoint.startswith("tcp://") or settings.insecure:
        return None
    return partial(curve_keys.read, Path(settings.curve.directory))


def save_last(settings: Settings, last: list[CheckpointEvent]) -> None:
    """Write what was learned until the end, whatever has become of the telemetry process.

    After it has ended, so that nothing older is written over it. Never raises.
    """
    from smartspec.daemon.state.warm_start import state_directory

    directory = state_directory(settings)
    for event in last:
        try:
            directory.write(event.key_id, event.frame)
        except OSError as error:
            log.error(
                "state.directory: %s cannot be written (%s): what was learned since the last "
                "checkpoint is lost; name a directory that the daemon may write",
                directory.path,
                error,
            )
            return
    if last:
        log.info("learned state of %d kinds of engines is saved", len(last))


def run(
    settings: Settings,
    reload: Callable[[], Settings] | None = None,
    loop_factory: Callable[[Settings, Bus], Loop] = make_loop,
    exit_when_stuck_s: float = 0.0,
) -> None:
    """Serve until SIGTERM or SIGINT. Raises `ServiceError` when it cannot start.

    ``reload`` loads the settings anew at SIGHUP; ``exit_when_stuck_s``: of `StuckExit`.
    """
    stuck = StuckExit(exit_when_stuck_s)
    stuck.alive()
    signals = Signals()
    signals.install()
    notifier = Notifier(os.environ)
    runtime_dir = Path(settings.runtime_dir)
    prepare_runtime_dir(runtime_dir)
    lock = InstanceLock(runtime_dir / "daemon.lock")
    lock.acquire()
    bus = _bind_bus(settings.bus_endpoint)
    console = _bind_console(settings)
    telemetry = TelemetryChild(telemetry_of(settings), bus)
    loop = None
    last: list[CheckpointEvent] = []
    try:
        loop = loop_factory(settings, bus)
        # What lives now lives for good: collections need not look at it again. What the loop makes
        # is nearly all freed by reference counts, so the collections that remain are small.
        gc.collect()
        gc.freeze()
        log.info(
            "%s mode: engines at %s, events at %s, process %d",
            settings.mode,
            settings.endpoint,
            settings.bus_endpoint,
            os.getpid(),
        )
        notifier.ready(f"{settings.mode} mode")
        while not signals.stop:
            telemetry.check()
            loop.vitals.num_telemetry_restarts = telemetry.num_restarts
            if signals.reload:
                signals.reload = False
                if reload is not None:
                    notifier.reloading()
                    settings = _apply(settings, reload, loop, telemetry, bus)
                    notifier.ready(f"{settings.mode} mode")
            console.serve(loop.obey)
            reason = loop.cycle(CYCLE_TIMEOUT_S)
            notifier.alive(reason)
            stuck.alive()
        log.info("stopping")
        notifier.stopping()
    finally:
        if loop is not None:
            try:
                last = loop.checkpoints()
            except Exception:
                log.exception("what was learned since the last checkpoint is lost")
            loop.close()
        telemetry.close()
        save_last(settings, last)
        console.close()
        bus.close()
        lock.release()
        notifier.close()
        stuck.close()


def _apply(
    settings: Settings,
    load: Callable[[], Settings],
    loop: Loop,
    telemetry: TelemetryChild,
    bus: Bus,
) -> Settings:
    new, how = reload_settings(settings, load, bus)
    logs.configure(new.log)
    loop.vitals.is_reloaded = how is not None
    loop.apply(new)  # also when no setting has changed: who may connect is in a file of its own
    if how and "telemetry" in how:
        telemetry.restart(telemetry_of(new))
    return new


def _bind_bus(endpoint: str) -> EventBus:
    import zmq

    try:
        return EventBus.bind(endpoint)
    except zmq.ZMQError as error:
        raise ServiceError(f"bus_endpoint: cannot listen at {endpoint} ({error})") from error


def _bind_console(settings: Settings) -> commands.CommandServer:
    import zmq

    address = commands.endpoint(settings)
    try:
        return commands.CommandServer.bind(address)
    except zmq.ZMQError as error:
        raise ServiceError(f"runtime_dir: cannot listen at {address} ({error})") from error
