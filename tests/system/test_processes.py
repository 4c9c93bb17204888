"""Real processes, sockets and signals: killing anything must harm nothing."""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from fakes import PATIENCE_S
from scripted_engine import Costs, ScriptedEngine, hello

from smartspec.daemon.told import TOLD_EVERY
from smartspec.engine_adapter.link import EngineLink

pytestmark = pytest.mark.system

TTL_S = 1.0
STEP_S = 0.004
STALL_S = 1.0  #: far less than any wait for a daemon, far more than a busy machine's hiccup
BUSY = Costs(base_s=0.004, token_s=0.002)


class Daemon:
    """`smartspec run` in a directory of its own."""

    def __init__(self, runtime_dir: str, *settings: str, config: Path | None = None) -> None:
        self.endpoint = f"ipc://{runtime_dir}/engines.sock"
        self._runtime_dir = runtime_dir
        self._settings = settings
        self._config = config
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "smartspec.daemon.cli", "run"]
        command += ["--runtime-dir", self._runtime_dir, "--log-level", "warning"]
        if self._config is not None:
            command += ["--config", str(self._config)]
        for setting in ("telemetry.prometheus_port=0", *self._settings):
            command += ["--set", setting]
        self.process = subprocess.Popen(command)

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        if self.process.poll() is None:
            children = psutil.Process(self.process.pid).children(recursive=True)
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.kill()
            _, alive = psutil.wait_procs(children, 5)
            for child in alive:
                child.kill()


class Engine:
    """A scripted engine in this process, in real time."""

    def __init__(self, daemon: Daemon, acceptance: Any, name: str = "gpu0", epoch: int = 1) -> None:
        self.link = EngineLink(daemon.endpoint, hello(name, epoch))
        self.scripted = ScriptedEngine(self.link, np.array(acceptance), BUSY)
        self.slowest_s = 0.0

    def step(self) -> str:
        """One step; who chose its lengths."""
        began = time.perf_counter()
        self.scripted.step()
        self.slowest_s = max(self.slowest_s, time.perf_counter() - began)
        return self.scripted.choices[-1].source

    def run(self, seconds: float) -> list[str]:
        deadline = time.monotonic() + seconds
        sources = []
        while time.monotonic() < deadline:
            sources.append(self.step())
            time.sleep(STEP_S)
        return sources

    def run_until(self, *sources: str) -> float:
        """Step until one of ``sources`` has chosen; returns the seconds it took."""
        began = time.monotonic()
        while self.step() not in sources:
            assert time.monotonic() - began < PATIENCE_S, f"still {self.link.stats}"
            time.sleep(STEP_S)
        return time.monotonic() - began

    def mean_length(self, steps: int = 50) -> float:
        return float(np.mean([c.lengths.mean() for c in self.scripted.choices[-steps:]]))


