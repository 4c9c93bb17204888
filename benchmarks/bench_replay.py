"""Recorded answers under the real policy: what lengths chosen step by step bring over fixed ones.

An engine decodes recorded answers (record_acceptance.py), `--batch` at a time. What each draft
comes to is on record; what a step takes is reckoned, ``base + token N (+ forward D)``: N tokens in
the target's pass, D sequential draft passes. A token costs a share of the base, which stands for
load: a lone request on a large GPU pays 5% or less for a further token, a busy one 50% and more.
The daemon and its policies are the real ones without the wire (estimators, planner, program). They
know what they would at each moment: reports of steps that have ended, with 2% of noise on their
times; and a policy arrives while the next step is under way, so that it steers the step after.

Arms, over the same answers in the same order:

* *static*: each length from 0 to 8, the best of them picked in hindsight for every cell;
* *ours*, cold: nothing known at the start, the sweep of all lengths included; and warm: it has
  served the three tasks of the other half of the split, never the one measured, at the same load;
* *clairvoyant*: knows every outcome before it drafts, and wastes nothing. Out of anyone's reach.

``way`` is the share of the distance from the best static length to the clairvoyant. A draft model's
first pass is run before lengths are chosen for those who were drafted for in the step before, and
charged whether or not it is used (engine_adapter/reference/draft_model.py).

Run: python benchmarks/bench_replay.py
"""

from __future__ import annotations

import argparse
import copy
import itertools
import operator
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from acceptance_stream import Decoding, features, rates_for
from acceptance_traces import FILE, MAX_LENGTH, SPLIT, Answer, load
from figures import record
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from fakes import Steering

from smartspec.engine_adapter.base import (
    FEATURE_DRAFT_CONFIDENCE,
    FEATURE_LAST_SHARE,
    FEATURE_MATCH_AGREEMENT,
    FEATURE_SECOND_ACCEPTANCE,
    FEATURE_TOKEN_ACCEPTANCE,
    DecodeBatch,
    FixedLength,
    LengthSource,
    StepFacts,
)
from smartspec.engine_adapter.lengths import F64, I64, Choice
from smartspec.engine_adapter.messages import Limits

BASE_S = 0.02
TOKEN_SHARES = (0.05, 0.1, 0.2, 0.5)  #: of the base, per token of the target's pass
FORWARD_SHARES = (0.02, 0.1, 0.2)  #: of the base, per draft pass
NOISE = 0.02
SEED = 7
FEATURES = {
    "lookup": (
        FEATURE_LAST_SHARE,
        FEATURE_MATCH_AGREEMENT,
        FEATURE_TOKEN_ACCEPTANCE,
        FEATURE_SECOND_ACCEPTANCE,
    ),
    "draft": (FEATURE_LAST_SHARE, FEATURE_TOKEN_ACCEPTANCE, FEATURE_DRAFT_CONFIDENCE),
}


class Cell(NamedTuple):
    """One load, one mixture of tasks."""

    style: str
    batch: int
    token_share: float
    forward_share: float
    tasks: tuple[str, ...]  #: that are measured
    before: tuple[str, ...]  #: that a warm daemon has served
    num_answers: int | None = None  #: of each task; None: all

    @property
    def label(self) -> str:
        return self.tasks[0] if len(self.tasks) == 1 else f"{len(self.tasks)} tasks"


class Course(NamedTuple):
    """What decoding some answers took, whatever it costs."""

    num_emitted: int  #: tokens of answers
    num_steps: int
    num_tokens: int  #: of the target's passes
    num_forwards: int  #: of the draft model

    def goodput(self, cell: Cell) -> float:
        """Tokens per second at a cell's load."""
        passes = self.num_steps + cell.token_share * self.num_tokens
        return self.num_emitted / (BASE_S * (passes + cell.forward_share * self.num_forwards))


class Result(NamedTuple):
    cell: Cell
    static: list[float]  #: goodput by length, tokens per second
    cold: float
    warm: float
    clairvoyant: float

    @property
    def best(self) -> float:
        return max(self.static)

    def way(self, goodput: float) -> float:
        room = self.clairvoyant - self.best
        return (goodput - self.best) / room if room > 1e-9 * self.best else float("nan")


