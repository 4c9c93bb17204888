"""EngineLink: the engine's end of the control loop. Never blocks, never raises into a step.

Who chooses the lengths, in this order:

1. *policy*: the newest policy, while the daemon has been heard within its time to live;
2. *fallback*: the batch-to-length table of the last policy, for ``fallback_s`` after that (a
   static length on a full engine can tip it over, so the engine does not go back to it at once);
3. *own*: the engine's configuration, untouched: also when there never was a policy.

Invariants: `choose` and `report` do no I/O that can wait. A report that cannot be sent at once is
dropped and counted. While the daemon is silent no report is even encoded; a Hello goes out now and
then instead (liveness with back-off, after ZeroMQ's Paranoid Pirate pattern). Anything that goes
wrong in here is counted, logged once, and leaves the engine with its own configuration. That the
daemon has come or gone is logged too, at INFO and seldom, and never from `choose`.
"""

from __future__ import annotations

import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import zmq

from smartspec.engine_adapter import messages
from smartspec.engine_adapter.base import (
    F32,
    U64,
    DecodeBatch,
    FixedLength,
    LengthSource,
    StepFacts,
)
from smartspec.engine_adapter.curve import EngineKeys
from smartspec.engine_adapter.lengths import Choice
from smartspec.engine_adapter.levels import Levels
from smartspec.engine_adapter.messages import (
    Goodbye,
    Heartbeat,
    Hello,
    MessageError,
    Policy,
    Refused,
    Resync,
    Roster,
    StepReport,
    pack,
    require,
)
from smartspec.engine_adapter.program import Program
from smartspec.engine_adapter.ranking import Ranking

log = logging.getLogger("smartspec.link")

SILENCE_S = 1.0  #: without any word for so long, the daemon counts as gone
HELLO_S = (0.1, 1.0)  #: between Hellos to a silent daemon: at first, and at most
PREPARED_S = 0.5  #: after so long a prepared choice is none: the engine stood still
KEEP_ALIVE_S = 5.0  #: an idle engine says that it is still there
REFUSED_S = 5.0  #: a refused engine asks again after this
TELL_S = 10.0  #: between two lines in the log on whether the daemon is there, at least
FIRST_TELL_S = 5.0  #: so long a daemon may take to answer before it is said to be missing
PING_MS = 1000  #: over tcp, whose other end may vanish without a word; the kernel takes minutes
PING_TIMEOUT_MS = 5000  #: unanswered, and a new connection is tried, each for as long
SEND_QUEUE = 64  #: frames that may wait for a slow daemon
MAX_FRAMES_PER_STEP = 256  #: a flooding daemon may not hold up a step,
MAX_RECEIVE_S = 0.005  #: nor one that sends large frames; what is left waits for the next step
#: Plain numbers: arithmetic with zmq's enumerations takes as long as asking the socket.
EVENTS, POLLIN, POLLOUT = int(zmq.EVENTS), int(zmq.POLLIN), int(zmq.POLLOUT)
ROSTERS_KEPT = 16  #: a policy lags a few reports at most
NO_LENGTHS = np.empty(0, np.int64)
LONG_AGO = -math.inf


#: What is logged of the daemon, by how it is.
TOLD = {
    "heard": "the daemon at %s is heard: it steers this engine, or leaves it to itself",
    "fallback": "the daemon at %s is silent: lengths are from the table that it left",
    "own": "the daemon at %s is silent: this engine runs as configured, and goes on looking for it",
    "never": "no daemon answers at %s: this engine runs as configured, and goes on looking; is one "
    "running there, may this user open its socket, is this engine's key on its list?",
}


@dataclass(slots=True)
class LinkStats:
    """Counters since the link was made; `state` is who chose last."""

    state: str = "own"
    num_reports_sent: int = 0
    num_reports_dropped: int = 0
    num_policies: int = 0
    num_bad_frames: int = 0
    num_stale_policies: int = 0
    num_errors: int = 0
    num_connections: int = 0
    last_reason: str = ""


class Known(NamedTuple):
    """Lengths that hold whatever else is in the pass."""

    lengths: list[int]  #: [B]

    def choose(self, num_other_tokens: int) -> Known:
        """In the place of `Ranking.choose`."""
        return self


class Ready(NamedTuple):
    """A choice that was prepared, but for what only the step itself will tell."""

    by: Choice  #: who chooses
    #: of a batch that is known, or is yet to find its drafts; of one that no policy decides on
    lengths: Ranking | Levels | Known


