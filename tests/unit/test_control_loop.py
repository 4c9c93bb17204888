"""The loop on a fake transport and clock: order, counting, what may fail, what is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from fakes import step_report
from loop_rig import Rig
from scripted_engine import hello

from smartspec.daemon import config, narration
from smartspec.daemon.adoption.pauses import Pauses
from smartspec.daemon.commands import Command
from smartspec.daemon.control_loop import FAILED_IN_A_ROW
from smartspec.daemon.counters import LOGGED, Counters
from smartspec.daemon.decision import Arm
from smartspec.daemon.event_bus import (
    DecisionEvent,
    EngineEvent,
    GainEvent,
    LinkCounts,
    LoopEvent,
    NoteEvent,
    StepEvent,
)
from smartspec.daemon.outlook import Outlook
from smartspec.daemon.planner import RELEASE_TTL_S
from smartspec.daemon.sessions import ANSWER_EVERY_S, NOTE_EVERY_S, RETIRED_KEPT
from smartspec.engine_adapter import messages as wire

# -- decide, publish, learn -----------------------------------------------------------------------


def test_policy_goes_out_before_anything_is_learned_or_published(rig: Rig) -> None:
    order: list[str] = []
    session, send, publish = rig.session(), rig.transport.send, rig.bus.publish
    learn = session.engine.learn

    def noted(name: str, call: Any) -> Any:
        def wrapper(*arguments: Any) -> Any:
            order.append(name)
            return call(*arguments)

        return wrapper

    rig.transport.send = noted("send", send)  # type: ignore[method-assign]
    rig.bus.publish = noted("publish", publish)  # type: ignore[method-assign]
    session.engine.learn = noted("learn", learn)
    rig.cycle(b"a", step_report(1))
    assert order[:2] == ["send", "learn"]
    assert "publish" not in order[: order.index("learn")]


def test_policy_rests_on_what_was_known_before_the_report(rig: Rig) -> None:
    """Decided with the models as they were: the report's own lesson counts in the next policy."""
    rig.cycle(b"a", step_report(1))
    rig.cycle(b"a", step_report(2, roster=False))
    first, second = rig.policies()
    fresh = Rig()
    fresh.connect()
    fresh.cycle(b"a", step_report(1, num_accepted=b"", num_emitted=b""))
    (other,) = fresh.policies()
    assert first.log_survival == other.log_survival
    assert second.log_survival != first.log_survival


def test_one_decision_is_made_per_engine_however_many_reports(rig: Rig) -> None:
    rig.connect(b"b", "gpu1")
    for seq in range(1, 21):
        rig.transport.put(b"a", step_report(seq, roster=seq == 1))
        rig.transport.put(b"b", step_report(seq + 100, roster=seq == 1))
    rig.loop.cycle(0.1)
    for peer, newest in ((b"a", 20), (b"b", 120)):
        (policy,) = rig.policies(peer)
        assert policy.report_seq == newest
    assert rig.loop.counters["decisions"] == 2
    assert rig.loop.counters["reports"] == 40
    assert all(rig.session(name).engine.num_reports == 20 for name in ("gpu0", "gpu1"))
    assert len(rig.bus.of(StepEvent)) == 40  # all were learned from
    assert len(rig.bus.of(DecisionEvent)) == 2


def test_learning_gives_way_to_decisions_for_others(rig: Rig) -> None:
    order: list[str] = []
    for peer, name in ((b"b", "gpu1"), (b"c", "gpu2")):
        rig.connect(peer, name)

    def noted(what: str, call: Any, then: Any = lambda: None) -> Any:
        def wrapper(*arguments: Any) -> Any:
            order.append(what)
            then()
            return call(*arguments)

        return wrapper

    late = {"gpu0": lambda: rig.transport.put(b"c", step_report(1))}
    for name in ("gpu0", "gpu1", "gpu2"):
        session = rig.session(name)
        session.planner.decide = noted(f"decide {name}", session.planner.decide)
        then = late.pop(name, lambda: None)
        session.engine.learn = noted(f"learn {name}", session.engine.learn, then)
    rig.transport.put(b"a", step_report(1))
    rig.transport.put(b"b", step_report(1))
    rig.loop.cycle(0.1)  # what has come of gpu2 meanwhile goes before the learning of gpu1
    assert order == ["decide gpu0", "decide gpu1", "learn gpu0"]
    rig.loop.cycle(0.1)
    assert order[3:] == ["decide gpu2", "learn gpu1", "learn gpu2"]
    assert rig.transport.waits[-3:-1] == [0.0, 0.0]  # nothing is waited for while there is work


