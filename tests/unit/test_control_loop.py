"""The loop on a fake transport and clock: order, counting, who may connect, what may fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from fakes import Clock, FakeTransport, RecordingBus, step_report
from scripted_engine import hello

from smartspec.daemon import config, control_loop
from smartspec.daemon.adoption.pauses import Pauses
from smartspec.daemon.commands import Command
from smartspec.daemon.control_loop import FAILED_IN_A_ROW, ControlLoop
from smartspec.daemon.counters import LOGGED, Counters
from smartspec.daemon.decision import Arm
from smartspec.daemon.event_bus import (
    CheckpointEvent,
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
from smartspec.daemon.state.learned import ModelKey, decode
from smartspec.daemon.state.library import Library
from smartspec.engine_adapter import messages as wire


class Rig:
    """A loop and what it is connected to."""

    def __init__(
        self,
        mode: str = "control",
        library: Library | None = None,
        pauses: Pauses | None = None,
        **control: Any,
    ) -> None:
        overrides = {"mode": mode, **{f"control.{k}": v for k, v in control.items()}}
        self.clock = Clock()
        self.transport = FakeTransport()
        self.bus = RecordingBus()
        self.settings = config.load(None, {}, overrides)
        self.loop = ControlLoop(
            self.settings, self.transport, self.bus, self.clock, lambda: 7.0, library, pauses
        )

    def cycle(self, peer: bytes = b"a", *messages: wire.Message | bytes) -> str | None:
        self.transport.put(peer, *messages)
        return self.loop.cycle(0.1)

    def connect(self, peer: bytes = b"a", name: str = "gpu0", epoch: int = 1) -> None:
        self.cycle(peer, hello(name, epoch))
        self.transport.sent.clear()

    def policies(self, peer: bytes = b"a") -> list[wire.Policy]:
        return self.transport.take(peer, wire.Policy)

    def session(self, name: str = "gpu0") -> Any:
        return self.loop.sessions.by_name[name]


@pytest.fixture
def rig() -> Rig:
    made = Rig()
    made.connect()
    return made


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


# -- engines come and go --------------------------------------------------------------------------


def test_engine_hears_a_heartbeat_when_it_is_welcome() -> None:
    rig = Rig()
    rig.cycle(b"a", hello("gpu0"))
    (beat,) = rig.transport.take(b"a", wire.Heartbeat)[:1]
    assert beat.daemon_epoch == rig.loop.epoch
    (event,) = rig.bus.of(EngineEvent)
    assert (event.engine, event.state, event.epoch) == ("gpu0", "connected", 1)


def test_name_is_refused_while_another_engine_of_that_name_is_connected(rig: Rig) -> None:
    rig.cycle(b"a", step_report(1))
    rig.clock.now += 30  # silent for long, in a prefill perhaps, but connected
    rig.cycle(b"b", hello("gpu0", epoch=2))
    (refused,) = rig.transport.take(b"b", wire.Refused)
    assert refused.reason == "another engine is called 'gpu0'"
    rig.cycle(b"a", step_report(2, roster=False))
    assert len(rig.policies(b"a")) == 2
    assert rig.loop.counters["engines_refused"] == 1


def test_name_is_refused_when_somebody_repeats_an_engine_s_own_words(rig: Rig) -> None:
    rig.cycle(b"a", step_report(1))
    rig.cycle(b"b", hello("gpu0"), step_report(2))
    assert rig.transport.take(b"b", wire.Refused) and not rig.policies(b"b")
    rig.cycle(b"a", step_report(2, roster=False))
    assert rig.policies(b"a")[-1].report_seq == 2


def test_restarted_engine_keeps_what_was_learned(rig: Rig) -> None:
    for seq in range(1, 150):
        rig.cycle(b"a", step_report(seq, roster=seq == 1))
    before = rig.session().engine.acceptance.pooled_hazards().tolist()
    last = rig.policies()[-1].seq
    rig.transport.gone.add(b"a")  # killed: no goodbye, but the connection is gone
    rig.cycle(b"b", hello("gpu0", epoch=2))
    assert not rig.transport.take(b"b", wire.Refused)
    engine = rig.session().engine
    assert engine.hello.epoch == 2 and engine.is_warm
    assert engine.acceptance.pooled_hazards().tolist() == before
    rig.cycle(b"b", step_report(1, epoch=2))
    (policy,) = rig.policies(b"b")
    assert policy.epoch == 2 and policy.seq > last
    assert policy.num_probes == 0  # no second sweep
    assert [e.state for e in rig.bus.of(EngineEvent)] == ["connected", "replaced", "connected"]


def test_engine_that_says_goodbye_is_remembered(rig: Rig) -> None:
    for seq in range(1, 150):
        rig.cycle(b"a", step_report(seq, roster=seq == 1))
    rig.cycle(b"a", wire.Goodbye(epoch=2))  # of another epoch: not this one
    assert "gpu0" in rig.loop.sessions.by_name
    rig.cycle(b"a", wire.Goodbye(epoch=1))
    assert "gpu0" not in rig.loop.sessions.by_name
    rig.connect(b"b", "gpu0", epoch=2)
    assert rig.session().engine.is_warm


def test_nothing_is_decided_for_an_engine_that_reports_and_goes_in_one_turn(rig: Rig) -> None:
    rig.cycle(b"a", step_report(1), wire.Goodbye(epoch=1))
    assert rig.policies() == []
    assert rig.loop.counters["decisions"] == 0
    assert rig.loop.sessions.retired["gpu0"].learned.num_steps == 1  # what it said is still true


def test_nothing_is_published_of_an_engine_after_it_was_said_to_have_left(rig: Rig) -> None:
    rig.cycle(b"a", step_report(1))
    rig.cycle(b"a", step_report(2, roster=False), wire.Goodbye(epoch=1))
    rig.clock.now += 2.0
    rig.cycle()
    of_engine = [event for event in rig.bus.events if getattr(event, "engine", "") == "gpu0"]
    assert isinstance(of_engine[-1], EngineEvent) and of_engine[-1].state == "left"
    assert [event.seq for event in rig.bus.of(StepEvent)] == [1]


def test_steps_of_an_engine_are_not_taken_for_those_of_its_successor(rig: Rig) -> None:
    rig.cycle(b"a", step_report(7), hello("gpu0", epoch=2), step_report(1, epoch=2))
    assert [event.seq for event in rig.bus.of(StepEvent)] == [1]


def test_engine_is_lost_after_long_silence_and_returns_where_it_was(rig: Rig) -> None:
    for seq in range(1, 150):
        rig.cycle(b"a", step_report(seq, roster=seq == 1))
    last = rig.policies()[-1].seq
    rig.clock.now += rig.settings.control.engine_timeout_s + 1
    rig.transport.gone.add(b"a")
    rig.cycle()
    assert [e.state for e in rig.bus.of(EngineEvent)][-1] == "lost"
    rig.transport.gone.clear()
    rig.transport.sent.clear()
    rig.cycle(b"a", step_report(150, roster=False))
    assert rig.transport.take(b"a", wire.Resync)
    rig.cycle(b"a", hello("gpu0"), step_report(151))
    (policy,) = rig.policies()
    assert policy.seq > last  # or the engine would take it for an old one
    assert rig.session().engine.is_warm


def test_engine_without_requests_is_kept_while_it_is_connected(rig: Rig) -> None:
    rig.cycle(b"a", step_report(1))
    rig.clock.now += 100 * rig.settings.control.engine_timeout_s
    rig.cycle()
    assert [e.state for e in rig.bus.of(EngineEvent)] == ["connected"]
    rig.cycle(b"a", step_report(2, roster=False))
    assert rig.session().engine.num_reports == 2


def test_engine_that_hangs_loses_its_name_to_whoever_comes_by_it(rig: Rig) -> None:
    rig.cycle(b"a", step_report(1))
    rig.clock.now += rig.settings.control.engine_timeout_s + 1
    rig.cycle(b"b", hello("gpu0", epoch=2), step_report(1, epoch=2))
    assert len(rig.policies(b"b")) == 1 and rig.session().peer == b"b"


def test_idle_engine_is_kept_when_it_repeats_its_hello(rig: Rig) -> None:
    rig.cycle(b"a", step_report(1))
    for _ in range(20):
        rig.clock.now += rig.settings.control.engine_timeout_s / 2
        rig.cycle(b"a", hello("gpu0"))
    assert rig.session().engine.num_reports == 1


def test_engine_over_a_new_connection_goes_on(rig: Rig) -> None:
    rig.cycle(b"a", step_report(1))
    rig.transport.gone.add(b"a")
    rig.cycle(b"b", hello("gpu0"), step_report(2, roster=False))
    (policy,) = rig.policies(b"b")
    assert policy.report_seq == 2
    assert rig.session().engine.num_reports == 2


def test_one_connection_is_one_engine(rig: Rig) -> None:
    for i in range(RETIRED_KEPT + 10):
        rig.cycle(b"a", hello(f"name{i}"))
    assert len(rig.loop.sessions.by_name) == len(rig.loop.sessions.by_peer) == 1
    assert len(rig.loop.sessions.retired) <= RETIRED_KEPT


def test_engines_are_refused_beyond_the_allowed_number() -> None:
    rig = Rig(max_engines=2)
    for i in range(2):
        rig.connect(b"%d" % i, f"gpu{i}")
    for _ in range(10):  # told once in a while, however often it knocks
        rig.cycle(b"2", hello("gpu2"))
    assert rig.loop.counters["engines_refused"] == 10
    (refused,) = rig.transport.take(b"2", wire.Refused)
    assert "max_engines" in refused.reason
    rig.cycle(b"0", hello("gpu0"), step_report(1))  # those within go on
    assert len(rig.policies(b"0")) == 1
    rig.cycle(b"1", wire.Goodbye(epoch=1))
    rig.cycle(b"2", hello("gpu2"))
    assert not rig.transport.take(b"2", wire.Refused)


def test_engine_is_told_why_when_its_hello_contradicts_itself(rig: Rig) -> None:
    rig.cycle(b"a", step_report(1))
    limits = msgspec.structs.replace(hello().limits, graph_sizes=(8, 4))
    rig.cycle(b"b", msgspec.structs.replace(hello("gpu1"), limits=limits))
    (refused,) = rig.transport.take(b"b", wire.Refused)
    assert "graph_sizes" in refused.reason
    # Nor does it cost an engine of that name what it has.
    rig.transport.gone.add(b"a")
    rig.cycle(b"b", msgspec.structs.replace(hello("gpu0", 2), limits=limits))
    assert rig.session().engine.hello.epoch == 1


def test_refusal_fits_the_wire_when_the_name_is_long() -> None:
    rig = Rig()
    name = "\u00e9" * 256
    rig.connect(b"a", name)
    rig.cycle(b"a", step_report(1))
    rig.cycle(b"b", hello(name, epoch=2))
    assert len(rig.transport.take(b"b", wire.Refused)) == 1


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


LIES: list[dict[str, Any]] = [
    {"step_s": float("nan")},
    {"step_s": -0.03},
    {"context_tokens": 1 << 60},
    {"num_accepted": wire.pack([3] * 3, "u8")},
    {"num_emitted": wire.pack([9] * 3, "u8")},
    {"features": wire.pack([[float("inf")] * 3, [4.0] * 3], "f32")},
    {"num_drafted": b"\x02"},
]


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: next(iter(lie)))
def test_lying_engine_is_quarantined_with_an_event_and_others_are_unaffected(
    rig: Rig, lie: dict[str, Any]
) -> None:
    alone = Rig()
    alone.connect(b"b", "gpu1")
    rig.connect(b"b", "gpu1")
    for seq in range(1, 40):
        rig.transport.put(b"a", step_report(seq, **(lie if seq > 5 else {})))
        for each in (rig, alone):
            each.cycle(b"b", step_report(seq))
            each.clock.now += 0.02
    [note] = [n for n in rig.bus.of(NoteEvent) if n.kind == "quarantined"]
    assert (note.engine, note.level) == ("gpu0", "error")
    assert "quarantined" in [e.state for e in rig.bus.of(EngineEvent) if e.engine == "gpu0"]
    assert rig.loop.counters["quarantines"] == 1
    assert len(rig.policies(b"b")) == len(alone.policies(b"b")) > 0
    for mine, other in zip(
        rig.session("gpu1").engine.acceptance.pooled_hazards(),
        alone.session("gpu1").engine.acceptance.pooled_hazards(),
        strict=True,
    ):
        assert mine == other
    refusal = rig.transport.take(b"a", wire.Refused)[0]
    assert "quarantine" in refusal.reason


def test_quarantined_engine_may_return_and_is_not_believed_what_it_taught(rig: Rig) -> None:
    for seq in range(1, 30):
        rig.cycle(b"a", step_report(seq, **(LIES[0] if seq > 10 else {})))
    rig.transport.sent.clear()
    rig.clock.now += 1.0
    rig.cycle(b"a", hello("gpu0"))
    assert "quarantine" in rig.transport.take(b"a", wire.Refused)[0].reason
    rig.clock.now += rig.settings.limits.quarantine_s + 1
    rig.cycle(b"a", hello("gpu0"))
    assert rig.session().engine.learned.num_steps == 0
    rig.cycle(b"a", step_report(50))
    assert rig.policies()


def test_nobody_is_forgotten_for_a_liar_or_for_a_restart_in_place(rig: Rig) -> None:
    for i in range(RETIRED_KEPT):
        rig.cycle(b"%d" % i, hello(f"name{i}"))
        rig.cycle(b"%d" % i, wire.Goodbye(epoch=1))
    kept = set(rig.loop.sessions.retired)
    assert len(kept) == RETIRED_KEPT
    rig.cycle(b"a", hello("gpu0", 2))  # started anew
    assert set(rig.loop.sessions.retired) == kept
    for seq in range(1, 30):
        rig.cycle(b"a", step_report(seq, epoch=2, **(LIES[0] if seq > 5 else {})))
    assert rig.loop.counters["quarantines"] == 1
    assert set(rig.loop.sessions.retired) == kept
    assert "gpu0" not in rig.loop.sessions.trials


def test_engine_is_not_quarantined_when_few_of_its_frames_are_corrupted(rig: Rig) -> None:
    for seq in range(1, 1001):
        rig.clock.now += 0.02
        rig.cycle(b"a", b"\xc1" if seq % 25 == 0 else step_report(seq))
        rig.cycle(b"a", step_report(seq))  # comes twice
    assert rig.loop.counters["quarantines"] == 0
    assert rig.session().engine.num_reports == 960 + 40


def test_noisy_engine_starves_no_other(rig: Rig) -> None:
    rig.connect(b"b", "gpu1")
    learned: list[str] = []
    for session in (rig.session("gpu0"), rig.session("gpu1")):
        learn = session.engine.learn

        def noted(observation: Any, name: str = session.engine.name, learn: Any = learn) -> Any:
            learned.append(name)
            return learn(observation)

        session.engine.learn = noted
    seq = 0
    for turn in range(1, 41):  # a second: 40 steps of the one, 100,000 of the other
        for _ in range(2500):
            seq += 1
            rig.transport.put(b"a", step_report(seq))
        rig.transport.put(b"b", step_report(turn))
        rig.loop.cycle(0.0)
        rig.clock.now += 1 / 40
    limit = rig.settings.limits.max_reports_per_s
    assert rig.session("gpu0").engine.num_reports <= 1.3 * limit
    assert rig.session("gpu0").engine.num_throttled > 90_000
    assert learned.count("gpu0") <= 40 * control_loop.MAX_LEARNED_PER_CYCLE
    assert learned.count("gpu1") == 40  # every step of the other, in its own turn
    assert any(n.kind == "throttled" and n.engine == "gpu0" for n in rig.bus.of(NoteEvent))


def test_engine_is_refused_when_it_announces_too_many_requests() -> None:
    rig = Rig()
    rig.loop.apply(config.replace(rig.settings, {"limits.max_requests": 100}))
    rig.cycle(b"a", hello("gpu0", max_num_running=101))
    assert "limits.max_requests" in rig.transport.take(b"a", wire.Refused)[0].reason


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


# -- what was learned -----------------------------------------------------------------------------


def run_steps(rig: Rig, peer: bytes, count: int, **more: Any) -> None:
    for seq in range(1, count + 1):
        rig.cycle(peer, step_report(seq, roster=seq == 1, **more))


def other_model(name: str, epoch: int = 1) -> wire.Hello:
    fingerprint = wire.Fingerprint(target="another", proposer="lookup")
    return msgspec.structs.replace(hello(name, epoch), fingerprint=fingerprint)


def pass_interval(rig: Rig, turns: int = 5) -> list[CheckpointEvent]:
    before = len(rig.bus.of(CheckpointEvent))
    rig.clock.now += rig.settings.state.checkpoint_s
    for _ in range(turns):
        rig.cycle()
    return rig.bus.of(CheckpointEvent)[before:]


def test_one_checkpoint_is_taken_a_turn_when_the_interval_has_passed(rig: Rig) -> None:
    rig.cycle(b"b", other_model("gpu1"))
    run_steps(rig, b"a", 5)
    run_steps(rig, b"b", 5)
    assert not rig.bus.of(CheckpointEvent)
    assert len(pass_interval(rig, turns=1)) == 1
    rig.cycle()
    assert len({event.key_id for event in rig.bus.of(CheckpointEvent)}) == 2
    assert pass_interval(rig) == []  # nothing was learned since


def test_checkpoint_is_of_the_engine_that_learned_most_when_several_are_alike(rig: Rig) -> None:
    rig.connect(b"b", "gpu1")
    run_steps(rig, b"a", 5)
    run_steps(rig, b"b", 9)
    (event,) = pass_interval(rig)
    assert event.engine == "gpu1"
    assert decode(event.frame, event.key_id).num_steps == 9


def test_engine_starts_from_what_its_like_knows_and_learns_on_its_own(rig: Rig) -> None:
    run_steps(rig, b"a", 150)
    rig.connect(b"b", "gpu1")
    first, second = rig.session("gpu0").engine, rig.session("gpu1").engine
    known = first.acceptance.pooled_hazards().tolist()
    assert second.is_warm and second.acceptance.pooled_hazards().tolist() == known
    assert rig.bus.of(NoteEvent)[-1].kind == "warm_start"
    rig.transport.sent.clear()
    run_steps(rig, b"b", 5)
    policy = rig.policies(b"b")[0]
    assert "seed sweep" not in policy.reason
    assert first.acceptance.pooled_hazards().tolist() == known
    assert second.acceptance.pooled_hazards().tolist() != known


def test_engines_of_different_fingerprints_share_nothing(rig: Rig) -> None:
    run_steps(rig, b"a", 150)
    rig.cycle(b"b", other_model("gpu1"))
    assert rig.session("gpu1").engine.learned.num_steps == 0


def test_engine_is_not_warm_when_its_kind_was_only_observed() -> None:
    rig = Rig()
    rig.connect()
    run_steps(rig, b"a", 150, source="own")
    rig.connect(b"b", "gpu1")
    second = rig.session("gpu1")
    assert second.engine.learned.num_steps == 150
    assert not second.engine.is_warm and second.planner.prober.sweeping


def test_next_daemon_controls_from_the_first_step_when_it_has_the_checkpoints(rig: Rig) -> None:
    run_steps(rig, b"a", 150)
    rig.cycle(b"a", wire.Goodbye(epoch=1))  # gone, but not forgotten
    (last,) = rig.loop.checkpoints()
    library = Library()
    library.put(decode(last.frame, last.key_id))
    again = Rig(library=library)
    again.connect(b"a", epoch=2)
    again.cycle(b"a", step_report(1, epoch=2))
    (policy,) = again.policies()
    assert "seed sweep" not in policy.reason
    expected = rig.loop.sessions.retired["gpu0"].acceptance.log_survival().T.tobytes()
    assert policy.log_survival == expected
    (note,) = again.bus.of(NoteEvent)
    assert note.kind == "warm_start" and "150 steps" in note.text


def test_what_was_learned_is_saved_when_the_name_goes_to_another_model(rig: Rig) -> None:
    run_steps(rig, b"a", 20)
    rig.transport.gone.add(b"a")
    rig.cycle(b"b", other_model("gpu0", 2))
    (event,) = rig.bus.of(CheckpointEvent)
    assert decode(event.frame).num_steps == 20


def test_nothing_is_saved_when_state_is_off() -> None:
    rig = Rig()
    rig.settings = msgspec.structs.replace(
        rig.settings, state=msgspec.structs.replace(rig.settings.state, enabled=False)
    )
    rig.loop = ControlLoop(rig.settings, rig.transport, rig.bus, rig.clock)
    rig.connect()
    run_steps(rig, b"a", 5)
    assert pass_interval(rig) == [] and rig.loop.checkpoints() == []


def test_refused_state_is_counted_and_told_when_its_engine_comes() -> None:
    library = Library()
    library.note_refused(ModelKey.of(hello()).id, "damaged")
    rig = Rig(library=library)
    rig.connect()
    (note,) = rig.bus.of(NoteEvent)
    assert note.kind == "cold_start" and "damaged" in note.text
    assert rig.loop.counters["states_refused"] == 1


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
