"""Trees against chains: accepted tokens per step where a step may verify equally many.

Recorded greedy answers are decoded again (proposer_replay.py). Both may draft the same number of
tokens per step; a lookup drafts less where it finds less, so what was verified is told as well.
What trees have above chains is told with its 95% interval, of a bootstrap over answers.

* *lookup*, 4 and 8: chains are prompt lookup's; trees those of tree_lookup.py, from the request's
  own text and from earlier answers too: those before, in the order of recording. All answers.
* *head*, 5: the shipped drafter (docs/drafter.md) by itself, and with copies: in chains the
  likelier of its own and the copied token, in trees both as branches.
* *draft*, 4 and 8: the target without five of its thirty layers. Of chains the recording holds the
  outcome at every position; trees are drafted anew (tree_draft_model.py), for the answers with the
  shortest prompts of each task, since prompts are most of the work.

Writes build/figures/trees.json.

Run: python benchmarks/bench_trees.py [--only head] [--answers-per-task 30]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from acceptance_traces import Answer, load
from figures import record
from proposer_replay import ROWS, hear, replay, some_of
from record_acceptance import MODEL_LEN, ask
from rich.console import Console
from rich.table import Table
from spec_bench import TASKS, prompts
from torch import Tensor

from smartspec.engine_adapter.base import FixedLength, StepFacts
from smartspec.engine_adapter.reference import feature_head
from smartspec.engine_adapter.reference import model as models
from smartspec.engine_adapter.reference.feature_draft import FeatureChain, FeatureDraft
from smartspec.engine_adapter.reference.model_runner import ModelRunner
from smartspec.engine_adapter.reference.prompt_lookup import PromptLookup
from smartspec.engine_adapter.reference.proposer import Proposer
from smartspec.engine_adapter.reference.service import DEFAULT_DRAFTER
from smartspec.engine_adapter.reference.tree_draft_model import TreeDraftModel
from smartspec.engine_adapter.reference.tree_lookup import TreeLookup

SIZES = (4, 8)
DRAFTS = 5  #: of the head
NUM_SAMPLES = 4000
COLUMNS = "steps", "accepted", "verified"

F64 = npt.NDArray[np.float64]


class Counted(FixedLength):
    """One length for all; ``sums`` [A, 3]: of each answer its steps, tokens accepted, verified."""

    def __init__(self, length: int, num_answers: int) -> None:
        super().__init__(length)
        self.sums: F64 = np.zeros((num_answers, len(COLUMNS)))

    def report(self, facts: StepFacts) -> None:
        steps = np.ones(len(facts.num_accepted))
        rows = facts.batch.request_ids.astype(np.int64) - 1  # ids count from 1
        self.sums[rows] += np.stack((steps, facts.num_accepted, facts.num_drafted), axis=1)


def decode(
    proposer: Proposer,
    answers: list[Answer],
    starts: list[list[int]],
    size: int,
    states: list[Tensor] | None = None,
) -> F64:
    """`Counted.sums` of a proposer over recorded answers; ``starts``: what each answer follows."""
    counted = Counted(size, len(answers))
    replay(proposer, counted, answers, starts, 0.0, states=states)
    return counted.sums


def chains_of_recording(answers: list[Answer], size: int) -> F64:
    """`Counted.sums` of the draft model's chains: their outcomes were recorded."""
    sums = np.zeros((len(answers), len(COLUMNS)))
    for number, answer in enumerate(answers):
        place = 0
        while place < answer.size:
            drafted = min(size, int(answer.ceiling[place]))
            accepted = min(drafted, int(answer.draft_run[place]))
            sums[number] += 1, accepted, drafted
            place += accepted + 1
    return sums


def shortest(answers: Iterable[Answer], per_task: int) -> list[Answer]:
    """Of each task the answers with the shortest prompts that go on for a while."""
    by_size = sorted((a for a in answers if a.size >= 48), key=lambda answer: answer.num_prompt)
    chosen = []
    for task in TASKS:
        chosen += [answer for answer in by_size if answer.task == task][:per_task]
    return chosen


