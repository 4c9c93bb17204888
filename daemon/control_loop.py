"""The loop: receive all, decide for the newest, publish, then learn. Nothing else lives in it.

It never queues decisions: however many reports have come, each engine gets one, for its newest
report. Policies go out before anything is learned or published on the bus, and what is yet to be
learned of some engines gives way to decisions for others whose reports have come meanwhile; an
engine's own decisions know all of its reports before. Whatever a peer sends, the loop goes on: bad
input is counted, told once in a while, and dropped whole.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable
from typing import Protocol

from smartspec.daemon import narration
from smartspec.daemon.admission.curve_keys import KeyFileError
from smartspec.daemon.admission.throttle import Throttle
from smartspec.daemon.adoption.pauses import Pauses
from smartspec.daemon.adoption.trial import Step
from smartspec.daemon.commands import Answer, Command
from smartspec.daemon.config import Settings
from smartspec.daemon.counters import Counters
from smartspec.daemon.decision import Arm, Decision
from smartspec.daemon.engines import Observation, OutOfOrder, RosterGap
from smartspec.daemon.event_bus import Bus, CheckpointEvent, LinkCounts, LoopEvent, NullBus
from smartspec.daemon.sessions import REMIND_S, Session, Sessions
from smartspec.daemon.state.keeper import Keeper
from smartspec.daemon.state.library import Library
from smartspec.daemon.vitals import Vitals, release
from smartspec.engine_adapter import messages
from smartspec.engine_adapter.messages import Goodbye, Hello, MessageError, StepReport

log = logging.getLogger("smartspec.daemon")

MAX_FRAMES_PER_CYCLE = 4096
MAX_LEARNED_PER_CYCLE = 32  #: of one engine; what it sent before that is read, but teaches nothing
LONG_S, REST = 0.005, 4.0  #: after a decision of so long an engine rests so many times that
FAILED_IN_A_ROW = 16  #: decisions, after which an engine is released to its own setting


class Transport(Protocol):
    """What the loop needs of transport.Server."""

    def wait(self, timeout_s: float) -> bool: ...
    def receive(self) -> tuple[bytes, bytes] | None: ...
    def send(self, peer: bytes, frame: bytes) -> bool: ...  # False: the peer has gone
    def close(self) -> None: ...

    def reload(self) -> None: ...

    @property
    def num_unsendable(self) -> int: ...

    @property
    def num_denied(self) -> int: ...


class ControlLoop:
    """Steers all engines that connect.

    Parameters
    ----------
    settings : see config.py
    transport : frames from and to engines
    bus : where everything that happens is published
    clock : monotonic seconds, for all timing
    wall : seconds of the calendar, for events only
    library : what was learned before; None: nothing
    pauses : engines that are left to themselves; None: none
    """

    def __init__(
        self,
        settings: Settings,
        transport: Transport,
        bus: Bus,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        library: Library | None = None,
        pauses: Pauses | None = None,
    ) -> None:
        self._settings = settings
        self._transport = transport
        self._bus = bus
        self._is_heard = not isinstance(bus, NullBus)  # events of steps are not made for nobody
        self._clock = clock
        self._wall = wall
        self.epoch = secrets.randbits(48)
        self.vitals = Vitals(wall())
        self._pauses = pauses or Pauses()
        most = settings.limits.max_reports_per_s
        self._frames = Throttle(most, _burst(most))
        self._unlearned: dict[Session, list[Observation]] = {}  # what was decided for: oldest first
        self._next_heartbeat_at = clock()
        self._next_tidy_at = clock()
        self.counters = Counters()
        library = Library(settings.state.max_kept) if library is None else library
        if library.num_refused:
            self.counters["states_refused"] = library.num_refused
        self._keeper = Keeper(settings.state, library, bus, self.counters, clock(), wall)
        self.sessions = Sessions(
            settings,
            self.epoch,
            transport,
            bus,
            self._keeper,
            self.counters,
            self._pauses,
            clock,
        )

    def apply(self, settings: Settings) -> None:
        """Go on with other settings; those that need a restart must be as they were."""
        try:
            self._transport.reload()
        except KeyFileError as error:
            self.vitals.is_reloaded = False
            log.error("the list of engines in force stays: %s", error)
        self._settings = settings
        self._keeper.apply(settings.state)
        most = settings.limits.max_reports_per_s
        self._frames.per_s, self._frames.burst = most, _burst(most)
        self.sessions.apply(settings)

    # -- the loop -------------------------------------------------------------------------------

    def cycle(self, timeout_s: float) -> str | None:
        """One turn; returns the reason of the last decision made, if any.

        Waits at most ``timeout_s`` for something to arrive.
        """
        reason = None
        until_heartbeat_s = self._next_heartbeat_at - self._clock()
        if self._unlearned:
            timeout_s = 0.0
        if self._transport.wait(max(0.0, min(timeout_s, until_heartbeat_s))):
            began = self._clock()
            for session, observations in self._receive().items():
                if session in self._unlearned:
                    self._learn(session, self._unlearned.pop(session))
                # It may have reported and gone, or come anew, in one and the same turn.
                if self.sessions.by_peer.get(session.peer) is session:
                    reason = self._decide(session, began) or reason
                    self._beat()
                self._unlearned[session] = observations
        while self._unlearned:
            self._learn_next()
            self._beat()
            if self._unlearned and self._transport.wait(0.0):
                break  # decisions go first
        self._keep_time()
        return reason

    def _receive(self) -> dict[Session, list[Observation]]:
        arrived: dict[Session, list[Observation]] = {}
        for _ in range(MAX_FRAMES_PER_CYCLE):
            received = self._transport.receive()
            if received is None:
                break
            peer, frame = received
            session = self.sessions.by_peer.get(peer)
            if not self._frames.admits(peer, self._clock()):
                self.sessions.drop(session)
                continue
            try:
                self._take(peer, messages.decode_engine_message(frame), session, arrived)
            except RosterGap as gap:
                self.sessions.ask_again(peer, str(gap))
            except OutOfOrder as error:
                self.sessions.refuse_frame(peer, session, error)
            except MessageError as error:
                self.sessions.refuse_frame(peer, session, error)
                if session is not None and self.sessions.by_peer.get(peer) is session:
                    self.sessions.blame(peer, session, error)
                    if self.sessions.by_peer.get(peer) is not session:
                        arrived.pop(session, None)  # nothing of this turn is believed either
            except Exception:
                self.counters.failed("receiving", session.engine.name if session else "")
        return arrived

    def _take(
        self,
        peer: bytes,
        message: messages.EngineMessage,
        session: Session | None,
        arrived: dict[Session, list[Observation]],
    ) -> None:
        match message:
            case StepReport():
                if session is None or session.engine.hello.epoch != message.epoch:
                    self.sessions.ask_again(peer, "no Hello of this epoch was received")
                    return
                session.heard_at = self._clock()
                missed = session.engine.num_missed
                observation = session.engine.observe(message)
                arrived.setdefault(session, []).append(observation)
                self.sessions.credit(session)
                self.counters["reports"] += 1
                self.counters["steps_missed"] += session.engine.num_missed - missed
            case Hello():
                self._learn_pending()  # of whoever goes, before its rows are somebody else's
                self.sessions.welcome(peer, message)
            case Goodbye():
                if session is not None and session.engine.hello.epoch == message.epoch:
                    self._learn_pending()
                    self.sessions.forget(session, "left")

    def _decide(self, session: Session, began: float) -> str | None:
        now = self._clock()
        if now < session.rests_until:
            self.counters["decisions_put_off"] += 1
            return None
        try:
            decision = session.planner.decide(session.trial.arm(now))
            if decision is not None and decision.is_news and self._settings.mode != "observe":
                self.sessions.send(session.peer, decision.policy)  # made only now: it may fail too
                self.counters["policies_sent"] += 1
        except Exception as error:
            self._fail(session, error)
            return None
        session.num_failed = 0
        took_s = self._clock() - now
        if took_s > LONG_S:
            session.rests_until = now + (1.0 + REST) * took_s
        if decision is None:
            return None
        session.decision = decision
        session.decide_s = self._clock() - began
        self.counters["decisions"] += 1
        name, reason = session.engine.name, decision.order.reason
        extra = {"event": "decision", "engine": name}
        log.debug("engine %s: %s", name, reason, extra=extra)
        return reason

    def _fail(self, session: Session, error: Exception) -> None:
        """A decision that could not be made: the last policy goes on, but not for ever."""
        name = session.engine.name
        self.counters.failed("deciding", name)
        session.planner.tell_again()
        session.num_failed += 1
        if session.num_failed == 1:
            text = f"no decision could be made: {error!r}"
            narration.tell(self._bus, "fault", text, name)
        if session.num_failed == FAILED_IN_A_ROW and self._settings.mode != "observe":
            self.sessions.send(session.peer, session.planner.release())
            text = f"{FAILED_IN_A_ROW} decisions in a row failed: left to its own setting"
            narration.tell(self._bus, "fault", text, name)

    def _learn_pending(self) -> None:
        while self._unlearned:
            self._learn_next()

    def _learn_next(self) -> None:
        session = next(iter(self._unlearned))
        self._learn(session, self._unlearned.pop(session))

    def _learn(self, session: Session, observations: list[Observation]) -> None:
        began = self._clock()
        self.counters["reports_unlearned"] += max(0, len(observations) - MAX_LEARNED_PER_CYCLE)
        observations = observations[-MAX_LEARNED_PER_CYCLE:]
        predicted: list[float | None] = []
        decision = session.decision
        costs, acceptance = session.engine.step_cost, session.engine.acceptance
        num_changes = acceptance.num_changes
        times: float | None = None  # what was expected, that a step took by which costs changed
        for observation in observations:
            seconds, num_cost_changes = None, costs.num_changes
            try:
                seconds = session.engine.learn(observation)
                if session.trial.current is Arm.SMARTSPEC or self._settings.mode == "observe":
                    session.planner.prober.account(observation)
            except Exception:
                self.counters.failed("learning", session.engine.name)
            predicted.append(seconds)
            if costs.num_changes > num_cost_changes and seconds:
                times = observation.report.step_s / seconds
        session.learn_s = (self._clock() - began) / max(1, len(predicted))
        try:
            self._tell_steps(session, observations, predicted)
            if times is not None:
                self._note_drift(session, "cost", f"steps take {times:.2f} times what was expected")
            if acceptance.num_changes > num_changes:
                self._note_drift(
                    session, "acceptance", "first drafts are no longer accepted as they were"
                )
        except Exception:
            self.counters.failed("telling steps", session.engine.name)
        if decision is not None:
            session.decision = None
            try:
                self._compare(session, observations, decision)
            except Exception:
                self.counters.failed("comparing", session.engine.name)

    def _tell_steps(
        self, session: Session, observations: list[Observation], predicted: list[float | None]
    ) -> None:
        """Of an engine that is still there."""
        if not self._is_told_of(session):
            return
        for observation, seconds in zip(observations, predicted, strict=True):
            self._bus.publish(
                narration.step_event(session.engine, observation, seconds, self._wall())
            )

    def _is_told_of(self, session: Session) -> bool:
        """An engine that has left is not heard of after that: its last turn is told to nobody."""
        return self._is_heard and self.sessions.by_peer.get(session.peer) is session

    def _compare(
        self,
        session: Session,
        observations: list[Observation],
        decision: Decision,
    ) -> None:
        """Tell of a decision, and take steps into the comparison with what could have been."""
        now = self._clock()
        compared = decision.compared()
        if self._is_told_of(session):
            times = session.decide_s, session.learn_s, self._wall()
            self._bus.publish(narration.decision_event(session.engine, decision, *times))
        otherwise = {arm: compared[arm] for arm in (Arm.NONE, Arm.OWN)}
        for observation in observations:
            if not len(observation.batch.ids):
                continue
            step = Step(
                step_s=observation.report.step_s,
                tokens=observation.weighted_tokens + decision.prompts,
                chosen=compared[Arm.SMARTSPEC],
                otherwise=otherwise,
                model_std=decision.gain_std,
                # Of several steps an earlier one may have ended the block.
                obeyed=session.trial.current is decision.order.arm
                and session.planner.obeyed(observation),
                comparable=decision.is_comparable,
                num_waiting=observation.report.num_waiting,
            )
            retreat = session.trial.note(step, now)
            if retreat is not None:
                self.counters["retreats"] += 1
                narration.tell(self._bus, "retreat", retreat, session.engine.name)
        session.has_gain_news = True

    def _note_drift(self, session: Session, of: str, text: str) -> None:
        self.counters[f"{of}_changes"] += 1
        text = f"{text}: older ones now count less"
        narration.tell(self._bus, "drift", text, session.engine.name)

    # -- what an operator says ------------------------------------------------------------------

    def obey(self, command: Command) -> Answer:
        """Pause or release engines; returns what came of it, in words."""
        name, sessions = command.engine, self.sessions
        seen = {*sessions.by_name, *sessions.retired}
        if name and name not in seen and name not in self._pauses:
            known = ", ".join(sorted(seen)) or "none"
            return Answer(ok=False, text=f"no engine {name!r}; known: {known}")
        is_pause = command.action == "pause"
        kept = ""
        try:
            (self._pauses.pause if is_pause else self._pauses.release)(name)
        except ValueError as error:
            return Answer(ok=False, text=str(error))
        except OSError as error:
            kept = f"; not kept over a restart of the daemon ({error})"
        for session in sessions.by_name.values():
            was, session.trial.is_paused = (
                session.trial.is_paused,
                session.engine.name in self._pauses,
            )
            if session.trial.is_paused == was:
                continue
            if is_pause and self._settings.mode != "observe":
                sessions.send(session.peer, session.planner.release())  # it may be idle for long
            self._publish_gain(session)
        who = f"engine {name}" if name else "all engines"
        done = "paused: the engine's own setting" if is_pause else "released"
        text = f"{who} {done}{kept}"
        narration.tell(self._bus, command.action, text, name)
        return Answer(text=text)

    # -- what was learned ---------------------------------------------------------------------

    def checkpoints(self) -> list[CheckpointEvent]:
        """All that was learned in this life, published once more: for when the loop has ended."""
        self._learn_pending()
        return self._keeper.save_all(self.sessions.engines())

    # -- time -----------------------------------------------------------------------------------

    def _keep_time(self) -> None:
        self._beat()
        now = self._clock()
        self._keeper.save_some(now, self.sessions.engines)
        if now >= self._next_tidy_at:
            self._next_tidy_at = now + 1.0
            self.sessions.tidy(now)
            for session in self.sessions.by_name.values():
                if now >= session.remind_at:
                    session.remind_at = now + REMIND_S
                    session.has_gain_news = True
                    narration.remind_of(self._bus, session.engine)
                if session.has_gain_news:
                    session.has_gain_news = False
                    self._publish_gain(session)
            self._bus.publish(self._loop_event())

    def _beat(self) -> None:
        """Tell the engines that the daemon lives, if it is time: however long a turn takes."""
        now = self._clock()
        if now >= self._next_heartbeat_at:
            self._next_heartbeat_at = now + self._settings.control.heartbeat_s
            self.sessions.beat()

    def close(self) -> None:
        self._transport.close()

    # -- saying what happened -------------------------------------------------------------------

    def _publish_gain(self, session: Session) -> None:
        name = session.engine.name
        try:
            event = narration.gain_event(name, session.trial, self._clock(), self._wall())
        except Exception:
            self.counters.failed("telling the gain", name)
            return
        self._bus.publish(event)

    def _loop_event(self) -> LoopEvent:
        vitals = self.vitals
        cpu_user_s, cpu_system_s = vitals.cpu_s()
        outside = {
            "connections_denied": self._transport.num_denied,
            "frames_unsendable": self._transport.num_unsendable,
            "events_dropped": self._bus.num_dropped,
            "telemetry_restarts": vitals.num_telemetry_restarts,
        }
        by_name = self.sessions.by_name
        links = {name: narration.link_counts(s.engine) for name, s in by_name.items()}
        return LoopEvent(
            t_s=self._wall(),
            num_engines=len(by_name),
            counters={**self.counters, **outside},
            links={name: counts for name, counts in links.items() if counts != LinkCounts()},
            started_s=vitals.started_s,
            version=release(),
            protocol=messages.PROTOCOL_VERSION,
            cpu_user_s=cpu_user_s,
            cpu_system_s=cpu_system_s,
            resident_bytes=vitals.resident_bytes(),
            is_reloaded=vitals.is_reloaded,
        )


def _burst(per_s: float) -> float:
    """Reports that may come at once, as after a pause of the daemon: a quarter of a second's."""
    return max(64.0, per_s / 4)
