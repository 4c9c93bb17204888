"""None, copies, chains, trees and the one controller, simulated while load and acceptance change.

The schedule is bench_shift.py's: six phases of load and of the drafter's mean acceptance, costs 1.1
times from phase 5 on, requests the same for all. Beside the drafter's guesses there are copies:
when there is one, how far its matches agree, and how many of its tokens are right are those of
recorded answers of the nearest length (data/acceptance.npz, both temperatures), whatever the phase.
What is assumed of guesses and copies together is in engine_adapter/simulator/copies.py.

* fixed, one size for all: *none*; *copies*, prompt lookup's chains; *chain* and *tree*, the
  drafter's alone; *joined*, trees with copies among their branches;
* *smartspec*: the daemon's own loop, from a cold start, over trees with copies that grow at its
  prices: whether a request gets nothing, a copy, a chain or a tree is decided at every step.

`phase<i>_vs_best`: mean latency of the requests of a phase over that of the fixed choice that is
best there, over all seeds; `overall_vs_best`: the same of all requests. Ratios are geometric means
over seeds, pair by pair, with one-sided 95% upper bounds (paired.py).

Every run is kept in build/figures/kinds_shift_raw.jsonl as soon as it is done: `--resume` goes on.
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import replace
from functools import lru_cache

import kept_runs
import numpy as np
from acceptance_traces import FILE
from bench_shift import ACCEPTANCE, CONCENTRATION, LOADS, SETTINGS, set_up
from figures import record
from kept_runs import Runs
from paired import paired_ratio

from smartspec.engine_adapter.base import StepFacts
from smartspec.engine_adapter.simulator import acceptance, copies
from smartspec.engine_adapter.simulator.recorded import Recorded
from smartspec.engine_adapter.simulator.requests import I64
from smartspec.lab.profiles import answers
from smartspec.lab.simulation.world import Cell, simulate

MOST = 16
MOST_COPIED = 8  #: as far as the traces were recorded
OURS = "smartspec"
SIZES = {
    "copies": (1, 3, 5, 8),
    "chain": (1, 2, 3, 5),
    "tree": (2, 4, 8, 16),
    "joined": (2, 4, 8, 16),
}
FIXED = ("none_0", *(f"{kind}_{size}" for kind, sizes in SIZES.items() for size in sizes))
PHASES = tuple(f"phase{i}" for i in range(len(LOADS)))
PHASE_S = 30.0


@lru_cache
def recorded() -> Recorded:
    """Copies, up to `MOST_COPIED` tokens, of all recorded answers."""
    return answers.load(FILE, is_lookup=True, max_length=MOST_COPIED)


def cell_for(kind: str, setting: str, limit: int, seed: int, phase_s: float) -> tuple[Cell, I64]:
    """What an arm of this kind meets, and the phase of each request; the same luck for all."""
    cell, phase = set_up(setting, limit, seed, phase_s)
    num_output = cell.traffic.num_output
    if kind == "copies":
        which = recorded().nearest(num_output, seed)
        drawn = recorded().outcomes(which, num_output, max_length=MOST_COPIED)
        return replace(cell, draft="lookup", outcomes=drawn, max_length=MOST_COPIED), phase
    drawn = acceptance.draw(
        acceptance.BetaOverRequests(np.array(ACCEPTANCE)[phase], CONCENTRATION),
        num_output,
        max_length=MOST,
        seed=seed,
        trees=True,
    )
    joined = copies.among(drawn, recorded(), num_output, seed=seed)
    cell = replace(cell, outcomes=joined, max_length=MOST)
    match kind:
        case "none" | "chain":
            return cell.chains(MOST), phase
        case "tree":
            return cell.alone(), phase
    return cell, phase


def play(setting: str, limit: int, seed: int, arm: str, phase_s: float) -> dict[str, float]:
    """Mean latency in seconds by phase and of all, and what was drafted for it."""
    began = time.perf_counter()
    kind, _, size = arm.partition("_")
    counts: defaultdict[str, float] = defaultdict(float)
    cell, phase = cell_for(kind, setting, limit, seed, phase_s)

    def watch(now_s: float, facts: StepFacts) -> None:
        counts["num_forwards"] += facts.num_draft_forwards

    policy = OURS if arm == OURS else f"static{size}"
    engine = simulate(policy, replace(cell, watch=watch))
    latency = engine.served.latency_s
    by_phase = {name: float(latency[phase == i].mean()) for i, name in enumerate(PHASES)}
    return {"overall": float(latency.mean())} | by_phase | counts | {
        "num_steps": float(engine.num_steps),
        "num_drafted": float(engine.num_drafted),
        "num_accepted": float(engine.num_accepted),
        "wall_s": time.perf_counter() - began,
    }  # fmt: skip


def figures_of(runs: Runs, cells: list[tuple[str, int]], seeds: range) -> dict[str, float]:
    """Ratios below 1: the controller is faster. Figures without a set-up's name are the worst."""
    figures: dict[str, float] = {}
    worst: dict[str, float] = {}
    for setting, limit in cells:
        stem = f"{setting}_{limit}"
        arms = [arm for arm in FIXED if all((setting, limit, s, arm) in runs for s in seeds)]
        if not arms or any((setting, limit, s, OURS) not in runs for s in seeds):
            continue
        for group in (*PHASES, "overall"):
            latency = {
                arm: [runs[setting, limit, seed, arm][group] for seed in seeds]
                for arm in (*arms, OURS)
            }
            for kind in ("none", *SIZES):
                mine = [arm for arm in arms if arm.startswith(kind)]
                if not mine:
                    continue
                best = min(mine, key=lambda arm: float(np.mean(latency[arm])))
                ratio = paired_ratio(latency[OURS], latency[best])
                figures[f"{stem}_{group}_best_{kind}_size"] = float(best.partition("_")[2])
                figures[f"{stem}_{group}_best_{kind}_s"] = float(np.mean(latency[best]))
                figures[f"{stem}_{group}_vs_{kind}"] = ratio.value
            best = min(arms, key=lambda arm: float(np.mean(latency[arm])))
            ratio = paired_ratio(latency[OURS], latency[best])
            figures[f"{stem}_{group}_s"] = float(np.mean(latency[OURS]))
            figures |= ratio.figures(f"{stem}_{group}_vs_best")
            total = "overall_vs_best" if group == "overall" else "worst_phase_vs_best"
            for name, value in ratio.figures(total).items():
                worst[name] = max(value, worst.get(name, 0.0))
    return worst | figures


def main() -> None:
    drafters = [name for name, (_, draft) in SETTINGS.items() if draft != "lookup"]
    parser = kept_runs.parser(__doc__, drafters, (64,), seeds=3, phase_s=PHASE_S, workers=1)
    parser.add_argument("--arms", nargs="*", default=[*FIXED, OURS], choices=[*FIXED, OURS])
    options = parser.parse_args()
    runs, cells, seeds = kept_runs.play_all("kinds_shift", play, options.arms, options)
    counts = {"num_seeds": float(options.seeds), "phase_s": options.phase_s}
    record("kinds_shift", figures_of(runs, cells, seeds) | counts, seed=options.first_seed)


if __name__ == "__main__":
    main()
