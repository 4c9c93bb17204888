"""What the loop did, as events for the bus and lines of the log."""

from __future__ import annotations

import logging

import numpy as np

from smartspec.daemon.adoption.trial import Trial
from smartspec.daemon.decision import Arm, Decision
from smartspec.daemon.engines import Engine, Observation
from smartspec.daemon.event_bus import (
    NOTES,
    Bus,
    DecisionEvent,
    EngineEvent,
    GainEvent,
    LinkCounts,
    NoteEvent,
    NoteKind,
    PresentEvent,
    StepEvent,
)
from smartspec.engine_adapter import messages

log = logging.getLogger("smartspec.daemon")

LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}  #: of notes, in logging


def tell(bus: Bus, kind: NoteKind, text: str, engine: str = "") -> None:
    """A note on the bus, and a line in the log."""
    level = NOTES[kind]
    bus.publish(NoteEvent(engine=engine, level=level, kind=kind, text=text))
    about = f"engine {engine}: " if engine else ""
    what = f"{kind.replace('_', ' ')}: {text}"
    log.log(LEVELS[level], "%s%s", about, what, extra={"event": kind, "engine": engine})


def tell_of(bus: Bus, engine: Engine, state: str) -> None:
    """An engine has connected, left, or been lost: on the bus, and in the log."""
    extra = {"event": state, "engine": engine.name}
    log.info("engine %s: %s (epoch %d)", engine.name, state, engine.hello.epoch, extra=extra)
    bus.publish(_engine_event(EngineEvent, engine, state))


def remind_of(bus: Bus, engine: Engine) -> None:
    """An engine is still there: on the bus."""
    bus.publish(_engine_event(PresentEvent, engine, "connected"))


def _engine_event(kind: type[EngineEvent], engine: Engine, state: str) -> EngineEvent:
    hello = engine.hello
    return kind(
        engine=engine.name,
        epoch=hello.epoch,
        state=state,
        fingerprint=messages.to_plain(hello.fingerprint),
        limits=messages.to_plain(hello.limits),
    )


def step_event(
    engine: Engine, observation: Observation, predicted_s: float | None, t_s: float
) -> StepEvent:
    """A step as reported, and the seconds that were expected of it."""
    report = observation.report
    return StepEvent(
        engine=engine.name,
        seq=report.seq,
        t_s=t_s,
        num_running=len(observation.batch.ids),
        num_waiting=report.num_waiting,
        kv_usage=report.kv_usage,
        step_s=report.step_s,
        target_s=report.target_s,
        draft_s=report.draft_s,
        num_drafted=observation.num_drafts,
        num_accepted=int(observation.num_accepted.sum()),
        num_emitted=observation.num_emitted,
        num_prefill_tokens=report.num_prefill_tokens,
        context_tokens=report.context_tokens,
        source=report.source,
        staleness_steps=observation.staleness_steps,
        predicted_step_s=predicted_s,
    )


def decision_event(
    engine: Engine, decision: Decision, decide_s: float, learn_s: float, t_s: float
) -> DecisionEvent:
    """A policy, why, and what it and the alternatives should bring."""
    order = decision.order
    counts = np.bincount(decision.lengths, minlength=engine.max_length + 1)
    return DecisionEvent(
        engine=engine.name,
        policy_seq=decision.seq,
        report_seq=decision.report_seq,
        t_s=t_s,
        steering=order.arm is Arm.SMARTSPEC,
        reason=order.reason,
        value_of_time=order.value_of_time,
        depth=order.depth,
        mode=decision.mode,
        length_counts=tuple(counts.tolist()),
        predicted_goodput=decision.goodput,
        predicted_goodput_none=decision.none.goodput,
        predicted_goodput_static=decision.static().goodput,
        acceptance=tuple(engine.acceptance.pooled_hazards().tolist()),
        num_probes=order.num_probes,
        decide_s=decide_s,
        learn_s=learn_s,
        num_targets=order.num_targets,
        num_targets_out_of_reach=order.num_out_of_reach,
    )


def gain_event(name: str, trial: Trial, now: float, t_s: float) -> GainEvent:
    """What steering has gained, by the models and as measured, at ``now`` of the loop's clock."""
    gains = trial.gains
    values: dict[str, float | None] = {}
    for arm, over in ((Arm.NONE, "none"), (Arm.OWN, "static")):
        compared = gains.comparisons[arm].interval()
        for prefix, interval in (("gain", gains.over(arm)), ("measured", compared)):
            if interval is not None:
                for suffix, value in zip(("", "_low", "_high"), interval, strict=True):
                    values[f"{prefix}_over_{over}{suffix}"] = value
        values[f"bias_{over}"] = gains.bias(arm)
    return GainEvent(
        engine=name,
        t_s=t_s,
        stance=trial.stance(now),
        arm=trial.current,
        num_compared_none=gains.comparisons[Arm.NONE].num_made,
        num_compared_static=gains.comparisons[Arm.OWN].num_made,
        evidence_worse=trial.evidence.value,
        num_retreats=trial.num_retreats,
        retry_s=None if trial.retry_at is None else max(0.0, trial.retry_at - now),
        **values,
    )


def link_counts(engine: Engine) -> LinkCounts:
    """What an engine's connection has lost so far."""
    return LinkCounts(**{name: getattr(engine, name) for name in LinkCounts.__struct_fields__})
