"""A policy made ready to run: decoded once when it arrives, applied at every step.

Checks everything that a daemon could get wrong, so that applying it cannot fail: the engine's
step depends on nothing but its own arrays.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np

from smartspec.engine_adapter import lengths
from smartspec.engine_adapter.base import F32, U64, DecodeBatch
from smartspec.engine_adapter.lengths import UNIFORM, Choice, CostCurve, DraftCost, Ladder
from smartspec.engine_adapter.levels import Levels
from smartspec.engine_adapter.messages import (
    FEATURE_DRAFT_CONFIDENCE,
    LARGEST,
    MAX_BUCKETS,
    Curve,
    Policy,
    align,
    require,
    unpack,
)
from smartspec.engine_adapter.optimum import is_nimble, steered
from smartspec.engine_adapter.prices import Prices
from smartspec.engine_adapter.ranking import Ranking
from smartspec.engine_adapter.targets import choose_in_time

MAX_BREAKPOINTS = 4096
MAX_CURVES = 8
MAX_AXES = 16
MAX_BATCH_SIZE = 1 << 31  #: in the fallback table
MAX_POSSIBLE = 1 << 14  #: requests times buckets, to make ready for each while a step runs


def _curve(curve: Curve) -> CostCurve:
    tokens, seconds = curve.num_tokens, curve.seconds
    require(1 <= len(tokens) <= MAX_BREAKPOINTS, f"curves: {len(tokens)} breakpoints")
    require(len(tokens) == len(seconds), "curves: seconds must be as many as num_tokens")
    require(all(map(operator.lt, tokens, tokens[1:])), "curves: num_tokens must rise")
    return CostCurve(curve.mode, tokens, seconds)


class Program:
    """One policy, ready to choose lengths.

    Parameters
    ----------
    policy : as it came over the wire
    features : names of the rows of the engine's feature columns; an axis on a feature that the
        engine does not have reads 0 for all requests
    roster : request ids that the policy's corrections stand for, or None when not known any more
    previous : the program that this one follows

    Raises `messages.MessageError`.
    """

    edges: list[F32]
    rows: list[int | None]
    num_buckets: int
    log_survival: F32
    worth: F32 | None  #: [num_buckets]
    _fallback_batch: lengths.I64
    _fallback_length: lengths.I64

    def __init__(
        self,
        policy: Policy,
        features: tuple[str, ...],
        roster: U64 | None,
        previous: Program | None = None,
    ) -> None:
        self.policy = policy
        self.value_of_time = policy.value_of_time
        self.draft = DraftCost(
            policy.draft_fixed_s,
            policy.draft_per_forward_s,
            policy.draft_per_token_s,
            policy.draft_forwards,
            per_catch_up_s=policy.draft_per_catch_up_s,
        )
        require(1 <= len(policy.curves) <= MAX_CURVES, f"curves: {len(policy.curves)} given")
        #: Row of the feature that says whose first draft was run, where that matters.
        self._begins_at = None
        if policy.goes_on and FEATURE_DRAFT_CONFIDENCE in features:
            self._begins_at = features.index(FEATURE_DRAFT_CONFIDENCE)
        self.curves = [_curve(curve) for curve in policy.curves]
        # What seldom changes is taken over, checked as it is.
        if previous is not None and previous.policy.axes == policy.axes:
            self.edges, self.rows = previous.edges, previous.rows
            self.num_buckets = previous.num_buckets
        else:
            self._read_axes(policy, features)
        same_shape = previous is not None and previous.num_buckets == self.num_buckets
        if previous is not None and same_shape and previous._same_table(policy):
            self.log_survival = previous.log_survival
        else:
            self._read_table(policy)
        if previous is not None and same_shape and previous.policy.worth == policy.worth:
            self.worth = previous.worth
        else:
            self.worth = None
            if policy.worth:
                self.worth = unpack(policy.worth, "f32", (self.num_buckets,), "worth", low=0.0)
        if previous is not None and previous._same_fallback(policy):
            self._fallback_batch = previous._fallback_batch
            self._fallback_length = previous._fallback_length
        else:
            self._read_fallback(policy)
        self.roster: U64 = np.empty(0, np.uint64)
        self.correction: F32 = np.empty(0, np.float32)
        if roster is not None and policy.correction:
            self.correction = unpack(
                policy.correction, "f32", (len(roster),), "correction", low=0.0
            )
            self.roster = roster
        self._roster_bytes = self.roster.tobytes()
        self._columns: list[bytes | None] = []  #: of the last batch
        self._ladder: Ladder | None = None  #: of the same
        self._ranking: Ranking | None = None  #: of the same, if it was prepared
        self._levels: Levels | None = None  #: of the same, if its drafts have yet to be found
        self._made: tuple[str, int] | None = None  #: what chose, and prompt tokens that it minded
        self._chosen: Choice | None = None

    def _read_axes(self, policy: Policy, features: tuple[str, ...]) -> None:
        require(len(policy.axes) <= MAX_AXES, f"axes: more than {MAX_AXES}")
        for axis in policy.axes:
            rising = all(a < b for a, b in pairwise(axis.edges))
            finite = all(abs(edge) <= LARGEST for edge in axis.edges)
            require(rising and finite, "axes: edges must be finite and rise")
        self.edges = [np.array(axis.edges, np.float32) for axis in policy.axes]
        self.rows = [
            features.index(axis.feature) if axis.feature in features else None
            for axis in policy.axes
        ]
        self.num_buckets = math.prod(len(edges) + 1 for edges in self.edges)
        require(self.num_buckets <= MAX_BUCKETS, f"axes: more than {MAX_BUCKETS} buckets")

    def _same_table(self, policy: Policy) -> bool:
        mine = self.policy
        return mine.log_survival == policy.log_survival and mine.max_length == policy.max_length

    def _read_table(self, policy: Policy) -> None:
        shape = (policy.max_length, self.num_buckets)
        table = unpack(policy.log_survival, "f32", shape, "log_survival", high=0.0)
        rises = bool((table[1:] > table[:-1]).any())
        require(not rises, "log_survival: must not rise with depth")
        self.log_survival = table

    def _same_fallback(self, policy: Policy) -> bool:
        mine = self.policy
        return (mine.fallback_batch, mine.fallback_length) == (
            policy.fallback_batch,
            policy.fallback_length,
        )

    def _read_fallback(self, policy: Policy) -> None:
        sizes, lengths = policy.fallback_batch, policy.fallback_length
        require(len(sizes) == len(lengths), "fallback: one length per batch size")
        require(list(sizes) == sorted(sizes), "fallback_batch: must rise")
        require(max(sizes, default=0) <= MAX_BATCH_SIZE, f"fallback_batch: over {MAX_BATCH_SIZE}")
        self._fallback_batch = np.array(sizes, np.int64)
        self._fallback_length = np.array(lengths, np.int64)

    def survivals(self, batch: DecodeBatch) -> F32:
        """Survivals [max_length, B] of the present batch."""
        return self._survivals(batch, self._buckets(batch.features))

    def _survivals(self, batch: DecodeBatch, buckets: Any) -> F32:
        survivals: F32 = lengths.request_survivals(
            self.log_survival, buckets, self._corrections(batch)
        )
        return survivals

    def _buckets(self, features: F32) -> Any:
        """Buckets [B] of requests of these ``features`` [F, B]."""
        absent = np.zeros(features.shape[1], np.int64)  # an unknown feature reads 0
        if not self.rows:
            return absent
        columns = [absent if row is None else features[row] for row in self.rows]
        return lengths.bucket_index(self.edges, columns)

    def _corrections(self, batch: DecodeBatch) -> F32:
        ids = batch.request_ids
        if ids.tobytes() == self._roster_bytes:
            return self.correction
        at = align(self.roster, ids)
        correction = np.ones(len(ids), np.float32)
        correction[at >= 0] = self.correction[at[at >= 0]]
        return correction

    def rank(self, batch: DecodeBatch) -> Ranking | None:
        """The lengths of a batch for any prompts in its pass; None where a ladder does not do."""
        self._look_at(batch)
        if self._is_special(batch) or self._is_nimble(batch):
            self.choose(batch)  # while there is time: it is found again if nothing changes
            return None
        if self._ranking is None:
            self._ranking = Ranking(self._ladder_of(batch), *self._terms(batch))
        return self._ranking

    def level(self, batch: DecodeBatch, features: F32) -> Levels | None:
        """The lengths of a batch that is yet to find its drafts; None where `choose` is to do it.

        ``features`` : [F, V], values one of which each request will have
        """
        self._look_at(batch)
        if self._levels is None:
            value_of_time, depth, curves, draft = self._terms(batch)
            is_plain = len(curves) == 1 and curves[0].mode != UNIFORM and batch.floor is None
            is_small = batch.size * self.num_buckets <= MAX_POSSIBLE
            takes_more = self._is_special(batch) or self._is_nimble(batch)
            if not is_plain or not is_small or takes_more:
                return None
            self._levels = Levels(
                self.log_survival,
                self._corrections(batch),
                batch.weight,
                self.worth,
                int(batch.ceiling.max(initial=0)),
                value_of_time,
                depth,
                curves[0],
                draft,
            )
        self._levels.expect(self._buckets(features))
        return self._levels

    def choose(self, batch: DecodeBatch) -> Choice:
        """The lengths of greatest ``gain - value_of_time * T`` for the present batch."""
        choice = self._once(("policy", batch.num_prefill_tokens), self._choose, batch)
        assert choice is not None
        return choice

    def fallback(self, batch: DecodeBatch) -> Choice | None:
        """The learned length for a batch of this size; None when the policy brought no table."""
        return self._once(("fallback", 0), self._fall_back, batch)

    def _once(
        self,
        by: tuple[str, int],
        make: Callable[[DecodeBatch], Choice | None],
        batch: DecodeBatch,
    ) -> Choice | None:
        """What ``make`` makes of a batch; the last again where neither it nor ``by`` is new."""
        self._look_at(batch)
        if by != self._made:
            self._chosen, self._made = make(batch), by
            if self._chosen is not None:
                self._chosen.lengths.flags.writeable = False  # it may be given out again
        return self._chosen

    def _look_at(self, batch: DecodeBatch) -> None:
        """Forget what was found for the last batch, unless this one is equal."""
        # As bytes: compared at once, and an engine may use the same arrays for its next batch.
        columns = (
            batch.request_ids,
            batch.ceiling,
            batch.features,
            batch.weight,
            batch.floor,
            batch.token_time_target_s,
        )
        values = [column if column is None else column.tobytes() for column in columns]
        if values != self._columns:
            self._columns, self._made = values, None
            self._ladder, self._ranking, self._levels = None, None, None

    def _is_nimble(self, batch: DecodeBatch) -> bool:
        """Whether it is drafted for to the depth that is best for itself."""
        return is_nimble(batch.size, self.draft, self.policy.deepest)

    def _is_special(self, batch: DecodeBatch) -> bool:
        """Whether lengths take more than a ladder."""
        return self.policy.by_confidence or self._has_targets(batch)

    def _has_targets(self, batch: DecodeBatch) -> bool:
        return self.policy.meet_targets and batch.token_time_target_s is not None

    def _choose(self, batch: DecodeBatch) -> Choice:
        if self._has_targets(batch) and batch.token_time_target_s is not None:
            choice = choose_in_time(
                self.survivals(batch),
                batch.weight,
                batch.floor,
                batch.ceiling,
                batch.token_time_target_s,
                *self._terms(batch),
                batch.num_prefill_tokens,
            )
        elif self.policy.by_confidence:
            choice = self._by_confidence(batch)
        else:
            choice = steered(
                self._ladder_of(batch),
                *self._terms(batch),
                batch.num_prefill_tokens,
                self.policy.deepest,
            )
        return choice._replace(policy_seq=self.policy.seq)

    def _ladder_of(self, batch: DecodeBatch) -> Ladder:
        if self._ladder is None:  # other prompts in the pass leave it as it is
            buckets = self._buckets(batch.features)
            weight = lengths.request_weights(batch.weight, self.worth, buckets)
            survivals = self._survivals(batch, buckets)
            self._ladder = Ladder(survivals, weight, batch.floor, batch.ceiling.copy())
        return self._ladder

    def _terms(self, batch: DecodeBatch) -> tuple[float, int, list[CostCurve], DraftCost]:
        """By which lengths are chosen: value of time, depth, costs."""
        depth = min(self.policy.depth, self.policy.max_length)
        draft = self.draft
        if self._begins_at is not None and bool((batch.features[self._begins_at] >= 0.0).any()):
            draft = draft.begun()
        return self.value_of_time, depth, self.curves, draft

    def _by_confidence(self, batch: DecodeBatch) -> Choice:
        """The longest that the policy allows, and the prices by which they are stopped and cut."""
        most = min(self.policy.depth, self.policy.max_length)
        prices = Prices(
            self.value_of_time,
            tuple(self.curves),
            self.draft,
            batch.weight,
            batch.floor,
            batch.num_prefill_tokens,
        )
        return Choice(np.minimum(batch.ceiling, most).astype(np.int64), prices=prices)

    def with_probes(self, choice: Choice, batch: DecodeBatch) -> Choice:
        """``choice`` with the policy's probes put on the requests of the shortest lengths.

        Among equals they take turns, policy by policy: else the first in the batch got them all.
        """
        wanted = np.minimum(batch.ceiling, self.policy.probe_length)
        lengths = choice.lengths if choice.prices is None else choice.prices.floors(batch.size)
        able = np.flatnonzero(wanted > lengths)
        if not len(able):
            return choice
        # Probes come at a steady pace, so a turn counted by sequence numbers would skip some.
        turn = (self.policy.seq * 0x9E3779B1 & 0xFFFFFFFF) >> 16
        able = np.roll(able, -(turn % len(able)))
        shortest = able[np.argsort(lengths[able], kind="stable")[: self.policy.num_probes]]
        probing = lengths.copy()
        probing[shortest] = wanted[shortest]
        if choice.prices is not None:
            most = np.maximum(choice.lengths, probing)
            prices = choice.prices._replace(floor=probing)
            return choice._replace(lengths=most, prices=prices, source="probe")
        return choice._replace(lengths=probing, source="probe")

    def _fall_back(self, batch: DecodeBatch) -> Choice | None:
        if not len(self._fallback_batch):
            return None
        at = int(np.searchsorted(self._fallback_batch, batch.size, side="right")) - 1
        length = int(self._fallback_length[max(at, 0)])
        if batch.floor is not None:
            wanted = np.maximum(batch.floor, length)
        else:
            wanted = np.full(batch.size, length)
        return Choice.fixed(np.minimum(batch.ceiling, wanted).astype(np.int64), source="fallback")
