"""Hostile frames, both ways: counted, never a crash, never a wrong decision for others.

More than 20,000 frames in all: real ones whose bytes or whose meaning was changed, and noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec
import numpy as np
import pytest
import zmq
from fakes import (
    Clock,
    FakeDaemon,
    FakeTransport,
    decode_batch,
    ipc_endpoint,
    policy,
    step_facts,
    step_report,
    until,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_engine import hello

from smartspec.daemon import config
from smartspec.daemon.admission.throttle import Throttle
from smartspec.daemon.control_loop import ControlLoop
from smartspec.daemon.event_bus import NullBus
from smartspec.daemon.transport import Server
from smartspec.engine_adapter import messages as wire
from smartspec.engine_adapter.link import EngineLink
from smartspec.engine_adapter.messages import MessageError
from smartspec.engine_adapter.program import Program

pytestmark = pytest.mark.integration

FEATURES = ("last_accepted_share", "match_length")
FRAMES_PER_EXAMPLE = 16
LOOP_EXAMPLES = 800  # 12,800 frames
PROGRAM_EXAMPLES = 7000
LINK_EXAMPLES = 120  # 1,920 frames

# -- hostile values -------------------------------------------------------------------------------

numbers = st.sampled_from(
    [float("nan"), float("inf"), -float("inf"), -1.0, 0.0, -0.0, 1e-320, 1e-9, 0.5, 1e9, 1e300]
)
counts = st.sampled_from(
    [-1, 0, 1, 2, 5, 6, 64, 65, 255, 256, 4096, 2**31, 2**53, 2**63, 2**64 - 1]
)
f32_bits = [
    0,
    1,
    0x7F800000,
    0xFF800000,
    0x7FC00000,
    0x7F7FFFFF,
    0xFF7FFFFF,
    0xBF800000,
    0x3F800000,
]


@st.composite
def columns(draw: st.DrawFn) -> bytes:
    """Bytes of a column: of any size, or of plausible sizes with values that cannot be."""
    size = draw(st.sampled_from([0, 1, 2, 3, 3, 3, 3, 4, 600]))
    match draw(st.integers(0, 3)):
        case 0:
            return draw(st.binary(max_size=40))
        case 1:
            return bytes(draw(st.lists(st.integers(0, 255), min_size=size, max_size=size)))
        case 2:
            bits = draw(st.lists(st.sampled_from(f32_bits), min_size=size, max_size=size))
            return np.array(bits, "<u4").tobytes()
        case _:
            ids = draw(st.lists(st.integers(0, 3), min_size=size, max_size=size))
            return wire.pack(ids, "u64")


values = st.one_of(
    numbers,
    counts,
    columns(),
    st.none(),
    st.booleans(),
    st.text(max_size=8),
    st.sampled_from(["", "x" * 5000, "gpu0\n\x1b[2J", "uniform"]),
    st.lists(st.one_of(counts, numbers, st.just("match_length")), max_size=6),
    st.just(list(range(3000))),
    st.just(["match_length"] * 80),
)


@st.composite
def frames(draw: st.DrawFn, real: list[wire.Message]) -> bytes:
    """A real message, whole, with fields replaced or with its bytes changed; or noise."""
    frame = wire.encode(draw(st.sampled_from(real)))
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return draw(st.binary(max_size=64))
    if kind == 1:
        return frame + bytes(wire.MAX_FRAME_BYTES)
    if kind == 9:  # whole: what comes after the checks is to be reached whatever is drawn
        return frame
    if kind <= 3:
        data = bytearray(frame)
        for _ in range(draw(st.integers(1, 4))):
            if data:
                data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
        return bytes(data[: draw(st.integers(0, len(data)))] if kind == 2 else data)
    plain = msgspec.msgpack.decode(frame)
    for _ in range(draw(st.integers(1, 3))):
        target = plain
        while True:
            key = draw(st.sampled_from(sorted(target)))
            if isinstance(target[key], dict) and target[key] and draw(st.booleans()):
                target = target[key]
            else:
                break
        target[key] = draw(values)
    return msgspec.msgpack.encode(plain)


# -- to the daemon --------------------------------------------------------------------------------


#: Quarantine and rates would keep most of what follows from being read at all.
UNGUARDED = {"limits.quarantine_after": 1_000_000, "limits.max_reports_per_s": 100_000}


class Scene:
    """A daemon, an honest engine, and a hostile peer that is let in when ``hostile``.

    The honest engine alone is what the decisions are compared with.
    """

    def __init__(self) -> None:
        self.transport = FakeTransport()
        self.clock = Clock()
        self.loop = ControlLoop(
            config.load(None, {}, UNGUARDED),
            self.transport,
            NullBus(),
            self.clock,
            wall=lambda: 0.0,
        )
        self.loop.sessions.hellos = Throttle(1e9, 1e9)
        self.loop.sessions.epoch = 5
        self.rng = np.random.default_rng(0)
        self.seq = 0

    def honest(self) -> None:
        """The next report of the honest engine, and its Hello before the first.

        No policy has come into force with it, so that one is told with every report.
        """
        if not self.seq:
            self.transport.put(b"honest", hello("honest"))
        self.seq += 1
        accepted = np.minimum(self.rng.geometric(0.4, 3) - 1, 2)
        self.transport.put(
            b"honest",
            step_report(
                self.seq,
                roster=self.seq == 1,
                num_accepted=wire.pack(accepted, "u8"),
                num_emitted=wire.pack(accepted + 1, "u8"),
                step_s=0.03 + 0.002 * float(self.rng.random()),
                source="own",
                policy_seq=0,
            ),
        )

    def cycle(self) -> list[bytes]:
        """One turn; the policies that the honest engine got, as bytes but for their numbers.

        Those rise over all engines.
        """
        self.clock.now += 0.03
        self.loop.cycle(0.0)
        assert not self.transport.inbox
        policies = [
            wire.encode(msgspec.structs.replace(message, seq=0))
            for peer, message in self.transport.sent
            if peer == b"honest" and isinstance(message, wire.Policy)
        ]
        self.transport.sent.clear()
        return policies


UP: list[wire.Message] = [
    hello("hostile", 7),
    hello("honest", 8),
    step_report(1, epoch=7),
    step_report(2, epoch=7, roster=False),
    wire.Goodbye(epoch=7),
    wire.Goodbye(epoch=1),
]
hostile_frames = st.lists(frames(UP), min_size=FRAMES_PER_EXAMPLE, max_size=FRAMES_PER_EXAMPLE)


@pytest.mark.slow
def test_honest_engine_is_decided_for_bit_by_bit_as_if_alone() -> None:
    together, alone = Scene(), Scene()
    num_frames = 0

    @settings(max_examples=LOOP_EXAMPLES)
    @given(hostile_frames, st.booleans())
    def attack(frames: list[bytes], introduce: bool) -> None:
        nonlocal num_frames
        num_frames += len(frames)
        if introduce:  # known peers reach deeper; another name each time, so that all may be new
            name = f"hostile{num_frames % 1000}"
            together.transport.put(b"hostile", hello(name, 7))
        for frame in frames[: len(frames) // 2]:
            together.transport.put(b"hostile", frame)
        together.honest()
        for frame in frames[len(frames) // 2 :]:
            together.transport.put(b"hostile", frame)
        alone.honest()
        got, expected = together.cycle(), alone.cycle()
        assert got == expected and len(got) == 1

    attack()
    counters = together.loop.counters
    assert num_frames >= LOOP_EXAMPLES * FRAMES_PER_EXAMPLE
    assert not {name: n for name, n in counters.items() if name.startswith("failures")}
    assert counters["frames_refused"] > num_frames // 4
    assert together.loop.sessions.by_name["honest"].engine.num_refused == 0
    # Some got through all checks, or the test would say nothing of what comes after them.
    assert counters["reports"] > together.seq + 20
    assert counters["decisions"] > together.seq + 20


# -- to the engine --------------------------------------------------------------------------------

DOWN: list[wire.Message] = [
    policy(
        3,
        axes=(wire.BucketAxis(feature="match_length", edges=(3.0,)),),
        log_survival=wire.pack(-np.arange(1, 11).reshape(5, 2) / 5, "f32"),
        correction=wire.pack([1, 0.5, 2], "f32"),
        roster_version=1,
        probe_length=2,
        num_probes=1,
        draft_fixed_s=0.001,
        draft_per_forward_s=0.001,
        draft_per_token_s=0.0001,
    ),
    policy(2),
]
BATCH = decode_batch()
ROSTER = BATCH.request_ids


def test_policy_is_refused_or_runs_whatever_it_says() -> None:
    outcomes = {"refused": 0, "ran": 0}

    @settings(max_examples=PROGRAM_EXAMPLES)
    @given(frames(DOWN))
    def attack(frame: bytes) -> None:
        try:
            message = wire.decode_daemon_message(frame)
            if not isinstance(message, wire.Policy):
                return
            program = Program(message, FEATURES, ROSTER)
        except MessageError:
            outcomes["refused"] += 1
            return
        for batch in (BATCH, decode_batch([2, 9]), decode_batch([])):
            choice = program.with_probes(program.choose(batch), batch)
            fallback = program.fallback(batch)
            for made in (choice, fallback):
                if made is not None:
                    assert len(made.lengths) == batch.size
                    assert (made.lengths >= 0).all() and (made.lengths <= batch.ceiling).all()
        outcomes["ran"] += 1

    attack()
    assert outcomes["refused"] > PROGRAM_EXAMPLES // 4
    assert outcomes["ran"] > 50


@pytest.fixture
def connected() -> Iterator[tuple[FakeDaemon, EngineLink, Callable[[], None]]]:
    with ipc_endpoint() as endpoint:
        daemon = FakeDaemon(endpoint)
        link = EngineLink(endpoint, hello())

        def turn() -> None:
            link.idle()
            daemon.receive()

        until(lambda: daemon.peer, turn)
        yield daemon, link, turn
        link.close()
        daemon.close()


def test_link_serves_the_engine_whatever_the_daemon_sends(
    connected: tuple[FakeDaemon, EngineLink, Callable[[], None]],
) -> None:
    daemon, link, _ = connected
    down: list[wire.Message] = [
        *DOWN,
        wire.Heartbeat(daemon_epoch=99),
        wire.Resync(daemon_epoch=99, reason="no roster"),
        wire.Refused(daemon_epoch=99, reason="full"),
    ]

    @settings(max_examples=LINK_EXAMPLES)
    @given(st.lists(frames(down), min_size=FRAMES_PER_EXAMPLE, max_size=FRAMES_PER_EXAMPLE))
    def attack(frames: list[bytes]) -> None:
        before = link.stats.num_bad_frames
        daemon.send(*frames, b"\xc1 the end")

        def step() -> None:
            choice = link.choose(BATCH)
            assert len(choice.lengths) == 3
            assert (choice.lengths >= 0).all() and (choice.lengths <= 5).all()
            link.report(step_facts(BATCH))
            daemon.receive()

        step()
        until(lambda: link.stats.num_bad_frames > before, step)

    attack()
    assert link.stats.num_errors == 0
    assert link.stats.num_bad_frames >= LINK_EXAMPLES
    # And an honest daemon after that is obeyed.
    honest = policy(1, daemon_epoch=12345, reason="honest")
    link._refused_until = -np.inf

    def obey() -> None:
        daemon.send(honest)
        link.choose(BATCH)
        daemon.receive()

    until(lambda: link.stats.last_reason == "honest", obey)
    assert link.choose(BATCH).source == "policy"


def test_connection_survives_an_oversized_frame(
    connected: tuple[FakeDaemon, EngineLink, Callable[[], None]],
) -> None:
    daemon, link, turn = connected
    daemon.send(bytes(wire.MAX_FRAME_BYTES + 1))
    until(lambda: link.stats.num_bad_frames, turn)
    daemon.send(policy())
    until(lambda: link.stats.num_policies, turn)
    assert link.stats.num_errors == 0


def test_daemon_survives_an_oversized_frame() -> None:
    """ZeroMQ cuts the sender's connection, unread; others do not notice."""
    with ipc_endpoint() as endpoint:
        loop = ControlLoop(config.load(None, {}, {}), Server(endpoint), NullBus())
        link = EngineLink(endpoint, hello("honest"))
        context = zmq.Context()
        hostile = context.socket(zmq.DEALER)
        hostile.linger = 0
        hostile.connect(endpoint)

        def turn() -> None:
            link.idle()
            loop.cycle(0.0)

        until(lambda: link.stats.num_connections, turn)
        hostile.send(bytes(wire.MAX_FRAME_BYTES + 1))

        def step() -> None:
            link.choose(BATCH)
            link.report(step_facts(BATCH))
            loop.cycle(0.02)

        until(lambda: link.stats.num_policies >= 15, step)
        assert link.stats.num_bad_frames == 0
        assert loop.counters["engines_connected"] == 1
        hostile.close()
        context.term()
        link.close()
        loop.close()
