"""One connected engine: who it is, who is in its batch, and what has been learned about it.

Everything that an engine sends is checked here, before anything is learned from it: a report is
either taken whole or refused whole, with the field's name.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from smartspec.daemon.state.learned import MAX_GRAPH_SIZES, Learned, ModelKey
from smartspec.engine_adapter.lengths import I64, RAGGED, UNIFORM, DraftCost, bucket_index
from smartspec.engine_adapter.messages import (
    FEATURE_DRAFT_CONFIDENCE,
    MAX_BATCH,
    MAX_BUCKETS,
    MAX_LENGTH,
    MAX_STEP_S,
    NOT_RUN,
    SOURCES,
    STEERED,
    Hello,
    MessageError,
    Roster,
    StepReport,
    align,
    bits,
    require,
    unpack,
)
from smartspec.estimators.acceptance import AcceptanceEstimator
from smartspec.estimators.request_rows import Rows
from smartspec.estimators.step_cost import StepCost, StepShape
from smartspec.estimators.tree_acceptance import TreeAcceptance

U8 = npt.NDArray[np.uint8]
MAX_TOKENS = 1 << 28  #: no step has more of anything
MAX_PASS_TOKENS = 1 << 22  #: nor more of prompts: cost curves travel as f32, exact to 2^24
MAX_NAMES = 64  #: features, or execution modes
MIN_STEP_S = 1e-6
MOST_MISSED = 1 << 32  #: steps between two reports
MAX_DRAFTS = 1 << 16  #: of a batch: more would take too long to decide for
WEIGHTS = (1e-6, 1e6)  #: of requests
MOST = {
    "num_prefill_tokens": MAX_PASS_TOKENS,
    "context_tokens": MAX_TOKENS,
    "num_draft_forwards": MAX_TOKENS,
    "num_draft_tokens": MAX_TOKENS,
    "num_catch_up_tokens": MAX_TOKENS,
    "num_waiting": MAX_TOKENS,
}
POLICIES_KEPT = 64  #: to tell how late a report's policy was


class RosterGap(MessageError):
    """The report refers to a roster that never arrived."""


class OutOfOrder(MessageError):
    """The report came twice, or after a later one: the network's doing, and no lie."""


class Batch(NamedTuple):
    """Who was in a step; the same object for all reports of one roster."""

    version: int
    ids: npt.NDArray[np.uint64]  #: [B]
    weight: npt.NDArray[np.float32] | None
    floor: U8 | None
    target: npt.NDArray[np.float32] | None  #: seconds per token, 0: any; None: all 0


class Observation(NamedTuple):
    """A report that has passed all checks, as arrays."""

    report: StepReport
    batch: Batch
    num_drafted: U8  #: [B]
    num_drafts: int  #: their sum
    num_accepted: U8  #: [B]
    #: for the estimator: `num_accepted`, and what is told of drafts that were cut; of trees ranks,
    #: [B, K] bools
    accepted: npt.NDArray[Any]
    num_learned: U8  #: [B], for the estimator: drafts that were verified or are told of
    num_available: U8  #: [B]
    emitted: U8  #: [B]
    num_emitted: int  #: their sum
    buckets: I64  #: [B]
    blind_buckets: I64 | None  #: [B], had no first draft been run; None: they never are
    has_begun: bool  #: some first drafts were
    #: [B], bucket of the step before where there were drafts to be had and none was rejected, or
    #: -1; -1 for all where nothing is learned from it
    behind: I64
    staleness_steps: int | None  #: steps between the report that its policy knew and this one

    @property
    def weighted_tokens(self) -> float:
        """Tokens emitted, by the requests' weights: what goodput counts."""
        if self.batch.weight is None:
            return float(self.num_emitted)
        return float(self.batch.weight @ self.emitted.astype(np.float64))

    @property
    def drafted_any(self) -> bool:
        return self.num_drafts > 0


def nobody(key: ModelKey) -> Learned | None:
    """Lends nothing: an engine that nobody knows starts cold."""
    return None


class Numbering:
    """Numbers of policies, which rise over all engines for as long as the daemon lives.

    An engine that was forgotten and returns may still hold policies of ours: to it, a number that
    began anew would be stale.
    """

    def __init__(self) -> None:
        self.last = 0

    def next(self) -> int:
        self.last += 1
        return self.last


