"""The runs of one cell: policies by seeds, at a load or with a queue that is full.

All policies meet the same requests and the same luck. SmartSpec runs twice: cold, and warm, from
what the cold run of the *next* seed in the same cell had learned in the end; so a warm run has
never seen its own requests.
"""

from __future__ import annotations

import msgspec
import numpy as np
from paper_grid import FULL, Setting

from smartspec.daemon.state.learned import Checkpoint, decode
from smartspec.daemon.state.library import Library
from smartspec.engine_adapter.simulator import arrivals
from smartspec.engine_adapter.simulator.engine import Engine
from smartspec.engine_adapter.simulator.requests import F64
from smartspec.lab.simulation.workload import Workload, middle_rate
from smartspec.lab.simulation.world import Cell, Fleet, simulate

COLD, WARM = "smartspec_cold", "smartspec"
QUEUES = 4  #: batches' worth of requests that a full queue begins with


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One policy at one load with one seed; seconds are means over requests."""

    load: float  #: share of what is served without speculation; FULL: all come at once
    policy: str
    seed: int
    num_requests: int
    latency_s: float
    time_to_first_s: float
    served_per_s: float  #: requests, in the middle third
    num_steps: int
    num_drafted: int
    num_accepted: int


def play(setting: Setting, load: float) -> list[Run]:
    """All runs of a setting at a load; at its ``static_loads`` only those of one length."""
    cells = [make_cell(setting, load, seed) for seed in range(setting.num_seeds)]
    if load in setting.static_loads:
        return [
            run_of(load, policy, seed, simulate(policy, cell))
            for seed, cell in enumerate(cells)
            for policy in setting.statics
        ]
    runs, learned = [], []
    for seed, cell in enumerate(cells):
        engine, after = steer(cell)
        runs.append(run_of(load, COLD, seed, engine))
        learned.append(after)
    for seed, cell in enumerate(cells):
        engine, _ = steer(cell, learned[(seed + 1) % len(cells)])
        runs.append(run_of(load, WARM, seed, engine))
        for policy in (*setting.statics, *setting.others):
            runs.append(run_of(load, policy, seed, serve(policy, cell, setting)))
    return runs


def serve(policy: str, cell: Cell, setting: Setting) -> Engine:
    """A run under a policy that is not SmartSpec; of "chain3" the drafter drafts chains."""
    if policy.startswith("chain"):
        return simulate(policy.replace("chain", "static"), cell.chains(setting.max_length))
    return simulate(policy, cell)


def steer(cell: Cell, before: Checkpoint | None = None) -> tuple[Engine, Checkpoint]:
    """A run under SmartSpec from what was learned ``before``; and what it knows in the end."""
    library = Library()
    if before is not None:
        library.put(before)
    fleet = Fleet([cell], library)
    engine = fleet.run()[0]
    after = decode(fleet.loop.checkpoints()[0].frame)
    if before is not None and after.num_steps <= before.num_steps:
        raise RuntimeError("what was learned before was not used")
    return engine, after


def make_cell(setting: Setting, load: float, seed: int) -> Cell:
    """The requests of a load and seed, and their luck."""
    pair, asked = setting.pair, setting.requests
    workload = Workload(
        profile=pair.profile,
        draft=pair.draft,
        acceptance=asked.acceptance,
        concentration=setting.concentration,
        presence=asked.presence,
        max_length=setting.longest,
        trees=bool(pair.tree_sizes),
        max_num_running=pair.max_num_running,
        duration_s=pair.duration_s,
        mean_prompt=asked.mean_prompt,
        mean_output=asked.mean_output,
    )
    rng = np.random.default_rng((seed, 5))
    times: F64 = np.zeros(QUEUES * pair.max_num_running)
    if load != FULL:
        times = arrivals.poisson(workload.rate(load), pair.duration_s, rng)
    lengths = asked.mean_prompt, asked.mean_output
    return workload.cell_of(arrivals.exponential_lengths(times, *lengths, rng), seed)


def run_of(load: float, policy: str, seed: int, engine: Engine) -> Run:
    """What became of a run."""
    served = engine.served
    return Run(
        load=load,
        policy=policy,
        seed=seed,
        num_requests=len(served.num_output),
        latency_s=float(served.latency_s.mean()),
        time_to_first_s=float(served.time_to_first_s.mean()),
        served_per_s=middle_rate(served),
        num_steps=engine.num_steps,
        num_drafted=engine.num_drafted,
        num_accepted=engine.num_accepted,
    )