def test_decision_knows_all_reports_before_when_learning_gave_way(rig: Rig) -> None:
    """The same policies as if each report had been learned at once."""
    rig.connect(b"b", "gpu1")
    alone = Rig()
    alone.connect(b"b", "gpu1")
    b = rig.session("gpu1").engine
    learn = rig.session("gpu0").engine.learn
    for seq in range(1, 6):
        facts = {"num_accepted": wire.pack([seq % 3] * 3, "u8"), "num_emitted": b""}
        alone.cycle(b"b", step_report(seq, roster=seq == 1, **facts))
        rig.transport.put(b"a", step_report(seq, roster=seq == 1))
        rig.transport.put(b"b", step_report(seq, roster=seq == 1, **facts))

        def interrupted(*arguments: Any) -> Any:
            rig.transport.put(b"x", b"")
            return learn(*arguments)

        rig.session("gpu0").engine.learn = interrupted
        rig.loop.cycle(0.1)
        assert b.learned.num_steps == seq - 1
    rig.loop.cycle(0.0)
    assert b.learned.num_steps == 5
    assert [p.log_survival for p in rig.policies(b"b")] == [
        p.log_survival for p in alone.policies(b"b")
    ]


@pytest.mark.parametrize("last", ["goodbye", "hello"])
def test_what_is_yet_to_be_learned_of_an_engine_is_told_before_it_has_left(
    rig: Rig, last: str
) -> None:
    rig.bus.wanted |= {StepEvent, DecisionEvent}
    rig.connect(b"b", "gpu1")
    b, learn = rig.session("gpu1").engine, rig.session().engine.learn
    leaves = wire.Goodbye(epoch=1) if last == "goodbye" else hello("gpu1", 2)

    def interrupted(*arguments: Any) -> Any:
        rig.transport.put(b"b", leaves)
        return learn(*arguments)

    rig.session().engine.learn = interrupted
    rig.transport.put(b"a", step_report(1))
    rig.transport.put(b"b", step_report(1))
    rig.loop.cycle(0.1)
    assert b.learned.num_steps == 0  # it gave way
    rig.bus.events.clear()
    rig.loop.cycle(0.1)
    told = [type(event) for event in rig.bus.events if getattr(event, "engine", "") == "gpu1"]
    assert b.learned.num_steps == 1
    assert told[:2] == [StepEvent, DecisionEvent] and EngineEvent in told[2:]
    assert not {StepEvent, DecisionEvent} & set(told[2:])


def test_cycle_returns_the_reason_of_what_was_decided(rig: Rig) -> None:
    reason = rig.cycle(b"a", step_report(1))
    assert reason is not None and reason.startswith("3 running: ")
    (policy,) = rig.policies()
    assert policy.reason == reason
    assert rig.cycle() is None


def test_engines_of_one_daemon_do_not_mix(rig: Rig) -> None:
    rig.connect(b"b", "gpu1")
    for seq in range(1, 80):
        good = {"num_accepted": wire.pack([2] * 3, "u8"), "num_emitted": wire.pack([3] * 3, "u8")}
        bad = {"num_accepted": b"", "num_emitted": b""}
        rig.transport.put(b"a", step_report(seq, roster=seq == 1, **good))
        rig.transport.put(b"b", step_report(seq, roster=seq == 1, **bad))
        rig.loop.cycle(0.1)
    a, b = (rig.session(n).engine.acceptance.pooled_hazards()[0] for n in ("gpu0", "gpu1"))
    assert a > 0.9 and b < 0.1


def test_steering_is_left_out_when_observing() -> None:
    rig = Rig("observe")
    rig.connect()
    for seq in range(1, 10):
        assert rig.cycle(b"a", step_report(seq, roster=seq == 1)) is not None
        rig.clock.now += 0.1
    assert rig.policies() == []
    assert rig.transport.take(b"a", wire.Heartbeat)  # the engine goes on reporting
    decisions = rig.bus.of(DecisionEvent)
    assert len(decisions) == 9
    assert all(not event.steering and event.num_probes == 0 for event in decisions)
    assert rig.session().engine.acceptance.num_observed().sum() > 0


