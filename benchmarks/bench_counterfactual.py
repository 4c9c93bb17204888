"""Gains as predicted and measured against the true ones, on a scripted engine of known costs.

Engine and daemon take turns over a real socket; the engine (a mock: it has no model) has virtual
seconds. The true gain of a block is that of the lengths it ran, by known acceptance and costs,
chance taken out, against the same batches at length 0 and at the engine's own length. An estimate
is held against the true gain of the blocks that it is about: the running one of all blocks that
SmartSpec steered, the older the less they count; that of comparisons alone of its blocks in them.
Regimes differ in load, acceptance and in what is best; in one the load changes all the time.
Each regime and mode is run with several seeds.

`coverage_*_pct` is the share of runs whose 95% interval held the true gain; `error_*` the absolute
error of log gain. In `observe` nothing is steered: the truth there is that of the lengths that were
planned in the last minute. Writes build/figures/counterfactual.json.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "integration"))

from fakes import Clock, ipc_endpoint, until
from figures import record
from scripted_engine import Costs, ScriptedEngine, hello

from smartspec.daemon.adoption import trial
from smartspec.daemon.adoption.gain import (
    ALTERNATIVES,
    COMPARISONS_KEPT,
    MEMORY_BLOCKS,
    Discounted,
    GainEstimator,
    Interval,
    Tally,
)
from smartspec.daemon.config import load
from smartspec.daemon.control_loop import ControlLoop
from smartspec.daemon.decision import Arm, Decision
from smartspec.daemon.event_bus import NullBus
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
    "control": {"adoption.check_loss": 0.02},
    "canary": {"mode": "canary", "adoption.canary_share": 0.5},
    "observe": {"mode": "observe"},
}
OWN_LENGTH = 3
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


class Expected(NamedTuple):
    """What a step is expected to bring, by arm the tokens that it would have in the same time."""

    tokens: float
    seconds: float
    otherwise: dict[Arm, float]

    @classmethod
    def of(cls, engine: ScriptedEngine, lengths: np.ndarray) -> Expected:
        tokens, seconds = rates(engine, lengths)
        otherwise = {}
        for arm, length in ((Arm.NONE, 0), (Arm.OWN, OWN_LENGTH)):
            other_tokens, other_s = rates(engine, np.full(len(lengths), length))
            otherwise[arm] = seconds * other_tokens / other_s
        return cls(tokens, seconds, otherwise)


def log_gain(steps: Sequence[Expected], over: Arm) -> float:
    tokens = sum(step.tokens for step in steps)
    return math.log(tokens / sum(step.otherwise[over] for step in steps))


class WatchedTally(Tally):
    """A block's tally, beside what was to be expected of the steps in it."""

    latest: ClassVar[Expected]  #: of the step that the loop is told of next

    def __init__(self) -> None:
        super().__init__()
        self.expected: list[Expected] = []

    def add(
        self, step_s: float, tokens: float, chosen: float, otherwise: Mapping[Arm, float]
    ) -> None:
        super().add(step_s, tokens, chosen, otherwise)
        self.expected.append(WatchedTally.latest)


class WatchedGains(GainEstimator):
    """The estimator, beside what is true of the blocks that it is told of."""

    def __init__(self) -> None:
        super().__init__()
        self.true = {arm: Discounted(MEMORY_BLOCKS) for arm in ALTERNATIVES}
        self.true_compared: dict[Arm, deque[float]] = {
            arm: deque(maxlen=COMPARISONS_KEPT) for arm in ALTERNATIVES
        }

    def note_block(self, arm: Arm, tally: Tally, model_std: Mapping[Arm, float]) -> None:
        super().note_block(arm, tally, model_std)
        if arm is Arm.SMARTSPEC:
            for other in ALTERNATIVES:
                self.true[other].add(log_gain(tally.expected, other))

    def note_comparison(self, alternative: Arm, smartspec: Tally, other: Tally) -> float:
        self.true_compared[alternative].append(log_gain(smartspec.expected, alternative))
        return super().note_comparison(alternative, smartspec, other)


