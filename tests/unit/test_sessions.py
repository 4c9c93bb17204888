"""Who may connect, who is lost, who is not believed: the loop on a fake transport and clock."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from fakes import step_report
from loop_rig import Rig
from scripted_engine import hello

from smartspec.daemon import config, control_loop
from smartspec.daemon.event_bus import (
    EngineEvent,
    NoteEvent,
    StepEvent,
)
from smartspec.daemon.sessions import RETIRED_KEPT
from smartspec.engine_adapter import messages as wire

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


def test_engine_that_was_forgotten_while_idle_is_told_no_number_that_it_holds_already() -> None:
    rig = Rig()
    rig.connect(b"a")
    for seq in range(1, 20):
        rig.cycle(b"a", step_report(seq, roster=seq == 1))
    last = rig.policies()[-1].seq
    rig.cycle(b"a", wire.Goodbye(epoch=1))
    for i in range(RETIRED_KEPT + 1):
        rig.connect(b"b%d" % i, f"other{i}")
        rig.cycle(b"b%d" % i, wire.Goodbye(epoch=1))
    assert "gpu0" not in rig.loop.sessions.retired
    rig.cycle(b"a", hello("gpu0"), step_report(20))
    (policy,) = rig.policies()
    assert policy.seq > last


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


# -- liars and the loud ---------------------------------------------------------------------------


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
