"""Rival policies. Each is a `LengthSource`: what SmartSpec's link is to an engine, they are too.

Those tuned offline get what an operator would have: the profile and a mean acceptance.
*Informed* and *clairvoyant* are told what no policy can know; they are bounds.
"""

from __future__ import annotations

import math
from collections import deque
from typing import NamedTuple

import numpy as np

from smartspec.engine_adapter.base import DecodeBatch, FixedLength, StepFacts
from smartspec.engine_adapter.lengths import Choice, CostCurve, DraftCost, Ladder
from smartspec.engine_adapter.optimum import at_price, solve
from smartspec.engine_adapter.simulator.engine import Engine, Present
from smartspec.engine_adapter.simulator.profile import Profile
from smartspec.engine_adapter.simulator.requests import F64


class BatchLength(FixedLength):
    """One length for all, which may change from step to step."""

    def __init__(self) -> None:
        super().__init__(0)

    def at(self, num_running: int) -> int:
        """The length for a batch of so many."""
        raise NotImplementedError

    def choose(self, batch: DecodeBatch) -> Choice:
        self.length = self.at(batch.size)
        return super().choose(batch)


class AdaptiveTiers(BatchLength):
    """SGLang's adaptive speculation with its default tiers.

    A moving average (0.2) of accepted drafts per request and step, after 10 batches of warm-up, is
    looked at every 5. A longer length is taken while the average reaches the present one less
    half a token; a shorter one when it is no more than that one's, less half and a quarter.
    """

    TIERS = ((1, (1, 3, 5, 7)), (8, (0, 1, 3)), (32, (0, 1)), (64, (0,)))
    RATE, WARM_UP, EVERY, DOWN, UP = 0.2, 10, 5, -0.25, 0.0

    def __init__(self, max_length: int) -> None:
        super().__init__()
        self._max_length = max_length
        self._average: float | None = None
        self._num_batches = 0
        self._step = min(3, max_length)

    def _candidates(self, num_running: int) -> list[int]:
        tier = [lengths for least, lengths in self.TIERS if num_running >= least][-1]
        return [k for k in tier if k <= self._max_length]

    def at(self, num_running: int) -> int:
        fitting = [k for k in self._candidates(num_running) if k <= self._step]
        return fitting[-1] if fitting else self._candidates(num_running)[0]

    def report(self, facts: StepFacts) -> None:
        drafted = facts.num_drafted > 0
        if not drafted.any():
            # Nothing is learned at 0; the tier of the next batch may speculate again.
            self._step = max(self._step, 1)
            return
        mean = float(facts.num_accepted[drafted].mean())
        old = self._average
        self._average = mean if old is None else (1 - self.RATE) * old + self.RATE * mean
        self._num_batches += 1
        if self._num_batches > self.WARM_UP and self._num_batches % self.EVERY == 0:
            self._move(self._candidates(facts.batch.size))

    def _move(self, candidates: list[int]) -> None:
        assert self._average is not None
        at = max((i for i, k in enumerate(candidates) if k <= self._step), default=0)
        while at > 0 and self._average <= candidates[at - 1] - 0.5 + self.DOWN:
            at -= 1
        while at < len(candidates) - 1 and self._average > candidates[at] - 0.5 + self.UP:
            at += 1
        self._step = candidates[at]


class AuthorsRule(BatchLength):
    """The rule of SmartSpec's authors (arXiv 2406.14066, and their vLLM branch).

    One length for the batch: acceptance is a moving average (0.85 old, 0.15 new) from 0.7, the
    generated length the closed form ``(1 - a^(k+1)) / (1 - a)``, time linear in context and tokens
    as profiled beforehand; lengths are tried upwards until goodput falls, 0 counts 1.1 times, and
    all is decided anew every 20 steps.
    """

    EVERY, OLD, BONUS = 20, 0.85, 1.1

    def __init__(self, profile: Profile, draft: str, max_length: int) -> None:
        super().__init__()
        self._max_length = max_length
        self._draft = profile.draft(draft)
        shapes = [(b, k, c) for b in (1, 4, 16, 64, 128) for k in range(max_length + 1)
                  for c in (200, 700, 2000)]  # fmt: skip
        rows = np.array([[1.0, b * (k + 1), b * c] for b, k, c in shapes])
        seconds = np.array([profile.target_seconds(b, b * (k + 1), b * c) for b, k, c in shapes])
        relative = rows / seconds[:, None]
        self._coefficients = np.linalg.lstsq(relative, np.ones(len(rows)), rcond=None)[0]
        self.acceptance = 0.7
        self._context = 0
        self._num_steps = 0
        self._last = max_length

    def at(self, num_running: int) -> int:
        if self._num_steps % self.EVERY == 0 and num_running:
            self._last = self._decide(num_running)
        self._num_steps += 1
        return self._last

    def _decide(self, size: int) -> int:
        best, best_goodput, a = 0, -math.inf, min(self.acceptance, 0.999)
        for k in range(self._max_length + 1):
            base, token, context = self._coefficients
            seconds = base + token * size * (k + 1) + context * self._context
            if k:
                d = self._draft
                seconds += d.fixed_s + d.per_forward_s * k + d.per_token_s * k * size
            goodput_k = size * (1 - a ** (k + 1)) / (1 - a) / seconds
            if k == 0:
                goodput_k *= self.BONUS
            if goodput_k < best_goodput:
                break
            best, best_goodput = k, goodput_k
        return best

    def report(self, facts: StepFacts) -> None:
        self._context = facts.context_tokens
        drafted = int(facts.num_drafted.sum())
        if drafted:
            share = int(facts.num_accepted.sum()) / drafted
            self.acceptance = self.OLD * self.acceptance + (1 - self.OLD) * share


