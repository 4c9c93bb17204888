"""The demonstration's schedule, several times per arm, by turns: is SmartSpec ever the worse?

Each repetition has its own arrivals and order of prompts, the same for its arms, which take turns
of two seconds (lab/demo/turns.py). Rates are relative to one calibration at the start. The daemon
starts cold in every repetition. Compared is SmartSpec's mean latency with that of the best of the
other arms, per phase and overall; "the best" is the one with the lowest mean over all repetitions,
which favours it: it is chosen with the very numbers that it is compared by. `paired.py` gives the
statistics.

What each repetition measured is kept in build/figures/demo_raw.jsonl as it comes in, and
`--resume` goes on from there after an interruption.

`--arms kinds`: the same of kinds of drafts in place of lengths of copies. No speculation, copies,
chains of the shipped head's drafts and of copied tokens, and trees of these, each of a fixed size;
and SmartSpec, which has all of these to choose from at every step. `--arms pilot` plays further
sizes once, with another seed, to choose fixed ones by.

Run: python benchmarks/bench_demo.py [--arms kinds] [--repetitions 6] [--resume]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from figures import FOLDER, record
from kept_runs import lines
from paired import paired_ratio
from rich.console import Console

from smartspec.lab import environment
from smartspec.lab.demo import run as demo
from smartspec.lab.demo import schedule as schedules
from smartspec.lab.demo import summary
from smartspec.lab.demo.arms import ARMS, Arm
from smartspec.lab.demo.live import Display
from smartspec.lab.demo.player import PlayError, StepRecord
from smartspec.lab.demo.processes import ProcessFailed
from smartspec.lab.demo.session import ArmPlayed, Session, warm_up_prompts

SMARTSPEC = summary.SMARTSPEC
PROPOSERS = {"copies": "lookup", "chain": "eagle-chain", "tree": "eagle"}
NONE = ARMS[0]
STEERED = Arm(SMARTSPEC, "SmartSpec", "", None, PROPOSERS["tree"])


def fixed(kind: str, *sizes: int) -> list[Arm]:
    """Drafts of one kind, always of one size."""
    return [
        Arm(f"{kind}_{size}", f"{kind} of {size}", f"set to {size}", size, PROPOSERS[kind])
        for size in sizes
    ]


ARM_SETS = {
    "lengths": ARMS,
    "kinds": (NONE, *fixed("copies", 5), *fixed("chain", 3), *fixed("tree", 3), STEERED),
    "pilot": (
        *fixed("copies", 3, 5, 8),
        *fixed("chain", 1),
        *fixed("tree", 2),
        STEERED,
    ),
}


def measure(
    raw: Path, arms: Sequence[Arm], repetitions: int, seed: int, quick: bool, console: Console
) -> None:
    """Play what ``raw`` does not hold yet, and append it there."""
    done = read(raw)
    prompts = schedules.load_prompts()
    if quick:
        prompts = schedules.shortened(prompts, demo.NUM_QUICK_PROMPTS, demo.QUICK_MAX_TOKENS)
    finished = {row["repetition"] for row in done}
    if finished >= set(range(repetitions)):
        return
    with Session(raw.parent / "demo", Display(console), arms) as session:
        # A resumed run keeps the rates of its first part: they are what makes it one experiment.
        capacity = done[0]["capacity_requests_per_s"] if done else None
        if capacity is None:
            capacity = session.calibrate(prompts, seed).capacity_requests_per_s
        console.print(f"capacity without speculation: {capacity:.2f} requests/s", highlight=False)
        warm_up = warm_up_prompts(prompts, seed)
        for repetition in sorted(set(range(repetitions)) - finished):
            began = time.monotonic()
            schedule = schedules.build(prompts, capacity, seed=seed + repetition)
            with stolen_share() as stolen:
                results = session.play(
                    schedule, warm_up, seed + repetition, f"{repetition + 1}/{repetitions}, "
                )
            played = {result.arm.name: result for result in results}
            row = {
                "repetition": repetition,
                "seed": seed + repetition,
                "quick": quick,
                "by_turns": True,
                "capacity_requests_per_s": capacity,
                "arms": {name: arm_row(result) for name, result in played.items()},
                "stolen_share": stolen(),
                "num_different_answers": len(
                    summary.compare_answers(
                        {arm.name: played[arm.name].played.requests for arm in arms}
                    ).different
                ),
                "wall_s": time.monotonic() - began,
                "env": environment.describe(),
            }
            with raw.open("a") as file:
                file.write(json.dumps(row) + "\n")
            means = ", ".join(
                f"{name} {row['arms'][name]['overall']['latency_mean_s']:.2f} s"
                for name in (arm.name for arm in arms)
            )
            console.print(f"repetition {repetition + 1}: {means}", highlight=False)


@contextmanager
def stolen_share() -> Iterator[Callable[[], float]]:
    """Share of all cores' time that the hypervisor gave to other machines."""
    began, before = time.monotonic(), psutil.cpu_times().steal
    yield lambda: float(
        (psutil.cpu_times().steal - before) / (time.monotonic() - began) / psutil.cpu_count()
    )


