"""Trees of sizes that the daemon chooses, against fixed sizes and chains, on recorded answers.

Recorded greedy answers are decoded again, 8 at a time, as in bench_trees.py: the proposers are the
real ones, and what the target says is on record. What a step takes is reckoned, as in
bench_replay.py: ``base (1 + token_share N)``, N tokens in the target's pass. The daemon's
estimators, planner and program are the real ones without the wire; they start knowing nothing, and
steer the step after the next. All arms decode the same answers in the same order; the best fixed
size is picked in hindsight, cell by cell. Lookup only: a draft model's trees would have to be
drafted anew for every arm. The result is a function of the input, whatever the machine.

Run: python benchmarks/bench_tree_replay.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from acceptance_traces import Answer, load
from bench_trees import ROWS
from figures import record
from record_acceptance import MODEL_LEN, ask
from spec_bench import prompts

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from fakes import Steering

from smartspec.daemon.engines import Engine
from smartspec.daemon.policy import Planner
from smartspec.engine_adapter.base import (
    FEATURE_LAST_SHARE,
    DecodeBatch,
    FixedLength,
    LengthSource,
    StepFacts,
)
from smartspec.engine_adapter.messages import Fingerprint, Hello, Limits
from smartspec.engine_adapter.reference import model as models
from smartspec.engine_adapter.reference.draft_tree import agreeing_path
from smartspec.engine_adapter.reference.prompt_lookup import PromptLookup
from smartspec.engine_adapter.reference.proposer import Proposer
from smartspec.engine_adapter.reference.scheduler import Scheduler
from smartspec.engine_adapter.reference.sequence import Request, Sequence
from smartspec.engine_adapter.reference.tree_lookup import TreeLookup

BASE_S = 0.02
NOISE = 0.02
TOKEN_SHARES = (0.02, 0.05, 0.1, 0.2)  #: of the base, per token of the target's pass
MAX_CHAIN, MAX_TREE = 8, 16
FIXED = (0, 1, 2, 3, 4, 6, 8, 12, 16)


def replay(
    proposer: Proposer,
    source: LengthSource,
    answers: list[Answer],
    starts: list[list[int]],
    token_share: float,
) -> float:
    """Tokens per second of decoding all ``answers``, each from what it starts with."""
    rng = np.random.default_rng(0)
    scheduler = Scheduler(ROWS, MODEL_LEN, MODEL_LEN, proposer.caches)
    answer_of: dict[int, Answer] = {}
    for number, (answer, start) in enumerate(zip(answers, starts, strict=True), 1):
        answer_of[number] = answer
        scheduler.add(Sequence(number, Request(start), answer.size, 0, 0.0))
    tokens, seconds = 0, 0.0
    while scheduler.waiting or scheduler.running:
        scheduler.admit(0.0)
        running = list(scheduler.running)
        offer = proposer.available(running)
        ceiling = np.minimum(offer.ceiling, [s.num_remaining - 1 for s in running])
        batch = DecodeBatch(
            request_ids=np.array([s.id for s in running], np.uint64),
            ceiling=ceiling.astype(np.uint8),
            features=np.concatenate([[[s.last_share for s in running]], offer.features]).astype(
                "f4"
            ),
        )
        lengths = np.minimum(source.choose(batch).lengths, batch.ceiling).astype(np.int64)
        proposal = proposer.propose(running, lengths)
        paths = []
        for sequence, tree in zip(running, proposal.drafts, strict=True):
            said = answer_of[sequence.id].token[sequence.num_output :].tolist()
            drawn = [said[0], *(said[d] if d < len(said) else -1 for d in tree.depths)]
            path = agreeing_path(tree, drawn)
            paths.append(path)
            if tree.size:
                sequence.last_share = len(path) / tree.size
            sequence.tokens += said[: len(path) + 1]
        proposer.accepted(running, paths)
        drafted = np.array([tree.size for tree in proposal.drafts])
        accepted = np.array([len(path) for path in paths])
        step_s = BASE_S * (1 + token_share * float(len(running) + drafted.sum()))
        tokens += int(accepted.sum()) + len(running)
        seconds += step_s
        told_s = step_s * (1.0 + NOISE * float(rng.standard_normal()))
        source.report(
            StepFacts(
                batch=batch,
                num_drafted=drafted.astype(np.uint8),
                num_accepted=accepted.astype(np.uint8),
                num_emitted=(accepted + 1).astype(np.uint8),
                step_s=told_s,
                target_s=told_s,
                draft_s=0.0,
                context_tokens=200 * len(running),
                accepted_ranks=np.array([sum(1 << n for n in path) for path in paths], np.uint64)
                if proposer.trees
                else None,
            )
        )
        for sequence in running:
            if not sequence.num_remaining:
                scheduler.remove(sequence)
                proposer.forget(sequence)
    return tokens / seconds


def daemon_for(proposer: Proposer) -> Steering:
    """A daemon that knows nothing yet of an engine with this proposer."""
    limits = Limits(
        max_length=proposer.max_length,
        max_num_running=ROWS,
        static_length=3,
        features=(FEATURE_LAST_SHARE, *proposer.features),
        drafts_known_first=True,
        trees=proposer.trees,
    )
    fingerprint = Fingerprint(target="replay", proposer=proposer.name)
    engine = Engine(Hello(engine="replay", epoch=1, fingerprint=fingerprint, limits=limits))
    return Steering(engine, Planner(engine, daemon_epoch=9), late=1)


def main() -> None:
    """Every arm in every cell; a table, and the figures."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    text = {prompt.question_id: prompt for prompt in prompts()}
    tokenizer = models.load(device="cpu").tokenizer
    answers = [answer for answer in load() if answer.temperature == 0 and answer.size > 1]
    starts = [ask(text[a.question_id], tokenizer, 0.0).prompt for a in answers]
    figures: dict[str, float] = {"num_answers": len(answers)}
    for share in TOKEN_SHARES:
        found = {}
        for nodes in FIXED:
            source = FixedLength(nodes)
            found[f"tree_{nodes}"] = replay(TreeLookup(MAX_TREE), source, answers, starts, share)
        best = max(found, key=found.__getitem__)
        for name, proposer in (("chain", PromptLookup(MAX_CHAIN)), ("tree", TreeLookup(MAX_TREE))):
            found[name] = replay(proposer, daemon_for(proposer), answers, starts, share)
        cell = f"token_{share:g}"
        figures |= {f"{cell}_{name}_tokens_per_s": value for name, value in found.items()}
        figures[f"{cell}_best_fixed_nodes"] = float(best.removeprefix("tree_"))
        figures[f"{cell}_tree_vs_best_fixed"] = found["tree"] / found[best]
        figures[f"{cell}_tree_vs_chain"] = found["tree"] / found["chain"]
    record("tree_replay", figures)


if __name__ == "__main__":
    main()
