"""A full batch under static lengths and SmartSpec by turns, a few seconds each, in one worker.

`bench_demo.py` compares whole schedules, minutes apart, on machines whose speed may change by half
in a minute. Here the same worker serves a batch that never empties, and who decides lengths changes
every few seconds, in random order: each round is a comparison within seconds. Tokens per second are
tokens emitted over seconds in steps, in steps that decode; those right after a change are left out.

A regression over the steps of all arms (seconds by tokens in the pass, piecewise linear) gives
``*_common_cost``: the same ratios with each step at the cost it has on average, whoever ran it.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from figures import FOLDER, record
from paired import paired_ratio
from rich.console import Console
from scipy.optimize import nnls

from smartspec.lab.demo.live import Display
from smartspec.lab.demo.processes import DaemonProcess, WorkerProcess
from smartspec.lab.demo.schedule import Prompt, load_prompts, mixed
from smartspec.lab.demo.session import MAX_NUM_RUNNING, Session

ARMS: dict[str, int | None] = {"none": 0, "static_3": 3, "static_5": 5, "smartspec": None}
WARM_UP_S = 20.0
LEFT_OUT = 1  #: steps after a change: begun, or drafted for, under the arm before
KNOTS = (2, 16, 32, 48, 64, 96, 160, 256)


@dataclass(frozen=True, slots=True)
class Step:
    """A step that decoded."""

    num_tokens: int  #: in the target's pass: verified and of prompts
    num_emitted: int
    seconds: float


class Load:
    """Keeps the worker's batch full with the demonstration's prompts, over and over."""

    def __init__(self, worker: WorkerProcess, num_open: int, rng: np.random.Generator) -> None:
        self._worker = worker
        self._rng = rng
        self._deck: list[Prompt] = []
        self._num_submitted = 0
        for _ in range(num_open):
            self._submit()

    def _submit(self) -> None:
        if not self._deck:
            self._deck = mixed(load_prompts(), self._rng)
        prompt = self._deck.pop()
        self._num_submitted += 1
        self._worker.submit(f"{self._num_submitted}/{prompt.id}", prompt, prompt.max_tokens)

    def steps(self, seconds: float) -> list[Step]:
        """Steps of the next ``seconds``."""
        steps = []
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            got = self._worker.poll(0.05)
            event = {} if got is None else got[1]
            if event.get("event") == "finished":
                self._submit()
            elif event.get("event") == "error":
                raise RuntimeError(f"the worker says: {event['message']}")
            elif event.get("event") == "step" and event["lengths"]:
                size = len(event["lengths"])
                num_tokens = size + sum(event["num_drafted"]) + event["num_prefill_tokens"]
                emitted = size + sum(event["num_accepted"])
                steps.append(Step(num_tokens, emitted, event["step_s"]))
        return steps


def features(steps: list[Step]) -> np.ndarray:
    """[M, len(KNOTS) + 2]: 1, and tokens between neighbouring knots."""
    n = np.array([step.num_tokens for step in steps], np.float64)[:, None]
    low, high = np.array([0, *KNOTS]), np.array([*KNOTS, np.inf])
    return np.concatenate([np.ones((len(n), 1)), np.clip(n - low, 0, high - low)], axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--turn-s", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    rounds: dict[str, list[list[Step]]] = defaultdict(list)
    folder = FOLDER / "turns"
    with Session(folder, Display(Console(quiet=True))) as session:
        daemon = DaemonProcess(session.runtime_dir, folder / "daemon.log")
        try:
            daemon.wait_ready()
            session.worker.set_speculation("smartspec")
            load = Load(session.worker, MAX_NUM_RUNNING, rng)
            load.steps(WARM_UP_S)
            for number in range(args.rounds):
                for name in rng.permutation(list(ARMS)).tolist():
                    length = ARMS[name]
                    mode = "smartspec" if length is None else "static"
                    session.worker.set_speculation(mode, length)
                    rounds[name].append(load.steps(args.turn_s)[LEFT_OUT:])
                print(f"round {number + 1} of {args.rounds}", end="\r", flush=True)
        finally:
            daemon.stop()
    everything = [step for turns in rounds.values() for turn in turns for step in turn]
    seconds = np.array([step.seconds for step in everything])
    # Weighted by 1 / seconds: the noise is relative.
    coef, _ = nnls(features(everything) / seconds[:, None], np.ones(len(seconds)))
    own: dict[str, list[float]] = {}  # seconds per token, per round
    common: dict[str, list[float]] = {}
    for name, turns in rounds.items():
        tokens = [sum(step.num_emitted for step in turn) for turn in turns]
        own[name] = [sum(s.seconds for s in t) / n for t, n in zip(turns, tokens, strict=True)]
        costs = [float((features(turn) @ coef).sum()) for turn in turns]
        common[name] = [cost / n for cost, n in zip(costs, tokens, strict=True)]
    figures: dict[str, float] = {"num_rounds": args.rounds}
    for name in ARMS:
        figures[f"{name}_tokens_per_s"] = float(1 / np.mean(own[name]))
        figures[f"{name}_common_cost_tokens_per_s"] = float(1 / np.mean(common[name]))
    best = min((name for name in ARMS if ARMS[name] is not None), key=lambda n: np.mean(common[n]))
    for kind, values in (("", own), ("_common_cost", common)):
        for other in ("none", "static_3", "static_5"):
            ratio = paired_ratio(values["smartspec"], values[other])
            figures |= ratio.figures(f"smartspec_vs_{other}{kind}")
    print(f"seconds per token, SmartSpec over others; below 1 it is faster. Best static: {best}")
    record("turns", figures, seed=args.seed)


if __name__ == "__main__":
    main()
