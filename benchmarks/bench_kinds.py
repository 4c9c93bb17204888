"""None, a chain, a tree, a copy: what one controller by fresh confidences makes of them.

Recorded greedy answers are decoded again, 8 at a time, as in proposer_replay.py. Drafts are made
anew by the shipped head (docs/drafter.md), which reads what the target holds at each token: one
pass over each recorded answer tells. What a step takes is reckoned,
``base (1 + token_share N + forward_share F)``: N tokens in the target's pass, F passes of the head.

* *none*; *copies*, prompt lookup's chains of fixed lengths; *chains* and *trees* of the head alone,
  of fixed sizes; *joined*, trees of fixed sizes with copies among their branches. Of each the best
  size is picked in hindsight, cell by cell;
* *steered*: the controller. The daemon's estimators, planner and program are the real ones without
  the wire, and steer the step after the next. They and the calibrations have served as many other
  answers of the same tasks, at the same costs, before which they knew nothing. Beside it *copies,
  steered*: prompt lookup alone, its lengths chosen by the daemon's table.

Fixed sizes need nothing learned, but the order of their nodes does: their calibrations start anew.
The result is a function of the input, whatever the machine.

Run: python benchmarks/bench_kinds.py [--answers-per-task 8]
"""

from __future__ import annotations

import argparse

from acceptance_traces import load
from answer_replay import Course
from figures import record
from proposer_replay import ROWS, daemon_for, hear, replay, some_of
from record_acceptance import MODEL_LEN
from rich.console import Console
from rich.table import Table

from smartspec.engine_adapter.base import FixedLength
from smartspec.engine_adapter.reference import feature_head
from smartspec.engine_adapter.reference import model as models
from smartspec.engine_adapter.reference.feature_draft import FeatureChain, FeatureDraft
from smartspec.engine_adapter.reference.feature_head import FeatureHead
from smartspec.engine_adapter.reference.prompt_lookup import PromptLookup
from smartspec.engine_adapter.reference.proposer import Proposer
from smartspec.engine_adapter.reference.service import DEFAULT_DRAFTER

CELLS = ((0.02, 0.02), (0.02, 0.076), (0.05, 0.076), (0.1, 0.076), (0.2, 0.076))
MOST = 16
SIZES = {"copies": (1, 2, 3, 4, 6, 8), "chains": (1, 2, 3, 5), "trees": (2, 4, 8, 16)}
SIZES["joined"] = SIZES["trees"]


def proposer_for(kind: str, head: FeatureHead) -> Proposer:
    match kind:
        case "copies":
            return PromptLookup(max(SIZES[kind]))
        case "chains":
            return FeatureChain(head, ROWS, MODEL_LEN, max(SIZES[kind]), copies=False)
        case "trees":
            return FeatureDraft(head, ROWS, MODEL_LEN, MOST, copies=False)
    return FeatureDraft(head, ROWS, MODEL_LEN, MOST)


def main() -> None:
    """Every arm in every cell; a table, and the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--answers-per-task", type=int, default=8, help="and as many before them")
    arguments = parser.parse_args()
    target = models.load(device="cpu")
    head = feature_head.load(DEFAULT_DRAFTER, target.model)
    recorded = [answer for answer in load() if answer.temperature == 0 and answer.size > 1]
    chosen = some_of(recorded, 2 * arguments.answers_per_task)
    layers = head.config.layers
    before, measured = (hear(target, half, layers) for half in (chosen[::2], chosen[1::2]))

    def course(kind: str, size: int) -> Course:
        proposer, (answers, starts, states) = proposer_for(kind, head), measured
        return replay(proposer, FixedLength(size), answers, starts, 0.0, states=states)

    def steered(kind: str, token_share: float, forward_share: float) -> Course:
        proposer = proposer_for(kind, head)
        source, found, first_id = daemon_for(proposer), Course(0, 0, 0, 0), 1
        for answers, starts, states in (before, measured):
            costs = token_share, forward_share
            found = replay(proposer, source, answers, starts, *costs, states, first_id)
            first_id += len(answers)
        return found

    fixed = {"none_0": course("copies", 0)}
    for kind, sizes in SIZES.items():
        for size in sizes:
            fixed[f"{kind}_{size}"] = course(kind, size)
            print(kind, size, fixed[f"{kind}_{size}"], flush=True)
    figures: dict[str, float] = {"num_answers": len(measured.answers)}
    table = Table(title="tokens per second", title_justify="left")
    for column in (
        "token, forward",
        "none",
        *SIZES,
        "copies, steered",
        "steered",
        "/ best",
        "forwards / step",
    ):
        table.add_column(column, justify="right")
    for token_share, forward_share in CELLS:
        cell = f"token_{token_share:g}_forward_{forward_share:g}"
        found = {name: one.goodput(token_share, forward_share) for name, one in fixed.items()}
        by_table = steered("copies", token_share, forward_share)
        ours = steered("joined", token_share, forward_share)
        goodput = ours.goodput(token_share, forward_share)
        row = [f"{token_share:g}, {forward_share:g}"]
        for kind in ("none", *SIZES):
            best = max((name for name in found if name.startswith(kind)), key=found.__getitem__)
            row.append(f"{found[best]:.1f} ({best.removeprefix(kind + '_')})")
            figures[f"{cell}_{kind}_tokens_per_s"] = found[best]
            figures[f"{cell}_{kind}_best_size"] = float(best.removeprefix(kind + "_"))
        ratio = goodput / max(found.values())
        copies = by_table.goodput(token_share, forward_share)
        row += [
            f"{copies:.1f}",
            f"{goodput:.1f}",
            f"{ratio:.3f}",
            f"{ours.num_forwards / ours.num_steps:.2f}",
        ]
        figures |= {
            f"{cell}_steered_tokens_per_s": goodput,
            f"{cell}_copies_steered_tokens_per_s": copies,
            f"{cell}_steered_vs_best_fixed": ratio,
            f"{cell}_steered_vs_copies_steered": goodput / copies,
            f"{cell}_steered_forwards_per_step": ours.num_forwards / ours.num_steps,
            f"{cell}_steered_verified_per_step": ours.num_tokens / ours.num_steps,
        }
        print(row, flush=True)
        table.add_row(*row)
    Console(width=150).print(table)
    record("kinds", figures)


if __name__ == "__main__":
    main()
