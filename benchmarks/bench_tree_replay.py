"""Trees of sizes that the daemon chooses, against fixed sizes and chains, on recorded answers.

Recorded greedy answers are decoded again, 8 at a time, and what a step takes is reckoned
(proposer_replay.py): ``base (1 + token_share N)``, N tokens in the target's pass. The daemon's
estimators, planner and program are the real ones without the wire; they start knowing nothing, and
steer the step after the next. All arms decode the same answers in the same order; the best fixed
size is picked in hindsight, cell by cell. Lookup only: a draft model's trees would have to be
drafted anew for every arm. The result is a function of the input, whatever the machine.

Run: python benchmarks/bench_tree_replay.py
"""

from __future__ import annotations

import argparse

from acceptance_traces import load
from figures import record
from proposer_replay import daemon_for, replay
from record_acceptance import ask
from spec_bench import prompts

from smartspec.engine_adapter.base import FixedLength
from smartspec.engine_adapter.reference import model as models
from smartspec.engine_adapter.reference.prompt_lookup import PromptLookup
from smartspec.engine_adapter.reference.tree_lookup import TreeLookup

TOKEN_SHARES = (0.02, 0.05, 0.1, 0.2)  #: of the base, per token of the target's pass
MAX_CHAIN, MAX_TREE = 8, 16
FIXED = (0, 1, 2, 3, 4, 6, 8, 12, 16)


def main() -> None:
    """Every arm in every cell; a table, and the figures."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    text = {prompt.question_id: prompt for prompt in prompts()}
    tokenizer = models.load(device="cpu").tokenizer
    answers = [answer for answer in load() if answer.temperature == 0 and answer.size > 1]
    starts = [ask(text[a.question_id], tokenizer, 0.0).prompt for a in answers]
    figures: dict[str, float] = {"num_answers": len(answers)}
    fixed = {
        f"tree_{nodes}": replay(TreeLookup(MAX_TREE), FixedLength(nodes), answers, starts, 0.0)
        for nodes in FIXED
    }
    for share in TOKEN_SHARES:
        found = {name: course.goodput(share) for name, course in fixed.items()}
        best = max(found, key=found.__getitem__)
        for name, proposer in (("chain", PromptLookup(MAX_CHAIN)), ("tree", TreeLookup(MAX_TREE))):
            course = replay(proposer, daemon_for(proposer), answers, starts, share)
            found[name] = course.goodput(share)
        cell = f"token_{share:g}"
        figures |= {f"{cell}_{name}_tokens_per_s": value for name, value in found.items()}
        figures[f"{cell}_best_fixed_nodes"] = float(best.removeprefix("tree_"))
        figures[f"{cell}_tree_vs_best_fixed"] = found["tree"] / found[best]
        figures[f"{cell}_tree_vs_chain"] = found["tree"] / found["chain"]
    record("tree_replay", figures)


if __name__ == "__main__":
    main()
