"""Daemon, telemetry, Redis and engines as real processes, and all that may happen to them."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import redis
import zmq
from fakes import step_report
from scripted_engine import hello

from smartspec.daemon.state.state_directory import StateDirectory
from smartspec.daemon.telemetry.embedded_valkey import EmbeddedValkey
from smartspec.engine_adapter import messages as wire

STEERED = ("policy", "probe")
FAKETIME = "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1"
DISK_BYTES = 4 << 20
CROWD = 1000
READY_S = 60.0  #: a busy machine may take as long to start a process


class Gap:
    """The longest time for which this machine did not let us run."""

    def __init__(self) -> None:
        self.longest_s = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        last = time.monotonic()
        while not self._stop.wait(0.01):
            now = time.monotonic()
            self.longest_s = max(self.longest_s, now - last - 0.01)
            last = now

    def close(self) -> None:
        self._stop.set()
        self._thread.join()


class Engine:
    """A scripted engine behind its bad network; killed and started again under a new epoch."""

    def __init__(self, rig: Rig, name: str, acceptance: float) -> None:
        self._rig = rig
        self.name = name
        self._acceptance = acceptance
        self.epoch = 0
        self.slowest_s = 0.0
        self.num_steps = 0
        self.num_errors = 0
        self.steered_at = -1.0  #: of the last step that was
        self.pauses: list[list[float]] = []  #: from when until when it was stopped by us
        self.start()

    def start(self) -> None:
        self.epoch += 1
        script = Path(__file__).parent / "system" / "run_bad_engine.py"
        arguments = [self._rig.endpoint, str(self._rig.folder), self.name, str(self.epoch)]
        self.process = subprocess.Popen(
            [sys.executable, str(script), *arguments, str(self._acceptance)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"},
        )
        self._reader = threading.Thread(target=self._read, args=(self.process,), daemon=True)
        self._reader.start()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                if not line.endswith("\n"):
                    break
                step = json.loads(line)
                self.num_steps += 1
                self.num_errors = max(self.num_errors, step["errors"])
                if not self._was_stopped(step["at"] - step["took_s"], step["at"]):
                    self.slowest_s = max(self.slowest_s, step["took_s"])
                if step["source"] in STEERED:
                    self.steered_at = step["at"]

    def _was_stopped(self, begin: float, end: float) -> bool:
        return any(begin <= until and since <= end for since, until in self.pauses)

    def pause(self, seconds: float) -> None:
        self.pauses.append([time.monotonic(), math.inf])
        stop_for(self.process.pid, seconds)
        self.pauses[-1][1] = time.monotonic()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()


def stop_for(pid: int, seconds: float) -> None:
    """Keep a process from running for a while."""
    os.kill(pid, signal.SIGSTOP)
    try:
        time.sleep(seconds)
    finally:
        os.kill(pid, signal.SIGCONT)


class Rig:
    """Everything, in one folder; `close` leaves nothing behind."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self.endpoint = f"ipc://{folder}/engines.sock"
        self.gap = Gap()
        stack.callback(self.gap.close)
        self._stack = stack
        self.state = folder / "state"
        self.state.mkdir()
        self.has_disk = self._mount_disk()
        self._clock = folder / "clock"
        self._clock.write_text("+0\n")
        self._redis_socket = folder / "redis.sock"
        self.redis = EmbeddedValkey(self._redis_socket)
        self.redis.ensure()
        stack.callback(lambda: self.redis.close())
        self._manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._manager.bind(str(folder / "notify"))
        self._manager.settimeout(READY_S)
        stack.callback(self._manager.close)
        self.daemon: subprocess.Popen[bytes] | None = None
        self.log = (folder / "daemon.log").open("wb")
        stack.callback(self.log.close)
        stack.callback(self.kill_daemon)
        self.start_daemon()
        self.engines = [
            Engine(self, f"gpu{i}", acceptance) for i, acceptance in enumerate((0.6, 0.3))
        ]
        for engine in self.engines:
            stack.callback(engine.kill)

    def _mount_disk(self) -> bool:
        """A small disk of its own for the state directory, where that may be mounted."""
        command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "chaos", str(self.state)]
        if os.geteuid() != 0 or shutil.which("mount") is None:
            return False
        if subprocess.run(command, capture_output=True).returncode:
            return False
        self._stack.callback(subprocess.run, ["umount", "--lazy", str(self.state)], check=False)
        return True

    @property
    def has_clock(self) -> bool:
        return Path(FAKETIME).exists()

    # -- life --

    def start_daemon(self) -> None:
        settings = {
            "runtime_dir": self.folder,
            "redis.url": f"unix://{self._redis_socket}",
            "telemetry.prometheus_port": 0,
            "state.enabled": "true",
            "state.directory": self.state,
            "state.checkpoint_s": 2,
            "control.engine_timeout_s": 5,
            "control.max_engines": 4096,
            "log.level": "warning",
        }
        env = {**os.environ, "NOTIFY_SOCKET": str(self.folder / "notify"), "OMP_NUM_THREADS": "1"}
        if self.has_clock:
            env |= {
                "LD_PRELOAD": FAKETIME,
                "FAKETIME_TIMESTAMP_FILE": str(self._clock),
                "FAKETIME_NO_CACHE": "1",
                "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            }
        command = [sys.executable, "-m", "smartspec.daemon.cli", "run"]
        for name, value in settings.items():
            command += ["--set", f"{name}={value}"]
        self.daemon = subprocess.Popen(command, env=env, stderr=self.log)
        while "READY=1" not in self._manager.recv(4096).decode():
            pass

    def kill_daemon(self) -> None:
        if self.daemon is None or self.daemon.poll() is not None:
            return
        children = self.children()
        self.daemon.kill()
        self.daemon.wait()
        for child in children:  # they follow by themselves; a stopped one cannot
            if child.is_running():
                child.send_signal(signal.SIGCONT)

    def children(self) -> list[psutil.Process]:
        """Those that live: one that was just killed may still wait to be taken note of."""
        assert self.daemon is not None
        found = psutil.Process(self.daemon.pid).children(recursive=True)
        return [child for child in found if child.status() != psutil.STATUS_ZOMBIE]

    # -- faults: each begins and ends; recovery is timed from its return --

    def daemon_is_killed(self) -> None:
        self.kill_daemon()
        time.sleep(0.5)
        self.start_daemon()

    def daemon_is_stopped(self) -> None:
        assert self.daemon is not None
        stop_for(self.daemon.pid, 1.5)

    def telemetry_is_killed(self) -> None:
        for child in self.children():
            child.kill()

    def telemetry_is_stopped(self) -> None:
        for child in self.children():
            stop_for(child.pid, 1.5)

    def redis_is_killed(self) -> None:
        assert self.redis.pid is not None
        os.kill(self.redis.pid, signal.SIGKILL)
        time.sleep(1.0)
        self.redis.ensure()

    def redis_is_stopped(self) -> None:
        assert self.redis.pid is not None
        stop_for(self.redis.pid, 3.0)

    def engine_is_killed(self) -> None:
        self.engines[0].kill()
        self.engines[0].start()

    def engine_is_stopped(self) -> None:
        self.engines[1].pause(1.5)

    def network_is_bad(self) -> None:
        bad = self.folder / "bad-network"
        bad.touch()
        time.sleep(4.0)
        bad.unlink()

    def disk_is_full(self) -> None:
        filler = self.state / "filler"
        try:
            with filler.open("wb") as file:
                while True:
                    file.write(b"\0" * 65536)
                    file.flush()
        except OSError:
            pass
        time.sleep(5.0)
        filler.unlink()

    def clock_jumps(self) -> None:
        for offset in ("+86400\n", "-86400\n", "+0\n"):
            self._clock.write_text(offset)
            time.sleep(0.7)

    def crowd_comes_and_vanishes(self) -> None:
        context = zmq.Context()
        context.set(zmq.MAX_SOCKETS, CROWD + 10)
        for i in range(CROWD):
            client = context.socket(zmq.DEALER)
            client.linger = 50
            client.connect(self.endpoint)
            client.send(wire.encode(hello(f"crowd{i}", 1)))
            client.send(wire.encode(step_report(1)))
            client.close()
        context.term()

    @property
    def faults(self) -> list[Callable[[], None]]:
        """All that can be done on this machine."""
        always = [
            *(self.daemon_is_killed, self.daemon_is_stopped),
            *(self.telemetry_is_killed, self.telemetry_is_stopped),
            *(self.redis_is_killed, self.redis_is_stopped),
            *(self.engine_is_killed, self.engine_is_stopped),
            *(self.network_is_bad, self.crowd_comes_and_vanishes),
        ]
        return always + [self.disk_is_full] * self.has_disk + [self.clock_jumps] * self.has_clock

    # -- what is seen --

    def recover(self, patience_s: float) -> float:
        """Seconds until all engines are steered from now on."""
        began = time.monotonic()
        while not all(engine.steered_at > began for engine in self.engines):
            assert time.monotonic() - began < patience_s, self.tail()
            time.sleep(0.01)
        return time.monotonic() - began

    def seen(self, engine: str, patience_s: float) -> dict[str, float]:
        """What Redis shows of an engine, once that is fresh."""
        client = redis.Redis(unix_socket_path=str(self._redis_socket), socket_timeout=5.0)
        key = f"smartspec:v1:engine:{engine}"
        deadline = time.monotonic() + patience_s
        first: Any = None
        try:
            while time.monotonic() < deadline:
                try:
                    fields: Any = client.hgetall(key)
                except redis.RedisError:
                    fields = {}
                steps = int(fields.get(b"step_seq", 0))
                first = steps if first is None or steps < first else first
                if first and steps > first + 100 and b"prediction_error" in fields:
                    acceptance = json.loads(fields[b"acceptance"])
                    return {
                        "acceptance": acceptance[0],
                        "error": float(fields[b"prediction_error"]),
                    }
                time.sleep(0.2)
        finally:
            client.close()
        raise AssertionError(f"Redis shows nothing new of {engine}: {self.tail()}")

    def stored(self) -> list[str]:
        """Why any stored state was refused."""
        return [one.why_not for one in StateDirectory(self.state).entries() if one.why_not]

    def tail(self) -> str:
        self.log.flush()
        return (self.folder / "daemon.log").read_text("utf-8", "replace")[-2000:]
