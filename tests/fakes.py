"""Stand-ins for what the loop and the link meet outside: clock, transport, bus, daemon."""

from __future__ import annotations

import shutil
import socket
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import numpy as np
import zmq

from smartspec.daemon.decision import Decision
from smartspec.daemon.engines import Engine
from smartspec.daemon.event_bus import BusEvent
from smartspec.daemon.planner import Planner
from smartspec.engine_adapter import messages as wire
from smartspec.engine_adapter.base import DecodeBatch, FixedLength, StepFacts
from smartspec.engine_adapter.lengths import Choice
from smartspec.engine_adapter.program import Program

PATIENCE_S = 30.0  #: how long anything real may take on a busy machine


def free_port() -> int:
    """A TCP port of this host that was free just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Clock:
    """Seconds that pass when told to."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class FakeTransport:
    """Frames in and out of lists."""

    def __init__(self) -> None:
        self.inbox: deque[tuple[bytes, bytes]] = deque()
        self.sent: list[tuple[bytes, wire.DaemonMessage]] = []
        self.gone: set[bytes] = set()
        self.waits: list[float] = []
        self.closed = False
        self.num_unsendable = 0
        self.num_denied = 0

    def reload(self) -> None:
        pass

    def wait(self, timeout_s: float) -> bool:
        self.waits.append(timeout_s)
        return bool(self.inbox)

    def receive(self) -> tuple[bytes, bytes] | None:
        return self.inbox.popleft() if self.inbox else None

    def send(self, peer: bytes, frame: bytes) -> bool:
        if peer in self.gone:
            return False
        self.sent.append((peer, wire.decode_daemon_message(frame)))
        return True

    def close(self) -> None:
        self.closed = True

    def put(self, peer: bytes, *messages: wire.Message | bytes) -> None:
        for message in messages:
            frame = message if isinstance(message, bytes) else wire.encode(message)
            self.inbox.append((peer, frame))

    def take(self, peer: bytes, kind: type[Any]) -> list[Any]:
        """Messages of one kind sent to ``peer``; they are not there the next time."""
        taken = [m for p, m in self.sent if p == peer and isinstance(m, kind)]
        self.sent = [(p, m) for p, m in self.sent if not (p == peer and isinstance(m, kind))]
        return taken


class RecordingBus:
    """Keeps all events."""

    def __init__(self) -> None:
        self.events: list[BusEvent] = []
        self.wanted: set[type[Any]] = set()
        self.num_dropped = 0

    def wants(self, kind: type[Any]) -> bool:
        return kind in self.wanted

    def publish(self, event: BusEvent) -> None:
        self.events.append(event)

    def of(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.events if type(event) is kind]

    def close(self) -> None:
        pass


class FakeDaemon:
    """A daemon's socket, without a daemon: sends what it is told."""

    def __init__(self, endpoint: str, epoch: int = 99) -> None:
        self.epoch = epoch
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.ROUTER)
        self.socket.linger = 0
        self.socket.rcvhwm = 100  # full soon when it is not read
        self.socket.bind(endpoint)
        self.peer = b""

    def receive(self, timeout_s: float = 0.0) -> list[Any]:
        """All that has come, or comes within ``timeout_s``; remembers whom to answer."""
        received = []
        while self.socket.poll(round(timeout_s * 1000)):
            self.peer, frame = self.socket.recv_multipart()
            received.append(wire.decode_engine_message(frame))
            timeout_s = 0.0
        return received

    def send(self, *frames: wire.Message | bytes) -> None:
        for frame in frames:
            data = frame if isinstance(frame, bytes) else wire.encode(frame)
            self.socket.send_multipart((self.peer, data))

    def beat(self) -> None:
        self.send(wire.Heartbeat(daemon_epoch=self.epoch))

    def close(self) -> None:
        self.socket.close()
        self.context.term()