def test_events_tell_what_happened(rig: Rig) -> None:
    rig.cycle(b"a", step_report(5, num_waiting=2))
    (policy,) = rig.policies()
    rig.cycle(b"a", step_report(6, roster=False, policy_seq=policy.seq, source="policy"))
    first, second = rig.bus.of(StepEvent)
    assert (first.engine, first.seq, first.num_running, first.num_waiting) == ("gpu0", 5, 3, 2)
    assert (first.num_drafted, first.num_accepted, first.num_emitted) == (6, 3, 6)
    assert first.staleness_steps is None and second.staleness_steps == 1
    decision = rig.bus.of(DecisionEvent)[0]
    assert (decision.policy_seq, decision.report_seq, decision.t_s) == (policy.seq, 5, 7.0)
    assert sum(decision.length_counts) == 3
    assert decision.predicted_goodput > 0 and decision.reason == policy.reason


# -- gaps, repetition, rosters --------------------------------------------------------------------


def test_gaps_repetition_and_disorder_are_counted(rig: Rig) -> None:
    for seq in (1, 2, 5, 5, 4, 6):
        rig.transport.put(b"a", step_report(seq))
    rig.loop.cycle(0.1)
    engine = rig.session().engine
    assert (engine.num_reports, engine.num_missed, engine.num_repeated) == (4, 2, 2)
    assert rig.loop.counters["steps_missed"] == 2
    assert rig.loop.counters["frames_refused"] == 2
    (policy,) = rig.policies()
    assert policy.report_seq == 6


def test_roster_is_asked_for_when_it_is_missing_but_not_at_every_report(rig: Rig) -> None:
    for seq in range(1, 6):
        rig.cycle(b"a", step_report(seq, roster=False))
    (resync,) = rig.transport.take(b"a", wire.Resync)
    assert "roster" in resync.reason
    assert rig.policies() == []
    rig.clock.now += ANSWER_EVERY_S + 0.01
    rig.cycle(b"a", step_report(6, roster=False))
    assert len(rig.transport.take(b"a", wire.Resync)) == 1
    rig.cycle(b"a", hello("gpu0"), step_report(7))
    assert len(rig.policies()) == 1


def test_hello_is_asked_for_when_an_unknown_engine_reports() -> None:
    rig = Rig()
    rig.cycle(b"x", step_report(1))
    (resync,) = rig.transport.take(b"x", wire.Resync)
    assert resync.daemon_epoch == rig.loop.epoch
    rig.connect(b"x")
    rig.cycle(b"x", step_report(2, epoch=99))
    rig.clock.now += 1
    rig.cycle(b"x", step_report(3, epoch=99))
    assert rig.transport.take(b"x", wire.Resync)
    assert rig.loop.counters["reports"] == 0


def test_operator_is_told_when_steps_take_longer_for_good(rig: Rig) -> None:
    for seq in range(1, 201):
        slow = 1.5 if seq > 160 else 1.0
        rig.cycle(
            b"a", step_report(seq, roster=seq == 1, step_s=0.03 * slow, target_s=0.025 * slow)
        )
    notes = [note for note in rig.bus.of(NoteEvent) if note.kind == "drift"]
    # A few times: each alarm gives up a part of what was known.
    assert notes and len(notes) == rig.loop.counters["cost_changes"] <= 4
    assert notes[0].engine == "gpu0" and "1.5" in notes[0].text


def test_operator_is_told_of_the_step_that_was_slow_when_others_came_with_it(rig: Rig) -> None:
    cycle, notes = rig.cycle, []
    for seq in range(1, 260, 2):
        slow = 1.5 if seq > 160 else 1.0
        times = {"step_s": 0.03 * slow, "target_s": 0.025 * slow}
        rig.transport.put(b"a", step_report(seq, roster=seq == 1, **times))
        cycle(b"a", step_report(seq + 1, roster=False))  # as quick as ever
        notes = [note.text for note in rig.bus.of(NoteEvent) if note.kind == "drift"]
        if notes:
            break
    assert len(notes) == 1 and "steps take 1." in notes[0] and "take 1.0" not in notes[0]


