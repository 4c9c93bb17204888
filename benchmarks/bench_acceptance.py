"""Whose acceptance probabilities are right? Prequential scores on recorded traces.

Steps of recorded answers (record_acceptance.py) in batches of 8, with lengths at random
(acceptance_stream.py). Before each step every method says, for every request and depth, how likely
the draft at that depth is to be accepted once it is reached; after it all learn the same censored
outcome. Scored are the events that were reached: log-loss in nats, Brier score, and expected
calibration error over 15 bins of equal mass.

Rivals: a constant; a moving average over all requests, of accepted / drafted (the paper) or of
reached drafts; the same per request; a Beta posterior per request, its prior the moving average
of all. Their constants are chosen on three tasks, and the scores come from the three others, then
the other way round; the first split is the headline. The margin's standard error is clustered by
request.

`draft_ahead` is the draft model as the reference worker runs it: whoever was drafted for in the
last step has the confidence of its first draft known. `draft` goes without, as engines do that tell
none.

`--river` compares with river's classifiers (river_classifiers.py) instead.

Run: python benchmarks/bench_acceptance.py [--river]
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from acceptance_stream import STYLES, Step, steps
from acceptance_traces import FILE, MAX_LENGTH, SPLIT, Answer, load
from figures import record
from rich.console import Console
from rich.table import Table
from river_classifiers import MODELS, River

from smartspec.engine_adapter.base import (
    FEATURE_DRAFT_CONFIDENCE,
    FEATURE_MATCH_AGREEMENT,
    FEATURE_SECOND_ACCEPTANCE,
    FEATURE_TOKEN_ACCEPTANCE,
)
from smartspec.engine_adapter.lengths import bucket_index
from smartspec.estimators.acceptance import AcceptanceEstimator
from smartspec.estimators.features import BUCKET_EDGES

SEED = 0
NUM_ORDERS = 5  #: streams of the same answers in other orders, with other lengths
NUM_TUNING = 2  #: of these, those that rivals' constants are chosen on
NUM_BINS = 15
FLOOR = 1e-3  #: probabilities are kept away from 0 and 1 by this much, for all methods alike
F64 = npt.NDArray[np.float64]
DEPTHS = np.arange(MAX_LENGTH)


class Method(Protocol):
    """Predicts hazards [B, MAX_LENGTH], then learns what became of the step."""

    def predict(self, step: Step) -> F64: ...

    def learn(self, step: Step) -> None: ...


class Constant:
    def __init__(self, rate: float) -> None:
        self.rate = rate

    def predict(self, step: Step) -> F64:
        return np.full((len(step.ids), MAX_LENGTH), self.rate)

    def learn(self, step: Step) -> None:
        pass


def trials(step: Step, of_drafted: bool) -> F64:
    """The denominators of rates [B]: all drafts, or those that were reached."""
    reached = step.drafted if of_drafted else np.minimum(step.accepted + 1, step.drafted)
    return reached.astype(np.float64)


class MovingAverage:
    """One rate for all, over ``window`` drafts."""

    def __init__(self, window: float, of_drafted: bool) -> None:
        self.window, self.of_drafted = window, of_drafted
        self.accepted, self.tried = 7.0, 10.0

    def predict(self, step: Step) -> F64:
        return np.full((len(step.ids), MAX_LENGTH), self.accepted / self.tried)

    def learn(self, step: Step) -> None:
        tried = trials(step, self.of_drafted).sum()
        kept = (1.0 - 1.0 / self.window) ** tried
        self.accepted = self.accepted * kept + step.accepted.sum()
        self.tried = self.tried * kept + tried


class PerRequest:
    """A rate per request: what it showed, and the average over all as so many drafts.

    With a ``half_life`` in drafts older ones count less: a moving average. Without, it is the mean
    of the Beta posterior.
    """

    def __init__(self, strength: float, half_life: float, of_drafted: bool) -> None:
        self.strength, self.of_drafted = strength, of_drafted
        self.fade = 0.5 ** (1.0 / half_life)
        self.common = MovingAverage(1000.0, of_drafted)
        self.counts: F64 = np.zeros((1024, 2))  # by request: ids are small

    def predict(self, step: Step) -> F64:
        mean = self.common.accepted / self.common.tried
        counts = self.counts[step.ids]
        rate = (counts[:, 0] + self.strength * mean) / (counts[:, 1] + self.strength)
        return np.repeat(rate[:, None], MAX_LENGTH, axis=1)

    def learn(self, step: Step) -> None:
        tried = trials(step, self.of_drafted)
        new = np.stack((step.accepted, tried), 1)
        self.counts[step.ids] = self.counts[step.ids] * self.fade ** tried[:, None] + new
        self.common.learn(step)


class Ours:
    """The daemon's estimator and the engine's buckets, by the features named."""

    def __init__(self, features: Sequence[str], **arguments: Any) -> None:
        self.features = features
        self.edges = [np.array(BUCKET_EDGES[name], np.float32) for name in features]
        shape = tuple(len(edges) + 1 for edges in self.edges)
        self.estimator = AcceptanceEstimator(
            math.prod(shape), MAX_LENGTH, axis_sizes=shape, **arguments
        )

    def _buckets(self, step: Step) -> npt.NDArray[np.int64]:
        return bucket_index(self.edges, [step.features[name] for name in self.features])

    def predict(self, step: Step) -> F64:
        correction = self.estimator.corrections(self.estimator.rows(step.ids))
        table = self.estimator.log_survival()[self._buckets(step)].astype(np.float64)
        survival = np.exp(table * correction[:, None])
        return survival / np.concatenate((np.ones((len(survival), 1)), survival[:, :-1]), axis=1)

    def learn(self, step: Step) -> None:
        rows = self.estimator.rows(step.ids)
        self.estimator.learn_many(rows, self._buckets(step), step.drafted, step.accepted)


class Scores(NamedTuple):
    """Of all reached events, in the order of the stream."""

    chance: F64
    accepted: npt.NDArray[np.bool_]
    request: npt.NDArray[np.int64]

    @property
    def log_loss(self) -> F64:
        return -np.log(np.where(self.accepted, self.chance, 1.0 - self.chance))

    @property
    def brier(self) -> float:
        return float(((self.chance - self.accepted) ** 2).mean())

    @property
    def calibration_error(self) -> float:
        order = np.argsort(self.chance, kind="stable")
        gaps = [
            abs(self.chance[part].mean() - self.accepted[part].mean()) * len(part)
            for part in np.array_split(order, NUM_BINS)
        ]
        return float(sum(gaps) / len(order))


Make = Callable[[], Method]


def play(make: Make, orders: Sequence[Sequence[Step]]) -> Scores:
    """Predict, then learn, step by step; anew for each of the ``orders``."""
    chances, outcomes, requests = [], [], []
    for method, step in ((method, s) for order in orders for method in (make(),) for s in order):
        hazard = method.predict(step)
        reached = np.minimum(step.accepted + 1, step.drafted)[:, None] > DEPTHS
        chances.append(hazard[reached])
        outcomes.append((step.accepted[:, None] > DEPTHS)[reached])
        requests.append(np.repeat(step.ids, reached.sum(axis=1)))
        method.learn(step)
    chance = np.clip(np.concatenate(chances), FLOOR, 1.0 - FLOOR)
    return Scores(chance, np.concatenate(outcomes), np.concatenate(requests))


def clustered_error(differences: F64, request: npt.NDArray[np.int64]) -> float:
    """Standard error of the mean of ``differences``, those of one request taken as one draw."""
    centred = differences - differences.mean()
    sums = np.bincount(request, centred)
    num_requests = len(np.unique(request))
    return float(np.sqrt((sums**2).sum() * num_requests / (num_requests - 1)) / len(differences))


WINDOWS = (30.0, 100.0, 300.0, 1000.0, 3000.0)
STRENGTHS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
HALF_LIVES = (8.0, 16.0, 32.0, 64.0, 128.0)
RIVALS: dict[str, list[Make]] = {
    "constant": [lambda rate=rate: Constant(rate) for rate in np.arange(0.05, 1.0, 0.05)],
    "average_of_drafted": [lambda w=w: MovingAverage(w, True) for w in WINDOWS],
    "average": [lambda w=w: MovingAverage(w, False) for w in WINDOWS],
    "request_average_of_drafted": [
        lambda s=s, h=h: PerRequest(s, h, True) for s, h in itertools.product(STRENGTHS, HALF_LIVES)
    ],
    "request_average": [
        lambda s=s, h=h: PerRequest(s, h, False)
        for s, h in itertools.product(STRENGTHS, HALF_LIVES)
    ],
    "request_beta": [lambda s=s: PerRequest(s, 1e9, False) for s in STRENGTHS],
}
FEATURES = {
    "lookup": (FEATURE_MATCH_AGREEMENT, FEATURE_TOKEN_ACCEPTANCE, FEATURE_SECOND_ACCEPTANCE),
    "draft": (FEATURE_TOKEN_ACCEPTANCE,),
    "draft_ahead": (FEATURE_DRAFT_CONFIDENCE, FEATURE_TOKEN_ACCEPTANCE),
}


def streams(answers: Sequence[Answer], tasks: Sequence[str], style: str) -> list[list[Step]]:
    """The steps of some tasks' answers, in several orders."""
    chosen = [a for a in answers if a.task in tasks]
    return [steps(chosen, style, SEED + order) for order in range(NUM_ORDERS)]


