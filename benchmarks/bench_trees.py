"""Trees against chains: accepted tokens per step where a step may verify equally many.

Recorded greedy answers are decoded again (proposer_replay.py). Both may draft the same number of
tokens per step, 4 or 8; a lookup drafts less where it finds less, so what was verified is told as
well.

* *lookup*: chains are prompt lookup's; trees those of tree_lookup.py, from the request's own text
  and from earlier answers too: those before, in the order of recording. All answers.
* *draft*: the target without five of its thirty layers. Of chains the recording holds the outcome
  at every position; trees are drafted anew (tree_draft_model.py), for the answers with the
  shortest prompts of each task, since prompts are most of the work.

Writes build/figures/trees.json.

Run: python benchmarks/bench_trees.py [--answers-per-task 3] [--only-lookup]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from acceptance_traces import Answer, load
from figures import record
from proposer_replay import ROWS, replay
from record_acceptance import MODEL_LEN, ask
from rich.console import Console
from rich.table import Table
from spec_bench import TASKS, prompts

from smartspec.engine_adapter.base import FixedLength, StepFacts
from smartspec.engine_adapter.reference import model as models
from smartspec.engine_adapter.reference.events import Finished
from smartspec.engine_adapter.reference.model_runner import ModelRunner
from smartspec.engine_adapter.reference.prompt_lookup import PromptLookup
from smartspec.engine_adapter.reference.proposer import Proposer
from smartspec.engine_adapter.reference.sequence import Request
from smartspec.engine_adapter.reference.tree_draft_model import TreeDraftModel
from smartspec.engine_adapter.reference.tree_lookup import TreeLookup
from smartspec.engine_adapter.reference.worker import Worker

SIZES = (4, 8)


class Tally(NamedTuple):
    """Sums over the steps of a task."""

    steps: int = 0
    accepted: int = 0
    verified: int = 0

    def plus(self, steps: int, accepted: int, verified: int) -> Tally:
        return Tally(self.steps + steps, self.accepted + accepted, self.verified + verified)


Tallies = dict[str, Tally]


class Counted(FixedLength):
    """One length for all, and the steps that it takes, by task; ``answers``: ids count from 1."""

    def __init__(self, length: int, answers: list[Answer]) -> None:
        super().__init__(length)
        self.tallies: Tallies = dict.fromkeys(TASKS, Tally())
        self._answers = answers

    def report(self, facts: StepFacts) -> None:
        columns = facts.batch.request_ids, facts.num_accepted, facts.num_drafted
        rows = zip(*(column.tolist() for column in columns), strict=True)
        for number, accepted, verified in rows:
            task = self._answers[number - 1].task
            self.tallies[task] = self.tallies[task].plus(1, accepted, verified)


def decode(
    proposer: Proposer, answers: list[Answer], starts: list[list[int]], size: int
) -> Tallies:
    """Steps of a proposer over recorded answers; ``starts``: what each answer follows."""
    counted = Counted(size, answers)
    replay(proposer, counted, answers, starts, 0.0)
    return counted.tallies


def chains_of_recording(answers: list[Answer], size: int) -> Tallies:
    """Steps of the draft model's chains: their outcomes were recorded."""
    tallies = dict.fromkeys(TASKS, Tally())
    for answer in answers:
        place = 0
        while place < answer.size:
            drafted = min(size, int(answer.ceiling[place]))
            accepted = min(drafted, int(answer.draft_run[place]))
            tallies[answer.task] = tallies[answer.task].plus(1, accepted, drafted)
            place += accepted + 1
    return tallies


def with_first_token(target: models.LoadedModel, requests: list[Request]) -> list[list[int]]:
    """Prompts with the answer's first token, which recordings leave out."""
    worker = Worker(
        target.model, max_num_running=1, max_model_len=MODEL_LEN, max_prefill_tokens=MODEL_LEN
    )
    ids = [worker.add_request(Request(request.prompt, max_tokens=1)) for request in requests]
    first: dict[int, list[int]] = {}
    while worker.has_work:
        for event in worker.step().events:
            if isinstance(event, Finished):
                first[event.id] = event.tokens
    return [request.prompt + first[i] for i, request in zip(ids, requests, strict=True)]


def shortest(answers: Iterable[Answer], per_task: int) -> list[Answer]:
    """Of each task the answers with the shortest prompts that go on for a while."""
    by_size = sorted((a for a in answers if a.size >= 48), key=lambda answer: answer.num_prompt)
    chosen = []
    for task in TASKS:
        chosen += [answer for answer in by_size if answer.task == task][:per_task]
    return chosen


def show(title: str, rows: Mapping[str, Tallies]) -> dict[str, float]:
    """A table of accepted tokens per step, with those verified; returns them as figures."""
    table = Table(title=title, title_justify="left")
    for name in ("", *TASKS, "all"):
        table.add_column(name, justify="right")
    figures = {}
    for name, tallies in rows.items():
        total = Tally(*(sum(column) for column in zip(*tallies.values(), strict=True)))
        cells = []
        for task, tally in (*tallies.items(), ("all", total)):
            accepted, verified = tally.accepted / tally.steps, tally.verified / tally.steps
            cells.append(f"{accepted:.3f} of {verified:.2f}")
            figures[f"{name}_{task}_accepted_per_step"] = accepted
            figures[f"{name}_{task}_verified_per_step"] = verified
        table.add_row(name, *cells)
    Console(width=150).print(table)
    return figures


def main() -> None:
    """Replay, print tables, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--answers-per-task", type=int, default=3, help="for the draft model")
    parser.add_argument("--only-lookup", action="store_true")
    arguments = parser.parse_args()
    text = {prompt.question_id: prompt for prompt in prompts()}
    target = models.load(device="cpu")

    def requests(answers: list[Answer]) -> list[Request]:
        return [ask(text[a.question_id], target.tokenizer, 0.0) for a in answers]

    answers = [answer for answer in load() if answer.temperature == 0 and answer.size]
    starts = [request.prompt for request in requests(answers)]
    rows: dict[str, Tallies] = {}
    for size in SIZES:
        rows[f"lookup_{size}_chain"] = decode(PromptLookup(size), answers, starts, size)
        own = TreeLookup(size, history_tokens=0)
        rows[f"lookup_{size}_tree_own"] = decode(own, answers, starts, size)
        rows[f"lookup_{size}_tree"] = decode(TreeLookup(size), answers, starts, size)
    figures = show(f"lookup, {len(answers)} answers: accepted of verified", rows)
    if not arguments.only_lookup:
        few = shortest(answers, arguments.answers_per_task)
        starts = with_first_token(target, requests(few))
        thin: Any = models.without_layers(target.model, models.DEFAULT_DRAFT_DROP_LAYERS)
        rows = {}
        for size in SIZES:
            rows[f"draft_{size}_chain"] = chains_of_recording(few, size)
            trees = TreeDraftModel(ModelRunner(thin, ROWS, MODEL_LEN), size)
            rows[f"draft_{size}_tree"] = decode(trees, few, starts, size)
            figures |= show(f"draft model, {len(few)} answers: accepted of verified", rows)
    record("trees", figures)


if __name__ == "__main__":
    main()
