"""Workers, one for each arm; and beside them a daemon, for as long as a schedule is played."""

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
from smartspec.lab.demo.live import Display, View, view_of
from smartspec.lab.demo.monitor import Monitor
from smartspec.lab.demo.player import Play, Played, burst, play
from smartspec.lab.demo.processes import DaemonProcess, WorkerProcess, endpoints
from smartspec.lab.demo.schedule import Prompt, Schedule, mixed
from smartspec.lab.demo.turns import Lane, take_turns

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


@dataclass(frozen=True, slots=True)
class Contender:
    """An arm while it is played."""

    arm: Arm
    lane: Lane
    playing: Play
    steering: tuple[DaemonProcess, Monitor] | None  #: where SmartSpec decides

    def listen(self) -> None:
        """Hear what the daemon says. Raises `ProcessFailed` when it is gone."""
        if self.steering is not None:
            daemon, monitor = self.steering
            daemon.process.check()  # else these would be a fallback's figures
            monitor.drain()

    @property
    def notes(self) -> list[str]:
        return [] if self.steering is None else self.steering[1].notes

    def view(self, schedule: Schedule) -> View:
        """What is to be seen of it now."""
        reason = None
        if self.steering is not None:
            reason = self.steering[1].reason or "nothing heard yet"
        return view_of(self.playing, schedule, self.arm.title, reason or self.arm.why, bool(reason))


class Session:
    """Starts the workers on entry; on exit nothing that was started is left.

    Parameters
    ----------
    folder : for logs and sockets; created
    display : where progress goes
    arms : to be played: a worker for each, held in the turns of others

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
        self._arms = list(arms)
        self._workers: dict[str, WorkerProcess] = {}
        self._cleanup = contextlib.ExitStack()
        self._num_plays = 0
        self.ready: dict[str, Any] = {}  #: what the first arm's worker said of itself

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self._folder.mkdir(parents=True, exist_ok=True)
            self.runtime_dir = stack.enter_context(_runtime_dir(self._folder / "run"))
            ready = [self._start_worker(arm, stack) for arm in self._arms]
            self.worker = self._workers[self._arms[0].name]
            self.ready = ready[0]
            self._cleanup = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None:  # what is still open need not be answered
            for worker in self._workers.values():
                worker.process.popen.terminate()
        self._cleanup.close()

    def _start_worker(self, arm: Arm, stack: contextlib.ExitStack) -> dict[str, Any]:
        arguments = [
            *("--proposer", arm.proposer, "--max-length", str(MAX_LENGTH)),
            *("--speculation", "own", "--step-events", "--engine", "demo"),
            *("--endpoint", endpoints(self.runtime_dir)[0]),
            *("--max-num-running", str(MAX_NUM_RUNNING), "--threads", str(num_threads())),
        ]
        worker = WorkerProcess(arguments, self._folder / f"worker-{arm.name}.log")
        stack.callback(worker.stop)
        self._workers[arm.name] = worker
        with self._display.waiting(f"starting a worker: {arm.title}") as say:
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
        self, schedule: Schedule, warm_up: Sequence[Prompt], seed: int, title: str = ""
    ) -> list[ArmPlayed]:
        """Warm up every arm, then play the schedule to all by turns, until all is answered.

        The daemon of a SmartSpec arm starts cold before the arm's warm-up and is stopped in the
        end. In the turns of others its engine rests, and it does no more than keep in touch: a few
        wake-ups a second, which all arms bear.

        Parameters
        ----------
        seed : of the order of turns
        title : before those of the arms, for the display
        """
        with contextlib.ExitStack() as stack:
            contenders = [self._prepare(arm, schedule, warm_up, stack) for arm in self._arms]

            def look(place: int) -> None:
                contenders[place].listen()
                if self._display.due:
                    self._display.show(title, [one.view(schedule) for one in contenders], place)

            with self._display:
                take_turns(contenders, np.random.default_rng([seed, 2]), look)
            return [ArmPlayed(one.arm, one.playing.played, one.notes) for one in contenders]

    def _prepare(
        self,
        arm: Arm,
        schedule: Schedule,
        warm_up: Sequence[Prompt],
        stack: contextlib.ExitStack,
    ) -> Contender:
        worker = self._workers[arm.name]
        steering = self._start_daemon(stack) if arm.length is None else None
        worker.set_speculation("smartspec" if arm.length is None else "static", arm.length)
        with self._display.waiting(f"{arm.title}: warming up, not measured"):
            self._play_burst(worker, warm_up, "warm_up", max_tokens=WARM_UP_TOKENS)
        lane = Lane(worker)
        playing = Play(schedule.arrivals, lane, tag=self._tag(arm.name), clock=lane.clock)
        return Contender(arm, lane, playing, steering)

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
