"""Workers, kept for all arms; and beside them a daemon, for as long as one arm needs it."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from smartspec.lab.demo import calibration
from smartspec.lab.demo.arms import ARMS, Arm
from smartspec.lab.demo.calibration import Calibration
from smartspec.lab.demo.live import Display, view_of
from smartspec.lab.demo.monitor import Monitor
from smartspec.lab.demo.player import Played, burst, play
from smartspec.lab.demo.processes import DaemonProcess, WorkerProcess, endpoints
from smartspec.lab.demo.schedule import Prompt, Schedule, mixed

MAX_NUM_RUNNING = 16
MAX_LENGTH = 8  #: what SmartSpec may choose up to; the static arms are what they are called
NUM_CALIBRATION_PROMPTS = 24  #: one and a half full batches
NUM_WARM_UP_PROMPTS = 8
WARM_UP_TOKENS = 40
#: A Unix socket's path has at most 107 bytes; this leaves room for the names in the directory.
MAX_RUNTIME_DIR = 85


@dataclass(slots=True)
class ArmPlayed:
    """One arm's measurements."""

    arm: Arm
    played: Played
    notes: list[str] = field(default_factory=list)

    @property
    def steps_by_source(self) -> dict[str, int]:
        """Steps that decoded, by who chose their lengths."""
        counts: dict[str, int] = {}
        for step in self.played.steps:
            if step.lengths:
                counts[step.source] = counts.get(step.source, 0) + 1
        return counts