def until(condition: Callable[[], object], turn: Callable[[], object] = lambda: None) -> None:
    """Take turns until a condition holds; fails when it never does."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        turn()
        time.sleep(0.002)


@contextmanager
def ipc_endpoint() -> Iterator[str]:
    """A path short enough for a Unix socket, which pytest's own often are not."""
    folder = tempfile.mkdtemp(prefix="smartspec-")
    try:
        yield f"ipc://{folder}/e"
    finally:
        shutil.rmtree(folder)


def decode_batch(
    ids: Any = (1, 2, 3), *, ceiling: int = 5, num_features: int = 2, **more: Any
) -> DecodeBatch:
    size = len(ids)
    return DecodeBatch(
        np.array(ids, np.uint64),
        np.full(size, ceiling, np.uint8),
        np.tile(np.array([[0.5], [4.0]], np.float32)[:num_features], size),
        **more,
    )


def step_facts(batch: DecodeBatch, length: int = 0, accepted: int = 0, **more: Any) -> StepFacts:
    size = batch.size
    values: dict[str, Any] = {
        "batch": batch,
        "num_drafted": np.full(size, length, np.uint8),
        "num_accepted": np.full(size, accepted, np.uint8),
        "num_emitted": np.full(size, accepted + 1, np.uint8),
        "step_s": 0.03,
        "target_s": 0.025,
        "draft_s": 0.001,
        "context_tokens": 100 * size,
    }
    return StepFacts(**(values | more))


def step_report(
    seq: int, ids: Any = (1, 2, 3), *, roster: bool | wire.Roster = True, **more: Any
) -> Any:
    """A report of a step at length 2 of which 1 was accepted; ``more`` overrides any field."""
    size = len(ids)
    values: dict[str, Any] = {
        "epoch": 1,
        "seq": seq,
        "roster_version": 1,
        "step_s": 0.03,
        "target_s": 0.025,
        "draft_s": 0.001,
        "num_drafted": wire.pack([2] * size, "u8"),
        "num_accepted": wire.pack([1] * size, "u8"),
        "num_emitted": wire.pack([2] * size, "u8"),
        "num_available": wire.pack([5] * size, "u8"),
        "features": wire.pack([[0.5] * size, [4.0] * size], "f32"),
        "context_tokens": 100 * size,
        "num_draft_tokens": 2 * size,
        "source": "policy",
        **more,
    }
    if isinstance(roster, wire.Roster):
        values["roster"] = roster
    elif roster:
        version = values["roster_version"]
        values["roster"] = wire.Roster(version=version, request_ids=wire.pack(ids, "u64"))
    return wire.StepReport(**values)


def policy(seq: int = 1, *, lengths_for: float = 0.9, **more: Any) -> wire.Policy:
    """A policy for `decode_batch`: one bucket, acceptance ``lengths_for``, a cheap target."""
    values: dict[str, Any] = {
        "epoch": 1,
        "daemon_epoch": 99,
        "seq": seq,
        "report_seq": 1,
        "ttl_s": 1.0,
        "value_of_time": 100.0,
        "depth": 5,
        "curves": (
            wire.Curve(
                mode="ragged",
                num_tokens=(1.0, 1000.0),
                seconds=(0.02, 0.03),
            ),
        ),
        "max_length": 5,
        "log_survival": wire.pack(np.log([[lengths_for]]) * np.arange(1, 6), "f32"),
        "fallback_batch": (1, 8),
        "fallback_length": (2, 1),
        "fallback_s": 60.0,
        "reason": "told so",
    }
    return wire.Policy(**(values | more))


