"""Recorded answers under the real policy: what lengths chosen step by step bring over fixed ones.

An engine decodes recorded answers (answer_replay.py), `--batch` at a time. Arms, over the same
answers in the same order:

* *static*: each length from 0 to 8, the best of them picked in hindsight for every cell;
* *ours*, cold: nothing known at the start, the sweep of all lengths included; and warm: it has
  served the three tasks of the other half of the split, never the one measured, at the same load;
* *clairvoyant*: knows every outcome before it drafts, and wastes nothing. Out of anyone's reach.

``way`` is the share of the distance from the best static length to the clairvoyant. A draft model's
drafts are of the lengths that were chosen, as in vLLM; with `--confidences` they are stopped and
cut by its own confidences, as in the reference worker.

Run: python benchmarks/bench_replay.py
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from typing import NamedTuple

import numpy as np
from acceptance_traces import FILE, MAX_LENGTH, SPLIT, Answer
from answer_replay import (
    SEED,
    Cell,
    Clairvoyant,
    Course,
    Replay,
    answers_of,
    daemon_for,
    replay_for,
)
from figures import record
from rich.console import Console
from rich.progress import track
from rich.table import Table

from smartspec.engine_adapter.base import FixedLength

TOKEN_SHARES = (0.05, 0.1, 0.2, 0.5)  #: of the base, per token of the target's pass
FORWARD_SHARES = (0.02, 0.1, 0.2)  #: of the base, per draft pass


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


@cache
def static_course(
    style: str, batch: int, tasks: tuple[str, ...], num_answers: int | None, length: int
) -> Course:
    """Of one length for all, which a load's costs do not change."""
    cell = Cell(style, batch, 0.0, 0.0, tasks, ())
    return Replay(cell, SEED).run(answers_of(tasks, num_answers), FixedLength(length))


def clairvoyant(cell: Cell, answers: Sequence[Answer], value_of_time: float) -> float:
    """Goodput of knowing every outcome, by Dinkelbach's iteration on the value of time."""
    for _ in range(4):
        replay = Replay(cell, SEED)
        found = replay.run(answers, Clairvoyant(replay, value_of_time)).goodput(*cell.load)
        if abs(found - value_of_time) < 1e-6 * found:
            break
        value_of_time = found
    return value_of_time


def play(group: Sequence[Cell]) -> list[Result]:
    """Results of cells of one load and one past, which is served once."""
    before = answers_of(group[0].before, group[0].num_answers)
    steering = daemon_for(group[0])
    served = replay_for(group[0], SEED + 1)
    served.run(before, steering)
    results = []
    for cell in group:
        measured = answers_of(cell.tasks, cell.num_answers)
        static = [
            static_course(cell.style, cell.batch, cell.tasks, cell.num_answers, length).goodput(
                *cell.load
            )
            for length in range(MAX_LENGTH + 1)
        ]
        cold = replay_for(cell, SEED).run(measured, daemon_for(cell)).goodput(*cell.load)
        warmed = copy.deepcopy(served)
        warmed.reseed(SEED)
        warm = warmed.run(measured, copy.deepcopy(steering)).goodput(*cell.load)
        results.append(Result(cell, static, cold, warm, clairvoyant(cell, measured, max(static))))
    return results


def cells(
    styles: Sequence[str], batches: Sequence[int], num_answers: int | None, confidences: bool
) -> list[Cell]:
    """All loads and mixtures; a task's daemon has served the other half of the split."""
    found = []
    for style, batch, token in itertools.product(styles, batches, TOKEN_SHARES):
        for forward in (0.0,) if style == "lookup" else FORWARD_SHARES:
            for half, other in (SPLIT, SPLIT[::-1]):
                for tasks in (*((task,) for task in half), tuple(half)):
                    load = style, batch, token, forward, tasks, tuple(other), num_answers
                    found.append(Cell(*load, confidences and style == "draft"))
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
    parser.add_argument("--confidences", action="store_true", help="drafts are cut by them")
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args()
    todo = [
        cell
        for cell in cells(
            args.style or ("lookup", "draft"), args.batch or (1, 8), args.answers, args.confidences
        )
        if cell.token_share in (args.token_share or TOKEN_SHARES)
        and cell.forward_share in (args.forward_share or (0.0, *FORWARD_SHARES))
    ]
    groups = [list(some) for _, some in itertools.groupby(todo, lambda cell: cell[:4] + cell[5:])]
    with ProcessPoolExecutor(args.jobs) as pool:
        played = track(pool.map(play, groups), description="replaying", total=len(groups))
        results = [result for results in played for result in results]
    show(results)
    name = "replay_confidences" if args.confidences else "replay"
    record(name, figures_of(results), seed=SEED, notes={"traces": FILE.name})


if __name__ == "__main__":
    main()
