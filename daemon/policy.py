"""From what is known of an engine to its next policy, with the reason in words. Does no I/O."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple, TypedDict

import numpy as np
import numpy.typing as npt

from smartspec.daemon import goodput
from smartspec.daemon.engines import STEERED, Engine, Observation
from smartspec.daemon.goodput import Optimum
from smartspec.daemon.probing import Prober
from smartspec.engine_adapter.lengths import (
    F64,
    I64,
    RAGGED,
    UNIFORM,
    CostCurve,
    DraftCost,
    Ladder,
    choose_lengths,
    request_survivals,
    step_seconds,
)
from smartspec.engine_adapter.messages import Curve, Policy, pack
from smartspec.engine_adapter.targets import expected_tokens, out_of_reach
from smartspec.estimators.step_cost import StepShape

TABLE_EVERY = 8  #: decisions between two acceptance tables; what is the same is not read anew
YOUNG = 200  #: decisions in which the table is still moving fast
FALLBACK_EVERY = 50  #: decisions between two fallback tables: it changes slowly
TOLD_EVERY = 16  #: decisions between two policies at most, whether or not anything has changed
WORTH_TELLING = 0.005  #: share of goodput by which the policy in force must fall short
#: Share by which the value of time must have moved, where drafts are chosen by confidence: what
#: that costs grows with its square.
VALUE_WORTH_TELLING = 0.02


RELEASE_TTL_S = 1e-9  #: of a policy that has expired by the time it is looked at


class Arm(enum.StrEnum):
    """What an engine can be made to run, so that goodputs can be compared."""

    SMARTSPEC = "smartspec"  #: the lengths of greatest goodput
    OWN = "own"  #: its own configuration, whatever that is
    NONE = "none"  #: no speculation


class Expected(NamedTuple):
    """What a step should bring."""

    tokens: float  #: weighted
    seconds: float

    @property
    def goodput(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True, slots=True)
class Decision:
    """A policy and what was expected of it and of the alternatives."""

    policy: Policy
    lengths: I64  #: [B], what it means for the batch last reported
    chosen: Expected
    none: Expected  #: length 0 for all
    static: Callable[[], Expected]  #: the engine's own length for all; worked out when asked
    gain_std: Callable[[], dict[Arm, float]]  #: of log(goodput / alternative's), as models know it
    mode: str = RAGGED  #: execution mode chosen
    num_targets: int = 0  #: requests that ask for a time per token
    num_out_of_reach: int = 0  #: of these, who cannot have it
    is_news: bool = True  #: False: the policy in force does as well, and need not be sent
    arm: Arm = Arm.SMARTSPEC
    is_comparable: bool = True  #: False: lengths are bent by targets, or the models being seeded
    prompts: float = 0.0  #: tokens that the seconds of the step's prompts would be worth

    @property
    def goodput(self) -> float:
        return self.chosen.goodput

    def compared(self) -> dict[Arm, float]:
        """Tokens per second of each arm, the prompts that a step takes along counted.

        At what their seconds are worth (docs/adr/0005-price-of-time.md): by tokens of answers alone
        long drafts look good that keep prompts waiting.
        """
        arms = {Arm.SMARTSPEC: self.chosen, Arm.NONE: self.none, Arm.OWN: self.static()}
        return {arm: (one.tokens + self.prompts) / one.seconds for arm, one in arms.items()}


class PlannerSettings(TypedDict):
    """What an operator may change while a planner works."""

    ttl_s: float
    fallback_s: float
    probe_share: float
    meet_targets: bool


class Planner:
    """Decides for one engine.

    Parameters
    ----------
    engine : state and estimates to decide by
    ttl_s, fallback_s : how long policies hold without a word from the daemon, and their
        fallback table after that
    probe_share : share of goodput that probing may cost
    seed_sweep : try every length at the first start
    meet_targets : whether requests' token time targets are kept
    """

    def __init__(
        self,
        engine: Engine,
        *,
        daemon_epoch: int,
        ttl_s: float = 1.0,
        fallback_s: float = 60.0,
        probe_share: float = 0.005,
        seed_sweep: bool = True,
        meet_targets: bool = True,
    ) -> None:
        self.engine = engine
        self.prober = Prober(engine.max_length, probe_share, seed_sweep and not engine.is_warm)
        self._daemon_epoch = daemon_epoch
        self._ttl_s = ttl_s
        self._fallback_s = fallback_s
        self._meet_targets = meet_targets
        self._fallback: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
        self._table: npt.NDArray[np.float32] | None = None
        self._told_roster: int | None = None  #: of the last policy that was news
        self._told_value = 0.0  #: of time, by the same
        self._num_untold = 0
        self._num_decisions = 0
        self._arm = Arm.SMARTSPEC
        self._arm_after = 0  #: policies after this one are of the arm

    def adjust(
        self, *, ttl_s: float, fallback_s: float, probe_share: float, meet_targets: bool
    ) -> None:
        """Go on with other settings, told to the engine by the next policy."""
        self._ttl_s = ttl_s
        self._fallback_s = fallback_s
        self._meet_targets = meet_targets
        self.prober.share = probe_share
        self._told_roster = None

    def decide(self, arm: Arm = Arm.SMARTSPEC) -> Decision | None:
        """The policy for what the engine last reported; None before it decodes anything.

        What is predicted is that of SmartSpec whatever the ``arm`` that the engine is to run.
        """
        engine, observation = self.engine, self.engine.last
        if observation is None or engine.max_length == 0 or not len(observation.batch.ids):
            return None
        if arm is not self._arm:
            self._arm, self._arm_after = arm, engine.policy_seq
        steering = arm is Arm.SMARTSPEC
        batch = observation.batch
        rows = engine.rows(batch)
        fresh = self._num_decisions < YOUNG or self._num_decisions % TABLE_EVERY == 0
        if self._table is None or fresh:
            self._table = np.ascontiguousarray(engine.acceptance.log_survival().T)
        table = self._table
        correction = engine.acceptance.corrections(rows)
        known_first = engine.hello.limits.drafts_known_first
        survival = request_survivals(table, engine.last_bucket, correction)
        presence = engine.acceptance.presence(rows) if known_first else None
        available = None if known_first else observation.num_available
        ladder = Ladder(survival, batch.weight, batch.floor, available, presence)
        shape = StepShape(
            batch=len(batch.ids),
            verify_tokens=len(batch.ids),
            prefill_tokens=observation.report.num_prefill_tokens,
            context_tokens=observation.report.context_tokens,
        )
        curves = self._curves(shape)
        draft = engine.draft_cost()
        # Prompts come in rows: what the last step carried is the best guess for the next.
        other = observation.report.num_prefill_tokens
        beside_s = engine.step_cost.prefill_cost() * other
        optimum = goodput.solve(ladder, curves, draft)
        chosen_s = optimum.choice.seconds
        if other:
            # What a second is worth the batch shows alone (docs/adr/0005-price-of-time.md).
            optimum = goodput.at_price(ladder, optimum.value_of_time, curves, draft, other)
            chosen_s = optimum.choice.seconds + beside_s
            optimum = optimum._replace(goodput=optimum.choice.gain / chosen_s)
        chosen = Expected(optimum.choice.gain, chosen_s)
        even = curves[-1]  # of single lengths, such as 0
        alone_s, none_s = even.at((ladder.size, ladder.size + other)).tolist()
        none = Expected(ladder.weight_sum, none_s + beside_s)
        prompts = optimum.value_of_time * max(none.seconds - alone_s, 0.0)
        probe_length = num_probes = 0
        if steering:
            probe_length, num_probes = self.prober.plan(
                engine, optimum, ladder, curves[0], draft, other
            )
        every = FALLBACK_EVERY if self._num_decisions >= YOUNG else FALLBACK_EVERY // 5
        if self._num_decisions and self._num_decisions % every == 0:
            self._fallback = self._fallback_table(ladder, even, draft)
        self._num_decisions += 1
        sweep_length = self.prober.sweep_length(observation) if steering else None
        # Targets bind a step as a whole, which is not known before it is drafted.
        wanted = self._meet_targets and batch.target is not None
        by_confidence = engine.hello.limits.confidences and steering and sweep_length is None
        by_confidence = by_confidence and not wanted
        reason = self._reason(optimum, none.goodput, num_probes, probe_length, by_confidence)
        num_targets = num_out_of_reach = 0
        if self._meet_targets and batch.target is not None:
            tokens = expected_tokens(survival if presence is None else survival * presence)
            missed = out_of_reach(batch.target, tokens, curves[0], draft, other)
            num_targets, num_out_of_reach = int((batch.target > 0).sum()), int(missed.sum())
            reason += f"; {num_targets} with a target"
            if num_out_of_reach:
                reason += f", {num_out_of_reach} of them out of reach"
        value_of_time, depth = optimum.value_of_time, optimum.depth
        if by_confidence:
            depth = engine.max_length
        elif sweep_length is not None:
            # At no value of time every request takes all that the depth allows.
            value_of_time, depth = 0.0, sweep_length
            reason = f"{len(batch.ids)} running: seed sweep, length {sweep_length} for all"
        is_news = True
        binding = num_targets > num_out_of_reach  # targets bend the engine's choice, not ours
        if arm is Arm.NONE:
            depth = 0
            reason += "; for comparison: no speculation"
            is_news = not self._may_keep()
        elif arm is Arm.OWN:
            reason += "; not steered: the engine's own setting"
            # Told again only where that did not arrive: its own arrival makes it look alive.
            waiting = observation.report.policy_seq <= self._arm_after
            is_news = observation.report.source != "own" and waiting
        elif by_confidence and not num_probes and self._may_keep():
            moved = abs(value_of_time - self._told_value)
            is_news = moved > VALUE_WORTH_TELLING * self._told_value
        elif sweep_length is None and not num_probes and not binding and self._may_keep():
            if presence is not None:  # of what this step could draft
                ladder = Ladder(survival, batch.weight, batch.floor, observation.num_available)
            is_news = not _did_as_well(observation, ladder, optimum, curves, draft)
        if is_news:
            seq = engine.next_policy_seq(observation.report.seq)
            self._told_roster = batch.version
            self._told_value = value_of_time
            self._num_untold = 0
        else:
            seq = engine.policy_seq
            engine.confirm_policy(seq, observation.report.seq)
            self._num_untold += 1
        policy = Policy(
            epoch=engine.hello.epoch,
            daemon_epoch=self._daemon_epoch,
            seq=seq,
            report_seq=observation.report.seq,
            ttl_s=self._ttl_s,
            value_of_time=value_of_time,
            depth=depth,
            curves=tuple(
                Curve(mode=curve.mode, num_tokens=curve.num_tokens, seconds=curve.seconds)
                for curve in curves
            ),
            max_length=len(table),
            log_survival=pack(table, "f32"),
            axes=engine.axes,
            draft_fixed_s=draft.fixed_s,
            draft_per_forward_s=draft.per_forward_s,
            draft_per_token_s=draft.per_token_s,
            draft_forwards=draft.forwards,
            roster_version=batch.version,
            correction=pack(correction, "f32"),
            probe_length=probe_length,
            num_probes=num_probes,
            fallback_batch=self._fallback[0],
            fallback_length=self._fallback[1],
            fallback_s=self._fallback_s,
            predicted_goodput=optimum.goodput,
            reason=reason,
            meet_targets=self._meet_targets and steering,
            by_confidence=by_confidence,
        )
        if arm is Arm.OWN and is_news:
            policy = self._release(seq, reason)
        return Decision(
            policy,
            optimum.choice.lengths,
            chosen,
            none,
            cache(partial(self._static, ladder, even, draft, other, beside_s)),
            partial(self._gain_std, ladder, optimum.choice.lengths, shape),
            optimum.choice.mode,
            num_targets,
            num_out_of_reach,
            is_news,
            arm,
            not steering or not (binding or self.is_learning),
            prompts,
        )

    @property
    def is_learning(self) -> bool:
        """Whether it is too early to judge what is chosen."""
        return self.prober.sweeping or self.engine.learned.num_steps < YOUNG

    def obeyed(self, observation: Observation) -> bool:
        """Whether a step ran what the last `decide` was asked for."""
        report = observation.report
        if self._arm is Arm.OWN:
            return report.source == "own"
        return report.source in STEERED and report.policy_seq > self._arm_after

    def release(self) -> Policy:
        """A policy that leaves the engine to its own configuration, at once."""
        return self._release(self.engine.next_policy_seq(self.engine.last_seq), "released")

    def _release(self, seq: int, reason: str) -> Policy:
        """Expired on arrival, with nothing to fall back to but the engine itself.

        Looked at by a clock that has not moved since, it is the engine's static length.
        """
        limits = self.engine.hello.limits
        return Policy(
            epoch=self.engine.hello.epoch,
            daemon_epoch=self._daemon_epoch,
            seq=seq,
            report_seq=self.engine.last_seq,
            ttl_s=RELEASE_TTL_S,
            value_of_time=0.0,
            depth=limits.static_length,
            curves=(Curve(mode=RAGGED, num_tokens=(1.0,), seconds=(1.0,)),),
            max_length=limits.max_length,
            log_survival=pack([0.0] * limits.max_length, "f32"),
            fallback_s=0.0,
            reason=reason,
        )

    def _may_keep(self) -> bool:
        """Whether the last step was chosen by the newest policy, for the batch it was made for."""
        last = self.engine.last
        return (
            last is not None
            and last.report.source in STEERED
            and last.report.policy_seq == self.engine.policy_seq > self._arm_after
            and last.batch.version == self._told_roster
            and self._num_untold < TOLD_EVERY
        )

    def _curves(self, shape: StepShape) -> list[CostCurve]:
        """Seconds by tokens in the pass, wide enough for a batch that has since doubled.

        One per mode of the engine, uniform last. Those of a pass without prompts: what the tokens
        of prompts cost beyond that of others is the same for all lengths, so that an engine can
        choose by these curves whatever prompts its step turns out to carry.
        """
        limits = self.engine.hello.limits
        most = min(2 * round(shape.batch) + 8, limits.max_num_running) * (1 + limits.max_length)
        most += self.engine.most_prefill_tokens
        curves = []
        for mode in sorted(limits.modes, key=lambda mode: mode == UNIFORM):
            shape = shape._replace(ragged=float(self.engine.is_dear(mode)))
            tokens, seconds = self.engine.step_cost.whole_curve(shape, 1, most)
            curves.append(CostCurve(mode, tokens, tuple(seconds.tolist())))
        return curves

    def _static(
        self, ladder: Ladder, curve: CostCurve, draft: DraftCost, other: int, beside_s: float
    ) -> Expected:
        static = self.engine.hello.limits.static_length
        lengths, gain = ladder.at(static)
        presence = 1.0 if ladder.presence is None else ladder.presence
        drafts = np.array(float((lengths * presence).sum()))
        depth = int(lengths.max(initial=0))
        static_s = float(step_seconds(curve, draft, ladder.size + other + drafts, drafts, depth))
        return Expected(gain, static_s + beside_s)

    def _gain_std(self, ladder: Ladder, lengths: I64, shape: StepShape) -> dict[Arm, float]:
        """Deviation of log(goodput at ``lengths`` / goodput otherwise), by the delta method.

        Hazards are taken to be independent by depth, and wrong alike for all requests; those of
        depths never tried are as uncertain as their prior. Of costs only the difference counts.
        """
        engine = self.engine
        hazard_std = engine.acceptance.hazard_std() / engine.acceptance.pooled_hazards()
        static = engine.hello.limits.static_length
        tokens, cost = self._influence(ladder, ladder.at(lengths)[0], shape)
        found = {}
        for arm, length in ((Arm.NONE, 0), (Arm.OWN, static)):
            other_tokens, other_cost = self._influence(ladder, ladder.at(length)[0], shape)
            of_tokens = float((((tokens - other_tokens) * hazard_std) ** 2).sum())
            of_cost = engine.step_cost.log_ratio_std(cost, other_cost)
            found[arm] = float(np.sqrt(of_tokens + of_cost**2))
        return found

    def _influence(self, ladder: Ladder, lengths: I64, shape: StepShape) -> tuple[F64, StepShape]:
        """d log tokens / d log hazard by depth or rank, [K]; and the shape of such a step."""
        presence = 1.0 if ladder.presence is None else ladder.presence
        taken = np.arange(ladder.max_length)[:, None] < lengths
        by_depth = (ladder.worth * taken * presence).sum(axis=1, dtype=np.float64)
        beyond: F64 = by_depth
        if not self.engine.key.trees:  # where a hazard is a factor of all that follow
            beyond = by_depth[::-1].cumsum()[::-1]
        drafts = float((lengths * presence).sum())
        forwards = 0.0
        if not self.engine.hello.limits.drafts_known_first:
            forwards = self.engine.draft_cost().num_forwards(int(lengths.max(initial=0)))
        return beyond / (ladder.weight_sum + float(by_depth.sum())), shape._replace(
            verify_tokens=ladder.size + drafts, draft_forwards=forwards, draft_tokens=drafts
        )

    def _fallback_table(
        self, ladder: Ladder, curve: CostCurve, draft: DraftCost
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        most = self.engine.hello.limits.max_num_running
        batches: I64 = np.unique(np.geomspace(1, most, 12).round().astype(np.int64))
        average: F64 = ladder.worth.mean(axis=1) * (ladder.size / ladder.weight_sum)
        presence = 1.0 if ladder.presence is None else float(ladder.presence.mean())
        best = goodput.best_by_batch(average, presence, batches, curve, draft)
        return tuple(batches.tolist()), tuple(best.tolist())

    def _reason(
        self,
        optimum: Optimum,
        none: float,
        num_probes: int,
        probe_length: int,
        by_confidence: bool,
    ) -> str:
        lengths = optimum.choice.lengths
        size, report = len(lengths), self.engine.last
        waiting = report.report.num_waiting if report else 0
        load = f"{size} running" + (f", {waiting} waiting" if waiting else "")
        top = int(lengths.max(initial=0))
        if by_confidence:
            what = "as many drafts as their confidences pay for"
            what += f"; without them lengths {int(lengths.min())}-{top}"
        elif top == 0:
            what = "no speculation: drafts would cost more than they bring"
        elif lengths.min() == top:
            what = f"length {top} for all"
        else:
            what = f"lengths {int(lengths.min())}-{top} (mean {lengths.mean():.1f})"
        gain = optimum.goodput / none - 1 if none > 0 else 0.0
        reason = f"{load}: {what}; {optimum.goodput:.0f} tok/s, {gain:+.0%} over none"
        if num_probes:
            reason += f"; probe: length {probe_length} for {num_probes}"
        return reason


def _did_as_well(
    observation: Observation,
    ladder: Ladder,
    optimum: Optimum,
    curves: list[CostCurve],
    draft: DraftCost,
) -> bool:
    """Whether a step was as good as the optimum's price would have made it."""
    num_other_tokens = observation.report.num_prefill_tokens
    given = curves, draft, num_other_tokens
    best = choose_lengths(ladder, optimum.value_of_time, optimum.depth, *given)
    lengths, gain = ladder.at(observation.num_drafted)
    drafts, depth = np.array(float(lengths.sum())), int(lengths.max(initial=0))
    curve = next((one for one in curves if one.mode == observation.report.mode), curves[0])
    verified = ladder.size * depth if curve.mode == UNIFORM else drafts
    num_tokens = ladder.size + num_other_tokens + verified
    seconds = float(step_seconds(curve, draft, num_tokens, drafts, depth))
    loss = best.gain - gain - optimum.value_of_time * (best.seconds - seconds)
    return loss <= WORTH_TELLING * best.gain
