"""The engine's end of the loop against a bare socket: who chooses when, and what is told."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from fakes import Clock, FakeDaemon, decode_batch, ipc_endpoint, policy, step_facts, until
from scripted_engine import hello

from smartspec.engine_adapter import link as link_module
from smartspec.engine_adapter import messages as wire
from smartspec.engine_adapter.base import DecodeBatch, FixedLength
from smartspec.engine_adapter.lengths import Choice
from smartspec.engine_adapter.levels import Levels
from smartspec.engine_adapter.link import EngineLink
from smartspec.engine_adapter.ranking import Ranking

OWN_LENGTH = 3  # what `hello` announces as the engine's own


class Pair:
    """A link and the socket that it talks to."""

    def __init__(self, endpoint: str) -> None:
        self.clock = Clock()
        self.endpoint = endpoint
        self.daemon = FakeDaemon(endpoint)
        self.link = EngineLink(endpoint, hello(), clock=self.clock)
        self.heard: list[Any] = []

    def listen(self) -> None:
        self.heard += self.daemon.receive()

    def connect(self) -> None:
        """Until the daemon has the engine's Hello, and the link a heartbeat."""

        def knock() -> None:
            self.clock.now += 0.2
            self.link.idle()
            self.listen()

        until(lambda: self.heard, knock)
        self.daemon.beat()
        until(lambda: self.link.stats.num_connections, self.link.idle)
        self.daemon.receive(0.05)
        self.heard.clear()

    def deliver(self, *frames: wire.Message | bytes) -> None:
        """Send and let the link take it in: a resync at the end tells that all has come."""
        self.daemon.send(*frames, wire.Resync(daemon_epoch=self.daemon.epoch))
        self.listen()
        before = sum(isinstance(m, wire.Hello) for m in self.heard)

        def turn() -> None:
            self.link.idle()
            self.listen()

        until(lambda: sum(isinstance(m, wire.Hello) for m in self.heard) > before, turn)

    def report(self, batch: DecodeBatch, **more: Any) -> wire.StepReport:
        """Report a step and receive it."""
        self.link.report(step_facts(batch, **more))
        until(lambda: any(isinstance(m, wire.StepReport) for m in self.heard), self.listen)
        reports = [m for m in self.heard if isinstance(m, wire.StepReport)]
        assert len(reports) == 1
        self.heard.clear()
        return reports[0]

    def source(self) -> str:
        return self.link.choose(decode_batch()).source

    def close(self) -> None:
        self.link.close()
        self.daemon.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    with ipc_endpoint() as endpoint:
        made = Pair(endpoint)
        made.connect()
        yield made
        made.close()


# -- who chooses ----------------------------------------------------------------------------------


def test_own_length_is_chosen_when_there_never_was_a_daemon() -> None:
    with ipc_endpoint() as endpoint:
        clock = Clock()
        link = EngineLink(endpoint, hello(), clock=clock)
        batch = decode_batch()
        batch.ceiling[0] = 1
        for _ in range(100):
            clock.now += 0.1
            choice = link.choose(batch)
            assert choice.lengths.tolist() == [1, OWN_LENGTH, OWN_LENGTH]
            assert choice.source == "own"
            link.report(step_facts(batch))
        assert link.stats.num_reports_dropped == 100
        assert link.stats.num_reports_sent == link.stats.num_errors == 0
        link.close()


def test_own_source_is_asked_when_one_is_given(pair: Pair) -> None:
    class Own:
        closed = False

        def choose(self, batch: DecodeBatch) -> Choice:
            return Choice.fixed(np.full(batch.size, 4), "own")

        def report(self, facts: Any) -> None:
            raise AssertionError("reports are the daemon's")

        def idle(self) -> None:
            pass

        def close(self) -> None:
            pass

    link = EngineLink(pair.endpoint, hello("other"), own=Own(), clock=pair.clock)
    assert link.choose(decode_batch()).lengths.tolist() == [4, 4, 4]
    link.close()


