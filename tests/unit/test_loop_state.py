"""What was learned outlives engines and daemons: the loop on a fake transport and clock."""

from __future__ import annotations

from typing import Any

import msgspec
from fakes import step_report
from loop_rig import Rig
from scripted_engine import hello

from smartspec.daemon import config
from smartspec.daemon.control_loop import ControlLoop
from smartspec.daemon.event_bus import (
    CheckpointEvent,
    NoteEvent,
)
from smartspec.daemon.state.learned import ModelKey, decode
from smartspec.daemon.state.library import Library
from smartspec.engine_adapter import messages as wire


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


def test_shorter_interval_holds_at_once_when_settings_are_read_again(rig: Rig) -> None:
    run_steps(rig, b"a", 5)
    assert rig.settings.state.checkpoint_s > 11
    rig.clock.now += 11
    rig.loop.apply(config.replace(rig.settings, {"state.checkpoint_s": 10.0}))
    rig.cycle()
    assert len(rig.bus.of(CheckpointEvent)) == 1


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