class Bandit(BatchLength):
    """UCB1 (Auer et al. 2002) over lengths, for each power of two of the batch size.

    The reward is tokens per second, as a share of the most that was seen with such a batch.
    """

    def __init__(self, max_length: int) -> None:
        super().__init__()
        self._num_arms = max_length + 1
        self._count: dict[int, np.ndarray] = {}
        self._sum: dict[int, np.ndarray] = {}
        self._most: dict[int, float] = {}

    def at(self, num_running: int) -> int:
        size = num_running.bit_length()
        count = self._count.setdefault(size, np.zeros(self._num_arms))
        if (count == 0).any():
            return int(np.argmin(count))
        mean = self._sum[size] / count / self._most[size]
        return int(np.argmax(mean + np.sqrt(2 * np.log(count.sum()) / count)))

    def report(self, facts: StepFacts) -> None:
        size = facts.batch.size.bit_length()
        if size not in self._count or facts.batch.num_prefill_tokens:
            return
        rate = float(facts.num_emitted.sum()) / facts.step_s
        self._count[size][self.length] += 1
        self._sum.setdefault(size, np.zeros(self._num_arms))[self.length] += rate
        self._most[size] = max(self._most.get(size, 0.0), rate)


class SwitchOff(BatchLength):
    """TensorRT-LLM: one length until the rolling acceptance falls under a threshold, then never.

    Acceptance is that of the last ``window`` steps that drafted, drafts accepted per request.
    """

    def __init__(self, length: int, threshold: float = 1.0, window: int = 1000) -> None:
        super().__init__()
        self._on, self._threshold = length, threshold
        self._recent: deque[float] = deque(maxlen=window)
        self.is_off = False

    def at(self, num_running: int) -> int:
        return 0 if self.is_off else self._on

    def report(self, facts: StepFacts) -> None:
        drafted = facts.num_drafted > 0
        if self.is_off or not drafted.any():
            return
        self._recent.append(float(facts.num_accepted[drafted].mean()))
        full = len(self._recent) == self._recent.maxlen
        if full and sum(self._recent) / len(self._recent) < self._threshold:
            self.is_off = True


class Known(NamedTuple):
    """A step about to run, as a policy that is told the truth sees it."""

    ladder: Ladder  #: by the true probabilities, or outcomes
    alone: CostCurve  #: true costs, if the step carried no prompts
    carrying: CostCurve  #: with the prompts that it does carry
    draft: DraftCost
    num_prompt_tokens: int


class Told(FixedLength):
    """Our law with true costs and true probabilities, or (``clairvoyant``) true outcomes.

    `engine` is to be set before the first step.
    """

    engine: Engine

    def __init__(self, draft: str, *, clairvoyant: bool = False) -> None:
        super().__init__(0)
        self._draft, self._clairvoyant = draft, clairvoyant

    def value_of_time(self, step: Known) -> float:
        """The goodput of the batch without the step's prompts: as the daemon prices a second."""
        return solve(step.ladder, [step.alone], step.draft).value_of_time

    def survival(self, present: Present) -> F64:
        """Of the step about to run: [max_length, B], of trees the gains of ranks."""
        outcomes = self.engine.outcomes
        depths = np.arange(1, self.engine.max_length + 1)[:, None]
        if outcomes.trees is not None:
            return outcomes.trees.gain[present.requests].T
        if self._clairvoyant:
            return (depths <= outcomes.run[present.positions]).astype(np.float64)
        ahead = outcomes.probability[present.positions + depths - 1]
        return np.cumprod(ahead, axis=0, dtype=np.float64)

    def choose(self, batch: DecodeBatch) -> Choice:
        engine, present = self.engine, self.engine.present
        assert present is not None
        factor, trees = present.cost_factor, engine.outcomes.trees
        draft = engine.profile.draft(self._draft, factor)
        if trees is not None:
            # As many passes as the deepest tree of so many nodes would take.
            levels = trees.num_levels[present.requests, 1:].max(axis=0, initial=0)
            draft = draft._replace(forwards=tuple(levels.tolist()))
        prompts = batch.num_prefill_tokens
        most = batch.size * (1 + engine.max_length) + prompts
        alone, carrying = (
            engine.profile.curve(batch.size, present.context_tokens, chunks, most, factor)
            for chunks in ((), present.chunks)
        )
        ladder = Ladder(self.survival(present), ceiling=batch.ceiling)
        price = self.value_of_time(Known(ladder, alone, carrying, draft, prompts))
        return at_price(ladder, price, [carrying], draft, prompts).choice
