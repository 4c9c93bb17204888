"""What was learned outlives the daemon: real processes, stopped, killed and started again."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import psutil
import pytest
from fakes import PATIENCE_S
from scripted_engine import Costs, ScriptedEngine, hello

from smartspec.daemon.state.learned import decode
from smartspec.engine_adapter.link import EngineLink

pytestmark = pytest.mark.system

BUSY = Costs(base_s=0.004, token_s=0.002)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


@pytest.fixture
def folder(stack: ExitStack) -> Path:
    made = Path(tempfile.mkdtemp(prefix="ss-"))
    stack.callback(shutil.rmtree, made, ignore_errors=True)
    return made


class Daemon:
    """`smartspec run` that keeps its state in ``folder``/state."""

    def __init__(self, stack: ExitStack, folder: Path, *settings: str) -> None:
        self.endpoint = f"ipc://{folder}/engines.sock"
        self.log = folder / "daemon.log"
        command = [sys.executable, "-m", "smartspec.daemon.cli", "run"]
        command += ["--runtime-dir", str(folder)]
        given = ("telemetry.prometheus_port=0", "state.enabled=true", "state.checkpoint_s=0.5")
        for setting in (*given, f"state.directory={folder}/state", *settings):
            command += ["--set", setting]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stderr=log)
        stack.callback(self.close)

    def end(self, number: signal.Signals) -> None:
        """Send a signal, and wait until it and what it started have gone."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(number)
        self.process.wait(PATIENCE_S)
        _, alive = psutil.wait_procs(children, PATIENCE_S)
        assert not alive

    def close(self) -> None:
        if self.process.poll() is None:
            self.end(signal.SIGTERM)

    def says(self, part: str) -> bool:
        return part in self.log.read_text("utf-8")


def engine(stack: ExitStack, daemon: Daemon, epoch: int, *, max_length: int = 5) -> ScriptedEngine:
    link = EngineLink(daemon.endpoint, hello("gpu0", epoch, max_length=max_length))
    stack.callback(link.close)
    return ScriptedEngine(link, np.full(8, 0.03), BUSY, max_length=max_length)


def step_until(load: ScriptedEngine, condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 2 * PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        load.step()
        time.sleep(0.004)


def steered(load: ScriptedEngine) -> int:
    return sum(choice.source in ("policy", "probe") for choice in load.choices)


def first_lengths(load: ScriptedEngine, count: int = 6) -> float:
    """Mean length of the first steered steps."""
    step_until(load, lambda: steered(load) >= count)
    choices = [c for c in load.choices if c.source in ("policy", "probe")]
    return float(np.mean([c.lengths.mean() for c in choices[:count]]))


def learn(stack: ExitStack, daemon: Daemon) -> None:
    load = engine(stack, daemon, 1)
    step_until(load, lambda: steered(load) >= 250)


def stored(folder: Path) -> list[Path]:
    return sorted((folder / "state").glob("*.state"))


def test_daemon_controls_from_the_first_step_when_it_was_stopped(
    stack: ExitStack, folder: Path
) -> None:
    first = Daemon(stack, folder, "telemetry.enabled=false")
    learn(stack, first)
    assert not stored(folder)  # at shutdown only, without telemetry
    first.end(signal.SIGTERM)
    (path,) = stored(folder)
    assert decode(path.read_bytes()).num_steered >= 250
    second = Daemon(stack, folder, "telemetry.enabled=false")
    # A daemon that knows nothing drafts 5 for all at first: nearly all of it is rejected here.
    assert first_lengths(engine(stack, second, 2)) < 1
    assert second.says("starts from what engine gpu0 knew")


def test_daemon_controls_from_the_last_checkpoint_when_it_was_killed(
    stack: ExitStack, folder: Path
) -> None:
    first = Daemon(stack, folder)
    load = engine(stack, first, 1)

    def saved() -> bool:
        return any(decode(path.read_bytes()).num_steered > 200 for path in stored(folder))

    step_until(load, saved)
    first.end(signal.SIGKILL)
    second = Daemon(stack, folder, "telemetry.enabled=false")
    assert first_lengths(engine(stack, second, 2)) < 1


@pytest.mark.parametrize("damage", ["cut", "limits"])
def test_daemon_starts_cold_and_says_why_when_state_does_not_fit(
    stack: ExitStack, folder: Path, damage: str
) -> None:
    first = Daemon(stack, folder, "telemetry.enabled=false")
    learn(stack, first)
    first.end(signal.SIGTERM)
    (path,) = stored(folder)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    second = Daemon(stack, folder, "telemetry.enabled=false")
    load = engine(stack, second, 2, max_length=5 if damage == "cut" else 4)
    assert first_lengths(load) > 1
    if damage == "cut":
        assert second.says("damaged or cut short") and second.says("starts cold")
        assert path.with_name(f"{path.name}.refused").exists() and not path.exists()
    else:
        assert second.says("starts cold: what was stored is of other limits: max_length 5, now 4")
        assert path.exists()