def test_bad_frame_is_counted_and_told_now_and_then(rig: Rig) -> None:
    rig.loop.apply(config.replace(rig.settings, {"limits.quarantine_after": 1000}))
    for _ in range(50):
        rig.cycle(b"a", b"\xc1", step_report(1, step_s=float("nan")))
    assert rig.loop.counters["frames_refused"] == 100
    assert rig.session().engine.num_refused == 100
    (note,) = rig.bus.of(NoteEvent)
    assert (note.kind, note.engine) == ("bad_frame", "gpu0")
    rig.clock.now += NOTE_EVERY_S + 0.01
    rig.cycle(b"a", b"\xc1")
    assert len(rig.bus.of(NoteEvent)) == 2
    rig.cycle(b"a", step_report(1))
    assert len(rig.policies()) == 1


def test_peer_of_another_version_is_told_so() -> None:
    rig = Rig()
    plain = msgspec.msgpack.decode(wire.encode(hello()))
    newer = msgspec.msgpack.encode(plain | {"version": 2})
    for _ in range(10):
        rig.cycle(b"new", newer)
    (refused,) = rig.transport.take(b"new", wire.Refused)
    assert "version 2 is not spoken here" in refused.reason
    assert rig.loop.counters["frames_refused"] == 10


def test_flood_of_one_cycle_is_bounded(rig: Rig) -> None:
    rig.transport.put(b"x", *[b"\xc1"] * 10_000)
    rig.transport.put(b"a", step_report(1))
    rig.loop.cycle(0.0)
    assert 0 < len(rig.transport.inbox) <= 10_001 - 4096
    while rig.transport.inbox:
        rig.loop.cycle(0.0)
    assert len(rig.policies()) == 1


# -- failures and time ----------------------------------------------------------------------------


def fail(*arguments: Any) -> None:
    raise ZeroDivisionError("a fault of ours")


def test_failing_planner_costs_its_engine_the_decision_and_nobody_else(rig: Rig) -> None:
    rig.connect(b"b", "gpu1")
    rig.session().planner.decide = fail
    for seq in range(1, 4):
        rig.transport.put(b"b", step_report(seq, roster=seq == 1))
        rig.cycle(b"a", step_report(seq, roster=seq == 1))
    assert rig.loop.counters["failures_deciding"] == 3
    assert not rig.policies(b"a") and len(rig.policies(b"b")) == 3
    assert rig.session().engine.acceptance.num_observed().sum() > 0  # it still learns
    (note,) = [note for note in rig.bus.of(NoteEvent) if note.kind == "fault"]
    assert (note.engine, note.level) == ("gpu0", "error") and "a fault of ours" in note.text


def test_engine_is_released_when_no_decision_can_be_made_for_it(rig: Rig) -> None:
    decide = rig.session().planner.decide
    rig.session().planner.decide = fail
    for seq in range(1, FAILED_IN_A_ROW + 3):
        rig.cycle(b"a", step_report(seq, roster=seq == 1))
    (release,) = rig.policies()
    assert release.ttl_s == RELEASE_TTL_S
    rig.session().planner.decide = decide
    rig.cycle(b"a", step_report(FAILED_IN_A_ROW + 3, roster=False))
    (policy,) = rig.policies()
    assert policy.ttl_s > RELEASE_TTL_S and policy.seq > release.seq


def test_policy_that_cannot_be_made_is_a_decision_that_failed(rig: Rig) -> None:
    planner = rig.session().planner
    make, planner._policy = planner._policy, fail
    for seq in range(1, FAILED_IN_A_ROW + 3):
        rig.cycle(b"a", step_report(seq, roster=seq == 1))
        assert planner._told is None  # or it would be held for under way, and the next one kept
    assert rig.loop.counters["failures_deciding"] == FAILED_IN_A_ROW + 2
    (release,) = rig.policies()
    assert release.ttl_s == RELEASE_TTL_S
    planner._policy = make
    rig.cycle(b"a", step_report(FAILED_IN_A_ROW + 3, roster=False))
    assert len(rig.policies()) == 1