class Found(NamedTuple):
    """Of one run, over one alternative: log gains, each as estimated between what and what."""

    true: float
    estimated: tuple[float, float, float]
    compared: tuple[float, tuple[float, float, float]] | None  #: the true one too

    @property
    def held(self) -> bool:
        return self.estimated[1] <= self.true <= self.estimated[2]


def run(regime: str, mode: str, seconds: float, seed: int) -> dict[Arm, Found]:
    costs, (low, high), sizes = REGIMES[regime]
    rng = np.random.default_rng(seed)
    clock = Clock()
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
        gains = session.trial.gains = WatchedGains()
        planned: deque[tuple[float, Expected]] = deque()
        decide = session.planner.decide

        def noted(arm: Arm) -> Decision | None:
            decision = decide(arm)
            if decision is not None and len(decision.lengths) == len(engine.ids):
                planned.append((clock.now, Expected.of(engine, decision.lengths)))
            return decision

        session.planner.decide = noted  # type: ignore[method-assign]
        began, step = clock.now, 0
        while clock.now - began < seconds:
            if len(sizes) > 1 and step % STAY_STEPS == 0:
                engine.set_batch(rng.uniform(low, high, sizes[step // STAY_STEPS % len(sizes)]))
            elif step % 8 == 0:
                engine.replace(1, rng.uniform(low, high, 1))
            clock.now += engine.step().step_s
            WatchedTally.latest = Expected.of(engine, engine.choices[-1].lengths)
            loop.cycle(1.0)
            step += 1
        late = [expected for at, expected in planned if at > clock.now - WINDOW_S]
        found = {}
        for arm in ALTERNATIVES:
            over, compared = gains.over(arm), gains.comparisons[arm].interval()
            assert over is not None
            found[arm] = Found(
                log_gain(late, arm) if mode == "observe" else gains.true[arm].mean,
                logs(over),
                compared and (float(np.mean(gains.true_compared[arm])), logs(compared)),
            )
        link.close()
        loop.close()
    return found


def logs(interval: Interval) -> tuple[float, float, float]:
    value, low, high = (math.log1p(max(x, -0.999)) for x in interval)
    return value, low, high


def main() -> None:
    """Run all, print a table, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=150.0, help="virtual, per run")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--regimes", default=",".join(REGIMES))
    parser.add_argument("--modes", default=",".join(MODES))
    args = parser.parse_args()
    trial.Tally = WatchedTally  # type: ignore[misc]
    figures: dict[str, float] = {}
    for mode in args.modes.split(","):
        held: dict[Arm, list[bool]] = {arm: [] for arm in ALTERNATIVES}
        compared_held: list[bool] = []
        for regime in args.regimes.split(","):
            runs = [run(regime, mode, args.seconds, seed) for seed in range(args.seeds)]
            for arm, name in ((Arm.NONE, "none"), (Arm.OWN, "static")):
                found = [one[arm] for one in runs]
                held[arm] += [one.held for one in found]
                errors = [abs(one.estimated[0] - one.true) for one in found]
                figures[f"{mode}_{regime}_error_{name}"] = float(np.mean(errors))
                for one in found:
                    if one.compared is not None:
                        true, (_, low, high) = one.compared
                        compared_held.append(low <= true <= high)
            widths = [one[Arm.OWN].estimated[2] - one[Arm.OWN].estimated[1] for one in runs]
            figures[f"{mode}_{regime}_width_static"] = float(np.mean(widths))
            print(f"{mode} {regime}: done", flush=True)
        for arm, name in ((Arm.NONE, "none"), (Arm.OWN, "static")):
            figures[f"{mode}_coverage_{name}_pct"] = 100 * float(np.mean(held[arm]))
        if compared_held:
            figures[f"{mode}_coverage_compared_pct"] = 100 * float(np.mean(compared_held))
    record("counterfactual", figures, seed=0)


if __name__ == "__main__":
    main()
