"""Policies by loads by seeds: one run each, in parallel, every policy meeting the same requests."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace

import msgspec
import numpy as np

from smartspec.daemon.adoption.gain import student_95
from smartspec.engine_adapter.simulator.requests import Traffic
from smartspec.lab.simulation.timeline import Timeline, Watch
from smartspec.lab.simulation.workload import Count, Positive, Workload
from smartspec.lab.simulation.world import rival, simulate


class Experiment(Workload, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What to try."""

    #: compared with the first; empty: none, lengths 1, 3 and 5, SmartSpec, and, where it can be
    #: told all that is to be known of drafts, informed
    policies: tuple[str, ...] = ()
    loads: tuple[Positive, ...] = (0.1, 0.5, 0.8)  #: of what is served without speculation
    num_seeds: Count = 3

    def __post_init__(self) -> None:
        if not self.policies:
            lengths = dict.fromkeys(min(length, self.max_length) for length in (1, 3, 5))
            fixed = (f"static{length}" for length in lengths)
            told = () if self.drafts or self.copies else ("informed",)
            policies = ("none", *fixed, *told, "smartspec")
            msgspec.structs.force_setattr(self, "policies", policies)


class Run(msgspec.Struct, frozen=True, omit_defaults=True):
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
    timeline: Timeline | None = None  #: of watched runs


def check(experiment: Experiment) -> None:
    """Raises ValueError for what cannot be played: a profile, draft, policy or load."""
    experiment.check()
    one = Traffic(np.zeros(1), np.ones(1, np.int64), np.ones(1, np.int64))
    cell = experiment.cell_of(one, seed=0)
    for name in experiment.policies:
        if name != "smartspec":
            rival(name, cell)
    for load in experiment.loads:
        experiment.traffic(load, seed=0)  # what cannot be played is told before anything is


def play(experiment: Experiment, policy: str, load: float, seed: int, watched: bool = False) -> Run:
    """Serve one run; the same arguments give the same numbers. ``watched``: with a timeline."""
    cell = experiment.cell(load, seed)
    watch = Watch(experiment.duration_s, experiment.max_length) if watched else None
    if watch is not None:
        cell = replace(cell, watch=watch.step)
    engine = simulate(policy, cell, bus=watch)
    served = engine.served
    decoding = served.time_per_token_s[served.num_output > 1]
    return Run(
        policy=policy,
        load=load,
        seed=seed,
        num_requests=cell.traffic.size,
        latency_mean_s=float(served.latency_s.mean()),
        latency_p99_s=float(np.quantile(served.latency_s, 0.99)),
        time_to_first_mean_s=float(served.time_to_first_s.mean()),
        time_per_token_mean_s=float(decoding.mean()) if len(decoding) else 0.0,
        num_steps=engine.num_steps,
        num_drafted=engine.num_drafted,
        num_accepted=engine.num_accepted,
        num_preempted=engine.num_preempted,
        timeline=watch.timeline(served) if watch is not None else None,
    )


def play_all(
    experiment: Experiment,
    num_workers: int = 1,
    note: Callable[[], None] = lambda: None,
    watched: bool = False,
) -> list[Run]:
    """All runs, in the order of loads, policies and seeds; ``note`` is called after each.

    ``watched``: those of seed 0 with a timeline.
    """
    check(experiment)
    jobs = [
        (experiment, policy, load, seed, watched and seed == 0)
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
    jobs: list[tuple[Experiment, str, float, int, bool]], num_workers: int
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
    """A policy at a load, over its seeds; intervals of 95% by Student's t, NaN for two or fewer."""

    policy: str
    load: float
    latency_mean_s: float
    latency_low_s: float  #: of the interval of the mean
    latency_high_s: float
    over_first: float  #: geometric mean of the latencies' ratios to the first policy's, per seed
    over_first_low: float  #: of its interval
    over_first_high: float
    lowest: float  #: of these ratios
    highest: float
    accepted_share: float  #: of drafts; NaN: none were drafted


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, and the ends of its 95% interval; NaN for fewer than three values.

    >>> [round(x, 2) for x in interval([1.0, 2.0, 3.0])]
    [2.0, -0.4, 4.4]
    """
    mean, n = float(np.mean(values)), len(values)
    if n < 3:
        return mean, math.nan, math.nan
    half = student_95(n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return mean, mean - half, mean + half


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
        mean, low, high = interval([run.latency_mean_s for run in group])
        ratio, ratio_low, ratio_high = (
            math.exp(x) for x in interval([math.log(r) for r in ratios])
        )
        lines.append(
            Line(
                policy=policy,
                load=load,
                latency_mean_s=mean,
                latency_low_s=low,
                latency_high_s=high,
                over_first=ratio,
                over_first_low=ratio_low,
                over_first_high=ratio_high,
                lowest=min(ratios),
                highest=max(ratios),
                accepted_share=accepted / drafted if drafted else math.nan,
            )
        )
    return lines