class Session:
    """Starts the workers on entry; on exit nothing that was started is left.

    Parameters
    ----------
    folder : for logs and sockets; created
    display : where progress goes
    arms : to be played: a worker for each of their proposers, idle while another's arm is played

    Attributes
    ----------
    worker : of the first arm, while entered
    runtime_dir : of daemons, while entered: where workers look for one
    """

    worker: WorkerProcess
    runtime_dir: Path

    def __init__(self, folder: Path, display: Display, arms: Sequence[Arm] = ARMS) -> None:
        self._folder = folder
        self._display = display
        self._proposers = list(dict.fromkeys(arm.proposer for arm in arms))
        self._workers: dict[str, WorkerProcess] = {}
        self._cleanup = contextlib.ExitStack()
        self._num_plays = 0
        self.ready: dict[str, Any] = {}  #: what the first worker said of itself

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self._folder.mkdir(parents=True, exist_ok=True)
            self.runtime_dir = stack.enter_context(_runtime_dir(self._folder / "run"))
            ready = {name: self._start_worker(name, stack) for name in self._proposers}
            self.worker = self._workers[self._proposers[0]]
            self.ready = ready[self._proposers[0]]
            self._cleanup = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._cleanup.close()

    def _start_worker(self, proposer: str, stack: contextlib.ExitStack) -> dict[str, Any]:
        arguments = [
            *("--proposer", proposer, "--max-length", str(MAX_LENGTH)),
            *("--speculation", "own", "--step-events", "--engine", "demo"),
            *("--endpoint", endpoints(self.runtime_dir)[0]),
            *("--max-num-running", str(MAX_NUM_RUNNING), "--threads", str(num_threads())),
        ]
        worker = WorkerProcess(arguments, self._folder / f"worker-{proposer}.log")
        stack.callback(worker.stop)
        self._workers[proposer] = worker
        with self._display.waiting(f"starting the worker, {proposer}") as say:
            return worker.wait_ready(say)

    def calibrate(self, prompts: Sequence[Prompt], seed: int) -> Calibration:
        """Measure what the machine serves without speculation. Takes some 10 to 20 s."""
        chosen = mixed(prompts, np.random.default_rng(seed))[:NUM_CALIBRATION_PROMPTS]
        with self._display.waiting("calibrating: a full batch without speculation") as say:
            began = time.monotonic()

            def progress(now_s: float, played: Played) -> None:
                done = f"{played.num_finished} of {len(chosen)} answered"
                say(time.monotonic() - began, done)

            self.worker.set_speculation("static", 0)
            # The first pass over a model touches its weights for the first time.
            self._play_burst(self.worker, chosen[:2], "touch", max_tokens=8)
            played = self._play_burst(self.worker, chosen, "calibration", on_tick=progress)
        return calibration.calibrate(played.requests, played.steps, MAX_NUM_RUNNING)

    def play(
        self, arm: Arm, schedule: Schedule, warm_up: Sequence[Prompt], title: str
    ) -> ArmPlayed:
        """Warm up, then play the schedule until all is answered: the worker is idle again.

        The daemon of a SmartSpec arm starts cold before the warm-up and is stopped after the arm:
        it learns everything within the arm, and takes no processor time from the others.
        """
        worker = self._workers[arm.proposer]
        with contextlib.ExitStack() as stack:
            daemon, monitor = self._start_daemon(stack) if arm.length is None else (None, None)
            worker.set_speculation("smartspec" if arm.length is None else "static", arm.length)
            with self._display.waiting(f"{title}: warming up, not measured"):
                self._play_burst(worker, warm_up, "warm_up", max_tokens=WARM_UP_TOKENS)

            def show(now_s: float, played: Played) -> None:
                if daemon is not None and monitor is not None:
                    daemon.process.check()  # else these would be a fallback's figures
                    monitor.drain()
                if self._display.due:
                    self._display.show(
                        view_of(
                            played,
                            title=title,
                            phase=schedule.phase_at(now_s),
                            now_s=now_s,
                            duration_s=schedule.duration_s,
                            num=len(schedule.arrivals),
                            why=arm.why
                            if monitor is None
                            else monitor.reason or "nothing heard yet",
                        )
                    )

            with self._display:
                played = play(schedule.arrivals, worker, tag=self._tag(arm.name), on_tick=show)
            return ArmPlayed(arm, played, [] if monitor is None else monitor.notes)

    def _play_burst(
        self,
        worker: WorkerProcess,
        prompts: Sequence[Prompt],
        phase: str,
        max_tokens: int | None = None,
        **how: Any,
    ) -> Played:
        return play(
            burst(prompts, phase), worker, tag=self._tag(phase), max_tokens=max_tokens, **how
        )

    def _tag(self, name: str) -> str:
        self._num_plays += 1
        return f"{self._num_plays}-{name}"

    def _start_daemon(self, stack: contextlib.ExitStack) -> tuple[DaemonProcess, Monitor]:
        with self._display.waiting("starting the daemon, cold"):
            daemon = DaemonProcess(self.runtime_dir, self._folder / "daemon.log")
            stack.callback(daemon.stop)
            monitor = Monitor(daemon.bus_endpoint)
            stack.callback(monitor.close)
            daemon.wait_ready()
        return daemon, monitor


@contextlib.contextmanager
def _runtime_dir(wanted: Path) -> Iterator[Path]:
    """``wanted``, or where its path is too long for sockets, a temporary directory."""
    wanted = wanted.absolute()
    if len(str(wanted).encode()) <= MAX_RUNTIME_DIR:
        wanted.mkdir(mode=0o700, parents=True, exist_ok=True)
        yield wanted
    else:
        with tempfile.TemporaryDirectory(prefix="smartspec-demo-") as folder:
            yield Path(folder)


def num_threads() -> int:
    """Of the worker: all cores but one.

    An engine on an accelerator does not share it with its sidecar, nor with those who send it
    requests; torch's threads wait for each other at every operation, so that whoever takes one core
    for a moment holds up all. The core left alone is for everything else, in every arm.
    """
    return max(1, len(os.sched_getaffinity(0)) - 1)


def warm_up_prompts(prompts: Sequence[Prompt], seed: int) -> list[Prompt]:
    """One prompt of each kind or so, the same for every arm."""
    return mixed(prompts, np.random.default_rng([seed, 1]))[:NUM_WARM_UP_PROMPTS]