def arm_row(result: ArmPlayed) -> dict[str, Any]:
    """What is kept of an arm: its summary, who chose the lengths of its steps, and their sizes."""
    return {
        **summary.arm_summary(result.played.requests),
        "steps_by_source": result.steps_by_source,
        "steps": steps_summary(result),
        "notes": result.notes,
    }


def steps_summary(result: ArmPlayed) -> dict[str, dict[str, float]]:
    """Of the steps that decoded, apart by whether they carried prompts: how many, and means."""
    steps = [step for step in result.played.steps if step.lengths]
    return {
        "alone": means_of([step for step in steps if not step.num_prefill_tokens]),
        "with_prompts": means_of([step for step in steps if step.num_prefill_tokens]),
    }


def means_of(steps: Sequence[StepRecord]) -> dict[str, float]:
    if not steps:
        return {}
    return {
        "num": len(steps),
        "num_prefill_tokens": float(np.mean([step.num_prefill_tokens for step in steps])),
        "num_decoding": float(np.mean([len(step.lengths) for step in steps])),
        "num_verified": float(np.mean([sum(step.num_drafted) for step in steps])),
        "num_accepted": float(np.mean([sum(step.num_accepted) for step in steps])),
        "drafting_ms": 1e3 * float(np.mean([step.draft_s for step in steps])),
        "target_ms": 1e3 * float(np.mean([step.target_s for step in steps])),
        "step_ms": 1e3 * float(np.mean([step.step_s for step in steps])),
    }


def read(raw: Path) -> list[dict[str, Any]]:
    """Repetitions measured so far. Raises ValueError for those of arms one after the other."""
    rows = sorted(lines(raw), key=lambda row: int(row["repetition"]))
    if not all(row.get("by_turns") for row in rows):
        raise ValueError(f"{raw} has repetitions that were not played by turns: move it away")
    return rows


def figures_of(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Figures over repetitions; ratios below 1: SmartSpec is faster."""
    phases = list(rows[0]["arms"][SMARTSPEC]["phases"])
    others = [name for name in rows[0]["arms"] if name != SMARTSPEC]
    figures: dict[str, float] = {}
    ratios = {}
    for group in (*phases, summary.OVERALL):
        means = {name: mean_latencies(rows, name, group) for name in (*others, SMARTSPEC)}
        best = min(others, key=lambda name: float(np.mean(means[name])))
        ratios[group] = paired_ratio(means[SMARTSPEC], means[best])
        figures |= ratios[group].figures(f"{group}_vs_best")
        for other in others:
            figures[f"{group}_vs_{other}"] = paired_ratio(means[SMARTSPEC], means[other]).value
        for name, values in means.items():
            figures[f"{group}_{name}_latency_mean_s"] = float(np.mean(values))
        # Against the best of each repetition by itself: harsher still, since it picks by luck.
        best_each = [min(each) for each in zip(*(means[name] for name in others), strict=True)]
        figures[f"{group}_vs_best_each"] = paired_ratio(means[SMARTSPEC], best_each).value
    worst = {
        "worst_phase_vs_best": max(ratios[phase].value for phase in phases),
        "worst_phase_vs_best_upper95": max(ratios[phase].upper95 for phase in phases),
        "num_repetitions": len(rows),
        "num_different_answers": sum(row["num_different_answers"] for row in rows),
    }
    return worst | figures


def mean_latencies(rows: Sequence[dict[str, Any]], arm: str, group: str) -> list[float]:
    """Mean latency in seconds of an arm in each repetition."""
    arms = [row["arms"][arm] for row in rows]
    stats = [one["overall"] if group == summary.OVERALL else one["phases"][group] for one in arms]
    return [float(one["latency_mean_s"]) for one in stats]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", choices=ARM_SETS, default="lengths")
    parser.add_argument("--repetitions", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on with what was kept")
    parser.add_argument("--quick", action="store_true", help="few short requests: does it work?")
    args = parser.parse_args()
    name = "demo" if args.arms == "lengths" else f"demo_{args.arms}"
    name += "_quick" if args.quick else ""
    FOLDER.mkdir(parents=True, exist_ok=True)
    raw = FOLDER / f"{name}_raw.jsonl"
    if not args.resume:
        raw.unlink(missing_ok=True)
    code = 0
    try:
        with demo.signals_raise():
            measure(raw, ARM_SETS[args.arms], args.repetitions, args.seed, args.quick, Console())
    except KeyboardInterrupt:
        print("interrupted; `--resume` goes on from here", file=sys.stderr)
        code = demo.EXIT_INTERRUPTED
    except (ProcessFailed, PlayError, ValueError) as error:
        print(f"bench_demo: {error}\n`--resume` goes on from what was kept", file=sys.stderr)
        return demo.EXIT_FAILED
    rows = read(raw)
    if rows:
        record(name, figures_of(rows), seed=args.seed)
    return code


if __name__ == "__main__":
    sys.exit(main())
