"""Gains as predicted and measured against the true ones, on a scripted engine of known costs.

Engine and daemon take turns over a real socket; the engine (a mock: it has no model) has virtual
seconds. The true gain is that of the lengths it chose, by known acceptance and costs, chance taken
out: over all steps of the last minute that SmartSpec steered, against the same batches at length 0
and at the engine's own length. Regimes differ in load, acceptance and in what is best; in two of
them the load changes all the time. Each regime and mode is run with several seeds.

`coverage_*_pct` is the share of runs whose 95% interval held the true gain; `error_*` the absolute
error of log gain. In `observe` nothing is steered: the truth there is that of the lengths that were
planned. Writes build/figures/counterfactual.json.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import deque
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "integration"))

from fakes import Clock, ipc_endpoint, until
from figures import record
from scripted_engine import Costs, ScriptedEngine, hello

from smartspec.daemon.config import load
from smartspec.daemon.control_loop import ControlLoop
from smartspec.daemon.event_bus import NullBus
from smartspec.daemon.policy import Arm, Decision
from smartspec.daemon.sessions import Session
from smartspec.daemon.transport import Server
from smartspec.engine_adapter.link import EngineLink

#: Costs, acceptance range, batch sizes (several: one of them after another).
REGIMES = {
    "idle": (Costs(base_s=0.03, token_s=0.0002), (0.7, 0.9), (4,)),
    "knee": (Costs(base_s=0.02, token_s=0.0001, knee=48, beyond_s=0.002), (0.5, 0.9), (20,)),
    "busy": (Costs(base_s=0.004, token_s=0.002), (0.4, 0.8), (24,)),
    "draft_model": (
        Costs(base_s=0.03, token_s=0.0005, draft_forward_s=0.003, draft_token_s=0.0001),
        (0.3, 0.9),
        (12,),
    ),
    "changing": (Costs(base_s=0.02, token_s=0.001, draft_forward_s=0.001), (0.4, 0.9), (4, 12, 32)),
}
MODES = {
    "control": {"adoption.check_share": 0.05},
    "canary": {"mode": "canary", "adoption.canary_share": 0.5},
    "observe": {"mode": "observe"},
}
STAY_STEPS = 60  #: at one batch size, where it changes
WINDOW_S = 60.0


def rates(engine: ScriptedEngine, lengths: np.ndarray) -> tuple[float, float]:
    """Expected tokens and seconds of a step of the present batch at ``lengths``."""
    c, a = engine.costs, engine.acceptance
    drafts, depth = int(lengths.sum()), int(lengths.max(initial=0))
    num_tokens = len(a) + drafts
    seconds = c.base_s + c.token_s * num_tokens + c.beyond_s * max(0, num_tokens - c.knee) + 1e-4
    seconds += c.draft_forward_s * depth + c.draft_token_s * drafts
    return float(((1 - a ** (lengths + 1)) / (1 - a)).sum()), seconds


class Truth:
    """Tokens, seconds and what other lengths would have brought in them, of the last steps."""

    def __init__(self) -> None:
        self._steps: deque[tuple[float, float, float, float]] = deque()
        self._seconds = 0.0

    def add(self, engine: ScriptedEngine, lengths: np.ndarray) -> None:
        tokens, seconds = rates(engine, lengths)
        others = []
        for length in (0, 3):
            other_tokens, other_s = rates(engine, np.full(len(lengths), length))
            others.append(seconds * other_tokens / other_s)
        self._steps.append((tokens, seconds, *others))
        self._seconds += seconds
        while self._seconds > WINDOW_S:
            self._seconds -= self._steps.popleft()[1]

    def log_gains(self) -> dict[Arm, float]:
        tokens, _, none, own = np.array(self._steps).sum(axis=0)
        return {Arm.NONE: math.log(tokens / none), Arm.OWN: math.log(tokens / own)}


def run(regime: str, mode: str, seconds: float, seed: int) -> dict[Arm, tuple[float, ...]]:
    """(true, estimated, low, high) log gains over both alternatives, and (measured, low, high)."""
    costs, (low, high), sizes = REGIMES[regime]
    rng = np.random.default_rng(seed)
    clock, truth = Clock(), Truth()
    with ipc_endpoint() as endpoint:
        settings = load(None, {}, {"control.seed_sweep": True, **MODES[mode]})
        loop = ControlLoop(settings, Server(endpoint), NullBus(), clock)
        # The name is the seed of the trial.
        link = EngineLink(endpoint, hello(f"{regime}-{seed}", lookup=False), clock=clock)
        engine = ScriptedEngine(
            link, rng.uniform(low, high, sizes[0]), costs, lookup=False, seed=seed
        )

        def turn() -> None:
            clock.now += 0.05
            link.idle()
            loop.cycle(0.0)

        until(lambda: link.stats.num_connections, turn)
        turn()
        session: Session = next(iter(loop.sessions.by_name.values()))
        planned: list[Decision] = []
        decide = session.planner.decide

        def noted(arm: Arm) -> Decision | None:
            decision = decide(arm)
            if decision is not None:
                planned[:] = [decision]
            return decision

        session.planner.decide = noted  # type: ignore[method-assign]
        began, step = clock.now, 0
        while clock.now - began < seconds:
            if len(sizes) > 1 and step % STAY_STEPS == 0:
                engine.set_batch(rng.uniform(low, high, sizes[step // STAY_STEPS % len(sizes)]))
            elif step % 8 == 0:
                engine.replace(1, rng.uniform(low, high, 1))
            clock.now += engine.step().step_s
            lengths = engine.choices[-1].lengths
            arm = session.trial.current
            loop.cycle(1.0)
            if mode == "observe" and planned and len(planned[0].lengths) == len(lengths):
                truth.add(engine, planned[0].lengths)
            elif arm is Arm.SMARTSPEC and engine.choices[-1].source != "own":
                truth.add(engine, lengths)
            step += 1
        found = {}
        true = truth.log_gains()
        for arm in (Arm.NONE, Arm.OWN):
            over, compared = session.trial.gains.over(arm), session.trial.gains.comparisons[arm]
            assert over is not None
            logs = [math.log1p(max(x, -0.999)) for x in over]
            measured = compared.interval()
            more = [] if measured is None else [math.log1p(x) for x in measured]
            found[arm] = (true[arm], *logs, *more)
        link.close()
        loop.close()
    return found


def main() -> None:
    """Run all, print a table, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=150.0, help="virtual, per run")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--regimes", default=",".join(REGIMES))
    args = parser.parse_args()
    figures: dict[str, float] = {}
    for mode in MODES:
        held: dict[Arm, list[bool]] = {Arm.NONE: [], Arm.OWN: []}
        measured_held: list[bool] = []
        for regime in args.regimes.split(","):
            errors: dict[Arm, list[float]] = {Arm.NONE: [], Arm.OWN: []}
            widths: list[float] = []
            for seed in range(args.seeds):
                for arm, (true, value, low, high, *more) in run(
                    regime, mode, args.seconds, seed
                ).items():
                    held[arm].append(low <= true <= high)
                    errors[arm].append(abs(value - true))
                    if arm is Arm.OWN:
                        widths.append(high - low)
                    if more:
                        measured_held.append(more[1] <= true <= more[2])
            for arm, name in ((Arm.NONE, "none"), (Arm.OWN, "static")):
                figures[f"{mode}_{regime}_error_{name}"] = float(np.mean(errors[arm]))
            figures[f"{mode}_{regime}_width_static"] = float(np.mean(widths))
            print(f"{mode} {regime}: done", flush=True)
        figures[f"{mode}_coverage_none_pct"] = 100 * float(np.mean(held[Arm.NONE]))
        figures[f"{mode}_coverage_static_pct"] = 100 * float(np.mean(held[Arm.OWN]))
        if measured_held:
            figures[f"{mode}_coverage_measured_pct"] = 100 * float(np.mean(measured_held))
    record("counterfactual", figures, seed=0)


if __name__ == "__main__":
    main()