class EngineProcess:
    """A scripted engine in a process of its own, which can be killed."""

    def __init__(self, daemon: Daemon, name: str, epoch: int, acceptance: float) -> None:
        script = Path(__file__).with_name("run_engine.py")
        tests = str(script.parents[1])
        self.process = subprocess.Popen(
            [sys.executable, str(script), daemon.endpoint, name, str(epoch), str(acceptance)],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": tests, "OMP_NUM_THREADS": "1"},
        )
        self._lines: queue.Queue[dict[str, Any]] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.endswith("\n"):
                self._lines.put(json.loads(line))

    def steps(self, count: int) -> list[dict[str, Any]]:
        """The next steps that it takes."""
        return [self._lines.get(timeout=PATIENCE_S) for _ in range(count)]

    def until_steered(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while self.steps(1)[0]["source"] not in ("policy", "probe"):
            assert time.monotonic() < deadline

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()


Run = Callable[..., Any]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


@pytest.fixture
def runtime_dir(stack: ExitStack) -> str:
    folder = tempfile.mkdtemp(prefix="smartspec-")
    stack.callback(shutil.rmtree, folder, ignore_errors=True)
    return folder


@pytest.fixture
def daemon(stack: ExitStack, runtime_dir: str) -> Daemon:
    made = Daemon(runtime_dir, "telemetry.enabled=false")
    stack.callback(made.close)
    return made


def engine(stack: ExitStack, daemon: Daemon, *arguments: Any) -> Engine:
    made = Engine(daemon, *arguments)
    stack.callback(made.link.close)
    return made


def test_engine_goes_on_when_the_daemon_is_killed_and_is_steered_again_after(
    stack: ExitStack, daemon: Daemon
) -> None:
    load = engine(stack, daemon, [0.1] * 16)
    load.run_until("policy")
    load.run(1.5)
    daemon.kill()
    took_s = load.run_until("fallback")
    assert took_s < TTL_S + STALL_S
    assert load.mean_length(1) < 1  # the learned table's, not the engine's own 3
    assert set(load.run(0.5)) == {"fallback"}
    daemon.start()
    load.run_until("policy", "probe")
    assert load.slowest_s < STALL_S
    assert load.link.stats.num_errors == 0


def test_step_never_waits_when_the_daemon_is_stopped(stack: ExitStack, daemon: Daemon) -> None:
    load = engine(stack, daemon, [0.6] * 64)
    load.run_until("policy")
    load.run(0.5)
    load.slowest_s = 0.0
    daemon.signal(signal.SIGSTOP)
    sources = load.run(2.5)
    daemon.signal(signal.SIGCONT)
    assert load.slowest_s < STALL_S
    assert sources[-1] == "fallback" and "own" not in sources
    assert load.link.stats.num_reports_dropped > 0
    load.run_until("policy")
    # What had queued up meanwhile was one decision's worth: it is in step at once.
    load.run(0.5)
    assert load.link.stats.state in ("policy", "probe")
    assert load.link.stats.num_errors == 0


def test_restarted_engine_is_a_new_epoch_and_keeps_what_was_learned(
    stack: ExitStack, daemon: Daemon
) -> None:
    first = EngineProcess(daemon, "gpu0", 1, 0.03)
    stack.callback(first.kill)
    first.until_steered()
    first.steps(250)
    learned = np.mean([s["mean"] for s in first.steps(50)])
    assert learned < 1
    first.kill()
    second = EngineProcess(daemon, "gpu0", 2, 0.03)
    stack.callback(second.kill)
    second.until_steered()
    steered = [s["mean"] for s in second.steps(3)]
    # A new engine would draft much for all at first, and sweep.
    assert np.mean(steered) < 1
    assert max(s["took_s"] for s in second.steps(50)) < STALL_S


def test_engine_that_comes_anew_drafts_much_at_first(stack: ExitStack, daemon: Daemon) -> None:
    """What the test above would see if nothing was kept."""
    fresh = EngineProcess(daemon, "gpu0", 1, 0.03)
    stack.callback(fresh.kill)
    fresh.until_steered()
    assert np.mean([s["mean"] for s in fresh.steps(3)]) > 1.5


def test_two_engines_on_one_daemon_do_not_mix(stack: ExitStack, daemon: Daemon) -> None:
    good = engine(stack, daemon, [0.97] * 2, "gpu0")
    bad = engine(stack, daemon, [0.03] * 2, "gpu1")
    assert good.scripted.ids.tolist() == bad.scripted.ids.tolist()
    good.run_until("policy")
    bad.run_until("policy")
    for _ in range(300):
        good.step()
        bad.step()
        time.sleep(STEP_S)
    assert good.mean_length() > 4
    assert bad.mean_length() < 1


def test_name_is_refused_while_its_engine_lives(stack: ExitStack, daemon: Daemon) -> None:
    first = engine(stack, daemon, [0.6] * 4)
    first.run_until("policy")
    rival = engine(stack, daemon, [0.6] * 4, "gpu0", 2)
    deadline = time.monotonic() + PATIENCE_S
    while not rival.link.stats.last_reason:
        assert time.monotonic() < deadline
        assert rival.step() == "own"
        assert first.step() in ("policy", "probe")
        time.sleep(STEP_S)
    assert "gpu0" in rival.link.stats.last_reason


def test_loop_does_not_notice_when_telemetry_and_redis_are_killed(
    stack: ExitStack, runtime_dir: str
) -> None:
    daemon = Daemon(runtime_dir)
    stack.callback(daemon.close)
    load = engine(stack, daemon, [0.6] * 16)
    load.run_until("policy")

    def children() -> list[psutil.Process]:
        found: list[psutil.Process] = psutil.Process(daemon.process.pid).children(recursive=True)
        return found

    deadline = time.monotonic() + 3 * PATIENCE_S
    while len(children()) < 2:  # telemetry, and its Redis
        assert time.monotonic() < deadline, "telemetry did not start"
        load.run(0.1)
    load.slowest_s = 0.0
    policies, killed = load.link.stats.num_policies, children()
    reports = load.link.stats.num_reports_sent
    for child in killed:
        child.kill()
    sources = load.run(2.0)
    assert set(sources) <= {"policy", "probe"}
    assert load.slowest_s < STALL_S
    assert load.link.stats.num_policies - policies >= len(sources) // (TOLD_EVERY + 1)
    assert load.link.stats.num_reports_sent - reports == len(sources)
    assert load.link.stats.num_errors == 0
    # And it is started again.
    gone = {child.pid for child in killed}
    deadline = time.monotonic() + 3 * PATIENCE_S
    while not {child.pid for child in children()} - gone:
        assert time.monotonic() < deadline, "telemetry was not started again"
        load.run(0.1)


def test_steering_goes_on_when_telemetry_is_slow_to_end_at_a_reload(
    stack: ExitStack, runtime_dir: str
) -> None:
    config = Path(runtime_dir) / "smartspec.toml"
    config.write_text("[redis]\nttl_s = 1000\n", "utf-8")
    daemon = Daemon(runtime_dir, config=config)
    stack.callback(daemon.close)
    load = engine(stack, daemon, [0.6] * 16)
    load.run_until("policy")

    def telemetry() -> psutil.Process | None:
        found = psutil.Process(daemon.process.pid).children()
        return found[0] if found else None

    deadline = time.monotonic() + 3 * PATIENCE_S
    while not (Path(runtime_dir) / "valkey.sock").exists():
        assert time.monotonic() < deadline, "telemetry did not start"
        load.run(0.1)
    old = telemetry()
    assert old is not None
    old.suspend()  # as when it waits for a disk or a Redis: it has to be killed
    config.write_text("[redis]\nttl_s = 2000\n", "utf-8")
    daemon.signal(signal.SIGHUP)
    sources = []
    deadline = time.monotonic() + 3 * PATIENCE_S
    while (new := telemetry()) is None or new.pid == old.pid:
        assert time.monotonic() < deadline, "telemetry was not started again"
        sources += load.run(0.1)
    assert set(sources) <= {"policy", "probe"}
    assert load.slowest_s < STALL_S


@pytest.mark.slow
def test_engine_is_paused_and_released_from_the_command_line(
    stack: ExitStack, runtime_dir: str
) -> None:
    daemon = Daemon(runtime_dir, "telemetry.enabled=false")
    stack.callback(daemon.close)
    load = engine(stack, daemon, [0.6] * 16)
    load.run_until("policy")

    def smartspec(*words: str) -> subprocess.CompletedProcess[str]:
        """The command, while the engine goes on stepping."""
        command = [sys.executable, "-m", "smartspec.daemon.cli", *words]
        with subprocess.Popen(
            [*command, "--runtime-dir", runtime_dir],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            while process.poll() is None:
                load.run(0.05)
            out, err = process.communicate()
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    assert smartspec("pause", "gpu9").returncode == 3
    paused = smartspec("pause", "gpu0")
    assert (paused.returncode, paused.stderr) == (0, "")
    assert "engine gpu0 paused" in paused.stdout
    load.run_until("own")
    assert set(load.run(0.5)) == {"own"}
    # Neither the engine's restart nor the daemon's undoes it.
    load.link.close()
    again = engine(stack, daemon, [0.6] * 16, "gpu0", 2)
    again.run(1.0)
    assert set(again.run(0.5)) == {"own"}
    daemon.kill()
    daemon.start()
    connections = again.link.stats.num_connections
    deadline = time.monotonic() + PATIENCE_S
    while again.link.stats.num_connections == connections:
        assert again.step() == "own"
        assert time.monotonic() < deadline
        time.sleep(STEP_S)
    assert set(again.run(1.0)) == {"own"}
    load = again
    assert smartspec("release").returncode == 0
    load.run_until("policy")
    daemon.kill()
    nobody = smartspec("pause")
    assert nobody.returncode == 2 and "no daemon answers" in nobody.stderr
