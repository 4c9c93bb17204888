"""A long run: does the loop's memory, or the time that it takes to decide, grow?

8 engines report steps of 64 requests as fast as the loop takes them, in one process, over real
sockets: a million reports by default (`--reports`), of requests that come and go. Held against each
other are the quarters of the run: resident memory of the last within 2% of the second, and p99 of
decisions. `decision_*` is by the clock, and of a turn that decides for all engines, so that other
work on the machine and the other engines count; `decide_cpu_*` is the processor time of one
decision.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from figures import record
from scripted_engine import ScriptedEngine, hello

from smartspec.daemon import config
from smartspec.daemon.control_loop import ControlLoop
from smartspec.daemon.event_bus import BusEvent, DecisionEvent, EventBus
from smartspec.daemon.sessions import Session
from smartspec.daemon.transport import Server
from smartspec.engine_adapter.link import EngineLink

NUM_ENGINES = 8
NUM_REQUESTS = 64
REPORTS = 1_000_000
REPLACE_EVERY = 16  #: steps of an engine between two changes of its batch
REPLACED = 8
QUARTERS = 4
SETTLE_SHARE = 0.25  #: of each quarter, before its memory is read
SEED = 0


class Times:
    """Seconds, in memory that is taken at the start, lest the watching show in what is watched."""

    def __init__(self, most: int) -> None:
        self._values = np.zeros(most, np.float32)
        self._values.fill(np.nan)  # now it is resident
        self._count = 0

    def add(self, seconds: float) -> None:
        if self._count < len(self._values):
            self._values[self._count] = seconds
            self._count += 1

    def take_p99_ms(self) -> float:
        """p99 of those since the last call."""
        p99_s = float(np.percentile(self._values[: self._count], 99))
        self._count = 0
        return 1e3 * p99_s


class Watched:
    """The event bus, with an eye on the times of decisions."""

    def __init__(self, bus: EventBus, times: Times) -> None:
        self._bus = bus
        self._times = times

    @property
    def num_dropped(self) -> int:
        return self._bus.num_dropped

    def publish(self, event: BusEvent) -> None:
        if isinstance(event, DecisionEvent):
            self._times.add(event.decide_s)
        self._bus.publish(event)

    def close(self) -> None:
        self._bus.close()


def watch_cpu(loop: ControlLoop, times: Times) -> None:
    """Note the processor time of each decision."""
    decide = loop._decide

    def timed(session: Session, began: float) -> str | None:
        started_s = time.thread_time()
        reason = decide(session, began)
        times.add(time.thread_time() - started_s)
        return reason

    loop._decide = timed  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reports", type=int, default=REPORTS)
    num_reports = parser.parse_args().reports
    rng = np.random.default_rng(SEED)
    with tempfile.TemporaryDirectory(prefix="ss-") as folder:
        settings = config.load(
            env={},
            overrides={
                "runtime_dir": folder,
                "state.directory": str(Path(folder) / "state"),
                "state.checkpoint_s": 10.0,
                "limits.max_reports_per_s": 100_000,
            },
        )
        most = num_reports // QUARTERS + NUM_ENGINES
        times, cpu_times = Times(most), Times(most)
        bus = Watched(EventBus.bind(settings.bus_endpoint), times)
        loop = ControlLoop(settings, Server(settings.endpoint), bus)
        watch_cpu(loop, cpu_times)
        engines = [
            ScriptedEngine(
                EngineLink(settings.endpoint, hello(f"gpu{i}", 1)),
                rng.uniform(0.2, 0.9, NUM_REQUESTS),
                seed=i,
            )
            for i in range(NUM_ENGINES)
        ]
        process = psutil.Process()
        memory: list[float] = []  #: MiB, mean of each quarter
        p99_ms: list[float] = []
        cpu_p99_ms: list[float] = []
        began = time.monotonic()
        steps = 0
        for quarter in range(QUARTERS):
            sizes: list[int] = []
            first = loop.counters["reports"]
            while (done := loop.counters["reports"]) < num_reports * (quarter + 1) / QUARTERS:
                for engine in engines:
                    if steps % REPLACE_EVERY == 0:
                        engine.replace(REPLACED, rng.uniform(0.2, 0.9, REPLACED))
                    engine.step()
                    engine.choices.clear()
                loop.cycle(0.01)
                steps += 1
                share = (done - first) * QUARTERS / num_reports
                if share > SETTLE_SHARE and steps % 500 == 0:
                    sizes.append(process.memory_info().rss)
            gc.collect()
            sizes.append(process.memory_info().rss)
            memory.append(float(np.mean(sizes)) / 2**20)
            p99_ms.append(times.take_p99_ms())
            cpu_p99_ms.append(cpu_times.take_p99_ms())
            print(
                f"quarter {quarter + 1}: {memory[-1]:.1f} MiB, p99 {p99_ms[-1]:.2f} ms, "
                f"of processor time {cpu_p99_ms[-1]:.2f} ms",
                flush=True,
            )
        wall_s = time.monotonic() - began
        for engine in engines:
            engine.source.close()
        loop.close()
        bus.close()
    found = {
        "num_reports": float(num_reports),
        "wall_s": wall_s,
        "memory_second_mib": memory[1],
        "memory_last_mib": memory[3],
        "memory_growth_pct": 100 * (memory[3] / memory[1] - 1),
        "decision_p99_second_ms": p99_ms[1],
        "decision_p99_last_ms": p99_ms[3],
        "decide_cpu_p99_second_ms": cpu_p99_ms[1],
        "decide_cpu_p99_last_ms": cpu_p99_ms[3],
    }
    record("soak", found, seed=SEED)


if __name__ == "__main__":
    main()
