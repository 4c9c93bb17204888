"""What the daemon does, published lossily for other processes (Redis, Prometheus, inspect).

A ZeroMQ XPUB socket (PUB, and it tells what is asked for): the daemon never waits for a reader.
Three frames per event: topic (the event's tag); the publisher's epoch, different at every start,
and a sequence number counted per topic (two u64, little-endian); the event in MessagePack. When a
reader is slow, ZeroMQ drops for that reader alone, unseen by the publisher: so it is readers who
count what they have missed, by the gaps in the sequence.

Evolution follows the wire's rules (engine_adapter/messages.py): append only, new fields have
defaults.
"""

from __future__ import annotations

import os
import secrets
import time
import typing
from typing import Literal, Protocol

import msgspec
import zmq
from msgspec import Struct, field

SEND_HIGH_WATER = 4000  #: events queued per reader before it misses some
#: Plain numbers: arithmetic with zmq's enumerations takes as long as sending.
_LAST, _MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)


Level = Literal["debug", "info", "warning", "error"]


class Event(Struct, frozen=True, kw_only=True, tag_field="type", omit_defaults=True):
    """``t_s``: when, in seconds since the Unix epoch (for people; intervals are in the fields)."""

    t_s: float = field(default_factory=time.time)


class StepEvent(Event, frozen=True, kw_only=True, gc=False, tag="step"):
    """An engine's step, as reported."""

    engine: str
    seq: int
    num_running: int
    step_s: float
    num_waiting: int = 0
    kv_usage: float = 0.0  #: share of the KV room, 0 to 1
    target_s: float | None = None
    draft_s: float | None = None
    num_drafted: int = 0  #: draft tokens verified, over the batch
    num_accepted: int = 0
    num_emitted: int = 0
    num_prefill_tokens: int = 0
    context_tokens: int = 0
    source: str = "own"  #: who chose the lengths (messages.SOURCES)
    staleness_steps: int | None = None  #: from the report that its policy knew to this one
    predicted_step_s: float | None = None  #: None: no model yet


class DecisionEvent(Event, frozen=True, kw_only=True, gc=False, tag="decision"):
    """A policy: what was decided, why, and what it should bring."""

    engine: str
    policy_seq: int
    report_seq: int
    steering: bool  #: False: observing, paused, retreated, or a block without SmartSpec
    reason: str
    value_of_time: float = 0.0  #: tokens per second
    depth: int = 0
    mode: str = "ragged"
    length_counts: tuple[int, ...] = ()  #: [K + 1], requests at length 0, 1, ...
    predicted_goodput: float = 0.0  #: tokens per second
    predicted_goodput_none: float = 0.0  #: at length 0 for all
    predicted_goodput_static: float = 0.0  #: at the engine's own static length
    acceptance: tuple[float, ...] = ()  #: [K], pooled P(accept at depth j | reached j)
    num_probes: int = 0
    decide_s: float = 0.0
    learn_s: float = 0.0
    num_targets: int = 0  #: requests that ask for a time per token
    num_targets_out_of_reach: int = 0  #: of these, who cannot have it even if all others give way


class GainEvent(Event, frozen=True, kw_only=True, gc=False, tag="gain"):
    """What SmartSpec brings to an engine (docs/adoption.md), once a second while it works.

    Gains are ratios less 1; bounds are of 95% intervals; None: not known yet.
    """

    engine: str
    stance: str  #: "observe", "canary", "control", "paused" or "retreated"
    arm: str  #: what it runs now: "smartspec", "own" or "none"
    gain_over_none: float | None = None  #: estimated, of late
    gain_over_none_low: float | None = None
    gain_over_none_high: float | None = None
    gain_over_static: float | None = None
    gain_over_static_low: float | None = None
    gain_over_static_high: float | None = None
    measured_over_none: float | None = None  #: by blocks side by side
    measured_over_none_low: float | None = None
    measured_over_none_high: float | None = None
    measured_over_static: float | None = None
    measured_over_static_low: float | None = None
    measured_over_static_high: float | None = None
    num_compared_none: int = 0  #: pairs of blocks
    num_compared_static: int = 0
    bias_none: float | None = None  #: goodput measured over predicted, less 1, when it ran
    bias_static: float | None = None
    evidence_worse: float = 1.0  #: that the engine's own setting is better; over 1000 it retreats
    num_retreats: int = 0
    retry_s: float | None = None  #: until it is tried again; None: not retreated