class LinkSocket(Protocol):
    """What the link needs of a ZeroMQ socket."""

    def getsockopt(self, option: int) -> int: ...
    def setsockopt(self, option: int, value: int) -> None: ...
    def send(self, frame: bytes, flags: int = 0) -> None: ...
    def recv(self, flags: int = 0) -> bytes: ...
    def close(self) -> None: ...


class EngineLink:
    """A `LengthSource` that a daemon steers.

    Parameters
    ----------
    endpoint : where the daemon listens, e.g. ``ipc:///run/smartspec/engines.sock``
    hello : who this engine is and what it can do
    own : what decides when nobody steers; default: ``hello.limits.static_length`` for all
    clock : monotonic seconds
    keys : of this engine, for a daemon that is reached over tcp://; None: no encryption
    socket : frames to and from the daemon; None: ZeroMQ's, to ``endpoint``
    logger : where the link says what has changed; an engine's own may be the one that is shown
    """

    def __init__(
        self,
        endpoint: str,
        hello: Hello,
        own: LengthSource | None = None,
        *,
        keys: EngineKeys | None = None,
        clock: Callable[[], float] = time.monotonic,
        socket: LinkSocket | None = None,
        logger: logging.Logger = log,
    ) -> None:
        self.hello = hello
        self.stats = LinkStats()
        self._own = own or FixedLength(hello.limits.static_length)
        self._clock = clock
        self._endpoint = endpoint
        self._log = logger
        self._told = ""  #: of `TOLD`
        self._tell_at = LONG_AGO
        self._began_at = clock()
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._socket: Any = socket  # zmq's methods have more to them than LinkSocket's
        if socket is None:
            self._connect(endpoint, keys)

        self._program: Program | None = None
        self._probe_pending = False
        self._daemon_epoch: int | None = None
        self._refused_until = LONG_AGO
        self._heard_at = LONG_AGO
        self._policy_heard_at = LONG_AGO  #: the last word of the daemon whose policy is in force
        self._sent_at = LONG_AGO
        self._next_hello_at = LONG_AGO
        self._hello_wait_s = HELLO_S[0]
        self._seq = 0
        self._chosen_by: tuple[int, str] = (0, "own")
        self._rosters: OrderedDict[int, U64] = OrderedDict()
        self._roster_version = 0
        self._roster_columns: tuple[bytes, ...] = ()  #: ids, weights, floors, targets
        self._roster_sent = False
        self._hello_due = False
        self._looked = False  #: whether `choose` has received in this step
        self._prepared_at = LONG_AGO  #: when `prepare` has, for the next `choose`
        self._prepared: Ready | None = None  #: for the next step,
        self._ready_until = LONG_AGO  #: if that comes before
        self._writable = False  #: whether the socket took frames when last asked: asking is dear
        self._closed = False

    # -- the engine's side ----------------------------------------------------------------------

    def choose(self, batch: DecodeBatch) -> Choice:
        """Lengths for the step about to run."""
        try:
            if self._clock() - self._prepared_at > PREPARED_S:
                self._receive()
            self._prepared_at, self._looked, self._prepared = LONG_AGO, True, None
            choice = self._steer(batch)
            if self._probe_pending and choice is not None and choice.source == "policy":
                self._probe_pending = False
                assert self._program is not None
                choice = self._program.with_probes(choice, batch)
        except Exception:
            self._note_error("choosing lengths")
            self._program = None
            choice = None
        if choice is None:
            choice = self._own.choose(batch)
        steered = choice.source in messages.STEERED and self._program is not None
        seq = self._program.policy.seq if steered and self._program else 0
        self._chosen_by = (seq, choice.source)
        self.stats.state = choice.source
        return choice if choice.policy_seq == seq else choice._replace(policy_seq=seq)

    @property
    def may_steer(self) -> bool:
        """Whether a policy may decide the next `choose`; if not, ids and ceilings will do."""
        now = self._clock()
        if now - self._prepared_at > PREPARED_S:
            return True  # it takes in what has arrived first
        program = self._program
        return program is not None and now - self._policy_heard_at <= program.policy.ttl_s

    def prepare(self, batch: DecodeBatch, features: F32 | None = None) -> None:
        """Do now what the next `choose` would: for an engine that waits for its device.

        Takes in what has arrived, which the next `choose` then does not, unless the engine has
        stood still since. `ready` has the lengths of ``batch`` then; with ``features``, [F, V], and
        where a policy decides, those of one that is yet to find its drafts, each request with one
        of these values.
        """
        self._prepared = None
        try:
            self._receive()
            self._prepared_at = self._clock()
            self._prepared = self._prepare(batch, features)
        except Exception:
            self._note_error("preparing a choice")
            self._program = None

    def ready(self) -> Ready | None:
        """What was prepared for the step to be scheduled; None: it is `choose` that knows.

        In place of `choose`, once.
        """
        ready, self._prepared = self._prepared, None
        if ready is None or self._clock() > self._ready_until:
            return None
        if self._probe_pending and ready.by.source == "policy":
            return None
        self._prepared_at, self._looked = LONG_AGO, True
        self._chosen_by = ready.by.policy_seq, ready.by.source
        self.stats.state = ready.by.source
        return ready

    def report(self, facts: StepFacts) -> None:
        """Tell the daemon what a step did, if it can be told at once."""
        self._seq += 1
        try:
            if not self._looked:  # once per step
                self._receive()
            self._looked = False
            if self._in_touch() and self._writable:
                self._send_report(facts)
            else:
                self.stats.num_reports_dropped += 1
        except zmq.Again:
            self.stats.num_reports_dropped += 1
        except Exception:
            self._note_error("reporting a step")

    def idle(self) -> None:
        """Keep in touch while there is nothing to decode: call now and then (10 a second do)."""
        try:
            self._receive()
            if self._in_touch() and self._clock() - self._sent_at > KEEP_ALIVE_S:
                self._say_hello()
        except Exception:
            self._note_error("idling")

    def close(self) -> None:
        """Say goodbye and let go of the socket; idempotent."""
        if self._closed:
            return
        self._closed = True
        self._program = None
        try:
            if self._daemon_heard():
                self._socket.setsockopt(zmq.LINGER, 100)
                self._socket.send(messages.encode(Goodbye(epoch=self.hello.epoch)), zmq.NOBLOCK)
        except zmq.ZMQError:
            pass
        self._socket.close()
        if self._context is not None:
            self._context.term()

    def _connect(self, endpoint: str, keys: EngineKeys | None) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.SNDHWM, SEND_QUEUE),
            (zmq.RCVHWM, 256),
            (zmq.IMMEDIATE, 1),  # queue nothing for a daemon that is not there
            (zmq.RECONNECT_IVL, 50),
            (zmq.RECONNECT_IVL_MAX, 1000),
            # No MAXMSGSIZE: a connecting socket that meets a frame over it never connects again.
            # Such frames are refused by their decoder.
        ):
            self._socket.setsockopt(option, value)
        if endpoint.startswith("tcp://"):
            self._socket.heartbeat_ivl = PING_MS
            self._socket.heartbeat_timeout = PING_TIMEOUT_MS
            self._socket.connect_timeout = PING_TIMEOUT_MS
            self._socket.handshake_ivl = PING_TIMEOUT_MS
        if keys is not None:
            self._socket.curve_serverkey = keys.server
            self._socket.curve_publickey = keys.public
            self._socket.curve_secretkey = keys.secret
        self._socket.connect(endpoint)

    # -- choosing -------------------------------------------------------------------------------

    def _prepare(self, batch: DecodeBatch, features: F32 | None) -> Ready | None:
        program = self._program
        self._ready_until = self._prepared_at + PREPARED_S
        if program is None or self._clock() - self._policy_heard_at > program.policy.ttl_s:
            return self._prepare_alone(batch)
        lengths = program.rank(batch) if features is None else program.level(batch, features)
        if lengths is None:
            return None
        # As it will be unless prompts come.
        if isinstance(lengths, Ranking):
            lengths.choose(batch.num_prefill_tokens)
        else:
            lengths.prepare(batch.num_prefill_tokens)
        policy_until = self._policy_heard_at + program.policy.ttl_s
        self._ready_until = min(self._ready_until, policy_until)
        return Ready(Choice(NO_LENGTHS, policy_seq=program.policy.seq), lengths)

    def _prepare_alone(self, batch: DecodeBatch) -> Ready:
        """Where the daemon is silent."""
        choice = self._steer(batch)
        if choice is None or self._program is None:
            choice = self._own.choose(batch)
        else:
            policy = self._program.policy
            fallback_until = self._policy_heard_at + policy.ttl_s + policy.fallback_s
            self._ready_until = min(self._ready_until, fallback_until)
        return Ready(choice, Known(choice.lengths.tolist()))

    def _steer(self, batch: DecodeBatch) -> Choice | None:
        program = self._program
        if program is None:
            return None
        silent_s = self._clock() - self._policy_heard_at
        if silent_s <= program.policy.ttl_s:
            return program.choose(batch)
        if silent_s <= program.policy.ttl_s + program.policy.fallback_s:
            return program.fallback(batch)
        self._program = None
        return None

    # -- receiving ------------------------------------------------------------------------------

    def _receive(self) -> None:
        """Take in everything that has arrived; of several policies the newest counts."""
        if self._closed:
            return
        newest: Policy | None = None
        deadline = self._clock() + MAX_RECEIVE_S
        for _ in range(MAX_FRAMES_PER_STEP):
            if not self._ready() & POLLIN or self._clock() > deadline:
                break
            frame = self._socket.recv(zmq.NOBLOCK)
            try:
                message = messages.decode_daemon_message(frame)
            except MessageError as error:
                self._count_bad_frame(str(error))
                continue
            self._hear(message.daemon_epoch)
            match message:
                case Policy():
                    if self._is_newer(message, newest):
                        newest = message
                    else:
                        self.stats.num_stale_policies += 1
                case Resync():
                    self._hello_due = True
                case Refused():
                    self._refuse(message.reason)
                case Heartbeat():
                    self._tell()  # whoever is refused has none
        if newest is not None:
            self._install(newest)
        if self._hello_due:  # once, however often it was asked for
            self._hello_due = False
            self._next_hello_at = LONG_AGO
            self._say_hello()

    def _refuse(self, reason: str) -> None:
        if reason != self.stats.last_reason:
            self._log.warning(
                "the daemon refuses this engine, which runs on as configured: %s", reason
            )
        self.stats.last_reason = reason
        self._refused_until = self._clock() + REFUSED_S
        self._program = self._prepared = None

    def _hear(self, daemon_epoch: int) -> None:
        if daemon_epoch != self._daemon_epoch:
            # Another daemon, which knows nothing of us. The old one's policy lives out its time.
            self._hello_due = self._daemon_epoch is not None
            self._daemon_epoch = daemon_epoch
            self._refused_until = LONG_AGO
            self.stats.num_connections += 1
        self._heard_at = self._clock()
        if self._program is not None and self._program.policy.daemon_epoch == daemon_epoch:
            self._policy_heard_at = self._heard_at
        self._hello_wait_s = HELLO_S[0]

    def _is_newer(self, policy: Policy, than: Policy | None) -> bool:
        if policy.epoch != self.hello.epoch:
            return False
        if than is None and self._program is not None:
            than = self._program.policy
        return than is None or policy.daemon_epoch != than.daemon_epoch or policy.seq > than.seq

    def _install(self, policy: Policy) -> None:
        roster = self._rosters.get(policy.roster_version)
        limits = self.hello.limits
        try:
            known = limits.confidences or not policy.by_confidence
            require(known, "by_confidence: this engine has no confidences")
            self._program = Program(policy, limits.features, roster, self._program)
            self._prepared = None
        except MessageError as error:
            self._count_bad_frame(f"policy: {error}")
            return
        self._policy_heard_at = self._heard_at
        self._probe_pending = policy.num_probes > 0
        self.stats.num_policies += 1
        self.stats.last_reason = policy.reason

    # -- sending --------------------------------------------------------------------------------

    def _daemon_heard(self) -> bool:
        return self._clock() - self._heard_at <= SILENCE_S

    def _in_touch(self) -> bool:
        """Whether there is a daemon to report to; if not, knock now and then."""
        if self._closed or self._clock() < self._refused_until:
            return False
        if self._daemon_epoch is not None and self._daemon_heard():
            return True
        self._say_hello()
        return False

    def _say_hello(self) -> None:
        now = self._clock()
        if now < self._next_hello_at:
            return
        self._next_hello_at = now + self._hello_wait_s
        self._hello_wait_s = min(2 * self._hello_wait_s, HELLO_S[1])
        self._roster_sent = False
        if self._ready() & POLLOUT:
            self._socket.send(messages.encode(self.hello), zmq.NOBLOCK)
            self._sent_at = now
        self._tell()

    def _send_report(self, facts: StepFacts) -> None:
        batch = facts.batch
        self._update_roster(batch)
        policy_seq, source = self._chosen_by
        if facts.choice is not None:
            policy_seq, source = facts.choice.policy_seq, facts.choice.source
        report = StepReport(
            epoch=self.hello.epoch,
            seq=self._seq,
            roster_version=self._roster_version,
            roster=None if self._roster_sent else self._roster(),
            step_s=float(facts.step_s),  # adapters may well hand in numpy's scalars
            target_s=None if facts.target_s is None else float(facts.target_s),
            draft_s=None if facts.draft_s is None else float(facts.draft_s),
            num_drafted=pack(facts.num_drafted, "u8"),
            num_accepted=pack(facts.num_accepted, "u8"),
            num_emitted=pack(facts.num_emitted, "u8"),
            num_available=pack(batch.ceiling, "u8"),
            features=pack(batch.features, "f32"),
            num_prefill_tokens=int(batch.num_prefill_tokens),
            context_tokens=int(facts.context_tokens),
            num_draft_forwards=int(facts.num_draft_forwards),
            num_draft_tokens=int(facts.num_draft_tokens),
            num_catch_up_tokens=int(facts.num_catch_up_tokens),
            num_waiting=int(facts.num_waiting),
            kv_usage=float(facts.kv_usage),
            mode=facts.mode,
            policy_seq=policy_seq,
            source=source,
            num_dropped=self.stats.num_reports_dropped,
            accepted_ranks=b""
            if facts.accepted_ranks is None
            else pack(facts.accepted_ranks, "u64"),
            num_cut=b"" if facts.num_cut is None else pack(facts.num_cut, "u8"),
            num_cut_accepted=b""
            if facts.num_cut_accepted is None
            else pack(facts.num_cut_accepted, "u8"),
        )
        self._socket.send(messages.encode(report), zmq.NOBLOCK)
        self._roster_sent = True
        self._sent_at = self._clock()
        self.stats.num_reports_sent += 1

    def _update_roster(self, batch: DecodeBatch) -> None:
        # As bytes: compared at once, and an engine may use the same arrays for its next batch.
        columns = (
            pack(batch.request_ids, "u64"),
            b"" if batch.weight is None else pack(batch.weight, "f32"),
            b"" if batch.floor is None else pack(batch.floor, "u8"),
            b"" if batch.token_time_target_s is None else pack(batch.token_time_target_s, "f32"),
        )
        if columns == self._roster_columns:
            return
        self._roster_columns = columns
        self._roster_version += 1
        self._roster_sent = False
        self._rosters[self._roster_version] = np.frombuffer(columns[0], np.uint64)
        while len(self._rosters) > ROSTERS_KEPT:
            self._rosters.popitem(last=False)

    def _roster(self) -> Roster:
        ids, weight, floor, targets = self._roster_columns
        return Roster(
            version=self._roster_version,
            request_ids=ids,
            weight=weight,
            floor=floor,
            token_time_target_s=targets,
        )

    def _ready(self) -> int:
        events = int(self._socket.getsockopt(EVENTS))
        self._writable = bool(events & POLLOUT)
        return events

    # -- what is said of it ---------------------------------------------------------------------

    def _tell(self) -> None:
        """Log whether the daemon is there when that has changed; called now and then, not per step.

        A daemon that refuses this engine has had a line of its own.
        """
        now = self._clock()
        if now < self._tell_at or now < self._refused_until + REFUSED_S:
            return
        how = self._daemon_is(now)
        if how and how != self._told:
            self._told, self._tell_at = how, now + TELL_S
            self._log.info(TOLD[how], self._endpoint)

    def _daemon_is(self, now: float) -> str:
        """Of `TOLD`; empty: there is nothing to say yet."""
        if self._daemon_heard():
            return "heard"
        if self._daemon_epoch is None:
            return "never" if now - self._began_at > FIRST_TELL_S else ""
        if self._program is None:
            return "own"
        policy, silent_s = self._program.policy, now - self._policy_heard_at
        if silent_s <= policy.ttl_s:
            return ""
        return "fallback" if silent_s <= policy.ttl_s + policy.fallback_s else "own"

    # -- trouble --------------------------------------------------------------------------------

    def _count_bad_frame(self, what: str) -> None:
        self.stats.num_bad_frames += 1
        if self.stats.num_bad_frames == 1:
            self._log.warning(
                "bad frame from the daemon, dropped (later ones are only counted): %s", what
            )

    def _note_error(self, doing: str) -> None:
        self.stats.num_errors += 1
        if self.stats.num_errors == 1:
            self._log.exception("error while %s (later ones are only counted)", doing)