def compare(
    answers: Sequence[Answer], tuning: Sequence[str], held_out: Sequence[str], style: str
) -> tuple[dict[str, float], dict[str, Scores]]:
    """Scores on ``held_out`` of all methods, with constants that are best on ``tuning``."""
    proposer = style.removesuffix("_ahead")
    tune, test = (streams(answers, tasks, proposer) for tasks in (tuning, held_out))
    chosen: dict[str, Scores] = {}
    for name, candidates in RIVALS.items():
        best = min(candidates, key=lambda make: play(make, tune[:NUM_TUNING]).log_loss.mean())
        chosen[name] = play(best, test)
    best_name = min(chosen, key=lambda name: chosen[name].log_loss.mean())
    ours = chosen["ours"] = play(lambda: Ours(FEATURES[style]), test)
    margin = chosen[best_name].log_loss - ours.log_loss
    base = float(chosen[best_name].log_loss.mean())
    figures = {
        "logloss": float(ours.log_loss.mean()),
        "logloss_best_baseline": base,
        "margin_pct": 100.0 * float(margin.mean()) / base,
        "margin_stderr_pct": 100.0 * clustered_error(margin, ours.request) / base,
        "brier": ours.brier,
        "brier_best_baseline": chosen[best_name].brier,
        "ece": ours.calibration_error,
        "ece_best_baseline": chosen[best_name].calibration_error,
        "num_events": float(len(margin)),
    }
    return figures, chosen