class Drafted(NamedTuple):
    """What was drafted in a step."""

    lengths: I64  #: [B], verified
    num_forwards: int
    num_tokens: int  #: in these forwards
    num_cut: I64 | None = None  #: [B], behind those verified
    num_cut_accepted: I64 | None = None  #: of these


class Replay:
    """Decodes recorded answers to their end, `cell.batch` at a time, with lengths from a source."""

    def __init__(self, cell: Cell, seed: int) -> None:
        self.cell = cell
        self.is_lookup = cell.style == "lookup"
        self.rates = rates_for(cell.style)
        self._rng = np.random.default_rng(seed)
        self._next_id = 0
        self.spent: F64 = np.zeros(0)  #: seconds of each answer in the last run

    def reseed(self, seed: int) -> None:
        """Draw order and noise anew; what was learned stays."""
        self._rng = np.random.default_rng(seed)

    def seconds(self, num_tokens: int, num_forwards: int) -> float:
        c = self.cell
        return BASE_S * (1.0 + c.token_share * num_tokens + c.forward_share * num_forwards)

    def run(self, answers: Sequence[Answer], source: LengthSource) -> Course:
        """Decode all ``answers``, in an order of the seed's."""
        order = self._rng.permutation(len(answers)).tolist()
        course = Course(0, 0, 0, 0)
        self.spent = np.zeros(len(answers))
        place_of: dict[int, int] = {}
        running: list[Decoding] = []
        shares: list[float] = []
        while True:
            alive = [i for i, one in enumerate(running) if not one.done]
            running, shares = [running[i] for i in alive], [shares[i] for i in alive]
            while order and len(running) < self.cell.batch:
                place = order.pop()
                answer = answers[place]
                if answer.size > 1:
                    self._next_id += 1
                    place_of[self._next_id] = place
                    running.append(Decoding(self._next_id, answer, self.cell.style))
                    shares.append(-1.0)
            if not running:
                return course
            if isinstance(source, Clairvoyant):
                source.look(running)
            batch = self._describe(running, shares)
            drafted = self._draft(running, batch, source.choose(batch))
            lengths = drafted.lengths
            accepted = [
                one.advance(length, self.rates)
                for one, length in zip(running, lengths.tolist(), strict=True)
            ]
            for i, (count, length) in enumerate(zip(accepted, lengths.tolist(), strict=True)):
                shares[i] = count / length if length else shares[i]
            self._learn(running, lengths, accepted)
            num_tokens, num_emitted = batch.size + int(lengths.sum()), sum(accepted) + len(running)
            added = num_emitted, 1, num_tokens, drafted.num_forwards
            course = Course(*map(operator.add, course, added))
            for one in running:
                step_s = self.seconds(num_tokens, drafted.num_forwards)
                self.spent[place_of[one.number]] += step_s / len(running)
            self._report(source, batch, drafted, np.array(accepted))

    def _describe(self, running: list[Decoding], shares: list[float]) -> DecodeBatch:
        known = features(running, self.rates) | {FEATURE_LAST_SHARE: np.array(shares)}
        return DecodeBatch(
            request_ids=np.array([one.number for one in running], np.uint64),
            ceiling=np.array([one.available for one in running], np.uint8),
            features=np.array([known[name] for name in FEATURES[self.cell.style]], np.float32),
        )

    def _draft(self, running: list[Decoding], batch: DecodeBatch, choice: Choice) -> Drafted:
        lengths = np.minimum(choice.lengths, batch.ceiling).astype(np.int64)
        if self.is_lookup:
            return Drafted(lengths, 0, 0)
        began = any(one.goes_on for one in running)
        num_forwards = max(int(lengths.max(initial=0)), int(began))
        return Drafted(lengths, num_forwards, int(lengths.sum()))

    def _learn(self, running: list[Decoding], lengths: I64, accepted: list[int]) -> None:
        """Take in what became of a step."""

    def _report(
        self, source: LengthSource, batch: DecodeBatch, drafted: Drafted, accepted: I64
    ) -> None:
        """Tell the source of a step."""
        lengths, num_forwards, num_draft_tokens, cut, passed = drafted
        num_drafts = int(lengths.sum())
        target_s = self.seconds(batch.size + num_drafts, 0)
        draft_s = self.seconds(batch.size + num_drafts, num_forwards) - target_s
        noise = 1.0 + NOISE * self._rng.standard_normal(2)
        source.report(
            StepFacts(
                batch=batch,
                num_drafted=lengths.astype(np.uint8),
                num_accepted=accepted.astype(np.uint8),
                num_emitted=(accepted + 1).astype(np.uint8),
                step_s=float(target_s * noise[0] + draft_s * noise[1]),
                target_s=float(target_s * noise[0]),
                draft_s=float(draft_s * noise[1]),
                context_tokens=200 * batch.size,
                num_draft_forwards=num_forwards,
                num_draft_tokens=num_draft_tokens,
                num_cut=None if cut is None else cut.astype(np.uint8),
                num_cut_accepted=None if passed is None else passed.astype(np.uint8),
            )
        )


