"""The Azure hour and a fleet: how fast the simulator is, and what one daemon pays per engine.

`azure_conv_wall_s`: 19,366 conversations of Azure's trace of 2023, as they came, on an H100 with an
8B model and an EAGLE-like head, each policy in one process; the slower of no speculation's, static
3's and SmartSpec's. Acceptance is Beta over requests, mean 0.7.

`daemon_us_per_step_<n>`: processor time within the daemon's turns, per step of an engine, for one
engine and for 64 that one loop steers, each serving its own requests at half of its capacity. All
are of the same age, since a daemon decides less often once it knows an engine: the one is the sum
over engines that are steered one after another.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from figures import record

from smartspec.engine_adapter.simulator import acceptance, arrivals, profile
from smartspec.lab.public_data import data_folder
from smartspec.lab.simulation.workload import Workload
from smartspec.lab.simulation.world import Cell, Fleet, simulate

POLICIES = ("none", "static3", "smartspec")


def hour(policy: str, trace: Path, num_requests: int | None) -> dict[str, float]:
    """Serve the hour; seconds of this process and of the clock on the wall."""
    traffic = arrivals.azure(trace)
    if num_requests:
        traffic = traffic.part(slice(0, num_requests))
    wall, cpu = time.perf_counter(), time.process_time()
    drawn = acceptance.draw(
        acceptance.BetaOverRequests(0.7), traffic.num_output, max_length=5, seed=0
    )
    engine = simulate(policy, Cell(profile.load("h100_8b"), "eagle", traffic, drawn))
    return {
        "wall_s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
        "num_steps": float(engine.num_steps),
        "latency_mean_s": float(engine.served.latency_s.mean()),
    }


def daemon_us_per_step(fleets: list[list[int]], duration_s: float) -> float:
    """Processor time of the daemons' turns over steps of all engines, microseconds.

    ``fleets``: of each daemon, its engines' seeds.
    """
    workload, spent, num_steps = Workload(duration_s=duration_s), 0.0, 0
    for seeds in fleets:
        fleet = Fleet([workload.cell(0.5, seed) for seed in seeds])
        cycle = fleet.loop.cycle

        def timed(timeout_s: float, cycle: Callable[[float], object] = cycle) -> object:
            nonlocal spent
            began = time.process_time()
            try:
                return cycle(timeout_s)
            finally:
                spent += time.process_time() - began

        fleet.loop.cycle = timed  # type: ignore[method-assign,assignment]
        num_steps += sum(engine.num_steps for engine in fleet.run())
    return 1e6 * spent / num_steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policies", nargs="*", default=list(POLICIES))
    parser.add_argument("--requests", type=int, default=None, help="of the hour; default: all")
    parser.add_argument("--seconds", type=float, default=2.0, help="of the fleet's arrivals")
    options = parser.parse_args()
    figures: dict[str, float] = {}
    trace = data_folder() / "traces" / "azure2023_conv.csv"
    if not trace.is_file():
        print(f"no {trace}: the Azure hour is left out (make data, or SMARTSPEC_DATA)")
    else:
        walls = []
        for policy in options.policies:
            found = hour(policy, trace, options.requests)
            walls.append(found["wall_s"])
            figures |= {f"azure_conv_{policy}_{name}": value for name, value in found.items()}
            print(policy, {name: round(value, 2) for name, value in found.items()}, flush=True)
        figures["azure_conv_wall_s"] = max(walls, default=float("nan"))
    # In turns, so that the machine's pace is the same for both.
    one, many = [], []
    for _ in range(3):
        one.append(daemon_us_per_step([[seed] for seed in range(16)], options.seconds))
        many.append(daemon_us_per_step([list(range(64))], options.seconds))
    figures["daemon_us_per_step_1"] = float(np.median(one))
    figures["daemon_us_per_step_64"] = float(np.median(many))
    figures["daemon_us_ratio_64_to_1"] = float(np.median(np.array(many) / np.array(one)))
    record("fleet", figures)


if __name__ == "__main__":
    main()
