"""The shipped drafter on Spec-Bench, of which it was shown nothing: acceptance, cost, goodput.

* *acceptance*: greedy answers of the default model, five drafts, eight requests together: drafts
  accepted per step, by task; as the worker drafts, trees with copies among their branches; chains
  with copies; trees and chains of the head by itself; beside them chains of the target without five
  of its thirty layers.
* *forward*: a pass of the drafter over one token, and of the target, in turns, after 300 tokens.
* *goodput* at batch 1: each prompt is answered without speculation, with chains and trees of fixed
  sizes, and as the product does it: trees with copies, of sizes that the daemon chooses (in this
  process, between the steps); beside it, prompt lookup steered so. One run after the other; tokens
  per second of the steps after the prompt.

Without times, nothing depends on what else the machine does.

Run: python benchmarks/bench_drafter.py [--prompts-per-task 12] [--timed-per-task 3]
     [--rows mixed_chain,head_chain] [--skip-per-task 0] [--lengths 3,5] [--drafter FILE]
     [--threads 2]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from figures import record
from proposer_replay import daemon_for
from record_acceptance import MODEL_LEN, ask
from rich.console import Console
from rich.table import Table
from spec_bench import TASKS, Prompt, prompts

from smartspec.engine_adapter.base import FixedLength, LengthSource
from smartspec.engine_adapter.reference import feature_head
from smartspec.engine_adapter.reference import model as models
from smartspec.engine_adapter.reference.draft_model import DraftModel
from smartspec.engine_adapter.reference.feature_draft import FeatureChain, FeatureDraft
from smartspec.engine_adapter.reference.feature_head import FeatureHead, HeadRunner
from smartspec.engine_adapter.reference.model_runner import ModelRunner, Segment
from smartspec.engine_adapter.reference.prompt_lookup import PromptLookup
from smartspec.engine_adapter.reference.proposer import Proposer
from smartspec.engine_adapter.reference.service import DEFAULT_DRAFTER
from smartspec.engine_adapter.reference.worker import Worker

ACCEPTED = ("drafter", "mixed_chain", "head", "head_chain", "copy")
DRAFTS = 5
ROWS = 8
MOST = 8  #: drafts, as the worker has them
WARM_UP = 6
CONTEXT_TOKENS = 300


class Decoded(NamedTuple):
    """Steps after the prompts."""

    steps: int = 0
    accepted: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def plus(self, other: Decoded) -> Decoded:
        return Decoded(*(a + b for a, b in zip(self, other, strict=True)))


def worker_for(
    target: models.LoadedModel, proposer: Proposer | None, source: LengthSource, rows: int
) -> Worker:
    return Worker(
        target.model,
        proposer=proposer,
        length_source=source,
        max_num_running=rows,
        max_model_len=MODEL_LEN,
        max_prefill_tokens=MODEL_LEN,
        eos_token_ids=target.eos_token_ids,
    )


def decode(
    worker: Worker, target: models.LoadedModel, asked: Sequence[Prompt]
) -> dict[int, Decoded]:
    """Answer prompts together; of each, by its place, the steps in which it was drafted for."""
    ids = [worker.add_request(ask(prompt, target.tokenizer, 0.0)) for prompt in asked]
    found = dict.fromkeys(ids, Decoded())
    while worker.has_work:
        facts = worker.step().facts
        if facts is None:
            continue
        share = facts.step_s / max(1, len(facts.batch.request_ids))
        columns = zip(
            facts.batch.request_ids.tolist(),
            facts.num_accepted.tolist(),
            facts.num_emitted.tolist(),
            strict=True,
        )
        for request, accepted, emitted in columns:
            found[request] = found[request].plus(Decoded(1, accepted, emitted, share))
    return {place: found[request] for place, request in enumerate(ids)}


def by_task(asked: Sequence[Prompt], found: dict[int, Decoded]) -> dict[str, Decoded]:
    """Sums by task, and over all of them."""
    sums = dict.fromkeys((*TASKS, "all"), Decoded())
    for place, decoded in found.items():
        for name in (asked[place].task, "all"):
            sums[name] = sums[name].plus(decoded)
    return sums


def first_of_each(per_task: int, skipped: int = 0) -> list[Prompt]:
    chosen = []
    for task in TASKS:
        mine = [prompt for prompt in prompts() if prompt.task == task]
        chosen += mine[skipped : skipped + per_task]
    return chosen


def proposer_for(row: str, target: models.LoadedModel, head: FeatureHead) -> Proposer:
    match row:
        case "drafter":
            return FeatureDraft(head, ROWS, MODEL_LEN, DRAFTS)
        case "mixed_chain":
            return FeatureChain(head, ROWS, MODEL_LEN, DRAFTS)
        case "head":
            return FeatureDraft(head, ROWS, MODEL_LEN, DRAFTS, copies=False)
        case "head_chain":
            return FeatureChain(head, ROWS, MODEL_LEN, DRAFTS, copies=False)
        case "copy":
            thin: Any = models.without_layers(target.model, models.DEFAULT_DRAFT_DROP_LAYERS)
            return DraftModel(ModelRunner(thin, ROWS, MODEL_LEN), DRAFTS)
    raise ValueError(f"row {row} is none of {', '.join(ACCEPTED)}")


def acceptance(
    target: models.LoadedModel, proposers: dict[str, Proposer], asked: list[Prompt]
) -> dict[str, float]:
    """Accepted per step, `DRAFTS` drafts."""
    figures = {}
    # Those of like lengths together: rows are read up to the longest.
    asked = sorted(asked, key=lambda prompt: len(prompt.text))
    for name, proposer in proposers.items():
        worker = worker_for(target, proposer, FixedLength(DRAFTS), min(ROWS, len(asked)))
        for task, sums in by_task(asked, decode(worker, target, asked)).items():
            figures[f"{name}_{task}_accepted_per_step"] = sums.accepted / sums.steps
    return figures


def forward_share(
    target: models.LoadedModel, head: FeatureHead, repetitions: int
) -> dict[str, float]:
    """Medians over passes of one token, in turns."""
    whole = ModelRunner(target.model, 1, MODEL_LEN)
    small = HeadRunner(head, 1, MODEL_LEN)
    tokens = [(7 * i + 3) % 40_000 for i in range(CONTEXT_TOKENS)]
    states = torch.zeros(CONTEXT_TOKENS, head.config.hidden_size)
    whole.forward([Segment(0, 0, tokens, 1)])
    small.advance([Segment(0, 0, tokens, 1)], states)
    one = [Segment(0, CONTEXT_TOKENS, tokens[:1], 1)]
    taken: dict[str, list[float]] = {"target": [], "draft": []}
    for _ in range(repetitions):
        begin = time.perf_counter()
        whole.forward(one)
        middle = time.perf_counter()
        small.advance(one, states[:1])
        taken["target"].append(middle - begin)
        taken["draft"].append(time.perf_counter() - middle)
    target_s, draft_s = (float(np.median(taken[name])) for name in ("target", "draft"))
    return {
        "target_forward_ms": 1e3 * target_s,
        "draft_forward_ms": 1e3 * draft_s,
        "draft_over_target_forward": draft_s / target_s,
    }


def goodput(
    target: models.LoadedModel, head: FeatureHead, asked: list[Prompt], lengths: list[int]
) -> dict[str, float]:
    """At batch 1, over no speculation, in turns prompt by prompt.

    The daemon starts knowing nothing, and has the answers of `WARM_UP` other prompts to learn from.
    """
    arms = {"none": worker_for(target, None, FixedLength(0), 1)}
    for length in lengths:
        timed: dict[str, Proposer] = {
            "tree": FeatureDraft(head, 1, MODEL_LEN, length),
            "mixed_chain": FeatureChain(head, 1, MODEL_LEN),
            "chain": FeatureChain(head, 1, MODEL_LEN, copies=False),
        }
        for kind, proposer in timed.items():
            arms[f"{kind}_{length}"] = worker_for(target, proposer, FixedLength(length), 1)
    shipped = FeatureDraft(head, 1, MODEL_LEN, MOST)
    steered: dict[str, Proposer] = {"copies_daemon": PromptLookup(MOST), "daemon": shipped}
    others = [prompt for prompt in prompts() if prompt not in asked]
    for arm, proposer in steered.items():
        arms[arm] = worker_for(target, proposer, daemon_for(proposer, 1), 1)
        decode(arms[arm], target, others[:: len(others) // WARM_UP][:WARM_UP])
    sums = {arm: dict.fromkeys((*TASKS, "all"), Decoded()) for arm in arms}
    for number, prompt in enumerate(asked):
        order = list(arms)
        # Each arm's turn comes first, last and between as often as others'.
        for arm in order[number % len(order) :] + order[: number % len(order)]:
            one = by_task([prompt], decode(arms[arm], target, [prompt]))
            sums[arm] = {task: s.plus(one[task]) for task, s in sums[arm].items()}
    figures = {}
    for task in sums["none"]:
        pace = {arm: s[task].tokens / s[task].seconds for arm, s in sums.items()}
        figures[f"none_{task}_tokens_per_s"] = pace.pop("none")
        for arm, tokens_per_s in pace.items():
            ratio = tokens_per_s / figures[f"none_{task}_tokens_per_s"]
            figures[f"{arm}_{task}_goodput_ratio"] = ratio
    return figures


def show(title: str, figures: dict[str, float], suffix: str) -> None:
    """The figures that end so, a row per arm, a column per task."""
    table = Table(title=title, title_justify="left")
    for column in ("", *TASKS, "all"):
        table.add_column(column, justify="right")
    ends = [f"_{task}_{suffix}" for task in (*TASKS, "all")]
    arms = dict.fromkeys(
        key.removesuffix(end) for key in figures for end in ends if key.endswith(end)
    )
    for arm in arms:
        table.add_row(arm, *(f"{figures[arm + end]:.3f}" for end in ends))
    Console(width=120).print(table)


def main() -> None:
    """Measure, print tables, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts-per-task", type=int, default=12, help="for acceptance; 0: none")
    parser.add_argument("--timed-per-task", type=int, default=3, help="0: no times")
    parser.add_argument("--lengths", default="3,5", help="fixed ones that are timed")
    parser.add_argument("--drafter", type=Path, default=DEFAULT_DRAFTER)
    parser.add_argument("--rows", default=",".join(ACCEPTED), help="of acceptance")
    parser.add_argument("--skip-per-task", type=int, default=0, help="to tune by the next")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    target = models.load(device="cpu")
    head = feature_head.load(arguments.drafter, target.model)
    figures: dict[str, float] = {}
    if arguments.prompts_per_task:
        proposers = {row: proposer_for(row, target, head) for row in arguments.rows.split(",")}
        asked = first_of_each(arguments.prompts_per_task, arguments.skip_per_task)
        figures |= acceptance(target, proposers, asked)
        show(f"accepted per step, {DRAFTS} drafts", figures, "accepted_per_step")
    if arguments.timed_per_task:
        figures |= forward_share(target, head, repetitions=60)
        lengths = [int(part) for part in arguments.lengths.split(",") if part]
        figures |= goodput(target, head, first_of_each(arguments.timed_per_task), lengths)
        show("goodput over no speculation, batch 1", figures, "goodput_ratio")
    record("drafter", figures)


if __name__ == "__main__":
    main()