def test_step_that_cannot_be_told_is_counted_and_the_loop_goes_on(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(narration, "step_event", fail)
    for seq in range(1, 4):
        assert rig.cycle(b"a", step_report(seq, roster=seq == 1)) is not None
    assert rig.loop.counters["failures_telling steps"] == 3
    assert len(rig.policies()) == 3 and rig.session().engine.learned.num_steps == 3


def test_engine_that_is_long_to_decide_for_leaves_time_to_others(rig: Rig) -> None:
    rig.connect(b"b", "gpu1")
    planner = rig.session().planner
    decide = planner.decide

    def slowly(*arguments: Any) -> Any:
        rig.clock.now += rig.settings.control.heartbeat_s
        return decide(*arguments)

    planner.decide = slowly
    rig.transport.put(b"b", step_report(1))
    rig.cycle(b"a", step_report(1))
    beats = rig.transport.take(b"b", wire.Heartbeat)
    assert beats, "told within the turn that the daemon lives"
    for seq in range(2, 6):
        rig.clock.now += 0.8 * rig.settings.control.heartbeat_s
        rig.transport.put(b"b", step_report(seq, roster=False))
        rig.cycle(b"a", step_report(seq, roster=False))
    assert (len(rig.policies(b"a")), len(rig.policies(b"b"))) == (1, 5)
    assert rig.loop.counters["decisions_put_off"] == 4
    rig.clock.now += rig.settings.control.heartbeat_s
    rig.cycle(b"a", step_report(6, roster=False))
    assert len(rig.policies(b"a")) == 1


@pytest.mark.parametrize("mode", ["observe", "canary", "control"])
def test_first_step_of_any_length_does_no_lasting_harm(mode: str) -> None:
    """Kernels are compiled in it, say: what takes 20 ms took half a minute."""
    rig = Rig(mode)
    rig.connect()
    for seq in range(1, 1000):
        took_s = 30.0 if seq == 1 else 0.02
        facts: dict[str, Any] = {"step_s": took_s, "target_s": None, "draft_s": None}
        if rig.session().trial.current is Arm.OWN:
            facts |= {"source": "own", "num_drafted": wire.pack([3] * 3, "u8")}
        else:
            facts["policy_seq"] = rig.session().engine.policy_seq
        rig.cycle(b"a", step_report(seq, roster=seq == 1, **facts))
        rig.clock.now += took_s
    gain = rig.bus.of(GainEvent)[-1]
    assert rig.loop.counters.keys().isdisjoint({"failures_comparing", "failures_deciding"})
    assert gain.gain_over_none is not None
    assert -0.9 < gain.gain_over_none_low <= gain.gain_over_none_high < 3.0


@pytest.mark.parametrize("part", ["engine.learn", "planner.prober.account"])
def test_failing_lesson_is_counted_and_the_loop_goes_on(rig: Rig, part: str) -> None:
    target = rig.session()
    *path, name = part.split(".")
    for step in path:
        target = getattr(target, step)
    setattr(target, name, fail)
    for seq in range(1, 4):
        assert rig.cycle(b"a", step_report(seq, roster=seq == 1)) is not None
    assert rig.loop.counters["failures_learning"] == 3
    assert len(rig.policies()) == 3 and len(rig.bus.of(StepEvent)) == 3


def test_failing_comparison_is_counted_and_the_loop_goes_on(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Outlook, "at_length", fail)  # worked out when a decision is told of
    for seq in range(1, 4):
        assert rig.cycle(b"a", step_report(seq, roster=seq == 1)) is not None
    assert rig.loop.counters["failures_comparing"] == 3
    assert len(rig.policies()) == 3 and rig.session().engine.learned.num_steps == 3


def test_first_fault_of_a_kind_is_logged_however_many_there_were(
    caplog: pytest.LogCaptureFixture,
) -> None:
    counters = Counters()
    for doing, engine in [("deciding", f"e{i}") for i in range(200)] + [("learning", "x")] * 3:
        try:
            fail()
        except ZeroDivisionError:
            counters.failed(doing, engine)
    assert sum("deciding" in record.message for record in caplog.records) == LOGGED
    assert [r.message for r in caplog.records][-1] == "error while learning for engine x"
    assert (counters["failures_deciding"], counters["failures_learning"]) == (200, 3)


def test_heartbeats_go_out_while_a_long_turn_is_learned(rig: Rig) -> None:
    rig.connect(b"b", "gpu1")
    for name in ("gpu0", "gpu1"):
        engine = rig.session(name).engine
        learn = engine.learn

        def slowly(observation: Any, learn: Any = learn) -> Any:
            rig.clock.now += 1.1 * rig.settings.control.heartbeat_s
            return learn(observation)

        engine.learn = slowly
    rig.transport.put(b"b", step_report(1))
    rig.cycle(b"a", step_report(1))
    assert len(rig.transport.take(b"a", wire.Heartbeat)) == 2


def test_failing_welcome_is_counted_and_the_loop_goes_on(rig: Rig) -> None:
    rig.session().engine.observe = fail
    rig.cycle(b"a", step_report(1))
    assert rig.loop.counters["failures_receiving"] == 1
    rig.connect(b"b", "gpu1")
    rig.cycle(b"b", step_report(1))
    assert len(rig.policies(b"b")) == 1


def test_heartbeats_go_to_all_engines_at_their_pace(rig: Rig) -> None:
    rig.connect(b"b", "gpu1")
    rig.clock.now += 1.0
    rig.cycle()
    rig.transport.sent.clear()
    for _ in range(1000):
        rig.clock.now += 0.01
        rig.cycle()
    for peer in (b"a", b"b"):
        beats = rig.transport.take(peer, wire.Heartbeat)
        assert 40 <= len(beats) <= 51  # every 200 ms, in 10 s


def test_wait_ends_in_time_for_the_next_heartbeat(rig: Rig) -> None:
    rig.clock.now += 1.0
    rig.cycle()
    for passed in (0.0, 0.15, 0.18):
        start = rig.clock.now
        rig.clock.now += passed
        rig.loop.cycle(5.0)
        assert rig.transport.waits[-1] == pytest.approx(0.2 - passed)
        rig.clock.now = start
    rig.loop.cycle(0.01)
    assert rig.transport.waits[-1] == pytest.approx(0.01)


def test_counters_are_published_every_second(rig: Rig) -> None:
    rig.bus.events.clear()
    for _ in range(50):
        rig.clock.now += 0.1
        rig.cycle()
    events = rig.bus.of(LoopEvent)
    assert 4 <= len(events) <= 6
    assert events[-1].num_engines == 1
    assert events[-1].counters["engines_connected"] == 1


def test_changed_settings_reach_engines_by_the_next_policy(rig: Rig) -> None:
    rig.cycle(b"a", step_report(1))
    assert rig.policies()[-1].ttl_s == 1.0
    changed = {"control.ttl_s": 4.0, "control.fallback_s": 9.0, "control.max_engines": 1}
    rig.loop.apply(config.replace(rig.settings, changed))
    rig.cycle(b"a", step_report(2, roster=False))
    policy = rig.policies()[-1]
    assert (policy.ttl_s, policy.fallback_s) == (4.0, 9.0)
    rig.cycle(b"b", hello("gpu1"))
    assert rig.loop.counters["engines_refused"] == 1


def test_what_the_link_lost_is_published_per_engine(rig: Rig) -> None:
    rig.cycle(b"a", step_report(1))
    rig.cycle(b"a", step_report(1))  # again
    rig.cycle(b"a", step_report(2, step_s=-1.0))
    rig.cycle(b"a", step_report(5, num_dropped=2))
    rig.transport.num_unsendable = 3
    rig.bus.num_dropped = 4
    rig.clock.now += 1.1
    rig.loop.cycle(0.0)
    event = rig.bus.of(LoopEvent)[-1]
    expected = LinkCounts(num_dropped=2, num_missed=3, num_repeated=1, num_refused=2)
    assert event.links == {"gpu0": expected}
    assert event.counters["policies_sent"] >= 1
    assert event.counters["frames_unsendable"] == 3
    assert event.counters["events_dropped"] == 4


def test_transport_is_closed_with_the_loop(rig: Rig) -> None:
    rig.loop.close()
    assert rig.transport.closed


# -- what is run, and who says so -----------------------------------------------------------------


def test_engine_is_released_at_once_when_paused_and_steered_when_released(rig: Rig) -> None:
    rig.cycle(b"a", step_report(1))
    assert rig.policies()[-1].fallback_s > 0
    answer = rig.loop.obey(Command(action="pause", engine="gpu0"))
    assert answer.ok and "engine gpu0 paused" in answer.text
    (told,) = rig.policies()  # though the engine may be idle
    assert (told.ttl_s, told.fallback_s, told.depth) == (RELEASE_TTL_S, 0.0, 3)
    # A step that was under way: told again. Then there is nothing to tell.
    rig.cycle(b"a", step_report(2, roster=False, policy_seq=1))
    (again,) = rig.policies()
    assert again.seq > told.seq and again.ttl_s == RELEASE_TTL_S
    for seq in range(3, 10):
        rig.cycle(b"a", step_report(seq, roster=False, source="own"))
    assert rig.policies() == []
    assert not rig.bus.of(DecisionEvent)[-1].steering
    assert rig.bus.of(GainEvent)[-1].stance == "paused"
    rig.loop.obey(Command(action="release", engine="gpu0"))
    rig.cycle(b"a", step_report(10, roster=False, source="own"))
    (steered,) = rig.policies()
    assert steered.fallback_s > 0 and rig.bus.of(DecisionEvent)[-1].steering
    assert [n.kind for n in rig.bus.of(NoteEvent)] == ["pause", "release"]


def test_engine_stays_paused_when_it_restarts_and_when_the_daemon_does(tmp_path: Path) -> None:
    kept = tmp_path / "paused.json"
    for life in range(2):
        rig = Rig(pauses=Pauses(kept))
        rig.connect()
        if life == 0:
            rig.loop.obey(Command(action="pause", engine="gpu0"))
            rig.transport.sent.clear()
        rig.cycle(b"a", step_report(1, source="own"))
        rig.cycle(b"a", wire.Goodbye(epoch=1))
        rig.connect(b"b", epoch=2)
        rig.cycle(b"b", step_report(1, epoch=2, source="own"))
        assert rig.policies(b"a") == rig.policies(b"b") == []
        rig.connect(b"c", "gpu1")
        rig.cycle(b"c", step_report(1))
        assert len(rig.policies(b"c")) == 1  # others are steered


def test_all_engines_are_paused_when_none_is_named_those_to_come_included(rig: Rig) -> None:
    assert rig.loop.obey(Command(action="pause")).text.startswith("all engines paused")
    rig.connect(b"b", "gpu1")
    for peer in (b"a", b"b"):
        rig.cycle(peer, step_report(1, source="own"))
        assert rig.policies(peer) == []
    answer = rig.loop.obey(Command(action="release", engine="gpu0"))
    assert not answer.ok and "without a name" in answer.text
    rig.loop.obey(Command(action="release"))
    rig.cycle(b"b", step_report(2, roster=False, source="own"))
    assert len(rig.policies(b"b")) == 1


def test_unknown_engine_is_named_with_those_known_when_paused(rig: Rig) -> None:
    answer = rig.loop.obey(Command(action="pause", engine="gpu9"))
    assert not answer.ok and answer.text == "no engine 'gpu9'; known: gpu0"


def test_everything_is_paused_when_it_cannot_be_read_what_was(tmp_path: Path) -> None:
    kept = tmp_path / "paused.json"
    kept.write_text("{not a list")
    assert "gpu0" in Pauses(kept)


def test_gain_is_told_once_a_second_while_the_engine_works(rig: Rig) -> None:
    for seq in range(1, 101):
        rig.cycle(b"a", step_report(seq, roster=seq == 1))
        rig.clock.now += 0.05
    events = rig.bus.of(GainEvent)
    assert 4 <= len(events) <= 6
    assert {(e.stance, e.arm) for e in events} == {("control", "smartspec")}
    rig.clock.now += 10
    for _ in range(5):
        rig.clock.now += 1
        rig.cycle()
    assert len(rig.bus.of(GainEvent)) <= len(events) + 1


def test_trials_are_forgotten_with_what_was_learned(rig: Rig) -> None:
    for i in range(RETIRED_KEPT + 20):
        rig.cycle(b"b", hello(f"name{i}"))
    assert len(rig.loop.sessions.trials) <= RETIRED_KEPT + 2
