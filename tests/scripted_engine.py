"""A mock engine: known costs and acceptance, no model. For tests and benchmarks of the loop.

Its clock is virtual: a step "takes" what its cost says, at once. Real are the link, the messages,
the lengths and everything on the daemon's side.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from smartspec.engine_adapter.base import (
    FEATURE_LAST_SHARE,
    FEATURE_MATCH_LENGTH,
    DecodeBatch,
    LengthSource,
    StepFacts,
)
from smartspec.engine_adapter.lengths import RAGGED, UNIFORM, Choice
from smartspec.engine_adapter.messages import Fingerprint, Hello, Limits


@dataclass(frozen=True)
class Costs:
    """Seconds: ``base + token * N + beyond * max(0, N - knee)`` and of drafting."""

    base_s: float = 0.020
    token_s: float = 0.0002
    knee: int = 64
    beyond_s: float = 0.0
    draft_forward_s: float = 0.0
    draft_token_s: float = 0.0
    ragged_s: float = 0.0  #: more, for several lengths in one pass
    noise: float = 0.02


def hello(
    name: str = "scripted",
    epoch: int = 1,
    *,
    max_length: int = 5,
    lookup: bool = True,
    trees: bool = False,
    static_length: int = 3,
    max_num_running: int = 512,
    modes: tuple[str, ...] = (RAGGED,),
) -> Hello:
    return Hello(
        engine=name,
        epoch=epoch,
        fingerprint=Fingerprint(target="scripted", proposer="lookup" if lookup else "draft_model"),
        limits=Limits(
            max_length=max_length,
            max_num_running=max_num_running,
            static_length=static_length,
            features=(FEATURE_LAST_SHARE, FEATURE_MATCH_LENGTH)
            if lookup
            else (FEATURE_LAST_SHARE,),
            drafts_known_first=lookup,
            modes=modes,
            trees=trees,
        ),
    )


def ranks(hits: np.ndarray) -> np.ndarray:
    """``hits`` [B, <= 64] of a tree's nodes as the bits of a u64, [B]."""
    whole = np.zeros((len(hits), 64), np.bool_)
    whole[:, : hits.shape[1]] = hits
    return np.packbits(whole, axis=1, bitorder="little").view("<u8")[:, 0]


