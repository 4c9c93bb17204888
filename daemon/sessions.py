"""Who is connected: engines come, go, are refused, and are thrown out.

A connection has one engine, and a name belongs to one. What an engine that has gone had learned is
kept for a while, should it come back. Whatever a peer sends, others are unaffected: bad input is
counted, told once in a while, and dropped whole.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Protocol

from smartspec.daemon import narration
from smartspec.daemon.admission.quarantine import Quarantine
from smartspec.daemon.admission.throttle import Throttle
from smartspec.daemon.adoption.pauses import Pauses
from smartspec.daemon.adoption.trial import Trial
from smartspec.daemon.config import Settings
from smartspec.daemon.counters import Counters
from smartspec.daemon.decision import Decision
from smartspec.daemon.engines import Engine, Numbering
from smartspec.daemon.event_bus import Bus, NoteKind
from smartspec.daemon.planner import Planner, PlannerSettings
from smartspec.daemon.state.keeper import Keeper
from smartspec.daemon.state.learned import Learned, ModelKey
from smartspec.engine_adapter import messages
from smartspec.engine_adapter.messages import (
    DaemonMessage,
    Heartbeat,
    Hello,
    MessageError,
    Refused,
    Resync,
)

HELLOS_PER_S = 2.0  #: of one connection; each may mean an engine to set up
HELLO_BURST = 16.0
NOTE_EVERY_S = 1.0  #: at most one note per engine and second; all are counted
RETIRED_KEPT = 64  #: engines that left: a bound on memory. Others start from what their kind knows
REMIND_S = 10.0  #: between two reminders on the bus that an engine is there
ANSWER_EVERY_S = 0.1  #: to a peer in trouble
MAX_TEXT = 256  #: characters of a reason that the wire takes


class Sender(Protocol):
    """What is needed of transport.Server to answer a peer."""

    def send(self, peer: bytes, frame: bytes) -> bool: ...  # False: the peer has gone


class Session:
    """An engine as the loop holds it: state, planner, trial, and where it is."""

    def __init__(
        self, peer: bytes, engine: Engine, planner: Planner, trial: Trial, now: float
    ) -> None:
        self.peer = peer
        self.engine = engine
        self.planner = planner
        self.trial = trial
        self.has_gain_news = False
        self.heard_at = now
        self.noted_at = -1e9
        self.remind_at = now + REMIND_S  #: readers of the bus of it
        self.decision: Decision | None = None
        self.decide_s = 0.0
        self.learn_s = 0.0
        self.rests_until = -1e9  #: decided for no sooner: others have their turn
        self.num_failed = 0  #: decisions in a row


class Sessions:
    """The engines that are connected, and those that have gone and may come back.

    Parameters
    ----------
    settings : see config.py
    epoch : of this life of the daemon
    transport : answers to peers
    bus : where comings and goings are published
    keeper : lends what was learned before
    counters : the loop's own
    pauses : engines that are left to themselves
    clock : monotonic seconds

    Attributes
    ----------
    by_peer, by_name : the connected
    retired : by name, those that have gone
    trials : by name, of both
    """

    def __init__(
        self,
        settings: Settings,
        epoch: int,
        transport: Sender,
        bus: Bus,
        keeper: Keeper,
        counters: Counters,
        pauses: Pauses,
        clock: Callable[[], float],
    ) -> None:
        self._settings = settings
        self.epoch = epoch
        self._transport = transport
        self._bus = bus
        self._keeper = keeper
        self._counters = counters
        self._pauses = pauses
        self._clock = clock
        self.heartbeat = messages.encode(Heartbeat(daemon_epoch=epoch))
        self.by_peer: dict[bytes, Session] = {}
        self.by_name: dict[str, Session] = {}
        self.retired: dict[str, Engine] = {}
        self.trials: dict[str, Trial] = {}
        self._numbering = Numbering()
        self._answered_at: dict[bytes, float] = {}
        limits = settings.limits
        self.hellos = Throttle(HELLOS_PER_S, HELLO_BURST)
        self._quarantine = Quarantine(limits.quarantine_after, limits.quarantine_s)

    def apply(self, settings: Settings) -> None:
        """Go on with other settings."""
        self._settings = settings
        limits = settings.limits
        self._quarantine.after, self._quarantine.first_s = (
            limits.quarantine_after,
            limits.quarantine_s,
        )
        for session in self.by_name.values():
            session.planner.adjust(**self._planning())
        for trial in self.trials.values():
            trial.adjust(settings.adoption)

    def engines(self) -> list[Engine]:
        """Those connected, and those that have gone and may come back."""
        return [session.engine for session in self.by_name.values()] + [*self.retired.values()]

    def credit(self, session: Session) -> None:
        """An engine has told something that can be believed."""
        self._quarantine.credit(session.engine.name)

    def beat(self) -> None:
        """Tell all engines that the daemon lives."""
        for peer in self.by_peer:
            self._transport.send(peer, self.heartbeat)

    def tidy(self, now: float) -> None:
        """Let go of engines that have been silent for long, and are no longer connected.

        An engine without requests may have nothing to say for hours.
        """
        for session in list(self.by_name.values()):
            if self._is_silent(session, now) and not self._is_connected(session):
                self.forget(session, "lost")

    def _is_silent(self, session: Session, now: float) -> bool:
        return now - session.heard_at > self._settings.control.engine_timeout_s

    def _is_connected(self, session: Session) -> bool:
        return self._transport.send(session.peer, self.heartbeat)

    def send(self, peer: bytes, message: DaemonMessage) -> None:
        """One frame to a peer, if it is still there."""
        self._transport.send(peer, messages.encode(message))

    # -- they come ------------------------------------------------------------------------------

    def welcome(self, peer: bytes, hello: Hello) -> None:
        """An engine says who it is: seat it, with what is known of its kind, or refuse it."""
        if not self.hellos.admits(peer, self._clock()):
            self._counters["hellos_throttled"] += 1
            return
        if wait_s := self._quarantine.left_s(hello.engine, self._clock()):
            why = self._quarantine.why(hello.engine)
            self._refuse_engine(peer, hello, f"in quarantine for {wait_s:.0f} s more: {why}")
            return
        most = self._settings.limits.max_requests
        if hello.limits.max_num_running > most:
            self._refuse_engine(
                peer, hello, f"limits.max_requests: {most}, got {hello.limits.max_num_running}"
            )
            return
        known = self.by_name.get(hello.engine)
        if known is not None and self._in_use(known, peer):
            self._refuse_engine(peer, hello, f"another engine is called {hello.engine!r}")
            return
        if known is not None and known.engine.hello == hello:
            # The same engine over a new connection, or reminded by a Resync.
            self._seat(known, peer)
            known.heard_at = self._clock()
            self._transport.send(peer, self.heartbeat)
            return
        if known is None and len(self.by_name) >= self._settings.control.max_engines:
            self._refuse_engine(peer, hello, "control.max_engines is reached")
            return
        # Made first: a Hello that is refused must cost neither session nor what was learned.
        previous = known.engine if known else self.retired.get(hello.engine)
        origin: list[str] = []

        def lend(key: ModelKey) -> Learned | None:
            learned, words = self._keeper.lend(key, self.engines())
            origin.append(words)
            return learned

        engine = Engine(hello, previous, lend, self._numbering)
        if previous is not None and previous.learned is not engine.learned and previous.num_unsaved:
            self._keeper.save(previous)  # or it would go with the name
        if known is not None:
            self.forget(known, "replaced", keep=False)
        self.retired.pop(hello.engine, None)
        planner = Planner(
            engine,
            daemon_epoch=self.epoch,
            seed_sweep=self._settings.control.seed_sweep and self._settings.mode != "observe",
            **self._planning(),
        )
        session = Session(peer, engine, planner, self._trial_of(engine), self._clock())
        self._seat(session, peer)
        self.by_name[engine.name] = session
        self._transport.send(peer, self.heartbeat)
        self._counters["engines_connected"] += 1
        narration.tell_of(self._bus, engine, "connected")
        for text in filter(None, origin):
            kind: NoteKind = "warm_start" if engine.learned.num_steps else "cold_start"
            narration.tell(self._bus, kind, text, engine.name)

    def _planning(self) -> PlannerSettings:
        control = self._settings.control
        return {
            "ttl_s": control.ttl_s,
            "fallback_s": control.fallback_s,
            "probe_share": control.probe_share if self._settings.mode != "observe" else 0.0,
            "meet_targets": control.meet_targets,
        }

    def _trial_of(self, engine: Engine) -> Trial:
        """The trial of an engine of that name goes on, whatever has become of the engine."""
        trial = self.trials.get(engine.name)
        if trial is None:
            own_is_none = engine.hello.limits.static_length == 0
            # Names differ in a fleet, and so do the moments at which engines are compared.
            seed = zlib.crc32(engine.name.encode())
            trial = Trial(self._settings.mode, self._settings.adoption, seed, own_is_none)
            self.trials[engine.name] = trial
        trial.is_paused = engine.name in self._pauses
        trial.interrupt()
        return trial

    def _seat(self, session: Session, peer: bytes) -> None:
        """Note that an engine is reached at ``peer``: one connection, one engine."""
        if self.by_peer.get(session.peer) is session:
            del self.by_peer[session.peer]
        other = self.by_peer.get(peer)
        if other is not None:
            self.forget(other, "replaced")
        session.peer = peer
        self.by_peer[peer] = session

    def _in_use(self, known: Session, peer: bytes) -> bool:
        """Whether the name belongs to another engine that has worked and is still connected.

        Silence is no sign of death (a long prefill, an idle engine); a closed connection is. An
        engine that hangs loses its name after ``engine_timeout_s`` to whoever comes by it.
        """
        if known.peer == peer or known.engine.num_reports == 0:
            return False
        return not self._is_silent(known, self._clock()) and self._is_connected(known)

    # -- they go --------------------------------------------------------------------------------

    def forget(self, session: Session, state: str, *, keep: bool = True) -> None:
        """An engine has gone; ``state`` says how. ``keep``: what it had learned, for a while."""
        name = session.engine.name
        if self.by_peer.get(session.peer) is session:
            del self.by_peer[session.peer]
        if self.by_name.get(name) is session:
            del self.by_name[name]
            if keep:
                self._retire(session.engine)
        narration.tell_of(self._bus, session.engine, state)

    def _retire(self, engine: Engine) -> None:
        self.retired[engine.name] = engine
        if len(self.retired) > RETIRED_KEPT:
            oldest = next(iter(self.retired))
            del self.retired[oldest]
            if oldest not in self.by_name:
                self.trials.pop(oldest, None)

    # -- they make trouble ----------------------------------------------------------------------

    def _refuse_engine(self, peer: bytes, hello: Hello, why: str) -> None:
        self._counters["engines_refused"] += 1
        if not self._may_answer(peer):
            return
        self._send_refusal(peer, why)
        narration.tell(self._bus, "refused", why, hello.engine)

    def drop(self, session: Session | None) -> None:
        """Count a report that was one too many; it is not even read."""
        self._counters["frames_throttled"] += 1
        if session is None:
            return
        session.engine.num_throttled += 1
        if self._clock() - session.noted_at >= NOTE_EVERY_S:
            session.noted_at = self._clock()
            most = self._settings.limits.max_reports_per_s
            text = f"more than {most} reports a second: some are dropped unread"
            narration.tell(self._bus, "throttled", text, session.engine.name)

    def refuse_frame(self, peer: bytes, session: Session | None, error: MessageError) -> None:
        """Count a frame that cannot be believed, and say so once in a while."""
        self._counters["frames_refused"] += 1
        if session is not None:
            session.engine.num_refused += 1
            if self._clock() - session.noted_at < NOTE_EVERY_S:
                return
            session.noted_at = self._clock()
            narration.tell(self._bus, "bad_frame", str(error), session.engine.name)
            return
        # Most likely an engine of another version, or one that misdescribes itself: it should know.
        if self._may_answer(peer):
            self._send_refusal(peer, str(error))
            text = f"of an unknown peer: {error}"
            narration.tell(self._bus, "bad_frame", text)

    def blame(self, peer: bytes, session: Session, error: MessageError) -> None:
        """Count a lie; an engine that told too many loses its seat, and what it taught lately."""
        name = session.engine.name
        lasts_s = self._quarantine.blame(name, str(error)[: MAX_TEXT // 2], self._clock())
        if not lasts_s:
            return
        self._counters["quarantines"] += 1
        why = f"in quarantine for {lasts_s:.0f} s: it tells what cannot be true ({error})"
        narration.tell(self._bus, "quarantined", why, name)
        self._send_refusal(peer, why)
        self.forget(session, "quarantined", keep=False)
        self.trials.pop(name, None)

    def ask_again(self, peer: bytes, why: str) -> None:
        """A peer is to send its Hello and roster."""
        if self._may_answer(peer):
            self._counters["resyncs"] += 1
            self.send(peer, Resync(daemon_epoch=self.epoch, reason=why))

    def _send_refusal(self, peer: bytes, why: str) -> None:
        self.send(peer, Refused(daemon_epoch=self.epoch, reason=why[:MAX_TEXT]))

    def _may_answer(self, peer: bytes) -> bool:
        """Whether a peer in trouble is due an answer: an engine in full flow is told so often."""
        now = self._clock()
        if now - self._answered_at.get(peer, -1e9) < ANSWER_EVERY_S:
            return False
        if len(self._answered_at) > 4096:
            self._answered_at.clear()
        self._answered_at[peer] = now
        return True
