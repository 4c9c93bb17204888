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
import operator
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from acceptance_traces import Answer, load
from bench_trees import ROWS
from figures import record
from record_acceptance import MODEL_LEN, ask
from spec_bench import prompts
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from fakes import Steering

from smartspec.daemon.engines import Engine
from smartspec.daemon.planner import Planner
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
from smartspec.engine_adapter.reference.proposer import (
    ConfidentProposer,
    Proposer,
    ReadsFeatures,
)
from smartspec.engine_adapter.reference.scheduler import Scheduler
from smartspec.engine_adapter.reference.sequence import Request, Sequence
from smartspec.engine_adapter.reference.service import CONFIDENT, KNOWN_FIRST
from smartspec.engine_adapter.reference.tree_lookup import TreeLookup

BASE_S = 0.02
NOISE = 0.02
TOKEN_SHARES = (0.02, 0.05, 0.1, 0.2)  #: of the base, per token of the target's pass
MAX_CHAIN, MAX_TREE = 8, 16
FIXED = (0, 1, 2, 3, 4, 6, 8, 12, 16)


class Course(NamedTuple):
    """What decoding all answers took."""

    tokens: int
    steps: int
    num_verified: int  #: tokens of the target's passes
    num_forwards: int  #: of a drafter

    def goodput(self, token_share: float, forward_share: float = 0.0) -> float:
        """Tokens per second."""
        shares = self.steps + token_share * self.num_verified + forward_share * self.num_forwards
        return self.tokens / (BASE_S * shares)


def replay(
    proposer: Proposer,
    source: LengthSource,
    answers: list[Answer],
    starts: list[list[int]],
    token_share: float,
    forward_share: float = 0.0,
    states: list[Tensor] | None = None,
    first_id: int = 1,
) -> Course:
    """Decode all ``answers``, each from what it starts with.

    ``states`` : of a proposer that reads the target's, those of each answer at all its tokens;
    ``first_id`` : of the requests that they are to the source
    """
    rng = np.random.default_rng(0)
    scheduler = Scheduler(ROWS, MODEL_LEN, MODEL_LEN, proposer.caches)
    answer_of: dict[int, Answer] = {}
    for number, (answer, start) in enumerate(zip(answers, starts, strict=True), first_id):
        answer_of[number] = answer
        scheduler.add(Sequence(number, Request(start), answer.size, 0, 0.0))
    course = Course(0, 0, 0, 0)
    computed = dict.fromkeys(answer_of, 0)

    def read(sequences: list[Sequence]) -> None:
        """What the target has held at all tokens but the newest."""
        if states is None or not sequences or not isinstance(proposer, ReadsFeatures):
            return
        parts = [states[s.id - first_id][computed[s.id] : s.num_tokens - 1] for s in sequences]
        proposer.read(sequences, parts)
        computed.update((s.id, s.num_tokens - 1) for s in sequences)

    while scheduler.waiting or scheduler.running:
        scheduler.admit(0.0)
        running = list(scheduler.running)
        read([sequence for sequence in running if not computed[sequence.id]])
        offer = proposer.available(running)
        ceiling = np.minimum(offer.ceiling, [s.num_remaining - 1 for s in running])
        batch = DecodeBatch(
            request_ids=np.array([s.id for s in running], np.uint64),
            ceiling=ceiling.astype(np.uint8),
            features=np.concatenate([[[s.last_share for s in running]], offer.features]).astype(
                "f4"
            ),
        )
        choice = source.choose(batch)
        lengths = np.minimum(choice.lengths, batch.ceiling).astype(np.int64)
        if choice.prices is not None and isinstance(proposer, ConfidentProposer):
            proposal = proposer.propose_at(running, lengths, choice.prices)
        else:
            proposal = proposer.propose(running, lengths)
        paths, drawn = [], []
        for sequence, tree in zip(running, proposal.drafts, strict=True):
            said = answer_of[sequence.id].token[sequence.num_output :].tolist()
            drawn.append([said[0], *(said[d] if d < len(said) else -1 for d in tree.depths)])
            path = agreeing_path(tree, drawn[-1])
            paths.append(path)
            if tree.size:
                sequence.last_share = len(path) / tree.size
            sequence.tokens += said[: len(path) + 1]
        read(running)
        proposer.accepted(running, paths)
        drafted = np.array([tree.size for tree in proposal.drafts])
        accepted = np.array([len(path) for path in paths])
        num_verified = len(running) + int(drafted.sum())
        added = int(accepted.sum()) + len(running), 1, num_verified, proposal.num_forwards
        course = Course(*map(operator.add, course, added))
        noise = 1.0 + NOISE * rng.standard_normal(2)
        target_s = BASE_S * (1 + token_share * num_verified) * float(noise[0])
        draft_s = BASE_S * forward_share * proposal.num_forwards * float(noise[1])
        cut = proposal.cut
        told = paths if cut is None else cut.accepted(drawn, paths)
        source.report(
            StepFacts(
                batch=batch,
                num_drafted=drafted.astype(np.uint8),
                num_accepted=accepted.astype(np.uint8),
                num_emitted=(accepted + 1).astype(np.uint8),
                step_s=target_s + draft_s,
                target_s=target_s,
                draft_s=draft_s,
                context_tokens=200 * len(running),
                num_draft_forwards=proposal.num_forwards,
                num_draft_tokens=proposal.num_draft_tokens,
                accepted_ranks=np.array([sum(1 << n for n in path) for path in told], np.uint64)
                if proposer.trees
                else None,
                num_cut=None if cut is None else cut.num_cut,
                num_cut_accepted=None
                if cut is None
                else np.array([len(path) for path in told], np.uint8) - accepted.astype(np.uint8),
            )
        )
        for sequence in running:
            if not sequence.num_remaining:
                scheduler.remove(sequence)
                proposer.forget(sequence)
    return course


def daemon_for(proposer: Proposer, max_num_running: int = ROWS) -> Steering:
    """A daemon that knows nothing yet of an engine with this proposer."""
    limits = Limits(
        max_length=proposer.max_length,
        max_num_running=max_num_running,
        static_length=3,
        features=(FEATURE_LAST_SHARE, *proposer.features),
        drafts_known_first=proposer.name in KNOWN_FIRST,
        trees=proposer.trees,
        confidences=proposer.name in CONFIDENT,
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
