"""A schedule in which load, acceptance and costs change: how near does each policy come?

Six phases at 0.05, 0.5, 0.9, 0.1, 0.9, 0.05 of what is served without speculation, with mean
acceptance 0.9, 0.7, 0.4, 0.8, 0.5, 0.9 (Beta over requests, concentration 6); all costs 1.1 times
from phase 5 on. Two measures: mean latency over all requests, and the geometric mean over phases of
the mean latency of those that came in it. *Informed* is told true costs and probabilities,
*clairvoyant* what will be accepted. `way` is the part of the way from the best static length in
hindsight (0 to 5) to *informed*. SmartSpec starts cold.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor

import numpy as np
from figures import record

from smartspec.engine_adapter.simulator import acceptance, arrivals, profile
from smartspec.lab.simulation.experiment import capacity
from smartspec.lab.simulation.world import Cell, simulate

PHASE_S = 120.0
LOADS = (0.05, 0.5, 0.9, 0.1, 0.9, 0.05)
ACCEPTANCE = (0.9, 0.7, 0.4, 0.8, 0.5, 0.9)
DEARER_FROM_PHASE = 4
LENGTHS = 600.0, 200.0
SETTINGS = {
    "h100_eagle": ("h100_8b", "eagle"),
    "a100_160m": ("a100_7b", "160m"),
    "a100_lookup": ("a100_7b", "lookup"),
}
STATIC = ("none", "static1", "static2", "static3", "static4", "static5")
ONLINE = ("tiers", "authors", "bandit", "switch_off", "smartspec")
#: With a prompt token counting as so much of an answer's: what the solver of today leaves lying.
PROMPTS = ("informed0.1", "informed0.3")
POLICIES = (*STATIC, "table", *ONLINE, "informed", *PROMPTS, "clairvoyant")


def dearer(now_s: float, phase_s: float) -> float:
    return 1.1 if now_s >= DEARER_FROM_PHASE * phase_s else 1.0


def play(policy: str, setting: str, limit: int, seed: int, phase_s: float) -> dict[str, float]:
    """Both measures, and how long the run took."""
    began = time.perf_counter()
    name, draft = SETTINGS[setting]
    gpu = profile.load(name)
    most = capacity(gpu, limit, *LENGTHS)
    rng = np.random.default_rng((seed, 7))
    times = arrivals.piecewise([(phase_s, load * most) for load in LOADS], rng)
    traffic = arrivals.exponential_lengths(times, *LENGTHS, rng)
    phase = np.minimum((times // phase_s).astype(np.int64), len(LOADS) - 1)
    outcomes = acceptance.draw(
        acceptance.BetaOverRequests(np.array(ACCEPTANCE)[phase], 6.0),
        traffic.num_output,
        max_length=5,
        seed=seed,
        presence=0.6 if draft == "lookup" else None,
    )
    cell = Cell(
        gpu,
        draft,
        traffic,
        outcomes,
        acceptance=float(np.mean(ACCEPTANCE)),
        max_num_running=limit,
        seed=seed,
        cost_factor=lambda now_s: dearer(now_s, phase_s),
    )
    engine = simulate(policy, cell)
    latency = engine.served.latency_s
    by_phase = [latency[phase == p].mean() for p in range(len(LOADS)) if (phase == p).any()]
    return {
        "mean": float(latency.mean()),
        "geometric": float(np.exp(np.mean(np.log(by_phase)))),
        "num_steps": float(engine.num_steps),
        "wall_s": time.perf_counter() - began,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--limits", nargs="*", type=int, default=[64, 256])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--phase-s", type=float, default=PHASE_S)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    jobs = list(itertools.product(options.settings, options.limits, range(options.seeds), POLICIES))
    found: dict[tuple[str, int, int, str], dict[str, float]] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, context) as pool:
        waiting = [
            pool.submit(play, policy, setting, limit, seed, options.phase_s)
            for setting, limit, seed, policy in jobs
        ]
        for job, future in zip(jobs, waiting, strict=True):
            found[job] = future.result()
            print(*job, {k: round(v, 3) for k, v in found[job].items()}, flush=True)
    figures: dict[str, float] = {"num_seeds": options.seeds, "phase_s": options.phase_s}
    for setting, limit in itertools.product(options.settings, options.limits):
        for measure in ("mean", "geometric"):
            mean = {
                policy: float(
                    np.mean(
                        [found[setting, limit, s, policy][measure] for s in range(options.seeds)]
                    )
                )
                for policy in POLICIES
            }
            best = min(mean[name] for name in STATIC)
            informed = mean["informed"]
            stem = f"{setting}_{limit}_{measure}"
            figures[f"{stem}_best_static_s"] = best
            for name in (*ONLINE, "table", "none", "informed", *PROMPTS, "clairvoyant"):
                figures[f"{stem}_{name}_vs_best_static"] = mean[name] / best
            figures[f"{stem}_smartspec_vs_informed"] = mean["smartspec"] / informed
            figures[f"{stem}_smartspec_way"] = (best - mean["smartspec"]) / (best - informed)
    record("change", figures)


if __name__ == "__main__":
    main()
