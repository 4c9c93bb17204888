"""Policies by loads by seeds: one run each, in parallel, every policy meeting the same requests."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta

from smartspec.engine_adapter.simulator import acceptance, arrivals, profile
from smartspec.engine_adapter.simulator.engine import Served
from smartspec.engine_adapter.simulator.profile import Profile
from smartspec.engine_adapter.simulator.requests import Traffic
from smartspec.lab.simulation.world import Cell, rival, simulate

Positive = Annotated[float, Meta(gt=0)]
Count = Annotated[int, Meta(ge=1)]


class Experiment(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What to try. Lengths are exponential, arrivals Poisson, acceptance Beta over requests."""

    profile: str = "h100_8b"  #: a shipped profile, or a file
    draft: str = "eagle"  #: one of the profile's, or "lookup"
    policies: tuple[str, ...] = ("none", "static1", "static3", "static5", "informed", "smartspec")
    loads: tuple[Positive, ...] = (0.1, 0.5, 0.8)  #: of what is served without speculation
    num_seeds: Count = 3
    duration_s: Positive = 60.0
    acceptance: Annotated[float, Meta(gt=0, lt=1)] = 0.7  #: mean over requests
    concentration: Positive = 6.0
    presence: Annotated[float, Meta(gt=0, le=1)] = 0.6  #: how often a lookup finds a draft
    mean_prompt: Positive = 600.0
    mean_output: Positive = 200.0
    max_length: Annotated[int, Meta(ge=1, le=16)] = 5
    max_num_running: Count = 64


class Run(msgspec.Struct, frozen=True):
    """One policy at one load with one seed; times in seconds, means over requests."""

    policy: str
    load: float
    seed: int
    num_requests: int
    latency_mean_s: float
    latency_p99_s: float
    time_to_first_mean_s: float
    time_per_token_mean_s: float
    num_steps: int
    num_drafted: int
    num_accepted: int
    num_preempted: int


def read(path: Path) -> Experiment:
    """An experiment from TOML. Raises ValueError naming what is wrong."""
    try:
        return msgspec.toml.decode(path.read_bytes(), type=Experiment)
    except (msgspec.DecodeError, OSError) as error:
        raise ValueError(f"{path}: {error}") from error


def check(experiment: Experiment) -> None:
    """Raises ValueError, naming what is known, for a profile, draft or policy that is not."""
    gpu = profile.load(experiment.profile)
    gpu.draft(experiment.draft)
    empty = Traffic(np.empty(0), np.empty(0, np.int64), np.empty(0, np.int64))
    drawn = acceptance.draw(acceptance.Constant(0.5), empty.num_output, max_length=1, seed=0)
    for name in experiment.policies:
        if name != "smartspec":
            rival(name, Cell(gpu, experiment.draft, empty, drawn, max_length=1))


def capacity(
    gpu: Profile, max_num_running: int, mean_prompt: float, mean_output: float, seed: int = 0
) -> float:
    """Requests per second that are served without speculation, the batch being full throughout."""
    count = 6 * max_num_running
    rng = np.random.default_rng((seed, 2))
    traffic = arrivals.exponential_lengths(np.zeros(count), mean_prompt, mean_output, rng)
    never = acceptance.draw(acceptance.Constant(0.0), traffic.num_output, max_length=1, seed=seed)
    cell = Cell(gpu, "lookup", traffic, never, max_length=1, max_num_running=max_num_running)
    return middle_rate(simulate("none", cell).served)


def middle_rate(served: Served) -> float:
    """Requests per second while a batch stays full: neither its filling nor its emptying counts."""
    done = np.sort(served.finished_s)
    first, last = len(done) // 3, 2 * len(done) // 3
    return float((last - first) / (done[last] - done[first]))


