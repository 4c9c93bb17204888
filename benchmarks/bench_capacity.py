"""Eight engines x 256 requests x 40 steps/s on one daemon pinned to one core.

A real daemon process with its telemetry, and scripted engines (mocks: no model) in this process
that report on an absolute schedule, late or not. Staleness is what the engines see: steps between
the report that the policy in force knew, and the step it steers (1 is the least possible). Then
the same while Prometheus' page is scraped ten times a second, and once more with Redis frozen
(SIGSTOP) as well; decision times are the daemon's own, from its event bus. What the machine took is
given beside them: the share of time in which the loop was ready and did not run, and the share of
all cores that the hypervisor gave to others.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import live_daemon
from figures import record
from pinning import pin
from scripted_engine import Costs, ScriptedEngine, hello

from smartspec.daemon.event_bus import DecisionEvent, StepEvent, subscribe
from smartspec.engine_adapter.link import EngineLink

PORT = 19469


def scrape(stop: threading.Event, port: int) -> None:
    while not stop.wait(0.1):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as page:
            page.read()


def run_queue_s(pid: int) -> float:
    """Seconds that a process's first thread was ready and did not run, by Linux's own count."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9


def run(
    engines: list[ScriptedEngine], daemon: psutil.Process, bus: str, rate: float, seconds: float
) -> dict[str, np.ndarray | float]:
    """Drive all engines at ``rate`` steps per second; what the daemon then did."""
    subscriber = subscribe(bus)
    rng = np.random.default_rng(1)
    used, waited, stolen = daemon.cpu_times(), run_queue_s(daemon.pid), psutil.cpu_times().steal
    began = time.monotonic()
    staleness: list[int] = []
    decide_s: list[float] = []
    late_s: list[float] = []
    stop = threading.Event()

    def listen() -> None:
        while not stop.is_set():
            match subscriber.poll(0.1):
                case StepEvent(source="policy" | "probe") as event:
                    staleness.append(event.staleness_steps)
                case DecisionEvent() as event:
                    decide_s.append(event.decide_s)

    listener = threading.Thread(target=listen)
    listener.start()
    period = 1.0 / rate / len(engines)
    for turn in range(round(seconds * rate * len(engines))):
        due = began + turn * period
        if (wait := due - time.monotonic()) > 0:
            time.sleep(wait)
        late_s.append(time.monotonic() - due)
        engine = engines[turn % len(engines)]
        if turn % 4 == 0:
            engine.replace(1, rng.beta(3, 2, 1))
        engine.step()
    elapsed = time.monotonic() - began
    stop.set()
    listener.join()
    subscriber.close()
    after = daemon.cpu_times()
    return {
        "staleness": np.array(staleness),
        "decide_s": np.array(decide_s),
        "cpu_share": (after.user + after.system - used.user - used.system) / elapsed,
        "wait_share": (run_queue_s(daemon.pid) - waited) / elapsed,
        "steal_share": (psutil.cpu_times().steal - stolen) / elapsed / psutil.cpu_count(),
        "late_p99_s": float(np.percentile(late_s, 99)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engines", type=int, default=8)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--rate", type=float, default=40.0, help="steps per second and engine")
    parser.add_argument("--seconds", type=float, default=20.0)
    args = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    with ExitStack() as stack:
        folder = stack.enter_context(live_daemon.folder())
        overrides = {"state__directory": f"{folder}/state", "telemetry__prometheus_port": PORT}
        # Checkpoints come six times as often as by default.
        running = live_daemon.daemon(folder, **overrides, state__checkpoint_s=10.0)
        settings, process = stack.enter_context(running)
        time.sleep(4.0)
        daemon = psutil.Process(process.pid)
        pin(daemon.pid, {cores[-1]})
        for child in daemon.children(recursive=True):
            pin(child.pid, {cores[0]})
        os.sched_setaffinity(0, cores[:1])
        engines = []
        for i in range(args.engines):
            source = EngineLink(settings.endpoint, hello(f"engine{i}", i, lookup=False))
            acceptance = np.random.default_rng(i).beta(3, 2, args.requests)
            costs = Costs(draft_forward_s=0.001)
            engines.append(ScriptedEngine(source, acceptance, costs, lookup=False, seed=i))
        bus = settings.bus_endpoint
        run(engines, daemon, bus, args.rate, 3.0)  # warm up
        quiet = run(engines, daemon, bus, args.rate, args.seconds)
        stop = threading.Event()
        scraper = threading.Thread(target=scrape, args=(stop, PORT))
        scraper.start()
        scraped = run(engines, daemon, bus, args.rate, args.seconds)
        [telemetry] = daemon.children()
        [valkey] = telemetry.children()
        valkey.send_signal(signal.SIGSTOP)
        try:
            frozen = run(engines, daemon, bus, args.rate, args.seconds)
        finally:
            valkey.send_signal(signal.SIGCONT)
        stop.set()
        scraper.join()
        for engine in engines:
            engine.source.close()
    record(
        "capacity",
        {
            "staleness_p50_steps": float(np.median(quiet["staleness"])),
            "staleness_p99_steps": float(np.percentile(quiet["staleness"], 99)),
            "loop_cpu_share": float(quiet["cpu_share"]),
            "decision_p50_ms": float(np.median(quiet["decide_s"])) * 1e3,
            "decision_p99_ms": float(np.percentile(quiet["decide_s"], 99)) * 1e3,
            "staleness_p99_steps_scraped": float(np.percentile(scraped["staleness"], 99)),
            "decision_p99_ms_scraped": float(np.percentile(scraped["decide_s"], 99)) * 1e3,
            "loop_wait_share": float(quiet["wait_share"]),
            "steal_share": float(quiet["steal_share"]),
            "loop_wait_share_scraped": float(scraped["wait_share"]),
            "steal_share_scraped": float(scraped["steal_share"]),
            "loop_wait_share_redis_frozen": float(frozen["wait_share"]),
            "decision_p99_ms_redis_frozen": float(np.percentile(frozen["decide_s"], 99)) * 1e3,
            "driver_late_p99_ms": float(quiet["late_p99_s"]) * 1e3,
        },
    )


if __name__ == "__main__":
    main()