class Engine:
    """State of one engine epoch.

    Parameters
    ----------
    hello : its introduction
    previous : the same engine before its restart; what it learned is kept when the key (the
        fingerprint, and the limits that shape the models) is the same
    lend : asked for models of their own to start from when it is not
    numbering : of policies; None: its own

    Raises `MessageError` when the introduction contradicts itself.
    """

    learned: Learned
    num_unsaved: int  #: steps learned since checkpoints were last taken
    num_reports: int
    last_seq: int
    policy_seq: int

    def __init__(
        self,
        hello: Hello,
        previous: Engine | None = None,
        lend: Callable[[ModelKey], Learned | None] = nobody,
        numbering: Numbering | None = None,
    ) -> None:
        _check_hello(hello)
        limits = hello.limits
        self.hello = hello
        self.name = hello.engine
        self.max_length = limits.max_length
        self.modes = sorted(limits.modes, key=lambda mode: mode == UNIFORM)  #: uniform last
        self.key = ModelKey.of(hello)
        self.axes = self.key.axes
        self._edges = [np.array(axis.edges, np.float32) for axis in self.axes]
        self._feature_rows = [limits.features.index(axis.feature) for axis in self.axes]
        chains_of_a_model = not limits.drafts_known_first and not limits.trees
        self._first_draft_row: int | None = None
        if chains_of_a_model and FEATURE_DRAFT_CONFIDENCE in limits.features:
            self._first_draft_row = limits.features.index(FEATURE_DRAFT_CONFIDENCE)
        if previous is not None and previous.key == self.key:
            self.learned = previous.learned
            self.learned.acceptance.forget_requests()
            self.num_unsaved = previous.num_unsaved
        else:
            self.learned = lend(self.key) or Learned.new(self.key)
            self.num_unsaved = 0
        self.acceptance: AcceptanceEstimator = self.learned.acceptance
        self.step_cost: StepCost = self.learned.step_cost
        self.is_warm = self.learned.is_warm  #: at its start

        self.batch: Batch | None = None
        self._rows_batch: Batch | None = None
        self._rows: Rows = np.zeros(0, np.intp)
        self.last: Observation | None = None
        self.last_bucket: I64 = np.zeros(0, np.int64)  #: [B], of the newest drafts there were
        self.most_prefill_tokens = 0  #: in one step, so far
        # An engine that was lost and returns in the same epoch goes on counting.
        returns = previous is not None and previous.hello.epoch == hello.epoch
        self.last_seq = previous.last_seq if previous is not None and returns else 0
        self.num_reports = 0
        self.num_missed = 0  #: steps that no report told of
        self.num_repeated = 0  #: reports that came twice or out of order
        self.num_refused = 0  #: reports that could not be believed
        self.num_throttled = 0  #: reports that were one too many to be read
        self.num_dropped = 0  #: reports that it could not send, as it says itself
        self._numbering = numbering or Numbering()
        self.policy_seq = self._numbering.last  #: of the policy last made; before: lower than any
        self._report_of_policy: OrderedDict[int, int] = OrderedDict()

    # -- reports --------------------------------------------------------------------------------

    def observe(self, report: StepReport) -> Observation:
        """Check a report and take over its batch and load; raises `MessageError`.

        Learns nothing yet: that is `learn`, after the policy has gone out.
        """
        require(report.epoch == self.hello.epoch, "epoch: not the one of this engine's Hello")
        if report.seq <= self.last_seq:
            self.num_repeated += 1
            raise OutOfOrder(f"seq: {report.seq} after {self.last_seq}")
        missed = report.seq - self.last_seq - 1
        if self.last_seq:
            require(missed <= MOST_MISSED, f"seq: {report.seq} after {self.last_seq}")
        batch = self._batch_of(report)
        observation = self._check(report, batch)
        if self.last_seq:  # what went before the first report was not missed, but not sent to us
            self.num_missed += missed
        self.last_seq = report.seq
        self.num_reports += 1
        self.num_dropped = report.num_dropped
        self._follow(observation)
        return observation

    def _batch_of(self, report: StepReport) -> Batch:
        roster = report.roster
        if roster is None or (self.batch is not None and self.batch.version == roster.version):
            if self.batch is None or self.batch.version != report.roster_version:
                raise RosterGap(f"roster_version: {report.roster_version} was never received")
            return self.batch
        require(roster.version == report.roster_version, "roster.version: not roster_version")
        return _read_roster(roster, self.hello.limits.max_num_running)

    def _check(self, report: StepReport, batch: Batch) -> Observation:
        _check_seconds(report)
        report = _in_known_words(report)
        for name, most in MOST.items():
            count = getattr(report, name)
            require(count <= most, f"{name}: {count}, at most {most} can be true")
        size = (len(batch.ids),)
        drafted = unpack(report.num_drafted, "u8", size, "num_drafted", 0)
        accepted = unpack(report.num_accepted, "u8", size, "num_accepted", 0)
        emitted = unpack(report.num_emitted, "u8", size, "num_emitted", 1)
        available = unpack(report.num_available, "u8", size, "num_available", self.max_length)
        require(bool((accepted <= drafted).all()), "num_accepted: more than drafted")
        longest = max(report.num_drafted, default=0)  # of bytes: an array takes longer
        require(longest <= self.max_length, "num_drafted: over limits.max_length")
        require(bool((emitted <= accepted + 1).all()), "num_emitted: more than accepted + 1")
        outcome, told = self._outcome(report, drafted, accepted)
        names = self.hello.limits.features
        features = unpack(report.features, "f32", (len(names), *size), "features", 0.0)
        buckets, blind, has_begun = self._buckets(features), None, False
        if self._first_draft_row is not None:
            has_begun = bool((features[self._first_draft_row] >= 0.0).any())
            blind = buckets
            if has_begun:
                unseen = features.copy()
                unseen[self._first_draft_row] = NOT_RUN
                blind = self._buckets(unseen)
        known = self._report_of_policy.get(report.policy_seq)
        staleness = None if known is None else report.seq - known
        return Observation(
            report,
            batch,
            drafted,
            sum(report.num_drafted),
            accepted,
            outcome,
            told,
            available,
            emitted,
            int(emitted.sum()),
            buckets,
            blind,
            has_begun,
            self._behind(report, batch),
            staleness,
        )

    def _behind(self, report: StepReport, batch: Batch) -> I64:
        """Bucket of the step before [B], where there were drafts and none was rejected; else -1."""
        last = self.last
        is_wanted = self.learned.continuation.is_kept and not self.key.trees
        if not is_wanted or last is None or report.seq != last.report.seq + 1:
            return np.full(len(batch.ids), -1)
        whole = (last.num_accepted == last.num_drafted) & (last.num_available > 0)
        behind = np.where(whole, last.buckets, -1)
        if last.batch is batch:
            return behind
        return np.append(behind, -1)[align(last.batch.ids, batch.ids)]

    def _buckets(self, features: npt.NDArray[np.float32]) -> I64:
        if not self.axes:
            return np.zeros(features.shape[1], np.int64)
        return bucket_index(self._edges, [features[row] for row in self._feature_rows])

    def _outcome(
        self, report: StepReport, drafted: U8, accepted: U8
    ) -> tuple[npt.NDArray[Any], U8]:
        """What the estimator learns from: (accepted, drafted).

        Drafts that were cut for want of confidence are not verified. To learn of the others alone
        would take those that drafters are sure of for all. So they count as the engine tells that
        they would have turned out; of a chain unless one before them was rejected: then they are
        not reached.
        """
        most, passed, whole = drafted, np.zeros(len(drafted), np.uint8), accepted
        if report.num_cut:
            cut = unpack(report.num_cut, "u8", drafted.shape, "num_cut")
            passed = unpack(report.num_cut_accepted, "u8", drafted.shape, "num_cut_accepted", 0)
            told = drafted.astype(np.int64) + cut
            require(bool((told <= self.max_length).all()), "num_cut: over limits.max_length")
            require(bool((passed <= cut).all()), "num_cut_accepted: more than cut")
            most = told.astype(np.uint8)
            whole = np.where(accepted == drafted, accepted + passed, accepted)
        if self.key.trees:
            return self._accepted_ranks(report, drafted, accepted, most, passed), most
        return whole, most

    def _accepted_ranks(
        self, report: StepReport, drafted: U8, accepted: U8, most: U8, passed: U8
    ) -> npt.NDArray[np.bool_]:
        """[B, max_length], of ``most`` ranks: those verified, and behind them those cut."""
        column = unpack(report.accepted_ranks, "u64", drafted.shape, "accepted_ranks", 0)
        ranks, rank = bits(column), np.arange(MAX_LENGTH)
        beyond = ranks & (rank >= most[:, None])
        require(not beyond.any(), "accepted_ranks: one that was not drafted")
        verified = (ranks & (rank < drafted[:, None])).sum(1)
        require(bool((verified == accepted).all()), "accepted_ranks: not num_accepted of them")
        if report.num_cut:
            cut_accepted = ranks.sum(1) - verified
            require(bool((cut_accepted == passed).all()), "accepted_ranks: not num_cut_accepted")
        return ranks[:, : self.max_length]

    def _follow(self, observation: Observation) -> None:
        batch = observation.batch
        fresh = observation.buckets
        if batch is not self.batch:
            old = self.last_bucket
            at = np.full(len(batch.ids), -1)
            if self.batch is not None:
                at = align(self.batch.ids, batch.ids)
            self.last_bucket = np.where(at >= 0, old[at], fresh) if len(old) else fresh.copy()
            self.batch = batch
        if self.hello.limits.drafts_known_first:
            # Without a match the features say nothing about the next match.
            self.last_bucket = np.where(observation.num_available > 0, fresh, self.last_bucket)
        else:
            self.last_bucket = fresh
        self.most_prefill_tokens = max(
            self.most_prefill_tokens, observation.report.num_prefill_tokens
        )
        self.last = observation

    def rows(self, batch: Batch) -> Rows:
        """The estimator's rows of a batch's requests; looked up once per roster."""
        if batch is not self._rows_batch:
            self._rows_batch = batch
            self._rows = self.acceptance.rows(batch.ids)
        return self._rows

    # -- learning -------------------------------------------------------------------------------

    def learn(self, observation: Observation) -> float | None:
        """Take a step into both models; returns the seconds that were predicted for it."""
        report, batch = observation.report, observation.batch
        drafted = observation.num_drafted
        self.num_unsaved += 1
        self.learned.num_steps += 1
        self.learned.num_steered += report.source in STEERED
        if len(batch.ids):
            rows = self.rows(batch)
            if self.hello.limits.drafts_known_first:
                self.acceptance.learn_presence(rows, observation.num_available > 0)
            if observation.drafted_any or report.num_cut:  # else it would learn nothing
                columns = observation.buckets, observation.num_learned, observation.accepted
                self.acceptance.learn_many(rows, *columns)
            able = observation.num_available > 0
            self.learned.continuation.note(observation.buckets, able, observation.behind)
        num_draft_tokens = report.num_draft_tokens
        if self.hello.limits.drafts_known_first or self.key.trees:
            # Found, or grown beside others; but whatever they cost must be seen as theirs.
            num_draft_tokens = max(num_draft_tokens, observation.num_drafts)
        if isinstance(self.acceptance, TreeAcceptance):
            num_nodes = int(drafted.max(initial=0))
            self.acceptance.learn_forwards(num_nodes, report.num_draft_forwards)
        size, num_drafts = len(batch.ids), observation.num_drafts
        if report.mode == UNIFORM:  # as many are computed for all as for the longest
            num_drafts = size * int(drafted.max(initial=0))
        shape = StepShape(
            batch=size,
            verify_tokens=size + num_drafts,
            prefill_tokens=report.num_prefill_tokens,
            context_tokens=report.context_tokens,
            draft_forwards=self._forwards_beyond(report.num_draft_forwards),
            draft_tokens=num_draft_tokens,
            catch_up_tokens=report.num_catch_up_tokens,
            ragged=float(self.is_dear(report.mode)),
        )
        if not len(batch.ids) and not report.num_prefill_tokens:
            return None
        residual = self.step_cost.observe(shape, report.target_s, report.draft_s, report.step_s)
        return float(residual.predicted_s)

    def _forwards_beyond(self, count: float) -> float:
        """Of ``count`` forwards those that would not be run if nothing were drafted.

        One that always is counts as a part of the step: were it told as a cost of drafting nothing,
        length 0 would look cheaper than it is, and length 1 dearer.
        """
        return max(count - 1.0, 0.0) if self.key.keeps_up else count

    def draft_cost(self) -> DraftCost:
        """What drafting costs, as far as it is known."""
        forwards = self.acceptance.forwards()
        if self.key.keeps_up:
            by_depth = forwards or range(1, self.max_length + 1)
            forwards = tuple(map(self._forwards_beyond, by_depth))
        cost = DraftCost(*self.step_cost.draft_cost(), forwards)
        return cost._replace(per_catch_up_s=self.step_cost.catch_up_cost())

    def is_dear(self, mode: str) -> bool:
        """Whether a step in this mode is ragged where the engine could have run it uniform."""
        return mode == RAGGED and UNIFORM in self.hello.limits.modes

    # -- policies -------------------------------------------------------------------------------

    def next_policy_seq(self, report_seq: int) -> int:
        self.policy_seq = self._numbering.next()
        self.confirm_policy(self.policy_seq, report_seq)
        if len(self._report_of_policy) > POLICIES_KEPT:
            self._report_of_policy.popitem(last=False)
        return self.policy_seq

    def confirm_policy(self, policy_seq: int, report_seq: int) -> None:
        """Note that a policy is right for what ``report_seq`` told."""
        self._report_of_policy[policy_seq] = report_seq