def test_policy_falls_back_to_its_table_then_to_own_when_the_daemon_is_silent(pair: Pair) -> None:
    assert pair.source() == "own"
    pair.deliver(policy(ttl_s=1.0, fallback_s=60.0))
    assert pair.source() == "policy"
    pair.clock.now += 0.99
    assert pair.source() == "policy"
    pair.clock.now += 0.02
    choice = pair.link.choose(decode_batch())
    assert choice.source == "fallback" and choice.lengths.tolist() == [2, 2, 2]
    assert pair.link.choose(decode_batch(range(8))).lengths.tolist() == [1] * 8
    pair.clock.now += 59.9
    assert pair.source() == "fallback"
    pair.clock.now += 0.2
    choice = pair.link.choose(decode_batch())
    assert choice.source == "own" and choice.lengths.tolist() == [OWN_LENGTH] * 3
    # A heartbeat alone does not bring the expired program back; a policy does.
    pair.daemon.beat()
    pair.deliver()
    assert pair.source() == "own"
    pair.deliver(policy(2))
    assert pair.source() == "policy"


def test_heartbeats_keep_a_policy_in_force(pair: Pair) -> None:
    pair.deliver(policy(ttl_s=1.0))
    for _ in range(10):
        pair.clock.now += 0.9
        pair.daemon.beat()
        pair.deliver()
        assert pair.source() == "policy"


def test_policy_is_back_when_the_daemon_is_heard_within_the_fallback(pair: Pair) -> None:
    pair.deliver(policy())
    pair.clock.now += 30
    assert pair.source() == "fallback"
    pair.daemon.beat()
    pair.deliver()
    assert pair.source() == "policy"


def test_newest_policy_wins_whatever_the_order(pair: Pair) -> None:
    pair.deliver(*(policy(seq, reason=f"number {seq}") for seq in (5, 7, 6)))
    pair.source()
    assert pair.link.stats.last_reason == "number 7"
    taken = pair.link.stats.num_policies
    assert taken in (1, 2)  # the first may come in a turn of its own
    assert pair.link.stats.num_stale_policies == 1
    pair.deliver(policy(7), policy(3))
    assert pair.link.stats.num_policies == taken
    assert pair.link.stats.num_stale_policies == 3


def test_policy_is_ignored_when_it_is_for_another_epoch(pair: Pair) -> None:
    pair.deliver(policy(epoch=2))
    assert pair.source() == "own"
    assert pair.link.stats.num_stale_policies == 1


def test_policy_of_a_restarted_daemon_counts_when_its_number_is_lower(pair: Pair) -> None:
    pair.deliver(policy(500, reason="old"))
    pair.daemon.epoch = 100
    pair.deliver(policy(1, daemon_epoch=100, reason="new"))
    assert pair.link.stats.last_reason == "new"
    assert pair.link.stats.num_connections == 2


def test_probe_is_run_once_per_policy(pair: Pair) -> None:
    pair.deliver(policy(1, value_of_time=1e9, probe_length=4, num_probes=1))
    first = pair.link.choose(decode_batch())
    assert first.source == "probe" and sorted(first.lengths.tolist()) == [0, 0, 4]
    report = pair.report(decode_batch())
    assert (report.source, report.policy_seq) == ("probe", 1)
    second = pair.link.choose(decode_batch())
    assert second.source == "policy" and second.lengths.tolist() == [0, 0, 0]


def test_choice_is_ready_and_nothing_is_received_when_it_was_prepared(pair: Pair) -> None:
    pair.deliver(policy())
    pair.daemon.send(policy(seq=2))
    until(lambda: pair.link.stats.num_policies == 2, lambda: pair.link.prepare(decode_batch()))
    expected = pair.link._program.choose(decode_batch()) if pair.link._program else None
    pair.daemon.send(policy(seq=3))
    time.sleep(0.1)
    ready = pair.link.ready()
    assert ready is not None and ready.by.policy_seq == 2 and ready.by.source == "policy"
    assert isinstance(ready.lengths, Ranking) and expected is not None
    assert ready.lengths.choose(0).lengths == expected.lengths.tolist()
    assert pair.link.stats.num_policies == 2 and pair.link.stats.state == "policy"
    report = pair.report(decode_batch())
    assert (report.source, report.policy_seq) == ("policy", 2)
    assert pair.link.ready() is None  # it was prepared for one step only
    pair.link.choose(decode_batch())
    assert pair.link.stats.num_policies == 3