#: What may become of an engine; "replaced": by one of its name.
STATES = ("connected", "left", "lost", "replaced", "quarantined")


class EngineEvent(Event, frozen=True, kw_only=True, tag="engine"):
    """An engine came or went."""

    engine: str
    epoch: int
    state: str  #: one of `STATES`
    fingerprint: dict[str, str] = {}
    limits: dict[str, object] = {}


class PresentEvent(EngineEvent, frozen=True, kw_only=True, tag="present"):
    """An engine is connected as it was, told every few seconds: for readers who have come since."""


NoteKind = Literal[
    "bad_frame",
    "cold_start",
    "drift",
    "fault",
    "pause",
    "quarantined",
    "refused",
    "release",
    "reload_failed",
    "retreat",
    "telemetry_down",
    "throttled",
    "warm_start",
]
#: Of every kind of note on the bus, how grave it is.
NOTES: dict[NoteKind, Level] = {
    "bad_frame": "warning",
    "cold_start": "info",
    "drift": "warning",
    "fault": "error",
    "pause": "warning",
    "quarantined": "error",
    "refused": "warning",
    "release": "warning",
    "reload_failed": "error",
    "retreat": "error",
    "telemetry_down": "warning",
    "throttled": "warning",
    "warm_start": "info",
}


class NoteEvent(Event, frozen=True, kw_only=True, gc=False, tag="note"):
    """Something that an operator may want to know: bad frames, gaps, drift, a restart."""

    kind: str  #: of `NOTES`; telemetry adds a few of its own to Redis
    text: str
    engine: str = ""  #: empty: not about one engine
    level: Level = "info"


class LinkCounts(Struct, frozen=True, kw_only=True, gc=False, omit_defaults=True):
    """Reports of one engine that taught nothing, since it connected."""

    num_dropped: int = 0  #: by the engine, that could not send them; as it says itself
    num_missed: int = 0  #: steps that no report told of, those dropped included
    num_repeated: int = 0  #: came twice or out of order
    num_refused: int = 0  #: could not be believed
    num_throttled: int = 0  #: beyond limits.max_reports_per_s, and so not read


class LoopEvent(Event, frozen=True, kw_only=True, tag="loop"):
    """The daemon itself, once a second."""

    num_engines: int = 0
    counters: dict[str, int] = {}  #: totals since the daemon started
    links: dict[str, LinkCounts] = {}  #: by engine, of those that have anything to count
    started_s: float = 0.0  #: when, in seconds since the Unix epoch: no two daemons at once
    version: str = ""  #: of its package
    protocol: int = 0  #: of its wire
    cpu_user_s: float = 0.0  #: processor time so far
    cpu_system_s: float = 0.0
    resident_bytes: int | None = None  #: memory in use
    is_reloaded: bool = True  #: False: the last SIGHUP found what cannot be used


class CheckpointEvent(Event, frozen=True, kw_only=True, gc=False, tag="checkpoint"):
    """What was learned of one kind of engine, to be stored: newer ones replace older ones."""

    key_id: str  #: learned.ModelKey.id
    frame: bytes  #: learned.encode
    engine: str = ""  #: the one that learned it


class FrameEvent(Event, frozen=True, kw_only=True, gc=False, tag="frame"):
    """A frame between an engine and the daemon; published only while somebody records."""

    turn: int  #: of the loop, which takes in all that has arrived and decides once
    at_s: float  #: on the loop's clock
    peer: bytes
    inbound: bool  #: from the engine
    frame: bytes


BusEvent = (
    StepEvent
    | DecisionEvent
    | GainEvent
    | EngineEvent
    | NoteEvent
    | LoopEvent
    | CheckpointEvent
    | FrameEvent
    | PresentEvent
)

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(BusEvent)
_TOPICS = {kind: str(kind.__struct_config__.tag).encode() for kind in typing.get_args(BusEvent)}
#: What is always published.
USUAL = tuple(topic.decode() for kind, topic in _TOPICS.items() if kind is not FrameEvent)


def encode(event: BusEvent) -> bytes:
    """The last frame of an event."""
    return _encoder.encode(event)


class Bus(Protocol):
    """Where the loop says what it does. Never blocks, never raises."""

    num_dropped: int  #: events that could not be handed on at all

    def publish(self, event: BusEvent) -> None: ...

    def wants(self, kind: type[Event]) -> bool: ...  # somebody asked for these by name

    def close(self) -> None: ...