class Steering:
    """A `LengthSource` that plans in place: engine, planner and program without a wire.

    In the loop's order: decide for what a report says, then learn from it. A policy steers the next
    step, or ``late`` steps later.
    """

    def __init__(
        self, engine: Engine, planner: Planner, own_length: int = 3, late: int = 0
    ) -> None:
        self.engine = engine
        self.planner = planner
        self.program: Program | None = None
        self.decisions: list[Decision] = []
        self._own_length = own_length
        self._on_the_way: deque[tuple[wire.Policy, Any] | None] = deque([None] * late)
        self._chosen: tuple[int, str] = (0, "own")
        self._probing = False
        self._seq = 0
        self._ids = np.zeros(0, np.uint64)
        self._version = 0

    @classmethod
    def cold(cls, proposer: str, limits: wire.Limits) -> Steering:
        """Of an engine that nothing is known of yet; policies come one step late."""
        fingerprint = wire.Fingerprint(target="recorded", proposer=proposer)
        hello = wire.Hello(engine="replay", epoch=1, fingerprint=fingerprint, limits=limits)
        engine = Engine(hello)
        return cls(engine, Planner(engine, daemon_epoch=9), late=1)

    def delay(self, late: int) -> None:
        """From now on policies steer ``late`` steps later than they could."""
        self._on_the_way = deque([None] * late)

    def choose(self, batch: DecodeBatch) -> Choice:
        if self.program is None:
            return FixedLength(self._own_length).choose(batch)
        choice = self.program.choose(batch)
        if self._probing:
            choice = self.program.with_probes(choice, batch)
            self._probing = False
        self._chosen = (self.program.policy.seq, choice.source)
        return choice

    def report(self, facts: StepFacts) -> None:
        self._seq += 1
        ids = facts.batch.request_ids
        fresh = not self._version or not np.array_equal(ids, self._ids)
        if fresh:
            self._version += 1
            self._ids = ids.copy()
        report = step_report(
            self._seq,
            ids,
            roster=fresh,
            roster_version=self._version,
            step_s=float(facts.step_s),
            target_s=None if facts.target_s is None else float(facts.target_s),
            draft_s=None if facts.draft_s is None else float(facts.draft_s),
            num_drafted=wire.pack(facts.num_drafted, "u8"),
            num_accepted=wire.pack(facts.num_accepted, "u8"),
            num_emitted=wire.pack(facts.num_emitted, "u8"),
            num_available=wire.pack(facts.batch.ceiling, "u8"),
            features=wire.pack(facts.batch.features, "f32"),
            num_prefill_tokens=facts.batch.num_prefill_tokens,
            context_tokens=facts.context_tokens,
            num_draft_forwards=facts.num_draft_forwards,
            num_draft_tokens=facts.num_draft_tokens,
            num_waiting=facts.num_waiting,
            mode=facts.mode,
            policy_seq=self._chosen[0],
            source=self._chosen[1],
            accepted_ranks=b""
            if facts.accepted_ranks is None
            else wire.pack(facts.accepted_ranks, "u64"),
            num_cut=b"" if facts.num_cut is None else wire.pack(facts.num_cut, "u8"),
            num_cut_accepted=b""
            if facts.num_cut_accepted is None
            else wire.pack(facts.num_cut_accepted, "u8"),
        )
        if report.roster is not None:
            report = msgspec.structs.replace(
                report, roster=_with_wishes(report.roster, facts.batch)
            )
        observation = self.engine.observe(report)
        decision = self.planner.decide()
        if decision is not None:
            self.decisions.append(decision)
        news = decision is not None and decision.is_news
        self._on_the_way.append((decision.policy, self._ids) if decision and news else None)
        arrived = self._on_the_way.popleft()
        if arrived is not None:
            policy, roster = arrived
            self.program = Program(policy, self.engine.hello.limits.features, roster, self.program)
            self._probing = policy.num_probes > 0
        self.engine.learn(observation)
        self.planner.prober.account(observation)

    def idle(self) -> None:
        pass

    def close(self) -> None:
        pass


def _with_wishes(roster: wire.Roster, batch: DecodeBatch) -> wire.Roster:
    weight, target = batch.weight, batch.token_time_target_s
    return msgspec.structs.replace(
        roster,
        weight=b"" if weight is None else wire.pack(weight, "f32"),
        token_time_target_s=b"" if target is None else wire.pack(target, "f32"),
    )
