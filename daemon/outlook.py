"""What is known of an engine's next step, taken to be like its last: what drafts bring and cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from smartspec.daemon.engines import Engine, Observation
from smartspec.daemon.goodput import best_by_batch
from smartspec.engine_adapter.lengths import (
    F64,
    I64,
    CostCurve,
    DraftCost,
    Ladder,
    Worth,
    batch_seconds,
    possible,
    request_survivals,
    request_weights,
)
from smartspec.engine_adapter.optimum import Optimum, at_price, solve
from smartspec.estimators.continuation import Pace, Places
from smartspec.estimators.step_cost import StepShape


class Expected(NamedTuple):
    """What a step should bring."""

    tokens: float  #: weighted
    seconds: float

    @property
    def goodput(self) -> float:
        return self.tokens / self.seconds


class Outlook(NamedTuple):
    """The batch last reported, as the models see it now."""

    table: Worth  #: log survivals, [K, num_buckets]
    correction: Worth  #: [B]
    survival: Worth  #: of each request, [K, B]
    ladder: Ladder  #: with presences where drafts are known before lengths are chosen
    curves: list[CostCurve]  #: of passes without prompts, one per mode, uniform last
    draft: DraftCost
    shape: StepShape  #: of the step without drafts
    num_prompt_tokens: int  #: they come in rows: as many as in the last step are the best guess
    beside_s: float  #: by which those tokens are dearer than verified ones
    goes_on: bool  #: some would be drafted for, had no first drafts been run
    bucket: I64  #: [B], in which requests will be drafted for, as far as is known
    weight: Worth | None  #: [B], of requests; None: all 1
    #: [num_buckets], of an accepted draft, in tokens of the batch as it is; None: all 1
    worth: Worth | None = None

    @classmethod
    def of(cls, engine: Engine, observation: Observation, table: Worth) -> Outlook:
        """By what the engine's models say, of survivals ``table``."""
        batch, report = observation.batch, observation.report
        rows = engine.rows(batch)
        correction = engine.acceptance.corrections(rows)
        survival = request_survivals(table, engine.last_bucket, correction)
        known_first = engine.hello.limits.drafts_known_first
        presence = engine.acceptance.presence(rows) if known_first else None
        available = None if known_first else observation.num_available
        shape = StepShape(
            batch=len(batch.ids),
            verify_tokens=len(batch.ids),
            prefill_tokens=report.num_prefill_tokens,
            context_tokens=report.context_tokens,
        )
        curves = [_curve(engine, shape, mode) for mode in engine.modes]
        draft, goes_on = engine.draft_cost(), False
        if observation.blind_buckets is not None:
            blind = request_survivals(table, observation.blind_buckets, correction)
            ladder = Ladder(blind, batch.weight, batch.floor, available)
            goes_on = solve(ladder, curves, draft).depth > 0
        return cls(
            table,
            correction,
            survival,
            Ladder(survival, batch.weight, batch.floor, available, presence),
            curves,
            draft.begun() if goes_on and observation.has_begun else draft,
            shape,
            report.num_prefill_tokens,
            engine.step_cost.prefill_cost() * report.num_prefill_tokens,
            goes_on,
            engine.last_bucket,
            batch.weight,
        )

    def alone(self) -> Optimum:
        """The lengths of greatest goodput, were there no prompts in the step.

        Its goodput is what a second is worth (docs/adr/0005-price-of-time.md).
        """
        return solve(self.ladder, self.curves, self.draft)

    def pace(self, alone: Optimum) -> Pace | None:
        """What a request's part of a step takes; None where nothing can be drafted."""
        lengths, seconds = alone.choice.lengths, alone.choice.seconds
        if not lengths.any():
            lengths = self.ladder.at(1)[0]
            given = lengths, 0, self.num_drafts(lengths)
            seconds = batch_seconds(self.curves[-1], self.draft, *given)
        num_drafts = self.num_drafts(lengths)
        if not num_drafts:
            return None
        none_s = float(self.curves[-1].at(self.ladder.size)) + self.draft.sunk_s
        return Pace(none_s / self.ladder.size, max(0.0, seconds - none_s) / num_drafts)

    def ladder_of(
        self, ceiling: npt.NDArray[np.integer] | None, presence: Worth | None = None
    ) -> Ladder:
        """What can be drafted, at what it is worth where each request is."""
        weight = request_weights(self.weight, self.worth, self.bucket)
        return Ladder(self.survival, weight, self.ladder.floor, ceiling, presence)

    def among(self, places: Places) -> Outlook:
        """The same, drafts counting for what tokens take where they lead."""
        presence = self.ladder.presence
        if presence is None:
            presence = np.ones(self.ladder.size)
        ease = places.ease(self.bucket, presence, self.weight)
        return self._replace(worth=places.worth / ease)

    def optimum(self, alone: Optimum) -> Optimum:
        """The best lengths for the step as it is, drafts counting for what they are worth."""
        other = self.num_prompt_tokens
        if self.worth is None and not other:
            return alone
        ladder = self.ladder
        if self.worth is not None:
            ladder = self.ladder_of(ladder.ceiling, ladder.presence)
        optimum = at_price(ladder, alone.value_of_time, self.curves, self.draft, other)
        gain = self.ladder.at(optimum.choice.lengths)[1]
        choice = optimum.choice._replace(gain=gain)
        return optimum._replace(goodput=gain / (choice.seconds + self.beside_s), choice=choice)

    def chosen(self, optimum: Optimum) -> Expected:
        """What the optimum's lengths should bring."""
        return Expected(optimum.choice.gain, optimum.choice.seconds + self.beside_s)

    def without(self) -> tuple[Expected, float]:
        """What no speculation should bring, and the seconds of it that are its prompts'."""
        size = self.ladder.size
        alone_s = float(self.curves[-1].at(size))
        none_s = float(self.possible()[-1].at(size + self.num_prompt_tokens))
        none = Expected(self.ladder.weight_sum, none_s + self.beside_s)
        return none, max(none.seconds - alone_s, 0.0)

    def at_length(self, length: int) -> Expected:
        """What one length for all should bring."""
        lengths, gain = self.ladder.at(length)
        given = lengths, self.num_prompt_tokens, self.num_drafts(lengths)
        seconds = batch_seconds(self.possible()[-1], self.draft, *given)
        return Expected(gain, seconds + self.beside_s)

    def possible(self) -> Sequence[CostCurve]:
        """The curves of the step: the last one is that of one length for all."""
        return possible(self.curves, self.num_prompt_tokens)

    def num_drafts(self, lengths: I64) -> float:
        """Drafts to be expected at ``lengths`` [B]."""
        presence = 1.0 if self.ladder.presence is None else self.ladder.presence
        return float((lengths * presence).sum())


