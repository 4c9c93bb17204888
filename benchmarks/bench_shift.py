"""A schedule in which load, acceptance and costs change: how near does each policy come?

Six phases at 0.05, 0.5, 0.9, 0.1, 0.9, 0.05 of what is served without speculation, with mean
acceptance 0.9, 0.7, 0.4, 0.8, 0.5, 0.9 (Beta over requests, concentration 6); all costs 1.1 times
from phase 5 on. Two measures: mean latency over all requests, and the geometric mean over phases of
the mean latency of those that came in it. *Informed* is told true costs and probabilities,
*clairvoyant* what will be accepted. SmartSpec starts cold. The best static length
(0 to 5) is that of hindsight, for each set-up and measure. Ratios are geometric means over seeds,
pair by pair, with one-sided 95% upper bounds (paired.py); the figures without a set-up's name are
the worst over all. `share_to_informed` is the part of the way from the best static length to
*informed*, where there is one, with 95% intervals over seeds.

What is between SmartSpec and *informed* is told by three more policies, played when they are named:
`posterior`, told the true costs, and of acceptance what could be known: how it is spread over the
requests of each phase, and what a request has had accepted; `smartspec_unchecked`, with neither
comparisons nor probes; `smartspec_warm`, which begins with what it has learned of the whole
schedule with the next seed.

Every run is kept in build/figures/shift_raw.jsonl as soon as it is done: `--resume` goes on.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence

import kept_runs
import numpy as np
from figures import record
from kept_runs import Runs
from paired import paired_ratio
from paper_runs import steer
from scipy import stats

from smartspec.daemon import config
from smartspec.engine_adapter.base import StepFacts
from smartspec.engine_adapter.simulator import acceptance, arrivals, profile
from smartspec.engine_adapter.simulator.engine import Engine, Present
from smartspec.engine_adapter.simulator.requests import F64, I64
from smartspec.lab.simulation.policies import Told
from smartspec.lab.simulation.workload import capacity
from smartspec.lab.simulation.world import Cell, Fleet, serve, simulate

PHASE_S = 120.0
LOADS = (0.05, 0.5, 0.9, 0.1, 0.9, 0.05)
ACCEPTANCE = (0.9, 0.7, 0.4, 0.8, 0.5, 0.9)
DEARER_FROM_PHASE = 4
CONCENTRATION = 6.0  #: of the Beta distribution of acceptance over requests
LENGTHS = 600.0, 200.0
PRESENCE = 0.6  #: how often a lookup finds a draft
SETTINGS = {
    "h100_eagle": ("h100_8b", "eagle"),
    "a100_160m": ("a100_7b", "160m"),
    "a100_lookup": ("a100_7b", "lookup"),
}
STATIC = ("none", "static1", "static2", "static3", "static4", "static5")
ONLINE = ("tiers", "authors", "bandit", "switch_off")
TOLD = ("informed", "clairvoyant")
POLICIES = (*STATIC, "table", *ONLINE, *TOLD, "smartspec")
FURTHER = ("posterior", "smartspec_unchecked", "smartspec_warm")
UNCHECKED = config.load(None, {}, {"control.probe_share": 0.0, "adoption.check_loss": 0.0})
MEASURES = {"mean": "mean", "geometric": "geo"}  #: of a run, and how its figures begin


class Posterior(Told):
    """*Informed* of costs; of acceptance it knows the exact posterior of each request, no more.

    The prior is the true Beta of the request's phase. Its survival is E[p^j], p being the request's
    acceptance: greedy, no draft is made in order to learn.

    Parameters: ``mean`` [R] of the priors, ``concentration``.
    """

    def __init__(self, draft: str, mean: F64, concentration: float) -> None:
        super().__init__(draft)
        self._accepted, self._refused = mean * concentration, (1.0 - mean) * concentration

    def survival(self, present: Present) -> F64:
        accepted, refused = self._accepted[present.requests], self._refused[present.requests]
        before = np.arange(self.engine.max_length)[:, None]
        return np.cumprod((accepted + before) / (accepted + refused + before), axis=0)

    def report(self, facts: StepFacts) -> None:
        rows = facts.batch.request_ids.astype(np.int64) - 1
        self._accepted[rows] += facts.num_accepted
        self._refused[rows] += facts.num_accepted < facts.num_drafted


def dearer(now_s: float, phase_s: float) -> float:
    return 1.1 if now_s >= DEARER_FROM_PHASE * phase_s else 1.0


def set_up(setting: str, limit: int, seed: int, phase_s: float) -> tuple[Cell, I64]:
    """The schedule for one engine, and the phase of each request."""
    name, draft = SETTINGS[setting]
    gpu = profile.load(name)
    most = capacity(gpu, limit, *LENGTHS)
    rng = np.random.default_rng((seed, 7))
    times = arrivals.piecewise([(phase_s, load * most) for load in LOADS], rng)
    traffic = arrivals.exponential_lengths(times, *LENGTHS, rng)
    phase = np.minimum((times // phase_s).astype(np.int64), len(LOADS) - 1)
    outcomes = acceptance.draw(
        acceptance.BetaOverRequests(np.array(ACCEPTANCE)[phase], CONCENTRATION),
        traffic.num_output,
        max_length=5,
        seed=seed,
        presence=PRESENCE if draft == "lookup" else None,
    )
    cell = Cell(
        gpu,
        draft,
        traffic,
        outcomes,
        acceptance=float(np.mean(ACCEPTANCE)),
        presence=PRESENCE if draft == "lookup" else 1.0,
        max_num_running=limit,
        seed=seed,
        cost_factor=lambda now_s: dearer(now_s, phase_s),
    )
    return cell, phase


def measures(engine: Engine, phase: I64) -> dict[str, float]:
    """Both measures of a run, in seconds."""
    latency = engine.served.latency_s
    by_phase = [latency[phase == p].mean() for p in range(len(LOADS)) if (phase == p).any()]
    return {
        "mean": float(latency.mean()),
        "geometric": float(np.exp(np.mean(np.log(by_phase)))),
    }


def play(setting: str, limit: int, seed: int, policy: str, phase_s: float) -> dict[str, float]:
    """Both measures of a policy, and how long the run took."""
    began = time.perf_counter()
    cell, phase = set_up(setting, limit, seed, phase_s)
    match policy:
        case "posterior":
            mean = np.array(ACCEPTANCE)[phase]
            engine = serve(Posterior(cell.draft, mean, CONCENTRATION), cell)
        case "smartspec_unchecked":
            engine = Fleet([cell], settings=UNCHECKED).run()[0]
        case "smartspec_warm":
            _, learned = steer(set_up(setting, limit, seed + 1, phase_s)[0])
            engine, _ = steer(cell, learned)
        case _:
            engine = simulate(policy, cell)
    took = {"num_steps": float(engine.num_steps), "wall_s": time.perf_counter() - began}
    return measures(engine, phase) | took


def share(
    measured: Sequence[float], static: Sequence[float], informed: Sequence[float]
) -> tuple[float, float] | None:
    """Part of the way from ``static`` to ``informed``, of means over seeds; and its 95% margin.

    The margin is Student's, of the share's linear part seed by seed; NaN for a single seed. None
    where there is no way to go.
    """
    gone, way = np.subtract(static, measured), np.subtract(static, informed)
    if not way.mean() > 0:
        return None
    found, num = float(gone.mean() / way.mean()), len(way)
    if num == 1:
        return found, math.nan
    deviation = float((gone - found * way).std(ddof=1)) / float(way.mean())
    return found, float(stats.t.ppf(0.975, num - 1)) * deviation / math.sqrt(num)


def figures_of(
    runs: Runs, cells: Sequence[tuple[str, int]], seeds: Sequence[int]
) -> dict[str, float]:
    """Ratios of latencies per cell and measure, and the worst of all cells."""
    figures: dict[str, float] = {}
    worst: dict[str, float] = {}
    for (setting, limit), measured in itertools.product(cells, MEASURES):
        stem = f"{setting}_{limit}_{MEASURES[measured]}"
        policies = dict.fromkeys(key[3] for key in runs if key[:2] == (setting, limit))
        latency = {
            policy: [runs[setting, limit, seed, policy][measured] for seed in seeds]
            for policy in policies
            if all((setting, limit, seed, policy) in runs for seed in seeds)
        }

        def best(names: Sequence[str], latency: dict[str, list[float]] = latency) -> str | None:
            known = [name for name in names if name in latency]
            return min(known, key=lambda name: float(np.mean(latency[name])), default=None)

        static, online = best(STATIC), best(ONLINE)
        if static is None:
            continue
        figures[f"{stem}_best_static"] = STATIC.index(static)
        figures[f"{stem}_best_static_s"] = float(np.mean(latency[static]))
        for policy in (name for name in latency if name != static):
            ratio = paired_ratio(latency[policy], latency[static])
            figures |= ratio.figures(f"{stem}_{policy}_vs_best_static")
        if "smartspec" not in latency:
            continue
        references = {"best_static": static, "best_online": online, "informed": "informed"}
        references["clairvoyant"] = "clairvoyant"
        for name, reference in references.items():
            if reference is None or reference not in latency:
                continue
            ratio = paired_ratio(latency["smartspec"], latency[reference])
            figures |= ratio.figures(f"{stem}_vs_{name}")
            total = f"{MEASURES[measured]}_vs_{name}"
            worst[total] = max(ratio.value, worst.get(total, 0.0))
        for policy in ("smartspec", *FURTHER):
            if policy not in latency or "informed" not in latency:
                continue
            found = share(*(latency[name] for name in (policy, static, "informed")))
            if found is None:
                continue
            stem_of = stem if policy == "smartspec" else f"{stem}_{policy}"
            figures[f"{stem_of}_share_to_informed"] = found[0]
            figures[f"{stem_of}_share_to_informed_margin95"] = found[1]
            if policy == "smartspec":
                worst["share_to_informed"] = min(found[0], worst.get("share_to_informed", math.inf))
    return worst | figures


def main() -> None:
    parser = kept_runs.parser(__doc__, SETTINGS, (64, 256), seeds=5, phase_s=PHASE_S)
    parser.add_argument("--policies", nargs="*", default=list(POLICIES))
    options = parser.parse_args()
    runs, cells, seeds = kept_runs.play_all("shift", play, options.policies, options)
    counts = {"num_seeds": float(options.seeds), "phase_s": options.phase_s}
    record("shift", figures_of(runs, cells, seeds) | counts, seed=options.first_seed)


if __name__ == "__main__":
    main()
