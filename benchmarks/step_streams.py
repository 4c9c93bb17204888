"""Streams of steps as a serving run with changing load and lengths makes them.

A small closed loop on a virtual clock: requests arrive at a rate that changes every few hundred
steps, prompts are processed in chunks beside decoding, lengths follow the load and wander, and a
sweep of all lengths, twice, comes first. Time passes as the machine's noiseless seconds say.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np

from smartspec.estimators.step_cost import StepShape
from smartspec.lab.profiles.machines import Chunk, Machine, Step, Term

MAX_LENGTH = 5
SWEEPS = 2
NOISE = 0.03  #: relative deviation of a step's time
OUTLIER_SHARE = 0.01
OUTLIER_FACTORS = (5.0, 50.0)
SLOWED = 1.3


class Stream(NamedTuple):
    """One run; arrays are aligned with ``steps``."""

    steps: list[Step]
    true_s: np.ndarray  #: without noise
    seen_s: np.ndarray  #: with noise and outliers
    is_outlier: np.ndarray
    num_sweep: int  #: leading steps that sweep the lengths


class _Request:
    def __init__(self, prompt: int, output: int) -> None:
        self.prompt, self.output = prompt, output
        self.processed = self.emitted = 0


def shape(step: Step) -> StepShape:
    """What the daemon would be told of ``step``."""
    return StepShape(
        step.num_decoding,
        step.num_verify_tokens,
        step.num_prefill_tokens,
        step.context_tokens,
        step.num_draft_forwards,
        step.num_draft_tokens,
    )


def serve(machine: Machine, seed: int, num_steps: int, *, drafts: bool = True) -> list[Step]:
    """``num_steps`` steps that decode something; ``drafts``: a draft model, else prompt lookup."""
    rng = np.random.default_rng(seed)
    waiting: deque[_Request] = deque()
    running: list[_Request] = []
    steps: list[Step] = []
    sweep = list(range(MAX_LENGTH, -1, -1)) * SWEEPS
    typical_s = machine.seconds(Step(8, 16, 8 * 600))
    now_s = next_arrival_s = 0.0
    phase_ends, rate, prompt_scale, bias = 0, 0.0, 1.0, 0.0
    while len(steps) < num_steps:
        if len(steps) >= phase_ends:
            phase_ends = len(steps) + int(rng.integers(80, 400))
            wanted = np.exp(rng.uniform(0.0, np.log(0.6 * machine.max_num_running)))
            # A request lives for some 180 tokens, 1.8 a step.
            rate = float(wanted) / (100 * typical_s)
            prompt_scale, bias = float(np.exp(rng.uniform(-1, 1))), float(rng.normal(0, 1.5))
            next_arrival_s = min(next_arrival_s, now_s + rng.exponential(1 / rate))
        while next_arrival_s <= now_s:
            prompt = int(np.clip(400 * prompt_scale * np.exp(rng.normal()), 8, 3500))
            output = int(np.clip(150 * np.exp(0.8 * rng.normal()), 4, 500))
            waiting.append(_Request(prompt, output))
            next_arrival_s += rng.exponential(1 / rate)
        if not running and not waiting:
            now_s = next_arrival_s
            continue
        used = sum(r.prompt + r.output for r in running)
        while waiting and len(running) < machine.max_num_running:
            used += waiting[0].prompt + waiting[0].output
            if used > machine.kv_tokens:
                break
            running.append(waiting.popleft())
        decoding = [r for r in running if r.processed == r.prompt]
        if sweep and decoding:
            top, lengths = sweep[0], np.full(len(decoding), sweep.pop(0))
        else:
            load = np.log2(max(len(decoding), 1)) / np.log2(machine.max_num_running)
            top = int(np.clip(round(5 - 5 * load + bias + rng.normal(0, 0.7)), 0, MAX_LENGTH))
            lengths = np.minimum(rng.integers(0, MAX_LENGTH + 1, len(decoding)), top)
            if rng.random() < 0.02:  # a probe
                lengths[:8] = rng.integers(1, MAX_LENGTH + 1)
        num_verify = len(decoding) + int(lengths.sum())
        budget = max(machine.chunk_tokens - num_verify, 0)
        chunks = []
        for request in running:
            if request.processed < request.prompt and budget:
                tokens = min(request.prompt - request.processed, budget)
                chunks.append(Chunk(tokens, request.processed))
                request.processed += tokens
                budget -= tokens
        step = Step(
            len(decoding),
            num_verify,
            sum(r.processed + r.emitted for r in decoding),
            tuple(chunks),
            int(lengths.max(initial=0)) if drafts else 0,
            int(lengths.sum()),
        )
        now_s += machine.seconds(step)
        for request, length in zip(decoding, lengths, strict=True):
            request.emitted += 1 + min(int(rng.geometric(0.35)) - 1, int(length))
        running = [r for r in running if r.emitted < r.output]
        if decoding:
            steps.append(step)
    return steps


def stream(
    machine: Machine,
    seed: int,
    num_steps: int,
    *,
    drafts: bool = True,
    slower_from: int | None = None,
) -> Stream:
    """A run of `serve` with its times; from step ``slower_from`` on all take `SLOWED` times."""
    steps = serve(machine, seed, num_steps, drafts=drafts)
    true_s = np.array([machine.seconds(step) for step in steps])
    if slower_from is not None:
        true_s[slower_from:] *= SLOWED
    rng = np.random.default_rng((seed, 1))
    seen_s = true_s * np.maximum(1.0 + NOISE * rng.normal(size=num_steps), 0.5)
    is_outlier = rng.random(num_steps) < OUTLIER_SHARE
    seen_s = np.where(is_outlier, seen_s * rng.uniform(*OUTLIER_FACTORS, num_steps), seen_s)
    return Stream(steps, true_s, seen_s, is_outlier, SWEEPS * (MAX_LENGTH + 1))


def cpu_like() -> Machine:
    """Made up after the reference worker on two cores: few and long steps, one token far cheaper.

    75 ms for one token alone, some 100 ms for two, 9 ms for every further one, 2.5 ms per token of
    a prompt; see docs/results.md for the runs that these resemble.
    """

    def seconds(step: Step) -> float:
        dense = 0.075 + 0.025 * (step.num_verify_tokens + step.num_prefill_tokens > 1)
        dense += 0.009 * max(step.num_verify_tokens - 2, 0)
        return dense + 2e-6 * step.context_tokens + 0.0025 * step.num_prefill_tokens

    term = Term("step", "made up", "after the reference worker on a CPU", seconds)
    return Machine("cpu_like", (term,), (), 16, 20_000, 256)
