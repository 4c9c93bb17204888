"""Decisions that come late, on recorded answers: lengths, a policy, a policy on fresh confidences.

The draft model's chains (answer_replay.py), 8 answers at a time. Three arms, all else equal, each
0, 1, 2, 5 and 20 steps late (0: what a step's report says steers the next):

* *lengths*: the daemon chooses one for every request and sends those alone; a request that they do
  not know gets the median;
* *buckets*: the policy as a program, survivals by what the engine knows when it chooses;
* *confidences*: the policy on the draft model's own confidences (prices.py, growth.py).

Estimators and calibration have served the three tasks of the other half of the split, one step
late, and are copied for every lateness.

What an arm loses by being late is told against the same rule applied in time: at the step itself.
Of lengths that is *buckets*, 0 late: the daemon chooses by the same policy, but before the step,
not by what the engine sees when it drafts (`lengths_<late>_vs_at_step_time`).

A step's seconds are shared among the requests in it, so that every arm has seconds by answer. All
arms decode the same answers, so ratios of goodput are ratios of these seconds; intervals are 95% of
a bootstrap over answers, which are drawn together for both arms.

Run: python benchmarks/bench_late_replay.py [--token-share 0.05 --forward-share 0.05]
"""

from __future__ import annotations

import argparse
import copy
from collections import deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from acceptance_traces import SPLIT, Answer, load
from answer_replay import SEED, Cell, ConfidentReplay, Replay, Steering, daemon_for
from figures import record

from smartspec.engine_adapter.base import DecodeBatch, FixedLength, LengthSource, StepFacts
from smartspec.engine_adapter.lengths import F64, Choice

BATCH = 8
LATE = (0, 1, 2, 5, 20)
ARMS = ("lengths", "buckets", "confidences")
FIXED = (0, 1, 2, 3)
NUM_SAMPLES = 2000


class PushedLengths:
    """A `LengthSource`: what a daemon chooses by the last report, request by request, and no more.

    Parameters
    ----------
    daemon : chooses; what it says is not late in itself
    late : steps by which its lengths come late
    """

    def __init__(self, daemon: Steering, late: int) -> None:
        self._daemon = daemon
        self._lengths: dict[int, int] = {}
        self._queue: deque[dict[int, int]] = deque([{}] * late)

    def choose(self, batch: DecodeBatch) -> Choice:
        if not self._lengths:
            return FixedLength(0).choose(batch)
        usual = int(np.median(list(self._lengths.values())))
        pushed = [self._lengths.get(number, usual) for number in batch.request_ids.tolist()]
        return Choice(np.minimum(pushed, batch.ceiling).astype(np.int64))

    def report(self, facts: StepFacts) -> None:
        self._daemon.report(facts)
        ids = facts.batch.request_ids.tolist()
        chosen = self._daemon.choose(facts.batch).lengths.tolist()
        self._queue.append(dict(zip(ids, chosen, strict=True)))
        self._lengths = self._queue.popleft()

    def idle(self) -> None:
        pass

    def close(self) -> None:
        pass


def source_for(arm: str, served: Steering, late: int) -> LengthSource:
    """A copy of what has served, whose word comes ``late`` steps late."""
    copied = copy.deepcopy(served)
    copied.delay(0 if arm == "lengths" else late)
    return PushedLengths(copied, late) if arm == "lengths" else copied


def seconds(answers: Sequence[Answer], token_share: float, forward_share: float) -> dict[str, F64]:
    """By arm and lateness, and fixed length: seconds of each answer."""
    found: dict[str, list[F64]] = {}
    for half, other in (SPLIT, SPLIT[::-1]):
        cell = Cell("draft", BATCH, token_share, forward_share, half, other)
        before = [answer for answer in answers if answer.task in other]
        measured = [answer for answer in answers if answer.task in half]

        for length in FIXED:
            replay = Replay(cell, SEED)
            replay.run(measured, FixedLength(length))
            found.setdefault(f"fixed_{length}", []).append(replay.spent)
        past = {}
        for confidences in (False, True):
            source = daemon_for(cell._replace(confidences=confidences))
            served = ConfidentReplay(cell, SEED + 1)
            served.run(before, source)
            past[confidences] = source, served
        for arm in ARMS:
            source, served = past[arm == "confidences"]
            for late in LATE:
                replay = copy.deepcopy(served)
                replay.reseed(SEED)
                replay.run(measured, source_for(arm, source, late))
                found.setdefault(f"{arm}_{late}", []).append(replay.spent)
                print(f"{arm}, {late} late: {replay.spent.sum():.1f} s", flush=True)
    return {name: np.concatenate(parts) for name, parts in found.items()}


def ratio(spent: F64, reference: F64, draws: npt.NDArray[np.intp]) -> F64:
    """Goodput of one arm over another's: of all answers, and then of each draw of them."""
    drawn = reference[draws].sum(axis=1) / spent[draws].sum(axis=1)
    return np.append(reference.sum() / spent.sum(), drawn)


def with_interval(values: F64) -> dict[str, float]:
    """The first, and the 95% interval of the others."""
    low, high = np.percentile(values[1:], (2.5, 97.5)).tolist()
    return {"": float(values[0]), "_low": low, "_high": high}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--token-share", type=float, default=0.05, help="of a step, per token")
    parser.add_argument("--forward-share", type=float, default=0.05, help="per draft forward")
    parser.add_argument("--every", type=int, default=1, help="take one answer of so many")
    args = parser.parse_args()
    answers = [answer for answer in load() if answer.size > 1][:: args.every]
    spent = seconds(answers, args.token_share, args.forward_share)
    num_tokens = sum(answer.size - 1 for answer in answers)
    size = len(next(iter(spent.values())))
    draws = np.random.default_rng(SEED).integers(0, size, (NUM_SAMPLES, size))
    figures = {"num_answers": float(size)}
    for length in FIXED:
        figures[f"fixed_{length}_tokens_per_s"] = num_tokens / float(spent[f"fixed_{length}"].sum())
    for arm in ARMS:
        for late in LATE:
            mine = spent[f"{arm}_{late}"]
            figures[f"{arm}_{late}_tokens_per_s"] = num_tokens / float(mine.sum())
            compared = {"punctual": f"{arm}_0"}
            if arm == "confidences":
                compared |= {"lengths": f"lengths_{late}", "buckets": f"buckets_{late}"}
            else:
                compared["punctual_confidences"] = "confidences_0"
            if arm == "lengths":
                compared["at_step_time"] = "buckets_0"
            for name, other in compared.items():
                for part, value in with_interval(ratio(mine, spent[other], draws)).items():
                    figures[f"{arm}_{late}_vs_{name}{part}"] = value
    for late in LATE:
        fresh = ratio(spent[f"confidences_{late}"], spent["confidences_0"], draws)
        pushed = ratio(spent[f"lengths_{late}"], spent["buckets_0"], draws)
        for part, value in with_interval(fresh - pushed).items():
            figures[f"lengths_{late}_lose_more{part}"] = value
    record(f"late_replay_{args.token_share:g}_{args.forward_share:g}", figures, seed=SEED)


if __name__ == "__main__":
    main()