@dataclass
class ScriptedEngine:
    """Decodes ``acceptance.size`` endless requests; ``replace`` swaps some of them."""

    source: LengthSource
    acceptance: np.ndarray  #: [B], probability that a draft is accepted
    costs: Costs = field(default_factory=Costs)
    max_length: int = 5
    lookup: bool = True
    match_rate: float = 1.0
    num_waiting: int = 0
    num_prefill_tokens: int = 0  #: of every step
    seed: int = 0
    weight: np.ndarray | None = None  #: [B]
    token_time_target_s: np.ndarray | None = None  #: [B], 0: none
    #: [B, max_length], falling: drafts are trees, whose nodes are accepted so often by their rank
    gains: np.ndarray | None = None

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        self.ids = np.arange(1, len(self.acceptance) + 1, dtype=np.uint64)
        self.next_id = len(self.ids) + 1
        self.last_share = np.full(len(self.ids), -1.0, np.float32)
        self.tokens = 0
        self.seconds = 0.0
        self.choices: list[Choice] = []

    def set_batch(self, acceptance: np.ndarray) -> None:
        """All requests leave, others come."""
        self.acceptance = acceptance
        size = len(acceptance)
        self.ids = np.arange(self.next_id, self.next_id + size, dtype=np.uint64)
        self.next_id += size
        self.last_share = np.full(size, -1.0, np.float32)

    def replace(self, count: int, acceptance: np.ndarray) -> None:
        at = self.rng.choice(len(self.ids), count, replace=False)
        self.ids = self.ids.copy()
        self.ids[at] = np.arange(self.next_id, self.next_id + count, dtype=np.uint64)
        self.next_id += count
        self.acceptance = self.acceptance.copy()
        self.acceptance[at] = acceptance
        self.last_share[at] = -1.0

    def batch(self) -> DecodeBatch:
        size = len(self.ids)
        ceiling = np.full(size, self.max_length, np.uint8)
        features = [self.last_share.copy()]
        if self.lookup:
            match = np.where(self.rng.random(size) < self.match_rate, 4, 0).astype(np.float32)
            ceiling[match == 0] = 0
            features.append(match)
        return DecodeBatch(
            self.ids,
            ceiling,
            np.stack(features),
            weight=self.weight,
            token_time_target_s=self.token_time_target_s,
            num_prefill_tokens=self.num_prefill_tokens,
        )

    def forwards(self, length: int) -> int:
        """Of a draft model, for drafts up to this length."""
        if self.gains is None or not length:
            return length
        return 1 + round(np.log2(length))

    def step(self) -> StepFacts:
        batch = self.batch()
        choice = self.source.choose(batch)
        lengths = np.minimum(choice.lengths, batch.ceiling)
        size = batch.size
        chance = self.acceptance[:, None] if self.gains is None else self.gains
        passed = self.rng.random((size, self.max_length)) < chance
        passed &= np.arange(self.max_length) < lengths[:, None]
        if self.gains is None:
            passed = np.logical_and.accumulate(passed, axis=1)
        accepted = passed.sum(axis=1)
        drafted = lengths > 0
        self.last_share[drafted] = (accepted[drafted] / lengths[drafted]).astype(np.float32)
        total, depth = int(lengths.sum()), int(lengths.max(initial=0))
        c = self.costs
        num_tokens = size + total + self.num_prefill_tokens
        noise = 1 + c.noise * self.rng.standard_normal(2)
        target = c.base_s + c.token_s * num_tokens + c.beyond_s * max(0, num_tokens - c.knee)
        uniform = c.ragged_s > 0 and int(lengths.min(initial=depth)) == depth
        target += 0.0 if uniform else c.ragged_s
        forwards = 0 if self.lookup else self.forwards(depth)
        draft = 0.0 if self.lookup else c.draft_forward_s * forwards + c.draft_token_s * total
        target_s, draft_s = target * noise[0], draft * noise[1]
        facts = StepFacts(
            batch=batch,
            num_drafted=lengths.astype(np.uint8),
            num_accepted=accepted.astype(np.uint8),
            num_emitted=(accepted + 1).astype(np.uint8),
            step_s=target_s + draft_s + 1e-4,
            target_s=target_s,
            draft_s=draft_s,
            context_tokens=200 * size,
            num_draft_forwards=forwards,
            num_draft_tokens=0 if self.lookup else total,
            num_waiting=self.num_waiting,
            mode=UNIFORM if uniform else RAGGED,
            accepted_ranks=None if self.gains is None else ranks(passed),
        )
        self.tokens += int(accepted.sum()) + size
        self.seconds += facts.step_s
        self.choices.append(choice)
        self.source.report(facts)
        return facts


class CopyingEngine:
    """Decodes endless texts, of copied passages and others: prompt lookup that always finds drafts.

    A match is long in copied passages, of 20 tokens in the mean, where 95% of drafts are right, and
    short in as long other ones, where 35% are. What is right does not depend on what is drafted.
    """

    def __init__(
        self, source: LengthSource, size: int, costs: Costs, max_length: int, seed: int
    ) -> None:
        self.source, self.costs, self.max_length = source, costs, max_length
        self._rng = np.random.default_rng(seed)
        shape = size, 1 << 15
        self._copied = (self._rng.random(shape) < 1 / 20).cumsum(axis=1) % 2 == 1
        self._right = self._rng.random(shape) < np.where(self._copied, 0.95, 0.35)
        self._position = np.zeros(size, np.int64)
        self.tokens, self.seconds = 0, 0.0

    def step(self) -> None:
        size, depths = len(self._position), np.arange(self.max_length)
        rows = np.arange(size)
        match = np.where(self._copied[rows, self._position], 16, 2)
        batch = DecodeBatch(
            rows.astype(np.uint64),
            np.full(size, self.max_length, np.uint8),
            np.stack([np.full(size, -1.0), match]).astype(np.float32),
        )
        lengths = self.source.choose(batch).lengths
        ahead = self._right[rows[:, None], self._position[:, None] + depths]
        ahead &= depths < lengths[:, None]
        accepted = np.logical_and.accumulate(ahead, axis=1).sum(axis=1)
        self._position += accepted + 1
        num_tokens = size + int(lengths.sum())
        target_s = self.costs.base_s + self.costs.token_s * num_tokens
        target_s *= 1 + self.costs.noise * self._rng.standard_normal()
        self.tokens += size + int(accepted.sum())
        self.seconds += target_s
        facts = StepFacts(
            batch=batch,
            num_drafted=lengths.astype(np.uint8),
            num_accepted=accepted.astype(np.uint8),
            num_emitted=(accepted + 1).astype(np.uint8),
            step_s=target_s,
            target_s=target_s,
            draft_s=0.0,
            context_tokens=200 * size,
        )
        self.source.report(facts)
