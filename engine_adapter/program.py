"""A policy made ready to run: decoded once when it arrives, applied at every step.

Checks everything that a daemon could get wrong, so that applying it cannot fail: the engine's
step depends on nothing but its own arrays.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from smartspec.engine_adapter import lengths
from smartspec.engine_adapter.base import F32, U64, DecodeBatch
from smartspec.engine_adapter.lengths import Choice, CostCurve, DraftCost, Ladder
from smartspec.engine_adapter.messages import MAX_LENGTH, Policy, align, require, unpack

MAX_BUCKETS = 4096
MAX_BREAKPOINTS = 4096


def _finite(value: float, name: str) -> float:
    require(np.isfinite(value) and value >= 0, f"{name}: {value}, expected a number >= 0")
    return value


class Program:
    """One policy, ready to choose lengths.

    Parameters
    ----------
    policy : as it came over the wire
    features : names of the rows of the engine's feature columns; an axis on a feature that the
        engine does not have reads 0 for all requests
    roster : request ids that the policy's corrections stand for, or None when not known any more

    Raises `messages.MessageError`.
    """

    def __init__(self, policy: Policy, features: tuple[str, ...], roster: U64 | None) -> None:
        self.policy = policy
        require(policy.max_length <= MAX_LENGTH, f"max_length: {policy.max_length} > {MAX_LENGTH}")
        require(policy.ttl_s > 0 and np.isfinite(policy.ttl_s), f"ttl_s: {policy.ttl_s}")
        self.value_of_time = _finite(policy.value_of_time, "value_of_time")
        self.draft = DraftCost(
            _finite(policy.draft_fixed_s, "draft_fixed_s"),
            _finite(policy.draft_per_forward_s, "draft_per_forward_s"),
            _finite(policy.draft_per_token_s, "draft_per_token_s"),
        )
        require(len(policy.curves) > 0, "curves: none given")
        self.curves = []
        for curve in policy.curves:
            size = len(curve.num_tokens) // 4
            require(1 <= size <= MAX_BREAKPOINTS, f"curves: {size} breakpoints")
            num_tokens = unpack(curve.num_tokens, "f32", (size,), "num_tokens").astype(np.float64)
            seconds = unpack(curve.seconds, "f32", (size,), "seconds").astype(np.float64)
            require(bool((np.diff(num_tokens) > 0).all()), "curves: num_tokens must rise")
            require(bool((seconds >= 0).all()), "curves: seconds must be >= 0")
            self.curves.append(CostCurve(curve.mode, num_tokens, seconds))

        require(all(list(a.edges) == sorted(a.edges) for a in policy.axes), "axes: edges must rise")
        self.edges = [np.array(axis.edges, np.float64) for axis in policy.axes]
        self.rows = [
            features.index(axis.feature) if axis.feature in features else None
            for axis in policy.axes
        ]
        num_buckets = 1
        for edges in self.edges:
            num_buckets *= len(edges) + 1
            require(num_buckets <= MAX_BUCKETS, f"axes: more than {MAX_BUCKETS} buckets")
        self.log_survival = unpack(
            policy.log_survival, "f32", (num_buckets, policy.max_length), "log_survival"
        )
        require(bool((self.log_survival <= 0).all()), "log_survival: must be <= 0")
        require(
            bool((np.diff(self.log_survival, axis=1) <= 0).all()),
            "log_survival: must not rise with depth",
        )

        self.roster: U64 = np.empty(0, np.uint64)
        self.correction: F32 = np.empty(0, np.float32)
        if roster is not None and policy.correction:
            self.correction = unpack(policy.correction, "f32", (len(roster),), "correction")
            require(bool((self.correction >= 0).all()), "correction: must be >= 0")
            self.roster = roster

        sizes, fallback = policy.fallback_batch, policy.fallback_length
        require(len(sizes) == len(fallback), "fallback: one length per batch size")
        require(list(sizes) == sorted(sizes), "fallback_batch: must rise")
        self._fallback_batch = np.array(sizes, np.int64)
        self._fallback_length = np.array(fallback, np.int64)

    def survivals(self, batch: DecodeBatch) -> npt.NDArray[np.float64]:
        """Survivals [B, max_length] of the present batch."""
        zeros = np.zeros(batch.size, np.float32)
        columns = [zeros if row is None else batch.features[row] for row in self.rows]
        buckets = lengths.bucket_index(self.edges, columns)
        if len(buckets) != batch.size:
            buckets = np.zeros(batch.size, np.int64)
        return lengths.request_survivals(self.log_survival, buckets, self._corrections(batch))

    def _corrections(self, batch: DecodeBatch) -> F32:
        ids = batch.request_ids
        if ids is self.roster or np.array_equal(ids, self.roster):
            return self.correction
        at = align(self.roster, ids)
        correction = np.ones(len(ids), np.float32)
        correction[at >= 0] = self.correction[at[at >= 0]]
        return correction

    def choose(self, batch: DecodeBatch) -> Choice:
        """The lengths of greatest ``gain - value_of_time * T`` for the present batch."""
        ladder = Ladder(self.survivals(batch), batch.weight, batch.floor, batch.ceiling)
        return lengths.choose_lengths(
            ladder,
            self.value_of_time,
            min(self.policy.depth, ladder.max_length),
            self.curves,
            self.draft,
            batch.num_prefill_tokens,
        )

    def with_probes(self, choice: Choice, batch: DecodeBatch) -> Choice:
        """``choice`` with the policy's probes put on the requests of the shortest lengths."""
        wanted = np.minimum(batch.ceiling, self.policy.probe_length)
        able = np.flatnonzero(wanted > choice.lengths)
        if not len(able):
            return choice
        shortest = able[np.argsort(choice.lengths[able], kind="stable")[: self.policy.num_probes]]
        probing = choice.lengths.copy()
        probing[shortest] = wanted[shortest]
        return choice._replace(lengths=probing, source="probe")

    def fallback(self, batch: DecodeBatch) -> Choice | None:
        """The learned length for a batch of this size; None when the policy brought no table."""
        at = int(np.searchsorted(self._fallback_batch, batch.size, side="right")) - 1
        if not len(self._fallback_batch):
            return None
        length = int(self._fallback_length[max(at, 0)])
        return Choice.fixed(np.minimum(batch.ceiling, length).astype(np.int64), source="fallback")