def show(
    title: str, answers: list[Answer], rows: Mapping[str, F64], pairs: Mapping[str, str]
) -> dict[str, float]:
    """A table of accepted tokens per step and those verified; returns them as figures.

    ``rows`` : sums by answer of each arm; ``pairs`` : arms, and others that they are compared with
    """
    table = Table(title=f"{title}, {len(answers)} answers: accepted of verified")
    for name in ("", *TASKS, "all"):
        table.add_column(name, justify="right")
    of_task = {task: np.array([task == answer.task for answer in answers]) for task in TASKS}
    groups = of_task | {"all": np.ones(len(answers), np.bool_)}
    figures = {}
    for name, sums in rows.items():
        cells = []
        for group, mine in groups.items():
            steps, accepted, verified = sums[mine].sum(axis=0).tolist()
            cells.append(f"{accepted / steps:.3f} of {verified / steps:.2f}")
            figures[f"{name}_{group}_accepted_per_step"] = accepted / steps
            figures[f"{name}_{group}_verified_per_step"] = verified / steps
        table.add_row(name, *cells)
    for name, other in pairs.items():
        cells = []
        for group, mine in groups.items():
            low, high = above(rows[name][mine], rows[other][mine])
            cells.append(f"{low:+.3f} to {high:+.3f}")
            figures[f"{name}_{group}_above_chain_low"] = low
            figures[f"{name}_{group}_above_chain_high"] = high
        table.add_row(f"{name} - {other}", *cells)
    Console(width=180).print(table)
    return figures


def above(sums: F64, others: F64) -> tuple[float, float]:
    """95% interval of what is accepted per step beyond the other's, of the same answers."""
    drawn = np.random.default_rng(0).integers(0, len(sums), (NUM_SAMPLES, len(sums)))
    totals, beside = sums[drawn].sum(axis=1), others[drawn].sum(axis=1)
    low, high = np.percentile(
        totals[:, 1] / totals[:, 0] - beside[:, 1] / beside[:, 0], (2.5, 97.5)
    ).tolist()
    return low, high


def lookup(answers: list[Answer], target: models.LoadedModel) -> dict[str, float]:
    text = {prompt.question_id: prompt for prompt in prompts()}
    starts = [ask(text[a.question_id], target.tokenizer, 0.0).prompt for a in answers]
    rows: dict[str, F64] = {}
    for size in SIZES:
        rows[f"lookup_{size}_chain"] = decode(PromptLookup(size), answers, starts, size)
        own = TreeLookup(size, history_tokens=0)
        rows[f"lookup_{size}_tree_own"] = decode(own, answers, starts, size)
        rows[f"lookup_{size}_tree"] = decode(TreeLookup(size), answers, starts, size)
    pairs = {f"lookup_{size}_tree_own": f"lookup_{size}_chain" for size in SIZES}
    return show("lookup", answers, rows, pairs)


def head(answers: list[Answer], target: models.LoadedModel) -> dict[str, float]:
    drafter = feature_head.load(DEFAULT_DRAFTER, target.model)
    _, starts, states = hear(target, answers, drafter.config.layers)
    rows: dict[str, F64] = {}
    for name, copies in (("head", False), ("head_with_copies", True)):
        for shape, kind in (("chain", FeatureChain), ("tree", FeatureDraft)):
            proposer = kind(drafter, ROWS, MODEL_LEN, DRAFTS, copies=copies)
            rows[f"{name}_{shape}"] = decode(proposer, answers, starts, DRAFTS, states)
    pairs = {f"{name}_tree": f"{name}_chain" for name in ("head", "head_with_copies")}
    return show("head", answers, rows, pairs)


def draft(answers: list[Answer], target: models.LoadedModel) -> dict[str, float]:
    starts = hear(target, answers).starts
    thin: Any = models.without_layers(target.model, models.DEFAULT_DRAFT_DROP_LAYERS)
    rows = {}
    for size in SIZES:
        rows[f"draft_{size}_chain"] = chains_of_recording(answers, size)
        trees = TreeDraftModel(ModelRunner(thin, ROWS, MODEL_LEN), size)
        rows[f"draft_{size}_tree"] = decode(trees, answers, starts, size)
    pairs = {f"draft_{size}_tree": f"draft_{size}_chain" for size in SIZES}
    return show("draft model", answers, rows, pairs)


def main() -> None:
    """Replay, print tables, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("lookup", "head", "draft"))
    parser.add_argument("--answers-per-task", type=int, help="30 of the head, 3 of the draft model")
    arguments = parser.parse_args()
    target = models.load(device="cpu")
    answers = [answer for answer in load() if answer.temperature == 0 and answer.size]
    given: int | None = arguments.answers_per_task
    figures: dict[str, float] = {}
    if arguments.only in (None, "lookup"):
        figures |= lookup(answers, target)
    if arguments.only in (None, "head"):
        chosen = some_of(answers, given or 30)
        order = np.random.default_rng(0).permutation(len(chosen))  # tasks side by side
        figures |= head([chosen[place] for place in order], target)
    if arguments.only in (None, "draft"):
        figures |= draft(shortest(answers, given or 3), target)
    record("trees", figures)


if __name__ == "__main__":
    main()