def play(experiment: Experiment, policy: str, load: float, seed: int) -> Run:
    """Serve one run; the same arguments give the same numbers."""
    gpu = profile.load(experiment.profile)
    lengths = experiment.mean_prompt, experiment.mean_output
    rate = load * capacity(gpu, experiment.max_num_running, *lengths)
    rng = np.random.default_rng((seed, 3))
    times = arrivals.poisson(rate, experiment.duration_s, rng)
    traffic = arrivals.exponential_lengths(times, *lengths, rng)
    if not traffic.size:
        raise ValueError(f"no request in {experiment.duration_s:g} s at {rate:.2g}/s: go on longer")
    outcomes = acceptance.draw(
        acceptance.BetaOverRequests(experiment.acceptance, experiment.concentration),
        traffic.num_output,
        max_length=experiment.max_length,
        seed=seed,
        presence=experiment.presence if experiment.draft == "lookup" else None,
    )
    cell = Cell(
        gpu,
        experiment.draft,
        traffic,
        outcomes,
        acceptance=experiment.acceptance,
        max_length=experiment.max_length,
        max_num_running=experiment.max_num_running,
        seed=seed,
    )
    engine = simulate(policy, cell)
    served = engine.served
    decoding = served.time_per_token_s[served.num_output > 1]
    return Run(
        policy=policy,
        load=load,
        seed=seed,
        num_requests=traffic.size,
        latency_mean_s=float(served.latency_s.mean()),
        latency_p99_s=float(np.quantile(served.latency_s, 0.99)),
        time_to_first_mean_s=float(served.time_to_first_s.mean()),
        time_per_token_mean_s=float(decoding.mean()) if len(decoding) else 0.0,
        num_steps=engine.num_steps,
        num_drafted=engine.num_drafted,
        num_accepted=engine.num_accepted,
        num_preempted=engine.num_preempted,
    )


def play_all(
    experiment: Experiment, num_workers: int = 1, note: Callable[[], None] = lambda: None
) -> list[Run]:
    """All runs, in the order of loads, policies and seeds; ``note`` is called after each."""
    check(experiment)
    jobs = [
        (experiment, policy, load, seed)
        for load in experiment.loads
        for policy in experiment.policies
        for seed in range(experiment.num_seeds)
    ]
    found = {}
    for at, run in _played(jobs, num_workers):
        found[at] = run
        note()
    return [found[at] for at in range(len(jobs))]


def _played(
    jobs: list[tuple[Experiment, str, float, int]], num_workers: int
) -> Iterator[tuple[int, Run]]:
    if num_workers == 1:
        for at, job in enumerate(jobs):
            yield at, play(*job)
        return
    # Spawned, since a fork would copy whatever threads the caller has in whatever state.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, context) as pool:
        waiting = {pool.submit(play, *job): at for at, job in enumerate(jobs)}
        for future in as_completed(waiting):
            yield waiting[future], future.result()


class Line(msgspec.Struct, frozen=True):
    """A policy at a load, over its seeds."""

    policy: str
    load: float
    latency_mean_s: float
    over_first: float  #: geometric mean of the latencies' ratios to the first policy's, per seed
    lowest: float  #: of these ratios
    highest: float
    accepted_share: float  #: of drafts; NaN: none were drafted


def summarise(runs: Iterable[Run]) -> list[Line]:
    """One line per load and policy, in the order of ``runs``, against the first policy's."""
    groups: dict[tuple[float, str], list[Run]] = {}
    first: dict[tuple[float, int], float] = {}
    for run in runs:
        groups.setdefault((run.load, run.policy), []).append(run)
        first.setdefault((run.load, run.seed), run.latency_mean_s)
    lines = []
    for (load, policy), group in groups.items():
        ratios = [run.latency_mean_s / first[load, run.seed] for run in group]
        drafted = sum(run.num_drafted for run in group)
        accepted = sum(run.num_accepted for run in group)
        lines.append(
            Line(
                policy=policy,
                load=load,
                latency_mean_s=float(np.mean([run.latency_mean_s for run in group])),
                over_first=float(np.exp(np.mean(np.log(ratios)))),
                lowest=min(ratios),
                highest=max(ratios),
                accepted_share=accepted / drafted if drafted else float("nan"),
            )
        )
    return lines