def test_choice_is_ready_for_drafts_that_are_yet_to_be_found(pair: Pair) -> None:
    pair.deliver(policy())
    batch = decode_batch()
    pair.link.prepare(batch, np.zeros((len(batch.features), 4), np.float32))
    ready = pair.link.ready()
    assert ready is not None and isinstance(ready.lengths, Levels)


def test_nothing_is_ready_when_it_is_not_the_prepared_policy_that_chooses(pair: Pair) -> None:
    pair.deliver(policy(ttl_s=1.0))
    pair.link.prepare(decode_batch())
    pair.clock.now += 0.6
    assert pair.link.ready() is None  # the engine stood still
    pair.link.prepare(decode_batch())
    pair.clock.now += 0.45
    assert pair.link.ready() is None  # the policy has run out
    pair.deliver(policy(2, value_of_time=1e9, probe_length=4, num_probes=1))
    pair.link.prepare(decode_batch())
    assert pair.link.ready() is None  # a probe is due
    assert pair.source() == "probe"
    pair.link.prepare(decode_batch())
    pair.deliver(policy(3))
    assert pair.link.ready() is None  # another policy has come
    pair.link.prepare(decode_batch())
    assert pair.link.ready() is not None


def test_fallback_and_the_engines_own_lengths_are_ready_when_the_daemon_is_silent(
    pair: Pair,
) -> None:
    def prepared(after_s: float) -> tuple[str, int, list[int]] | None:
        pair.link.prepare(decode_batch())
        pair.clock.now += after_s
        ready = pair.link.ready()
        if ready is None:
            return None
        assert not isinstance(ready.lengths, Levels)
        assert pair.link.stats.state == ready.by.source
        return ready.by.source, ready.by.policy_seq, ready.lengths.choose(7).lengths

    own = ("own", 0, pair.link.choose(decode_batch()).lengths.tolist())
    assert prepared(0.0) == own  # nobody has steered yet
    pair.deliver(policy(ttl_s=1.0, fallback_s=10.0))
    pair.clock.now += 1.1
    fallback = pair.link.choose(decode_batch())
    assert fallback.source == "fallback" and fallback.lengths.tolist() != own[2]
    assert prepared(0.0) == ("fallback", 0, fallback.lengths.tolist())
    pair.clock.now += 9.5
    assert prepared(0.45) is None  # it has run out in between
    assert prepared(0.0) == own


def test_fallback_is_ready_though_a_probe_was_never_placed(pair: Pair) -> None:
    pair.deliver(policy(ttl_s=1.0, probe_length=4, num_probes=1))
    pair.clock.now += 1.1  # no step came in time
    pair.link.prepare(decode_batch())
    ready = pair.link.ready()
    assert ready is not None and ready.by.source == "fallback"


def test_policy_is_in_force_when_the_engine_stood_still_after_preparing(pair: Pair) -> None:
    pair.deliver(policy(ttl_s=1.0))
    pair.link.prepare(decode_batch())
    pair.clock.now += 3600.0
    pair.daemon.beat()
    time.sleep(0.1)
    assert pair.source() == "policy"


def test_features_are_read_while_a_policy_holds_or_one_may_come_first(pair: Pair) -> None:
    pair.link.prepare(decode_batch())
    assert not pair.link.may_steer  # nobody steers
    pair.clock.now += 1.0
    assert pair.link.may_steer  # `choose` will look whether somebody does
    pair.deliver(policy(ttl_s=1.0))
    pair.link.prepare(decode_batch())
    assert pair.link.may_steer
    pair.clock.now += 1.1
    pair.link.prepare(decode_batch())
    assert not pair.link.may_steer and pair.source() == "fallback"


def test_own_length_keeps_to_floors_as_a_policy_does() -> None:
    batch = decode_batch(ceiling=4, floor=np.array([0, 3, 9], np.uint8))
    assert FixedLength(1).choose(batch).lengths.tolist() == [1, 3, 4]
    assert FixedLength(9).choose(batch).lengths.tolist() == [4, 4, 4]


def test_own_length_is_chosen_when_preparing_fails(pair: Pair) -> None:
    pair.deliver(policy())
    wrong = decode_batch()
    wrong = DecodeBatch(wrong.request_ids, wrong.ceiling[:2], wrong.features)
    pair.link.prepare(wrong)
    assert pair.link.stats.num_errors == 1
    assert pair.source() == "own"


