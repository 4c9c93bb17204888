"""None, a chain, a tree, a copy and the one controller by turns, a few seconds each, for real.

Five workers on one model, each with a batch of its own that never empties, of the same prompts in
the same order (Spec-Bench's first turns, the shorter ones). Turns go round in random order, so that
each round is a comparison within seconds. What counts is seconds over tokens emitted, in steps that
carry no prompts. The controller's daemon runs in this process, between the steps; it starts knowing
nothing, and has the warm-up to learn in.

Run: python benchmarks/bench_kinds_turns.py [--rounds 12 --turn-s 4 --batch 4 --threads 2]
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from figures import record
from paired import paired_ratio
from proposer_replay import daemon_for
from record_acceptance import ask
from spec_bench import prompts

from smartspec.engine_adapter.base import FixedLength, LengthSource
from smartspec.engine_adapter.reference import feature_head
from smartspec.engine_adapter.reference import model as models
from smartspec.engine_adapter.reference.feature_draft import FeatureChain, FeatureDraft
from smartspec.engine_adapter.reference.feature_head import FeatureHead
from smartspec.engine_adapter.reference.prompt_lookup import PromptLookup
from smartspec.engine_adapter.reference.proposer import Proposer
from smartspec.engine_adapter.reference.sequence import Request
from smartspec.engine_adapter.reference.service import DEFAULT_DRAFTER
from smartspec.engine_adapter.reference.worker import Worker

MOST = 8
MODEL_LEN = 512
MAX_PROMPT_TOKENS = 256
MAX_TOKENS = 96
WARM_UP_S = {"steered": 60.0}
WARM_UP_ELSE_S = 8.0
FIXED = {"none": 0, "copy_3": 3, "chain_2": 2, "tree_4": 4}


class Turns:
    """One arm: a worker whose batch never empties."""

    def __init__(
        self,
        target: models.LoadedModel,
        asked: list[Request],
        proposer: Proposer,
        source: LengthSource | None,
        batch: int,
    ) -> None:
        self._asked = asked
        self._next = 0
        self._batch = batch
        self._worker = Worker(
            target.model,
            proposer=proposer,
            length_source=source or daemon_for(proposer, batch),
            max_num_running=batch,
            max_model_len=MODEL_LEN,
            eos_token_ids=target.eos_token_ids,
        )
        self.num_forwards = self.num_steps = self.num_verified = 0

    def run(self, seconds: float) -> float:
        """Seconds in steps per token emitted in them, over the next ``seconds``."""
        spent, tokens, until = 0.0, 0, time.monotonic() + seconds
        while time.monotonic() < until:
            while self._worker.num_running + self._worker.num_waiting < self._batch:
                self._worker.add_request(self._asked[self._next % len(self._asked)])
                self._next += 1
            facts = self._worker.step().facts
            if facts is not None and facts.batch.size and not facts.batch.num_prefill_tokens:
                spent += facts.step_s
                tokens += int(facts.num_emitted.sum())
                self.num_steps += 1
                self.num_forwards += facts.num_draft_forwards
                self.num_verified += facts.batch.size + int(facts.num_drafted.sum())
        return spent / tokens


def proposer_for(arm: str, head: FeatureHead, batch: int) -> Proposer:
    if arm in ("none", "copy_3"):
        return PromptLookup(MOST)
    if arm == "chain_2":
        return FeatureChain(head, batch, MODEL_LEN, MOST, copies=False)
    return FeatureDraft(head, batch, MODEL_LEN, MOST)


def requests(target: models.LoadedModel) -> list[Request]:
    made = [ask(prompt, target.tokenizer, 0.0).prompt for prompt in prompts()]
    return [Request(p, MAX_TOKENS) for p in made if len(p) <= MAX_PROMPT_TOKENS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--turn-s", type=float, default=4.0)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    target = models.load(device="cpu")
    head = feature_head.load(DEFAULT_DRAFTER, target.model)
    asked = requests(target)
    arms = {}
    for arm in (*FIXED, "steered"):
        source = FixedLength(FIXED[arm]) if arm in FIXED else None
        arms[arm] = Turns(target, asked, proposer_for(arm, head, args.batch), source, args.batch)
        arms[arm].run(WARM_UP_S.get(arm, WARM_UP_ELSE_S))
        arms[arm].num_forwards = arms[arm].num_steps = arms[arm].num_verified = 0
    found: dict[str, list[float]] = {arm: [] for arm in arms}
    rng = np.random.default_rng(0)
    for number in range(args.rounds):
        for arm in rng.permutation(list(arms)).tolist():
            found[arm].append(arms[arm].run(args.turn_s))
        print(f"round {number + 1} of {args.rounds}", end="\r", flush=True)
    figures: dict[str, float] = {"num_rounds": args.rounds, "batch": args.batch}
    for arm, turns in found.items():
        one = arms[arm]
        figures[f"{arm}_ms_per_token"] = 1e3 * float(np.mean(turns))
        figures[f"{arm}_forwards_per_step"] = one.num_forwards / one.num_steps
        figures[f"{arm}_verified_per_step"] = one.num_verified / one.num_steps
        if arm != "steered":
            ratio = paired_ratio(found["steered"], turns)
            figures |= ratio.figures(f"steered_vs_{arm}")
    record(f"kinds_turns_{args.batch}", figures)


if __name__ == "__main__":
    main()
