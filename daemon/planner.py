"""From what is known of an engine to its next decision, and to what it is told. Does no I/O."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import TypedDict

import numpy as np
import numpy.typing as npt

from smartspec.daemon.decision import Arm, Decision, Once, Order, in_words
from smartspec.daemon.engines import Batch, Engine, Observation
from smartspec.daemon.outlook import Expected, Outlook, by_batch, gain_std
from smartspec.daemon.probing import Prober
from smartspec.daemon.told import TOLD_EVERY, Told
from smartspec.engine_adapter.lengths import I64, RAGGED
from smartspec.engine_adapter.messages import STEERED, Curve, Policy, pack
from smartspec.engine_adapter.optimum import Optimum
from smartspec.engine_adapter.targets import expected_tokens, out_of_reach
from smartspec.estimators.continuation import Places

TABLE_EVERY = 8  #: decisions between two acceptance tables; what is the same is not read anew
YOUNG = 200  #: decisions in which the table is still moving fast
STEADY = 1000  #: decisions after which a batch that is as it was is looked at every other step
FALLBACK_EVERY = 200  #: decisions between two fallback tables: only what is learned moves it
RELEASE_TTL_S = 1e-9  #: of a policy that has expired by the time it is looked at


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
    seed_sweep : whether a first start sweeps (probing.py)
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
        self._places: Places | None = None
        self._last: Decision | None = None
        self._decided_for: Observation | None = None
        self._told: Told | None = None
        self._num_untold = 0  #: decisions since then
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
        self.tell_again()

    def tell_again(self) -> None:
        """The policy last told does not do, or never went out: the next decision makes another."""
        self._told = None

    def decide(self, arm: Arm = Arm.SMARTSPEC) -> Decision | None:
        """The policy for what the engine last reported; None before it decodes anything.

        What is predicted is that of SmartSpec whatever the ``arm`` that the engine is to run.
        """
        engine, observation = self.engine, self.engine.last
        if observation is None or engine.max_length == 0 or not len(observation.batch.ids):
            return None
        if arm is not self._arm:
            self._arm, self._arm_after = arm, engine.policy_seq
        if self._last is not None and self._stands(self._last, observation):
            self._num_untold += 1
            return dataclasses.replace(self._last, is_news=False)
        outlook = Outlook.of(engine, observation, self._survivals())
        alone = outlook.alone()
        places = self._where(observation.batch, outlook, alone)
        if places is not None:
            outlook = outlook.among(places)
        optimum = outlook.optimum(alone)
        none, prompts_s = outlook.without()
        order = self._order(arm, observation, outlook, optimum, none)
        is_news = self._is_news(order, observation, outlook, optimum)
        report_seq = observation.report.seq
        if is_news:
            seq = engine.next_policy_seq(report_seq)
            self._told = Told(
                seq,
                report_seq,
                outlook,
                observation.batch.ids,
                order.value_of_time,
                order.depth,
                order.deepest,
            )
            self._num_untold = 0
        else:
            seq = engine.policy_seq
            engine.confirm_policy(seq, report_seq)
            self._num_untold += 1
        policy = partial(self._policy, seq, observation, outlook, order, optimum, self._fallback)
        if arm is Arm.OWN and is_news:
            policy = partial(self._release, seq, order.reason)
        self._decided_for = observation
        self._last = Decision(
            order,
            seq,
            report_seq,
            Once(policy),
            optimum.choice.lengths,
            outlook.chosen(optimum),
            none,
            Once(partial(outlook.at_length, engine.hello.limits.static_length)),
            partial(self._gain_std, outlook, optimum.choice.lengths),
            optimum.choice.mode,
            is_news,
            arm is not Arm.SMARTSPEC or self._is_typical(order),
            optimum.value_of_time * prompts_s,
        )
        return self._last

    def _stands(self, last: Decision, observation: Observation) -> bool:
        """Whether the last decision, made for the step before, need not be made anew."""
        before, report = self._decided_for, observation.report
        return (
            before is not None
            and before.batch is observation.batch
            and before.report.num_prefill_tokens == report.num_prefill_tokens
            and before.report.seq + 1 == report.seq
            and self._num_decisions >= STEADY
            and self._arm is last.order.arm is Arm.SMARTSPEC
            and last.is_comparable
            and not last.order.num_probes
            and self._is_told(observation)
        )

    def _is_told(self, observation: Observation) -> bool:
        """Whether the policy last told is of this arm and in force, or will soon be."""
        told = self._told
        return (
            told is not None
            and told.seq == self.engine.policy_seq > self._arm_after
            and self._num_untold < TOLD_EVERY
            and told.may_hold(observation)
        )

    def _has_targets(self, batch: Batch) -> bool:
        """Whether requests' targets bend lengths, and not goodput alone."""
        return self._meet_targets and batch.target is not None

    def _survivals(self) -> npt.NDArray[np.float32]:
        """The acceptance table, log survivals [K, num_buckets]; for some decisions the same."""
        if (
            self._table is None
            or self._num_decisions < YOUNG
            or self._num_decisions % TABLE_EVERY == 0
        ):
            self._table = np.ascontiguousarray(self.engine.acceptance.log_survival().T)
        return self._table

    def _where(self, batch: Batch, outlook: Outlook, alone: Optimum) -> Places | None:
        """What tokens take where answers go on; for some decisions the same.

        None where drafts' own confidences say what they are worth, or where targets are to be met.
        """
        continuation = self.engine.learned.continuation
        if self.engine.hello.limits.confidences or self._has_targets(batch):
            return None
        if not continuation.is_known:
            return None
        if self._num_decisions < YOUNG or self._num_decisions % TABLE_EVERY == 0:
            pace, table = outlook.pace(alone), np.exp(outlook.table)
            self._places = None if pace is None else continuation.places(table, pace)
        return self._places

    def _order(
        self,
        arm: Arm,
        observation: Observation,
        outlook: Outlook,
        optimum: Optimum,
        none: Expected,
    ) -> Order:
        """What to run, and why."""
        engine, batch, limits = self.engine, observation.batch, self.engine.hello.limits
        steering = arm is Arm.SMARTSPEC
        probe_length = num_probes = 0
        if steering:
            probe_length, num_probes = self.prober.plan(observation, outlook, optimum)
        every = FALLBACK_EVERY if self._num_decisions >= YOUNG else FALLBACK_EVERY // 20
        if self._num_decisions and self._num_decisions % every == 0:
            context_tokens = observation.report.context_tokens / len(batch.ids)
            self._fallback = by_batch(engine, context_tokens)
        self._num_decisions += 1
        sweep_length = self.prober.sweep_length(observation, outlook) if steering else None
        # Targets bind a step as a whole, which is not known before it is drafted.
        has_targets = self._has_targets(batch)
        by_confidence = limits.confidences and steering and sweep_length is None and not has_targets
        waiting = observation.report.num_waiting
        reason = in_words(optimum, none.goodput, waiting, by_confidence)
        if num_probes:
            reason += f"; probe: length {probe_length} for {num_probes}"
        num_targets = num_out_of_reach = 0
        if has_targets:
            num_targets, num_out_of_reach = _targets(batch, outlook)
            reason += f"; {num_targets} with a target"
            if num_out_of_reach:
                reason += f", {num_out_of_reach} of them out of reach"
        value_of_time, depth, deepest = optimum.value_of_time, optimum.depth, 0
        if by_confidence:
            depth = engine.max_length
        elif sweep_length is not None:
            # At no value of time every request takes all that the depth allows.
            value_of_time, depth = 0.0, sweep_length
            reason = f"{len(batch.ids)} running: seed sweep, length {sweep_length} for all"
        elif arm is Arm.SMARTSPEC and not has_targets:
            deepest = engine.max_length
        if arm is Arm.NONE:
            depth = 0
            reason += "; for comparison: no speculation"
        elif arm is Arm.OWN:
            reason += "; not steered: the engine's own setting"
        return Order(
            arm,
            value_of_time,
            depth,
            reason,
            probe_length,
            num_probes,
            by_confidence,
            deepest,
            sweep_length is not None,
            num_targets,
            num_out_of_reach,
        )

    def _is_news(
        self, order: Order, observation: Observation, outlook: Outlook, optimum: Optimum
    ) -> bool:
        """Whether the engine has to be told."""
        report, told = observation.report, self._told
        if order.arm is Arm.OWN:
            # Told again only where that did not arrive: its own arrival makes it look alive.
            return report.source != "own" and report.policy_seq <= self._arm_after
        if told is None or not self._is_told(observation):
            return True
        if order.arm is Arm.NONE:
            return False
        if order.num_probes or order.is_sweep or order.is_bound:
            return True
        if order.by_confidence:
            return not told.values_time_at(order.value_of_time)
        return not told.does_as_well(observation, outlook, optimum)

    def _policy(
        self,
        seq: int,
        observation: Observation,
        outlook: Outlook,
        order: Order,
        optimum: Optimum,
        fallback: tuple[tuple[int, ...], tuple[int, ...]],
    ) -> Policy:
        draft = outlook.draft
        return Policy(
            epoch=self.engine.hello.epoch,
            daemon_epoch=self._daemon_epoch,
            seq=seq,
            report_seq=observation.report.seq,
            ttl_s=self._ttl_s,
            value_of_time=order.value_of_time,
            depth=order.depth,
            curves=tuple(
                Curve(mode=curve.mode, num_tokens=curve.num_tokens, seconds=curve.seconds)
                for curve in outlook.curves
            ),
            max_length=len(outlook.table),
            log_survival=pack(outlook.table, "f32"),
            axes=self.engine.axes,
            draft_fixed_s=draft.fixed_s,
            draft_per_forward_s=draft.per_forward_s,
            draft_per_token_s=draft.per_token_s,
            draft_per_catch_up_s=draft.per_catch_up_s,
            draft_forwards=draft.forwards,
            roster_version=observation.batch.version,
            correction=pack(outlook.correction, "f32"),
            probe_length=order.probe_length,
            num_probes=order.num_probes,
            fallback_batch=fallback[0],
            fallback_length=fallback[1],
            fallback_s=self._fallback_s,
            predicted_goodput=optimum.goodput,
            reason=order.reason,
            meet_targets=self._meet_targets and order.arm is Arm.SMARTSPEC,
            by_confidence=order.by_confidence,
            deepest=order.deepest,
            goes_on=outlook.goes_on,
            worth=b"" if outlook.worth is None else pack(outlook.worth, "f32"),
        )

    def _is_typical(self, order: Order) -> bool:
        """Whether goodput is what lengths are chosen for, by models that know enough for it.

        A sweep that waits for the queue to empty bends nothing: it may wait for ever.
        """
        return self.engine.learned.num_steps >= YOUNG and not (order.is_sweep or order.is_bound)

    def obeyed(self, observation: Observation) -> bool:
        """Whether a step ran what the last `decide` was asked for."""
        report = observation.report
        if self._arm is Arm.OWN:
            return report.source == "own"
        return report.source in STEERED and report.policy_seq > self._arm_after

    def _gain_std(self, outlook: Outlook, lengths: I64) -> dict[Arm, float]:
        others = (0, self.engine.hello.limits.static_length)
        stds = gain_std(self.engine, outlook, lengths, others)
        return dict(zip((Arm.NONE, Arm.OWN), stds, strict=True))

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


def _targets(batch: Batch, outlook: Outlook) -> tuple[int, int]:
    """How many requests ask for a time per token, and how many of these cannot have it."""
    assert batch.target is not None
    presence, survival = outlook.ladder.presence, outlook.survival
    tokens = expected_tokens(survival if presence is None else survival * presence)
    missed = out_of_reach(
        batch.target, tokens, outlook.curves[0], outlook.draft, outlook.num_prompt_tokens
    )
    return int((batch.target > 0).sum()), int(missed.sum())