def test_good_policy_stays_when_a_bad_one_follows(pair: Pair) -> None:
    pair.deliver(policy(1, reason="good"), policy(2, value_of_time=float("nan")))
    # The bad one was the newest of its turn; the next good one counts again.
    pair.deliver(policy(3, reason="better"))
    pair.deliver(policy(4, curves=()))
    assert pair.source() == "policy"
    assert pair.link.stats.last_reason == "better"
    assert pair.link.stats.num_bad_frames >= 1
    assert pair.link.stats.num_errors == 0


def test_policy_by_confidence_is_refused_by_an_engine_without_confidences(pair: Pair) -> None:
    pair.deliver(policy(1, reason="good"))
    pair.deliver(policy(2, reason="bad", by_confidence=True))
    assert pair.source() == "policy"
    assert pair.link.stats.last_reason == "good"
    assert pair.link.stats.num_bad_frames >= 1


def test_own_length_is_chosen_when_the_policy_cannot_be_applied(pair: Pair) -> None:
    axes = (wire.BucketAxis(feature="match_length", edges=(1.0,)),)
    table = wire.pack(-np.ones((2, 5)), "f32")
    pair.deliver(policy(axes=axes, log_survival=table))
    broken = decode_batch(num_features=1)  # an adapter that forgets a feature
    assert pair.link.choose(broken).source == "own"
    assert pair.link.stats.num_errors == 1
    pair.deliver(policy(2))
    assert pair.source() == "policy"


def test_refused_engine_runs_as_configured_and_asks_again_later(pair: Pair) -> None:
    pair.deliver(policy())
    pair.daemon.send(wire.Refused(daemon_epoch=99, reason="full"))
    until(lambda: pair.link.stats.last_reason == "full", pair.link.idle)
    assert pair.source() == "own"
    for _ in range(40):
        pair.clock.now += 0.1
        pair.link.report(step_facts(decode_batch()))
    assert pair.daemon.receive(0.05) == []
    pair.clock.now += link_module.REFUSED_S
    pair.link.report(step_facts(decode_batch()))
    until(lambda: pair.heard, pair.listen)
    assert isinstance(pair.heard[0], wire.Hello)


# -- what is told ---------------------------------------------------------------------------------


def test_report_carries_the_step_as_it_was(pair: Pair) -> None:
    pair.deliver(policy(7))
    batch = decode_batch(
        [4, 9], num_prefill_tokens=12, weight=np.array([1, 2], np.float32), ceiling=4
    )
    pair.link.choose(batch)
    more: dict[str, Any] = {
        "num_draft_forwards": 3,
        "num_draft_tokens": np.int64(6),
        "num_catch_up_tokens": 2,
        "num_waiting": 5,
        "kv_usage": np.float32(0.5),
        "step_s": np.float32(0.25),
        "target_s": None,
        "draft_s": None,
        "mode": "uniform",
        "num_cut": np.array([1, 0], np.uint8),
        "num_cut_accepted": np.array([1, 0], np.uint8),
    }
    report = pair.report(batch, length=3, accepted=2, **more)
    assert list(report.num_cut + report.num_cut_accepted) == [1, 0, 1, 0]
    assert report.roster is not None
    assert wire.unpack(report.roster.request_ids, "u64", (2,), "ids").tolist() == [4, 9]
    assert wire.unpack(report.roster.weight, "f32", (2,), "weight").tolist() == [1, 2]
    assert report.roster.floor == b""
    assert list(report.num_drafted + report.num_accepted) == [3, 3, 2, 2]
    assert list(report.num_emitted + report.num_available) == [3, 3, 4, 4]
    assert wire.unpack(report.features, "f32", (2, 2), "features").tolist() == [[0.5] * 2, [4] * 2]
    assert (report.num_prefill_tokens, report.context_tokens) == (12, 200)
    assert (report.num_draft_forwards, report.num_draft_tokens) == (3, 6)
    assert (report.num_catch_up_tokens, report.num_waiting) == (2, 5)
    assert (report.kv_usage, report.step_s, report.mode) == (0.5, 0.25, "uniform")
    assert report.target_s is None and report.draft_s is None
    assert (report.policy_seq, report.source) == (7, "policy")