def _check_hello(hello: Hello) -> None:
    limits = hello.limits
    require(
        bool(hello.engine) and hello.engine.isprintable(),
        f"engine: {hello.engine!r}, expected 1 to 256 printable characters",
    )
    require(
        limits.static_length <= limits.max_length,
        f"limits.static_length: {limits.static_length} is over limits.max_length",
    )
    require(
        limits.max_num_running * limits.max_length <= MAX_DRAFTS,
        f"limits: {limits.max_num_running} requests of {limits.max_length} drafts each, at most "
        f"{MAX_DRAFTS} drafts can be decided for in time",
    )
    sizes = limits.graph_sizes
    require(len(sizes) <= MAX_GRAPH_SIZES, f"limits.graph_sizes: more than {MAX_GRAPH_SIZES}")
    require(
        all(a < b for a, b in pairwise((0, *sizes)))
        and (not sizes or sizes[-1] <= MAX_PASS_TOKENS),
        f"limits.graph_sizes: must rise, from at least 1 to at most {MAX_PASS_TOKENS}",
    )
    for name in ("modes", "features"):
        given = getattr(limits, name)
        require(len(given) <= MAX_NAMES, f"limits.{name}: more than {MAX_NAMES}")
        require(len(set(given)) == len(given), f"limits.{name}: named twice")
    require(len(limits.modes) > 0, "limits.modes: at least one is needed")
    num_buckets = ModelKey.of(hello).num_buckets
    require(
        num_buckets <= MAX_BUCKETS,
        f"limits.features: together they make {num_buckets} buckets, at most {MAX_BUCKETS}",
    )
    for mode in limits.modes:
        require(mode in (RAGGED, UNIFORM), f"limits.modes: {mode!r}, expected ragged or uniform")


