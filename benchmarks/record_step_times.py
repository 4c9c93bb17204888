"""Record what steps of the reference worker take, under changing load and lengths.

The default model with prompt lookup answers Spec-Bench's prompts on the CPU, one thread of torch.
How many are running, how long prompts are and how long drafts may be change every few dozen steps;
a sweep of all lengths, twice, comes first. Every step is kept as the daemon would be
told of it. Other work on the machine is part of what is recorded: see that there is none.

Run: python benchmarks/record_step_times.py; writes benchmarks/data/step_times.npz
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from spec_bench import prompts

from smartspec.engine_adapter.base import DecodeBatch, FixedLength, StepFacts
from smartspec.engine_adapter.lengths import Choice
from smartspec.engine_adapter.reference import model as models
from smartspec.engine_adapter.reference.prompt_lookup import PromptLookup
from smartspec.engine_adapter.reference.sequence import Request
from smartspec.engine_adapter.reference.worker import Worker
from smartspec.estimators.step_cost import StepShape

FILE = Path(__file__).parent / "data" / "step_times.npz"
MAX_LENGTH = 5
MAX_RUNNING = 8
SEED = 0


class Wandering(FixedLength):
    """Lengths up to a top that wanders, and the shape and seconds of every step.

    Attributes
    ----------
    shapes, seconds : of each step that decoded something; seconds of target, drafts and all
    """

    def __init__(self, rng: np.random.Generator) -> None:
        super().__init__(0)
        self.top = MAX_LENGTH
        self.shapes: list[StepShape] = []
        self.seconds: list[tuple[float, float, float]] = []
        self._rng = rng
        self._sweep = [*range(MAX_LENGTH, -1, -1)] * 2

    def choose(self, batch: DecodeBatch) -> Choice:
        if self._sweep and batch.size:
            lengths = np.full(batch.size, self._sweep.pop(0))
        else:
            lengths = self._rng.integers(0, self.top + 1, batch.size)
        return Choice.fixed(np.minimum(lengths, batch.ceiling), source="own")

    def report(self, facts: StepFacts) -> None:
        size, num_drafts = facts.batch.size, int(facts.num_drafted.sum())
        if not size or facts.target_s is None or facts.draft_s is None:
            return
        self.shapes.append(
            StepShape(
                batch=size,
                verify_tokens=size + num_drafts,
                prefill_tokens=facts.batch.num_prefill_tokens,
                context_tokens=facts.context_tokens,
                draft_tokens=num_drafts,
            )
        )
        self.seconds.append((facts.target_s, facts.draft_s, facts.step_s))


def record(num_steps: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Shapes [num_steps, 8], columns those of `StepShape`, and seconds [num_steps, 3]."""
    rng = np.random.default_rng(SEED)
    loaded = models.load(device="cpu")
    lengths = Wandering(rng)
    worker = Worker(
        loaded.model,
        loaded.tokenizer,
        PromptLookup(MAX_LENGTH),
        lengths,
        max_num_running=MAX_RUNNING,
        max_model_len=640,
        eos_token_ids=loaded.eos_token_ids,
        seed=SEED,
    )
    asked = [loaded.tokenizer.encode(prompt.text) for prompt in prompts()]
    until, wanted, longest = 0, 1, 400
    while len(lengths.shapes) < num_steps:
        if len(lengths.shapes) >= until:
            until = len(lengths.shapes) + int(rng.integers(30, 90))
            wanted = round(float(np.exp(rng.uniform(0.0, np.log(MAX_RUNNING)))))
            longest = int(np.exp(rng.uniform(np.log(50), np.log(500))))
            lengths.top = int(rng.integers(0, MAX_LENGTH + 1))
        while worker.num_running + worker.num_waiting < wanted:
            prompt = asked[int(rng.integers(len(asked)))][:longest]
            worker.add_request(Request(prompt, max_tokens=int(rng.integers(20, 120))))
        worker.step()
    return np.array(lengths.shapes[:num_steps]), np.array(lengths.seconds[:num_steps])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--file", type=Path, default=FILE)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    shapes, seconds = record(arguments.steps)
    np.savez_compressed(
        arguments.file,
        **{name: shapes[:, i].astype(np.uint16) for i, name in enumerate(StepShape._fields)},
        target_s=seconds[:, 0].astype(np.float32),
        draft_s=seconds[:, 1].astype(np.float32),
        step_s=seconds[:, 2].astype(np.float32),
    )
    print(f"{len(shapes)} steps in {time.monotonic() - began:.0f} s: {arguments.file}")


if __name__ == "__main__":
    main()