@cache
def answers_of(tasks: tuple[str, ...], count: int | None) -> list[Answer]:
    """The first ``count`` answers of each of the tasks, in the order of recording."""
    answers = load()
    places = [
        place
        for task in tasks
        for place in [i for i, answer in enumerate(answers) if answer.task == task][:count]
    ]
    return [answers[place] for place in sorted(places)]


@cache
def static_course(
    style: str, batch: int, tasks: tuple[str, ...], num_answers: int | None, length: int
) -> Course:
    """Of one length for all, which a load's costs do not change."""
    cell = Cell(style, batch, 0.0, 0.0, tasks, ())
    return Replay(cell, SEED).run(answers_of(tasks, num_answers), FixedLength(length))


class Clairvoyant(FixedLength):
    """Drafts what will be accepted, as far as it pays at the value of time."""

    def __init__(self, replay: Replay, value_of_time: float) -> None:
        super().__init__(0)
        self._replay = replay
        self._value = value_of_time
        self._lengths: I64 = np.zeros(0, np.int64)

    def look(self, running: Sequence[Decoding]) -> None:
        """Be told the outcomes of the step about to run."""
        runs = np.array([min(int(one.run[one.position]), one.available) for one in running])
        best_value = -np.inf
        for depth in range(int(runs.max(initial=0)) + 1):
            lengths = np.minimum(runs, depth)
            num_tokens = len(runs) + int(lengths.sum())
            num_forwards = 0 if self._replay.is_lookup else depth
            value = num_tokens - self._value * self._replay.seconds(num_tokens, num_forwards)
            if value > best_value:
                self._lengths, best_value = lengths, value

    def choose(self, batch: DecodeBatch) -> Choice:
        return Choice.fixed(self._lengths, source="own")


def clairvoyant(cell: Cell, answers: Sequence[Answer], value_of_time: float) -> float:
    """Goodput of knowing every outcome, by Dinkelbach's iteration on the value of time."""
    for _ in range(4):
        replay = Replay(cell, SEED)
        found = replay.run(answers, Clairvoyant(replay, value_of_time)).goodput(cell)
        if abs(found - value_of_time) < 1e-6 * found:
            break
        value_of_time = found
    return value_of_time


def daemon_for(cell: Cell, confidences: bool = False) -> Steering:
    """A daemon that knows nothing, and whose policies come one step late.

    ``confidences`` : whether the engine stops and cuts its drafts by them
    """
    lookup = cell.style == "lookup"
    limits = Limits(
        max_length=MAX_LENGTH,
        max_num_running=64,
        static_length=3,
        features=FEATURES[cell.style],
        drafts_known_first=lookup,
        confidences=confidences,
    )
    return Steering.cold("lookup" if lookup else "draft_model", limits)