def _read_roster(roster: Roster, max_num_running: int) -> Batch:
    size, rest = divmod(len(roster.request_ids), 8)
    require(rest == 0, f"request_ids: {len(roster.request_ids)} bytes, expected 8 per request")
    allowed = min(MAX_BATCH, max_num_running)
    require(size <= allowed, f"request_ids: {size} requests, at most {allowed} were announced")
    ids = unpack(roster.request_ids, "u64", (size,), "request_ids")
    require(len(set(ids.tolist())) == size, "request_ids: not unique")
    weight: Any = None
    if roster.weight:
        weight = unpack(roster.weight, "f32", (size,), "weight")
        low, high = WEIGHTS
        is_within = bool(((weight >= low) & (weight <= high)).all())
        require(is_within, f"weight: must be in [{low:g}, {high:g}]")
    floor = unpack(roster.floor, "u8", (size,), "floor") if roster.floor else None
    target: Any = None
    if roster.token_time_target_s:
        target = unpack(roster.token_time_target_s, "f32", (size,), "token_time_target_s", low=0.0)
    return Batch(roster.version, ids, weight, floor, target)


def _in_known_words(report: StepReport) -> StepReport:
    """A source or mode that is unknown here, as of a newer engine, is taken for the plainest.

    They become labels of metrics: of any text there would be no end of those.
    """
    source = report.source if report.source in SOURCES else "own"
    mode = report.mode if report.mode in (RAGGED, UNIFORM) else RAGGED
    if (source, mode) == (report.source, report.mode):
        return report
    return msgspec.structs.replace(report, source=source, mode=mode)


def _check_seconds(report: StepReport) -> None:
    for name in ("step_s", "target_s", "draft_s"):
        value = getattr(report, name)
        if value is None:
            continue
        if not 0 <= value <= MAX_STEP_S:  # refuses NaN too
            raise MessageError(f"{name}: {value}, expected 0 to {MAX_STEP_S:.0f} seconds")
    took_s = report.step_s
    require(took_s >= MIN_STEP_S, f"step_s: {took_s}, a step takes at least {MIN_STEP_S:g} s")
    parts = (report.target_s or 0.0) + (report.draft_s or 0.0)
    require(parts <= report.step_s * 1.001 + 1e-6, "target_s + draft_s: more than step_s")
    require(0 <= report.kv_usage <= 1.0, f"kv_usage: {report.kv_usage}, expected 0 to 1")
