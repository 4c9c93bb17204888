"""Continuous batching in virtual time: admit, choose, run, accept, report.

As vLLM's scheduler does: decoding requests go first, one chunk per prompt fills what they leave of
the token budget (drafts come on top of it), first come first served; where the KV room runs out,
the youngest request gives its room back, waits in front and is computed again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from smartspec.engine_adapter.base import DecodeBatch, LengthSource, StepFacts
from smartspec.engine_adapter.lengths import Choice
from smartspec.engine_adapter.simulator.profile import Chunk, Profile
from smartspec.engine_adapter.simulator.requests import F64, I64, Outcomes, Traffic


class Served(NamedTuple):
    """What became of the requests; aligned columns [R], seconds since the beginning."""

    arrival_s: F64
    first_token_s: F64
    finished_s: F64
    num_output: I64

    @property
    def latency_s(self) -> F64:
        return self.finished_s - self.arrival_s

    @property
    def time_to_first_s(self) -> F64:
        return self.first_token_s - self.arrival_s

    @property
    def time_per_token_s(self) -> F64:
        """Seconds per token after the first; NaN for answers of one token."""
        with np.errstate(invalid="ignore"):
            decoding: F64 = (self.finished_s - self.first_token_s) / (self.num_output - 1)
        return np.where(self.num_output > 1, decoding, np.nan)


class Present(NamedTuple):
    """The step about to run, as only a simulator knows it: for policies that are told the truth."""

    requests: I64  #: [B], those that decode
    positions: I64  #: [B], where they are in the columns of the outcomes
    context_tokens: int
    chunks: tuple[Chunk, ...]
    cost_factor: float


class Engine:
    """One engine and its requests.

    Parameters
    ----------
    profile, draft : what steps cost; ``draft`` is one of the profile's, or "lookup"
    source : who chooses lengths
    traffic, outcomes : the requests
    max_length : longest length that can be drafted; of trees, most nodes
    max_num_running : at most as many at once; None: the profile's
    noise : relative deviation of a step's time
    cost_factor : by seconds since the beginning, what all costs are multiplied by
    hear : called after every report, e.g. to schedule the daemon's turn
    watch : called with the time and what was done, after every step
    """

    def __init__(
        self,
        profile: Profile,
        draft: str,
        source: LengthSource,
        traffic: Traffic,
        outcomes: Outcomes,
        *,
        max_length: int = 5,
        max_num_running: int | None = None,
        seed: int = 0,
        noise: float = 0.02,
        cost_factor: Callable[[float], float] = lambda now_s: 1.0,
        hear: Callable[[], None] = lambda: None,
        watch: Callable[[float, StepFacts], None] | None = None,
    ) -> None:
        if traffic.size and traffic.num_prompt.max() + traffic.num_output.max() + max_length >= (
            profile.kv_tokens
        ):
            raise ValueError(f"a request needs more than kv_tokens = {profile.kv_tokens}")
        self.profile, self.source = profile, source
        self.traffic, self.outcomes = traffic, outcomes
        self.max_length = max_length
        self.max_num_running = max_num_running or profile.max_num_running
        self.present: Present | None = None
        self.is_idle = True
        self.num_steps = self.num_preempted = 0
        self.num_drafted = self.num_accepted = 0
        self._draft = profile.draft(draft)
        self._is_lookup = draft == "lookup"
        self._drafter = outcomes.drafter(seed)
        self._rng = np.random.default_rng((seed, 1))
        self._noise = noise
        self._cost_factor = cost_factor
        self._hear = hear
        self._watch = watch
        size = traffic.size
        self.first_token_s = np.full(size, np.nan)
        self.finished_s = np.full(size, np.nan)
        self._emitted = np.zeros(size, np.int64)
        self._last_share = np.full(size, -1.0, np.float32)
        self._waiting: deque[int] = deque()
        self._prefilling: list[list[int]] = []  # request, processed, of how many
        self._rows: I64 = np.empty(0, np.int64)  # decoding, by admission
        self._step: tuple[DecodeBatch, np.ndarray, StepFacts, list[int]] | None = None

    @property
    def served(self) -> Served:
        """All requests; NaN for what has not happened."""
        traffic = self.traffic
        return Served(traffic.arrival_s, self.first_token_s, self.finished_s, traffic.num_output)

    @property
    def num_waiting(self) -> int:
        """Requests that have come and have not been begun."""
        return len(self._waiting)

    def arrive(self, request: int) -> None:
        """A request comes and waits."""
        self.is_idle = False
        self._waiting.append(request)

    def begin_step(self, now_s: float) -> float | None:
        """Choose lengths and run; returns the step's seconds, or None when there is nothing."""
        context = self._make_room()
        chunks, done = self._fill_chunks(context)
        rows = self._rows
        if not len(rows) and not chunks:
            self.is_idle = True
            self.source.idle()
            return None
        emitted_before = self._emitted[rows]
        positions = self.outcomes.offset[rows] + emitted_before
        batch = self._batch(rows, positions, chunks)
        factor = self._cost_factor(now_s)
        self.present = Present(rows, positions, context, chunks, factor)
        size, choice = len(rows), Choice(np.zeros(0, np.int64))
        if size:
            choice = self.source.choose(batch)
        lengths = np.minimum(choice.lengths, batch.ceiling).astype(np.uint8)
        drafted = self._drafter.draft(rows, positions, choice, lengths)
        left = self.traffic.num_output[rows] - emitted_before
        emitted = np.minimum(drafted.num_accepted.astype(np.int64) + 1, left)
        drawn: list[float] = self._rng.standard_normal(2).tolist()
        luck = [1 + self._noise * deviation for deviation in drawn]
        target_s = self.profile.target_seconds(
            size, size + int(drafted.num_verified.sum()), context, chunks
        )
        target_s *= factor * max(luck[0], 0.1)
        draft_s, forwards, tokens = 0.0, drafted.num_forwards, drafted.num_draft_tokens
        if self._is_lookup:
            forwards = tokens = 0
        if forwards:
            d = self._draft
            draft_s = d.fixed_s + d.per_forward_s * forwards + d.per_token_s * tokens
            draft_s *= factor * max(luck[1], 0.1)
        seconds = target_s + draft_s
        facts = StepFacts(
            batch=batch,
            num_drafted=drafted.num_verified,
            num_accepted=drafted.num_accepted,
            num_emitted=emitted.astype(np.uint8),
            step_s=seconds,
            target_s=target_s,
            draft_s=draft_s,
            context_tokens=context,
            num_draft_forwards=forwards,
            num_draft_tokens=tokens,
            num_waiting=self.num_waiting,
            kv_usage=min(context / self.profile.kv_tokens, 1.0),
            accepted_ranks=drafted.ranks,
            num_cut=drafted.num_cut,
            num_cut_accepted=drafted.num_cut_accepted,
        )
        self._step = batch, emitted, facts, done
        return seconds

    def end_step(self, now_s: float) -> None:
        """Hand out tokens; whoever is done leaves; report."""
        assert self._step is not None
        _, emitted, facts, done = self._step
        self._step = None
        rows = self._rows
        if len(rows):
            self._emitted[rows] += emitted
            lengths = facts.num_drafted
            drafted = lengths > 0
            if drafted.any():
                self._last_share[rows[drafted]] = facts.num_accepted[drafted] / lengths[drafted]
                self.num_drafted += int(lengths.sum())
                self.num_accepted += int(facts.num_accepted.sum())
            finished = self._emitted[rows] >= self.traffic.num_output[rows]
            if finished.any():
                self.finished_s[rows[finished]] = now_s
                self._rows = rows[~finished]
        for request in done:
            if self._emitted[request] == 0:
                self.first_token_s[request] = now_s
            self._emitted[request] += 1
        if done:
            joined = np.array(done)
            finished = self._emitted[joined] >= self.traffic.num_output[joined]
            self.finished_s[joined[finished]] = now_s
            self._rows = np.concatenate([self._rows, joined[~finished]])
        self.num_steps += 1
        if self._watch is not None:
            self._watch(now_s, facts)
        self.source.report(facts)
        self._hear()

    # -- the batch ------------------------------------------------------------------------------

    def _batch(self, rows: I64, positions: I64, chunks: tuple[Chunk, ...]) -> DecodeBatch:
        ceiling = np.full(len(rows), self.max_length, np.uint8)
        features, told = self._last_share[rows][None], self.outcomes.features
        if self.outcomes.match_length is not None:
            match = self.outcomes.match_length[positions]
            ceiling[match == 0] = 0
            if told is None:
                features = np.concatenate([features, match[None].astype(np.float32)])
        if told is not None:
            features = np.concatenate([features, told[:, positions]])
        return DecodeBatch(
            (rows + 1).astype(np.uint64),
            ceiling,
            features,
            num_prefill_tokens=sum(chunk.num_tokens for chunk in chunks),
        )

    def _make_room(self) -> int:
        """Preempt until what decodes has room for its next tokens; returns its KV entries."""
        prefilled = sum(processed for _, processed, _ in self._prefilling)
        while True:
            rows = self._rows
            context = int(self.traffic.num_prompt[rows].sum() + self._emitted[rows].sum())
            if context + len(rows) * (1 + self.max_length) + prefilled <= self.profile.kv_tokens:
                return context
            self.num_preempted += 1
            if self._prefilling:  # they are younger than all that decode
                request, processed, _ = self._prefilling.pop()
                prefilled -= processed
            else:
                request = int(rows[-1])
                self._rows = rows[:-1]
            self._waiting.appendleft(request)

    def _fill_chunks(self, context: int) -> tuple[tuple[Chunk, ...], list[int]]:
        """Chunks of prompts within budget and room; and who will have no prompt left."""
        num_decoding = len(self._rows)
        if not self._prefilling and not self._waiting:
            return (), []
        budget = self.profile.chunk_tokens - num_decoding
        room = self.profile.kv_tokens - context - num_decoding * (1 + self.max_length)
        room -= sum(processed for _, processed, _ in self._prefilling)
        chunks, done = [], []
        for entry in self._prefilling:
            tokens = min(entry[2] - entry[1], budget, room)
            if tokens > 0:
                chunks.append(Chunk(tokens, entry[1]))
                entry[1] += tokens
                budget, room = budget - tokens, room - tokens
        while self._waiting and num_decoding + len(self._prefilling) < self.max_num_running:
            request = self._waiting[0]
            wanted = int(self.traffic.num_prompt[request] + self._emitted[request])
            tokens = min(wanted, budget)
            if tokens <= 0 or wanted > room:
                break
            self._waiting.popleft()
            self._prefilling.append([request, tokens, wanted])
            chunks.append(Chunk(tokens, 0))
            budget, room = budget - tokens, room - wanted
        for entry in self._prefilling:
            if entry[1] == entry[2]:
                done.append(entry[0])
        self._prefilling = [entry for entry in self._prefilling if entry[1] < entry[2]]
        return tuple(chunks), done