def test_roster_travels_only_when_it_has_changed(pair: Pair) -> None:
    versions = []
    weight = np.ones(2, np.float32)
    for batch in (
        decode_batch([1, 2]),
        decode_batch([1, 2]),
        decode_batch([2, 1]),
        decode_batch([2, 1], weight=weight),
        decode_batch([2, 1], weight=weight.copy()),
        decode_batch([2, 1], weight=weight, floor=np.ones(2, np.uint8)),
        decode_batch([2, 1], token_time_target_s=np.array([0, 0.5], np.float32)),
        decode_batch([]),
    ):
        report = pair.report(batch)
        versions.append((report.roster_version, report.roster is not None))
    changes = [True, False, True, True, False, True, True, True]
    assert [given for _, given in versions] == changes
    assert np.diff([version for version, _ in versions]).tolist() == changes[1:]


def test_roster_is_sent_anew_when_the_engine_reuses_its_arrays(pair: Pair) -> None:
    batch = decode_batch([1, 2], weight=np.ones(2, np.float32))
    first = pair.report(batch)
    batch.request_ids[:] = [3, 4]
    second = pair.report(batch)
    assert second.roster is not None
    assert second.roster_version > first.roster_version
    assert batch.weight is not None
    batch.weight[0] = 2.0
    assert pair.report(batch).roster is not None


def test_hello_and_roster_are_sent_anew_when_asked_for(pair: Pair) -> None:
    assert pair.report(decode_batch()).roster is not None
    assert pair.report(decode_batch()).roster is None
    pair.deliver()  # a Resync
    assert any(isinstance(m, wire.Hello) for m in pair.heard)
    pair.heard.clear()
    assert pair.report(decode_batch()).roster is not None


def test_one_hello_answers_when_resyncs_come_in_a_flood(pair: Pair) -> None:
    pair.daemon.send(*[wire.Resync(daemon_epoch=99)] * 50)
    time.sleep(0.05)
    pair.link.idle()
    assert len(pair.daemon.receive(0.05)) <= 2


def test_sequence_counts_steps_that_were_not_sent(pair: Pair) -> None:
    first = pair.report(decode_batch())
    pair.clock.now += 10  # silence: nothing is sent
    for _ in range(5):
        pair.link.report(step_facts(decode_batch()))
    pair.daemon.receive(0.05)
    pair.daemon.beat()
    pair.deliver()
    pair.heard.clear()
    report = pair.report(decode_batch())
    assert report.seq == first.seq + 6
    assert report.num_dropped == 5


def test_hellos_become_rarer_when_the_daemon_stays_silent(pair: Pair) -> None:
    pair.clock.now += 10
    for _ in range(200):
        pair.clock.now += 0.05
        pair.link.report(step_facts(decode_batch()))
    knocks: list[Any] = []
    until(lambda: len(knocks) >= 5, lambda: knocks.extend(pair.daemon.receive(0.1)))
    knocks += pair.daemon.receive(0.1)
    assert {type(m) for m in knocks} == {wire.Hello}
    assert len(knocks) <= 14  # in 10 s: after 0.1, 0.2, 0.4, 0.8 s, then every second


def test_idle_engine_says_that_it_is_there(pair: Pair) -> None:
    for _ in range(30):
        pair.clock.now += 0.5
        pair.daemon.beat()
        time.sleep(0.005)
        pair.link.idle()
    hellos: list[Any] = []
    until(lambda: hellos, lambda: hellos.extend(pair.daemon.receive(0.1)))
    hellos += pair.daemon.receive(0.1)
    assert len(hellos) <= 4


def test_reports_are_dropped_and_counted_when_the_daemon_does_not_read(pair: Pair) -> None:
    batch = decode_batch(range(256))
    slowest = 0.0
    for _ in range(20_000):
        began = time.perf_counter()
        pair.link.report(step_facts(batch))
        slowest = max(slowest, time.perf_counter() - began)
        if pair.link.stats.num_reports_dropped > 100:
            break
    assert pair.link.stats.num_reports_dropped > 100
    assert pair.link.stats.num_errors == 0
    assert slowest < 1.0  # it never waits for the daemon


# -- bad frames -----------------------------------------------------------------------------------