def by_batch(engine: Engine, context_tokens: float) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Batch sizes, rising, and the best single length from each on, of average requests.

    ``context_tokens``: of each. What the batch is that an engine happens to have does not matter.
    """
    limits, acceptance = engine.hello.limits, engine.acceptance
    most = limits.max_num_running
    begins: I64 = np.unique(np.geomspace(1, most, 12).round().astype(np.int64))
    # A length has to do up to the next size: the best of the sizes in between.
    middles = np.sqrt(begins * np.append(begins[1:] - 1, most)).round().astype(np.int64)
    mode = engine.modes[-1]
    curves = [
        _curve(engine, StepShape(size, size, context_tokens=size * context_tokens), mode)
        for size in middles.tolist()
    ]
    survival = acceptance.pooled_survivals()
    presence = acceptance.pooled_presence() if limits.drafts_known_first else 1.0
    best = best_by_batch(survival, presence, middles, curves, engine.draft_cost())
    return tuple(begins.tolist()), tuple(best.tolist())


def _curve(engine: Engine, shape: StepShape, mode: str) -> CostCurve:
    """Seconds by tokens in the pass: exact for a batch that has since doubled, roughly for any.

    That of a pass without prompts: what the tokens of prompts cost beyond that of others is the
    same for all lengths that such a pass can have (`lengths.possible`), so that an engine can
    choose by such curves whatever its step turns out to carry.
    """
    limits = engine.hello.limits
    sizes = min(2 * round(shape.batch) + 8, limits.max_num_running), limits.max_num_running
    hi, far = (size * (1 + limits.max_length) + engine.most_prefill_tokens for size in sizes)
    shape = shape._replace(ragged=float(engine.is_dear(mode)))
    return CostCurve(mode, *engine.step_cost.whole_curve(shape, 1, hi, far))


def gain_std(engine: Engine, outlook: Outlook, lengths: I64, others: Sequence[int]) -> list[float]:
    """Deviation of log(goodput at ``lengths`` / goodput at one length for all), for each other one.

    By the delta method. Hazards are taken to be independent by depth, and wrong alike for all
    requests; those of depths never tried are as uncertain as their prior. Of costs only the
    difference counts.
    """
    hazard_std = engine.acceptance.hazard_std() / engine.acceptance.pooled_hazards()
    tokens, cost = _influence(engine, outlook, lengths)
    found = []
    for length in others:
        other_tokens, other_cost = _influence(engine, outlook, outlook.ladder.at(length)[0])
        of_tokens = float((((tokens - other_tokens) * hazard_std) ** 2).sum())
        of_cost = engine.step_cost.log_ratio_std(cost, other_cost)
        found.append(float(np.sqrt(of_tokens + of_cost**2)))
    return found


def _influence(engine: Engine, outlook: Outlook, lengths: I64) -> tuple[F64, StepShape]:
    """d log tokens / d log hazard by depth or rank, [K]; and the shape of such a step."""
    ladder = outlook.ladder
    presence = 1.0 if ladder.presence is None else ladder.presence
    taken = np.arange(ladder.max_length)[:, None] < lengths
    by_depth = (ladder.worth * taken * presence).sum(axis=1, dtype=np.float64)
    beyond: F64 = by_depth
    if not engine.key.trees:  # where a hazard is a factor of all that follow
        beyond = by_depth[::-1].cumsum()[::-1]
    drafts = outlook.num_drafts(lengths)
    forwards = 0.0
    if not engine.hello.limits.drafts_known_first:
        forwards = outlook.draft.num_forwards(int(lengths.max(initial=0)))
    return beyond / (ladder.weight_sum + float(by_depth.sum())), outlook.shape._replace(
        verify_tokens=ladder.size + drafts, draft_forwards=forwards, draft_tokens=drafts
    )
