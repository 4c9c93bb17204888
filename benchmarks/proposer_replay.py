"""Recorded greedy answers, decoded again with real proposers: what the target says is on record.

`ROWS` answers at a time, each proposer's drafts verified against its answer, as the worker would
take the steps. What a step takes is reckoned, ``base (1 + token_share N + forward_share F)``: N
tokens in the target's pass, F passes of a drafter.
"""

from __future__ import annotations

import operator
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from acceptance_traces import Answer
from answer_replay import BASE_S, NOISE, Course
from record_acceptance import MODEL_LEN, ask
from spec_bench import TASKS, prompts
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from fakes import Steering

from smartspec.engine_adapter.base import (
    FEATURE_LAST_SHARE,
    DecodeBatch,
    LengthSource,
    StepFacts,
)
from smartspec.engine_adapter.messages import Limits
from smartspec.engine_adapter.reference import model as models
from smartspec.engine_adapter.reference.draft_tree import agreeing_path
from smartspec.engine_adapter.reference.model_runner import ModelRunner, Segment
from smartspec.engine_adapter.reference.proposer import (
    ConfidentProposer,
    Proposer,
    ReadsFeatures,
)
from smartspec.engine_adapter.reference.scheduler import Scheduler
from smartspec.engine_adapter.reference.sequence import Request, Sequence
from smartspec.engine_adapter.reference.service import CONFIDENT, KNOWN_FIRST

ROWS = 8  #: answers drafted for together


class Heard(NamedTuple):
    """Answers, and what the target held while it gave them."""

    answers: list[Answer]
    starts: list[list[int]]  #: prompts with the answer's first token, which recordings leave out
    states: list[Tensor]  #: [tokens, features] of each


@torch.inference_mode()
def hear(
    target: models.LoadedModel, answers: list[Answer], layers: tuple[int, ...] = (0,)
) -> Heard:
    """Read recorded greedy answers again, prompt and answer in a pass each.

    ``layers`` : of the target, whose states are kept
    """
    text = {prompt.question_id: prompt for prompt in prompts()}
    runner = ModelRunner(target.model, 1, MODEL_LEN)
    starts, states = [], []
    for answer in answers:
        prompt = ask(text[answer.question_id], target.tokenizer, 0.0).prompt
        logits, before = runner.forward_with_features([Segment(0, 0, prompt, 1)], layers)
        first = int(logits[-1].argmax())
        rest = [first, *answer.token.tolist()]
        _, after = runner.forward_with_features([Segment(0, len(prompt), rest, 1)], layers)
        starts.append([*prompt, first])
        states.append(torch.cat((before, after)))
    return Heard(answers, starts, states)


def some_of(answers: list[Answer], per_task: int) -> list[Answer]:
    """Of each task as many, from all over it."""
    chosen = []
    for task in TASKS:
        mine = [answer for answer in answers if answer.task == task]
        chosen += mine[:: max(1, len(mine) // per_task)][:per_task]
    return chosen


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
    return Steering.cold(proposer.name, limits)