def play(group: Sequence[Cell]) -> list[Result]:
    """Results of cells of one load and one past, which is served once."""
    before = answers_of(group[0].before, group[0].num_answers)
    steering = daemon_for(group[0])
    served = Replay(group[0], SEED + 1)
    served.run(before, steering)
    results = []
    for cell in group:
        measured = answers_of(cell.tasks, cell.num_answers)
        static = [
            static_course(cell.style, cell.batch, cell.tasks, cell.num_answers, length).goodput(
                cell
            )
            for length in range(MAX_LENGTH + 1)
        ]
        cold = Replay(cell, SEED).run(measured, daemon_for(cell)).goodput(cell)
        warmed = Replay(cell, SEED)
        warmed.rates = copy.deepcopy(served.rates)
        warmed._next_id = served._next_id
        warm = warmed.run(measured, copy.deepcopy(steering)).goodput(cell)
        results.append(Result(cell, static, cold, warm, clairvoyant(cell, measured, max(static))))
    return results


def cells(
    styles: Sequence[str], batches: Sequence[int], num_answers: int | None = None
) -> list[Cell]:
    """All loads and mixtures; a task's daemon has served the other half of the split."""
    found = []
    for style, batch, token in itertools.product(styles, batches, TOKEN_SHARES):
        for forward in (0.0,) if style == "lookup" else FORWARD_SHARES:
            for half, other in (SPLIT, SPLIT[::-1]):
                for tasks in (*((task,) for task in half), tuple(half)):
                    one = Cell(style, batch, token, forward, tasks, tuple(other), num_answers)
                    found.append(one)
    return found


def show(results: Sequence[Result]) -> None:
    table = Table(
        *("proposer", "batch", "token", "forward", "tasks", "best static", "tok/s"),
        *("cold", "warm", "clairvoyant", "way, warm"),
    )
    for result in results:
        cell, best = result.cell, result.best
        table.add_row(
            cell.style,
            str(cell.batch),
            f"{cell.token_share:.0%}",
            f"{cell.forward_share:.0%}",
            cell.label,
            str(int(np.argmax(result.static))),
            f"{best:.1f}",
            f"{result.cold / best:.3f}",
            f"{result.warm / best:.3f}",
            f"{result.clairvoyant / best:.3f}",
            f"{result.way(result.warm):.2f}",
        )
    Console(width=120).print(table)


def figures_of(results: Sequence[Result]) -> dict[str, float]:
    """Worst and mean over cells, single tasks and mixtures apart."""
    figures: dict[str, float] = {"num_cells": float(len(results))}
    for style in dict.fromkeys(result.cell.style for result in results):
        for kind, wanted in (("task", True), ("mixture", False)):
            some = [
                r for r in results if r.cell.style == style and (len(r.cell.tasks) == 1) == wanted
            ]
            for name in ("cold", "warm"):
                ratios = [getattr(r, name) / r.best for r in some]
                figures[f"{style}_{kind}_{name}_vs_best_min"] = min(ratios)
                figures[f"{style}_{kind}_{name}_vs_best_mean"] = float(np.mean(ratios))
                least = 0.99 if wanted else 1.0
                figures[f"{style}_{kind}_{name}_num_missed"] = float(sum(r < least for r in ratios))
                ways = [r.way(getattr(r, name)) for r in some]
                figures[f"{style}_{kind}_{name}_way_mean"] = float(np.nanmean(ways))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--style", choices=("lookup", "draft"), action="append")
    parser.add_argument("--batch", type=int, action="append", help="requests decoded together")
    parser.add_argument("--token-share", type=float, action="append", help="loads: of these")
    parser.add_argument("--forward-share", type=float, action="append", help="and of these")
    parser.add_argument("--answers", type=int, help="of each task; by default all")
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args()
    todo = [
        cell
        for cell in cells(args.style or ("lookup", "draft"), args.batch or (1, 8), args.answers)
        if cell.token_share in (args.token_share or TOKEN_SHARES)
        and cell.forward_share in (args.forward_share or (0.0, *FORWARD_SHARES))
    ]
    groups = [list(some) for _, some in itertools.groupby(todo, lambda cell: cell[:4] + cell[5:])]
    with ProcessPoolExecutor(args.jobs) as pool:
        played = track(pool.map(play, groups), description="replaying", total=len(groups))
        results = [result for results in played for result in results]
    show(results)
    record("replay", figures_of(results), seed=SEED, notes={"traces": FILE.name})


if __name__ == "__main__":
    main()