def by_task(answers: Sequence[Answer], tasks: Sequence[str], all_scores: dict[str, Scores]) -> None:
    """Print each method's log-loss by task."""
    task_of = np.array([a.task for a in answers if a.task in tasks])
    table = Table("method", *tasks, "all", "Brier", "ECE")
    for name, scores in all_scores.items():
        task = task_of[scores.request]
        cells = [f"{scores.log_loss[task == t].mean():.4f}" for t in tasks]
        rest = (scores.log_loss.mean(), scores.brier, scores.calibration_error)
        table.add_row(name, *cells, *(f"{value:.4f}" for value in rest))
    Console().print(table)


def compare_river(
    answers: Sequence[Answer], tuning: Sequence[str], held_out: Sequence[str], style: str
) -> dict[str, float]:
    """Log-losses of river's classifiers and ours on one order of ``held_out``; printed with times.

    One order, and a choice of settings on one: they take a hundred times as long as the rest.
    """
    proposer = style.removesuffix("_ahead")
    tune, test = (streams(answers, tasks, proposer)[:1] for tasks in (tuning, held_out))
    names = FEATURES[style]
    candidates: dict[str, list[Make]] = {"ours": [lambda: Ours(names)]}
    for name, models in MODELS.items():
        candidates[name] = [lambda model=model: River(model(), names) for model in models]
    figures: dict[str, float] = {}
    ours: Scores | None = None
    table = Table("method", "log-loss", "ours is better by", "stderr", "ECE", "us per draft")
    for name, makes in candidates.items():
        best = makes[0]
        if len(makes) > 1:
            best = min(makes, key=lambda make: play(make, tune).log_loss.mean())
        begin = time.process_time()
        scores = play(best, test)
        took_us = 1e6 * (time.process_time() - begin) / len(scores.chance)
        ours = ours or scores
        loss = float(scores.log_loss.mean())
        margin = scores.log_loss - ours.log_loss
        margin_pct = 100.0 * float(margin.mean()) / loss
        error_pct = 100.0 * clustered_error(margin, ours.request) / loss
        row = (f"{loss:.4f}", f"{margin_pct:.1f}%", f"{error_pct:.1f}")
        table.add_row(name, *row, f"{scores.calibration_error:.3f}", f"{took_us:.0f}")
        figures |= {
            f"river_{style}_{name}_logloss": loss,
            f"river_{style}_{name}_margin_pct": margin_pct,
            f"river_{style}_{name}_margin_stderr_pct": error_pct,
            f"river_{style}_{name}_ece": scores.calibration_error,
            f"river_{style}_{name}_us": took_us,
        }
    print(f"{style}, river: settings from {', '.join(tuning)}; scores on {', '.join(held_out)}")
    Console().print(table)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--river", action="store_true", help="river's classifiers instead")
    parser.add_argument("--style", choices=FEATURES, action="append", help="of these alone")
    args = parser.parse_args()
    answers = load()
    figures: dict[str, float] = {"num_answers": float(len(answers))}
    if args.river:
        for style in args.style or ("lookup", "draft_ahead"):
            figures |= compare_river(answers, *SPLIT, style)
        record("acceptance_river", figures, seed=SEED)
        return
    for style in args.style or (*STYLES, "draft_ahead"):
        for label, (tuning, held_out) in (("", SPLIT), ("swapped_", SPLIT[::-1])):
            found, scores = compare(answers, tuning, held_out, style)
            print(f"{style}: constants from {', '.join(tuning)}; scores on {', '.join(held_out)}")
            by_task(answers, held_out, scores)
            figures |= {f"{label}{style}_{name}": value for name, value in found.items()}
    record("acceptance", figures, seed=SEED)
    print(f"traces: {FILE.name}")


if __name__ == "__main__":
    main()