class NullBus:
    """A bus that nobody listens to."""

    num_dropped = 0

    def publish(self, event: BusEvent) -> None:
        pass

    def wants(self, kind: type[Event]) -> bool:
        return False

    def close(self) -> None:
        pass


class EventBus:
    """The publishing end. Not thread-safe: one thread publishes.

    Attributes
    ----------
    num_dropped : events that could not be handed to ZeroMQ at all
    """

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket
        self._epoch = secrets.token_bytes(8)
        self._seq = dict.fromkeys(_TOPICS, 0)
        self._wanted: set[bytes] = set()
        self.num_dropped = 0

    @classmethod
    def bind(cls, endpoint: str) -> EventBus:
        """Publish at ``endpoint``; an ipc socket gets mode 0660. Raises zmq.ZMQError."""
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.XPUB)
        socket.sndhwm = SEND_HIGH_WATER
        socket.linger = 0
        # By umask and not by chmod after: there is no moment in which others could connect.
        umask = os.umask(0o117)
        try:
            socket.bind(endpoint)
        except zmq.ZMQError:
            socket.close()
            raise
        finally:
            os.umask(umask)
        return cls(socket)

    def publish(self, event: BusEvent) -> None:
        kind = type(event)
        seq = self._seq[kind] = self._seq[kind] + 1
        try:
            body = _encoder.encode(event)
            # One by one: send_multipart takes twice as long, for its checks.
            self._socket.send(_TOPICS[kind], _MORE)
            self._socket.send(self._epoch + seq.to_bytes(8, "little"), _MORE)
            self._socket.send(body, _LAST)
        except (zmq.ZMQError, msgspec.MsgspecError, OverflowError, TypeError):
            self.num_dropped += 1

    def wants(self, kind: type[Event]) -> bool:
        """Whether a reader has asked for this kind of event, and not just for all there are."""
        while True:
            try:
                told = self._socket.recv(zmq.NOBLOCK)
            except zmq.ZMQError:
                break
            topic = bytes(told[1:])
            if told[:1] == b"\1":
                self._wanted.add(topic)
            elif told[:1] == b"\0":
                self._wanted.discard(topic)
        return _TOPICS[kind] in self._wanted

    def close(self) -> None:
        self._socket.close()


class Subscriber:
    """The reading end: newest events as they come, and a count of those missed.

    Attributes
    ----------
    num_missed : events dropped because this reader was slow, by topic
    num_bad : frames that were not events of this version
    """

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket
        self._last: dict[bytes, tuple[bytes, int]] = {}  # epoch and sequence by topic
        self.num_missed: dict[str, int] = {}
        self.num_bad = 0

    def poll(self, timeout_s: float) -> BusEvent | None:
        """The next event, or None when none came within ``timeout_s``."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                left_s = deadline - time.monotonic()
                if left_s <= 0 or not self._socket.poll(max(1, int(left_s * 1000))):
                    return None
                continue
            if (event := self._decode(frames)) is not None:
                return event

    def _decode(self, frames: list[bytes]) -> BusEvent | None:
        try:
            topic, position, payload = frames
            event: BusEvent = _decoder.decode(payload)
        except (ValueError, msgspec.DecodeError):
            self.num_bad += 1
            return None
        epoch, seq = position[:8], int.from_bytes(position[8:], "little")
        last_epoch, last_seq = self._last.get(topic, (b"", 0))
        # After a start of either side, what came before the first event heard is not a gap.
        if epoch == last_epoch and seq > last_seq + 1:
            name = topic.decode("ascii", "replace")
            self.num_missed[name] = self.num_missed.get(name, 0) + seq - last_seq - 1
        self._last[topic] = (epoch, seq)
        return event

    def close(self) -> None:
        self._socket.close()


def subscribe(endpoint: str, topics: tuple[str, ...] = ("",)) -> Subscriber:
    """Read the events of ``topics`` (tags; "": all) published at ``endpoint``, now or later."""
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.SUB)
    socket.rcvhwm = SEND_HIGH_WATER
    socket.linger = 0
    # The daemon may start after its readers, or restart: look again soon, then less often.
    socket.reconnect_ivl = 50
    socket.reconnect_ivl_max = 2000
    for topic in topics:
        socket.subscribe(topic)
    socket.connect(endpoint)
    return Subscriber(socket)