def test_bad_frames_are_counted_and_nothing_else(pair: Pair) -> None:
    plain = wire.encode(policy(5))
    bad = [b"", b"\xc1", plain[:-9], b"\x81\xa4type\xa5hello", wire.encode(hello())]
    skewed = wire.encode(wire.Heartbeat(daemon_epoch=1, version=2))
    pair.deliver(*bad, skewed)
    assert pair.link.stats.num_bad_frames == 6
    pair.daemon.socket.send_multipart((pair.daemon.peer, b"more", b"still more"))
    pair.deliver()
    assert pair.link.stats.num_bad_frames == 8  # parts of a message count as frames
    assert pair.link.stats.num_policies == pair.link.stats.num_errors == 0
    assert pair.link.stats.num_connections == 1
    assert pair.source() == "own"


def test_step_takes_in_a_bounded_number_of_frames_when_flooded(pair: Pair) -> None:
    heartbeat = wire.encode(wire.Heartbeat(daemon_epoch=99))
    flood = link_module.MAX_FRAMES_PER_STEP
    heard = 0

    def count(daemon_epoch: int) -> None:
        nonlocal heard
        heard += 1

    pair.link._hear = count  # type: ignore[method-assign]
    pair.daemon.send(*[heartbeat] * (2 * flood))
    time.sleep(0.1)
    pair.link.choose(decode_batch())
    assert heard <= flood


def test_link_closes_with_a_goodbye_and_then_keeps_to_its_own(pair: Pair) -> None:
    pair.deliver(policy())
    pair.heard.clear()
    pair.link.close()
    pair.link.close()
    until(lambda: pair.heard, pair.listen)
    assert pair.heard == [wire.Goodbye(epoch=1)]
    assert pair.source() == "own"
    pair.link.report(step_facts(decode_batch()))
    pair.link.idle()
    assert pair.link.stats.num_errors == 0


def test_policy_lives_out_its_time_when_only_another_daemon_is_heard(pair: Pair) -> None:
    pair.deliver(policy())
    assert pair.source() == "policy"
    pair.daemon.epoch += 1
    for _ in range(8):  # a daemon that observes, say: alive, but without a policy
        pair.clock.now += 0.2
        pair.deliver(wire.Heartbeat(daemon_epoch=pair.daemon.epoch))
    assert pair.source() == "fallback"


# -- what is said of it ---------------------------------------------------------------------------


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was logged at INFO since the last look."""
    lines = [record.getMessage() for record in caplog.records if record.levelname == "INFO"]
    caplog.clear()
    return lines


def pass_s(pair: Pair, seconds: float, beat: bool = False) -> None:
    """Steps, ten a second, with or without a daemon that is heard."""
    for _ in range(round(10 * seconds)):
        pair.clock.now += 0.1
        if beat:
            pair.deliver(wire.Heartbeat(daemon_epoch=pair.daemon.epoch))
        pair.source()
        pair.link.report(step_facts(decode_batch()))


def test_coming_and_going_of_the_daemon_is_logged_once_each(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    pass_s(pair, 12.0, beat=True)
    pair.deliver(policy(fallback_s=30.0))
    caplog.clear()
    pass_s(pair, 20.0)
    (line,) = told(caplog)
    assert pair.endpoint in line and "from the table" in line
    pass_s(pair, 30.0)
    (line,) = told(caplog)
    assert "runs as configured" in line
    pass_s(pair, 5.0, beat=True)
    (line,) = told(caplog)
    assert "is heard" in line


def test_daemon_that_comes_and_goes_all_the_time_is_logged_seldom(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    pass_s(pair, 12.0, beat=True)
    caplog.clear()
    for _ in range(10):
        pass_s(pair, 2.0)
        pass_s(pair, 0.5, beat=True)
    assert len(told(caplog)) <= 3  # in 25 seconds


def test_daemon_that_never_answers_is_logged_once_with_what_to_look_at(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    with ipc_endpoint() as endpoint:
        clock = Clock()
        link = EngineLink(endpoint, hello(), clock=clock)
        for _ in range(300):
            clock.now += 0.1
            link.choose(decode_batch())
            link.report(step_facts(decode_batch()))
        link.close()
    (line,) = told(caplog)
    assert endpoint in line and "is this engine's key on its list?" in line
