"""The loop: receive all, decide for the newest, publish, then learn. Nothing else lives in it.

It never queues work: however many reports have come, each engine gets one decision, for its newest
report. Policies go out before anything is learned or published on the bus. Whatever a peer sends,
the loop goes on: bad input is counted, told once in a while, and dropped whole.
"""

from __future__ import annotations

import logging
import secrets
import time
import zlib
from collections.abc import Callable
from typing import Protocol

from smartspec.daemon.commands import Answer, Command
from smartspec.daemon.config import Settings
from smartspec.daemon.counters import Counters
from smartspec.daemon.curve_keys import KeyFileError
from smartspec.daemon.engines import Engine, Observation, OutOfOrder, RosterGap
from smartspec.daemon.event_bus import (
    Bus,
    CheckpointEvent,
    DecisionEvent,
    EngineEvent,
    GainEvent,
    LinkCounts,
    LoopEvent,
    NoteEvent,
    NullBus,
    StepEvent,
)
from smartspec.daemon.keeper import Keeper
from smartspec.daemon.learned import Learned, ModelKey
from smartspec.daemon.library import Library
from smartspec.daemon.pauses import Pauses
from smartspec.daemon.policy import Arm, Decision, Planner, PlannerSettings
from smartspec.daemon.quarantine import Quarantine
from smartspec.daemon.throttle import Throttle
from smartspec.daemon.trial import Step, Trial
from smartspec.engine_adapter import messages
from smartspec.engine_adapter.messages import (
    DaemonMessage,
    Goodbye,
    Heartbeat,
    Hello,
    MessageError,
    Refused,
    Resync,
    StepReport,
)

log = logging.getLogger("smartspec.daemon")

MAX_FRAMES_PER_CYCLE = 4096
MAX_LEARNED_PER_CYCLE = 32  #: of one engine; what it sent before that is read, but teaches nothing
HELLOS_PER_S = 2.0  #: of one connection; each may mean an engine to set up
HELLO_BURST = 16.0
NOTE_EVERY_S = 1.0  #: at most one note per engine and second; all are counted
RETIRED_KEPT = 64
ANSWER_EVERY_S = 0.1  #: to a peer in trouble
MAX_TEXT = 256  #: characters of a reason that the wire takes


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
        self.decision: Decision | None = None
        self.decide_s = 0.0
        self.learn_s = 0.0


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
        self._heartbeat = messages.encode(Heartbeat(daemon_epoch=self.epoch))
        self._by_peer: dict[bytes, Session] = {}
        self._by_name: dict[str, Session] = {}
        self._retired: dict[str, Engine] = {}  # what was learned, should they come back
        self._trials: dict[str, Trial] = {}  # of those by name, and of the retired
        self._pauses = pauses or Pauses()
        self._answered_at: dict[bytes, float] = {}
        limits = settings.limits
        self._frames = Throttle(limits.max_reports_per_s, _burst(limits.max_reports_per_s))
        self._hellos = Throttle(HELLOS_PER_S, HELLO_BURST)
        self._quarantine = Quarantine(limits.quarantine_after, limits.quarantine_s)
        self._next_heartbeat_at = clock()
        self._next_tidy_at = clock()
        self.counters = Counters()
        library = Library(settings.state.max_kept) if library is None else library
        if library.num_refused:
            self.counters["states_refused"] = library.num_refused
        self._keeper = Keeper(settings.state, library, bus, self.counters, clock(), wall)

    def apply(self, settings: Settings) -> None:
        """Go on with other settings; those that need a restart must be as they were."""
        try:
            self._transport.reload()
        except KeyFileError as error:
            log.error("the list of engines in force stays: %s", error)
        self._settings = settings
        self._keeper.apply(settings.state)
        limits = settings.limits
        self._frames.per_s = limits.max_reports_per_s
        self._frames.burst = _burst(limits.max_reports_per_s)
        self._quarantine.after, self._quarantine.first_s = (
            limits.quarantine_after,
            limits.quarantine_s,
        )
        for session in self._by_name.values():
            session.planner.adjust(**self._planning())
        for trial in self._trials.values():
            trial.adjust(settings.adoption)

    # -- the loop -------------------------------------------------------------------------------

    def cycle(self, timeout_s: float) -> str | None:
        """One turn; returns the reason of the last decision made, if any.

        Waits at most ``timeout_s`` for something to arrive.
        """
        reason = None
        until_heartbeat_s = self._next_heartbeat_at - self._clock()
        if self._transport.wait(max(0.0, min(timeout_s, until_heartbeat_s))):
            began = self._clock()
            arrived = self._receive()
            for session in arrived:
                reason = self._decide(session, began) or reason
            for session, observations in arrived.items():
                self._learn(session, observations)
        self._keep_time()
        return reason

    def _receive(self) -> dict[Session, list[Observation]]:
        arrived: dict[Session, list[Observation]] = {}
        for _ in range(MAX_FRAMES_PER_CYCLE):
            received = self._transport.receive()
            if received is None:
                break
            peer, frame = received
            session = self._by_peer.get(peer)
            if not self._frames.admits(peer, self._clock()):
                self._drop(session)
                continue
            try:
                self._take(peer, messages.decode_engine_message(frame), session, arrived)
            except RosterGap as gap:
                self._ask_again(peer, str(gap))
            except OutOfOrder as error:
                self._refuse_frame(peer, session, error)
            except MessageError as error:
                self._refuse_frame(peer, session, error)
                if session is not None and self._by_peer.get(peer) is session:
                    self._blame(peer, session, error)
                    if self._by_peer.get(peer) is not session:
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
                    self._ask_again(peer, "no Hello of this epoch was received")
                    return
                session.heard_at = self._clock()
                missed = session.engine.num_missed
                observation = session.engine.observe(message)
                arrived.setdefault(session, []).append(observation)
                self._quarantine.credit(session.engine.name)
                self.counters["reports"] += 1
                self.counters["steps_missed"] += session.engine.num_missed - missed
            case Hello():
                self._welcome(peer, message)
            case Goodbye():
                if session is not None and session.engine.hello.epoch == message.epoch:
                    self._forget(session, "left")

    def _decide(self, session: Session, began: float) -> str | None:
        try:
            decision = session.planner.decide(session.trial.arm(self._clock()))
        except Exception:
            self.counters.failed("deciding", session.engine.name)
            return None
        if decision is None:
            return None
        if self._settings.mode != "observe" and decision.is_news:
            self._send(session.peer, decision.policy)
            self.counters["policies_sent"] += 1
        session.decision = decision
        session.decide_s = self._clock() - began
        self.counters["decisions"] += 1
        return decision.policy.reason

    def _learn(self, session: Session, observations: list[Observation]) -> None:
        began = self._clock()
        self.counters["reports_unlearned"] += max(0, len(observations) - MAX_LEARNED_PER_CYCLE)
        observations = observations[-MAX_LEARNED_PER_CYCLE:]
        predicted: list[float | None] = []
        decision = session.decision
        costs, acceptance = session.engine.step_cost, session.engine.acceptance
        num_cost_changes, num_changes = costs.num_changes, acceptance.num_changes
        for observation in observations:
            seconds = None
            try:
                seconds = session.engine.learn(observation)
                if session.trial.current is Arm.SMARTSPEC or self._settings.mode == "observe":
                    session.planner.prober.account(observation)
            except Exception:
                self.counters.failed("learning", session.engine.name)
            predicted.append(seconds)
        session.learn_s = (self._clock() - began) / max(1, len(predicted))
        if self._is_heard:
            for observation, seconds in zip(observations, predicted, strict=True):
                self._bus.publish(self._step_event(session, observation, seconds))
        if costs.num_changes > num_cost_changes:
            last = observations[-1].report
            times = last.step_s / (predicted[-1] or last.step_s)
            self._note_drift(session, "cost", f"steps take {times:.2f} times what was expected")
        if acceptance.num_changes > num_changes:
            self._note_drift(
                session, "acceptance", "first drafts are no longer accepted as they were"
            )
        if decision is not None:
            static = decision.goodput_static()
            if self._is_heard:
                self._bus.publish(self._decision_event(session, decision, static))
            try:
                self._compare(session, observations, decision, static)
            except Exception:
                self.counters.failed("comparing", session.engine.name)
            session.decision = None

    def _compare(
        self,
        session: Session,
        observations: list[Observation],
        decision: Decision,
        static: float,
    ) -> None:
        """Take steps into the comparison of what was run with what could have been."""
        now = self._clock()
        otherwise = {Arm.NONE: decision.goodput_none, Arm.OWN: static}
        for observation in observations:
            if not len(observation.batch.ids):
                continue
            step = Step(
                step_s=observation.report.step_s,
                tokens=observation.weighted_tokens,
                chosen=decision.goodput,
                otherwise=otherwise,
                model_std=decision.gain_std,
                # Of several steps an earlier one may have ended the block.
                obeyed=session.trial.current is decision.arm
                and session.planner.obeyed(observation),
                comparable=decision.is_comparable,
                num_waiting=observation.report.num_waiting,
            )
            retreat = session.trial.note(step, now)
            if retreat is not None:
                self.counters["retreats"] += 1
                log.warning("engine %s: %s", session.engine.name, retreat)
                self._bus.publish(
                    NoteEvent(
                        engine=session.engine.name, level="error", kind="retreat", text=retreat
                    )
                )
        session.has_gain_news = True

    def _note_drift(self, session: Session, of: str, text: str) -> None:
        self.counters[f"{of}_changes"] += 1
        self._bus.publish(
            NoteEvent(
                engine=session.engine.name,
                level="warning",
                kind="drift",
                text=f"{text}: older ones now count less",
            )
        )

    # -- engines come and go --------------------------------------------------------------------

    def _welcome(self, peer: bytes, hello: Hello) -> None:
        if not self._hellos.admits(peer, self._clock()):
            self.counters["hellos_throttled"] += 1
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
        known = self._by_name.get(hello.engine)
        if known is not None and self._in_use(known, peer):
            self._refuse_engine(peer, hello, f"another engine is called {hello.engine!r}")
            return
        if known is not None and known.engine.hello == hello:
            # The same engine over a new connection, or reminded by a Resync.
            self._seat(known, peer)
            known.heard_at = self._clock()
            self._transport.send(peer, self._heartbeat)
            return
        if known is None and len(self._by_name) >= self._settings.control.max_engines:
            self._refuse_engine(peer, hello, "control.max_engines is reached")
            return
        # Made first: a Hello that is refused must cost neither session nor what was learned.
        previous = known.engine if known else self._retired.get(hello.engine)
        origin: list[str] = []

        def lend(key: ModelKey) -> Learned | None:
            learned, words = self._keeper.lend(key, self._engines())
            origin.append(words)
            return learned

        engine = Engine(hello, previous, lend)
        if previous is not None and previous.learned is not engine.learned and previous.num_unsaved:
            self._keeper.save(previous)  # or it would go with the name
        if known is not None:
            self._forget(known, "replaced")
        self._retired.pop(hello.engine, None)
        planner = Planner(
            engine,
            daemon_epoch=self.epoch,
            seed_sweep=self._settings.control.seed_sweep and self._settings.mode != "observe",
            **self._planning(),
        )
        session = Session(peer, engine, planner, self._trial_of(engine), self._clock())
        self._seat(session, peer)
        self._by_name[engine.name] = session
        self._transport.send(peer, self._heartbeat)
        self.counters["engines_connected"] += 1
        log.info("engine %s connected (epoch %d)", engine.name, hello.epoch)
        self._publish_engine(session, "connected")
        for text in filter(None, origin):
            log.info("engine %s %s", engine.name, text)
            kind = "warm_start" if engine.learned.num_steps else "cold_start"
            self._bus.publish(NoteEvent(engine=engine.name, kind=kind, text=text))

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
        trial = self._trials.get(engine.name)
        if trial is None:
            own_is_none = engine.hello.limits.static_length == 0
            # Names differ in a fleet, and so do the moments at which engines are compared.
            seed = zlib.crc32(engine.name.encode())
            trial = Trial(self._settings.mode, self._settings.adoption, seed, own_is_none)
            self._trials[engine.name] = trial
        trial.is_paused = engine.name in self._pauses
        trial.interrupt()
        return trial

    def _seat(self, session: Session, peer: bytes) -> None:
        """Note that an engine is reached at ``peer``: one connection, one engine."""
        if self._by_peer.get(session.peer) is session:
            del self._by_peer[session.peer]
        other = self._by_peer.get(peer)
        if other is not None:
            self._forget(other, "replaced")
        session.peer = peer
        self._by_peer[peer] = session

    def _in_use(self, known: Session, peer: bytes) -> bool:
        """Whether the name belongs to another engine that has worked and is still connected.

        Silence is no sign of death (a long prefill, an idle engine); a closed connection is. An
        engine that hangs loses its name after ``engine_timeout_s``, as any that is lost.
        """
        if known.peer == peer or known.engine.num_reports == 0:
            return False
        return self._transport.send(known.peer, self._heartbeat)

    def _refuse_engine(self, peer: bytes, hello: Hello, why: str) -> None:
        self.counters["engines_refused"] += 1
        if not self._may_answer(peer):
            return
        log.warning("engine %s refused: %s", hello.engine, why)
        self._send_refusal(peer, why)
        self._bus.publish(NoteEvent(engine=hello.engine, level="warning", kind="refused", text=why))

    def _drop(self, session: Session | None) -> None:
        """Count a report that was one too many; it is not even read."""
        self.counters["frames_throttled"] += 1
        if session is None:
            return
        session.engine.num_throttled += 1
        if self._clock() - session.noted_at >= NOTE_EVERY_S:
            session.noted_at = self._clock()
            most = self._settings.limits.max_reports_per_s
            text = f"more than {most} reports a second: some are dropped unread"
            name = session.engine.name
            self._bus.publish(NoteEvent(engine=name, level="warning", kind="throttled", text=text))

    def _blame(self, peer: bytes, session: Session, error: MessageError) -> None:
        """Count a lie; an engine that told too many loses its seat, and what it taught lately."""
        name = session.engine.name
        lasts_s = self._quarantine.blame(name, str(error)[: MAX_TEXT // 2], self._clock())
        if not lasts_s:
            return
        self.counters["quarantines"] += 1
        why = f"in quarantine for {lasts_s:.0f} s: it tells what cannot be true ({error})"
        log.warning("engine %s %s", name, why)
        self._bus.publish(NoteEvent(engine=name, level="error", kind="quarantined", text=why))
        self._send_refusal(peer, why)
        self._forget(session, "quarantined")
        self._retired.pop(name, None)

    def _forget(self, session: Session, state: str) -> None:
        if self._by_peer.get(session.peer) is session:
            del self._by_peer[session.peer]
        if self._by_name.get(session.engine.name) is session:
            del self._by_name[session.engine.name]
            self._retired[session.engine.name] = session.engine
            if len(self._retired) > RETIRED_KEPT:
                oldest = next(iter(self._retired))
                del self._retired[oldest]
                if oldest not in self._by_name:
                    self._trials.pop(oldest, None)
        log.info("engine %s %s", session.engine.name, state)
        self._publish_engine(session, state)

    def _ask_again(self, peer: bytes, why: str) -> None:
        if self._may_answer(peer):
            self.counters["resyncs"] += 1
            self._send(peer, Resync(daemon_epoch=self.epoch, reason=why))

    def _may_answer(self, peer: bytes) -> bool:
        """Whether a peer in trouble is due an answer: an engine in full flow is told so often."""
        now = self._clock()
        if now - self._answered_at.get(peer, -1e9) < ANSWER_EVERY_S:
            return False
        if len(self._answered_at) > 4096:
            self._answered_at.clear()
        self._answered_at[peer] = now
        return True

    def _send_refusal(self, peer: bytes, why: str) -> None:
        self._send(peer, Refused(daemon_epoch=self.epoch, reason=why[:MAX_TEXT]))

    def _refuse_frame(self, peer: bytes, session: Session | None, error: MessageError) -> None:
        self.counters["frames_refused"] += 1
        name = session.engine.name if session else ""
        if session is not None:
            session.engine.num_refused += 1
            if self._clock() - session.noted_at < NOTE_EVERY_S:
                return
            session.noted_at = self._clock()
            self._bus.publish(
                NoteEvent(engine=name, level="warning", kind="bad_frame", text=str(error))
            )
            return
        # Most likely an engine of another version, or one that misdescribes itself: it should know.
        if self._may_answer(peer):
            self._send_refusal(peer, str(error))
            log.warning("frame from an unknown peer refused: %s", error)
            self._bus.publish(
                NoteEvent(engine="", level="warning", kind="bad_frame", text=str(error))
            )

    # -- what an operator says ------------------------------------------------------------------

    def obey(self, command: Command) -> Answer:
        """Pause or release engines; returns what came of it, in words."""
        name = command.engine
        if name and not (name in self._by_name or name in self._retired or name in self._pauses):
            known = ", ".join(sorted(self._by_name)) or "none"
            return Answer(ok=False, text=f"no engine {name!r}; known: {known}")
        is_pause = command.action == "pause"
        kept = ""
        try:
            (self._pauses.pause if is_pause else self._pauses.release)(name)
        except ValueError as error:
            return Answer(ok=False, text=str(error))
        except OSError as error:
            kept = f"; not kept over a restart of the daemon ({error})"
        for session in self._by_name.values():
            was, session.trial.is_paused = (
                session.trial.is_paused,
                session.engine.name in self._pauses,
            )
            if session.trial.is_paused == was:
                continue
            if is_pause and self._settings.mode != "observe":
                self._send(session.peer, session.planner.release())  # it may be idle for long
            self._bus.publish(self._gain_event(session))
        who = f"engine {name}" if name else "all engines"
        done = "paused: the engine's own setting" if is_pause else "released"
        text = f"{who} {done}{kept}"
        log.warning("%s", text)
        self._bus.publish(NoteEvent(engine=name, kind=command.action, level="warning", text=text))
        return Answer(text=text)

    # -- what was learned ---------------------------------------------------------------------

    def _engines(self) -> list[Engine]:
        """Those connected, and those that have gone and may come back."""
        return [session.engine for session in self._by_name.values()] + [*self._retired.values()]

    def checkpoints(self) -> list[CheckpointEvent]:
        """All that was learned in this life, published once more: for when the loop has ended."""
        return self._keeper.save_all(self._engines())

    # -- time -----------------------------------------------------------------------------------

    def _keep_time(self) -> None:
        now = self._clock()
        if now >= self._next_heartbeat_at:
            self._next_heartbeat_at = now + self._settings.control.heartbeat_s
            for peer in self._by_peer:
                self._transport.send(peer, self._heartbeat)
        self._keeper.save_some(now, self._engines)
        if now >= self._next_tidy_at:
            self._next_tidy_at = now + 1.0
            timeout_s = self._settings.control.engine_timeout_s
            for session in list(self._by_name.values()):
                if now - session.heard_at > timeout_s:
                    self._forget(session, "lost")
            for session in self._by_name.values():
                if session.has_gain_news:
                    session.has_gain_news = False
                    self._bus.publish(self._gain_event(session))
            self._bus.publish(self._loop_event())

    def close(self) -> None:
        self._transport.close()

    # -- saying what happened -------------------------------------------------------------------

    def _send(self, peer: bytes, message: DaemonMessage) -> None:
        self._transport.send(peer, messages.encode(message))

    def _publish_engine(self, session: Session, state: str) -> None:
        hello = session.engine.hello
        self._bus.publish(
            EngineEvent(
                engine=session.engine.name,
                epoch=hello.epoch,
                state=state,
                fingerprint=messages.to_plain(hello.fingerprint),
                limits=messages.to_plain(hello.limits),
            )
        )

    def _loop_event(self) -> LoopEvent:
        outside = {
            "connections_denied": self._transport.num_denied,
            "frames_unsendable": self._transport.num_unsendable,
            "events_dropped": self._bus.num_dropped,
        }
        links = {name: _link_counts(s.engine) for name, s in self._by_name.items()}
        return LoopEvent(
            t_s=self._wall(),
            num_engines=len(self._by_name),
            counters={**self.counters, **outside},
            links={name: counts for name, counts in links.items() if counts != LinkCounts()},
        )

    def _step_event(
        self, session: Session, observation: Observation, predicted_s: float | None
    ) -> StepEvent:
        report = observation.report
        return StepEvent(
            engine=session.engine.name,
            seq=report.seq,
            t_s=self._wall(),
            num_running=len(observation.batch.ids),
            num_waiting=report.num_waiting,
            kv_usage=report.kv_usage,
            step_s=report.step_s,
            target_s=report.target_s,
            draft_s=report.draft_s,
            num_drafted=int(observation.num_drafted.sum()),
            num_accepted=int(observation.num_accepted.sum()),
            num_emitted=observation.num_emitted,
            num_prefill_tokens=report.num_prefill_tokens,
            context_tokens=report.context_tokens,
            source=report.source,
            staleness_steps=observation.staleness_steps,
            predicted_step_s=predicted_s,
        )

    def _gain_event(self, session: Session) -> GainEvent:
        trial, now = session.trial, self._clock()
        gains = trial.gains
        values: dict[str, float | None] = {}
        for arm, over in ((Arm.NONE, "none"), (Arm.OWN, "static")):
            compared = gains.comparisons[arm].interval()
            for prefix, interval in (("gain", gains.over(arm)), ("measured", compared)):
                if interval is not None:
                    for suffix, value in zip(("", "_low", "_high"), interval, strict=True):
                        values[f"{prefix}_over_{over}{suffix}"] = value
            values[f"bias_{over}"] = gains.bias(arm)
        return GainEvent(
            engine=session.engine.name,
            t_s=self._wall(),
            stance=trial.stance(now),
            arm=trial.current,
            num_compared_none=gains.comparisons[Arm.NONE].num_made,
            num_compared_static=gains.comparisons[Arm.OWN].num_made,
            evidence_worse=trial.evidence.value,
            num_retreats=trial.num_retreats,
            retry_s=None if trial.retry_at is None else max(0.0, trial.retry_at - now),
            **values,
        )

    def _decision_event(self, session: Session, decision: Decision, static: float) -> DecisionEvent:
        policy = decision.policy
        counts = [0] * (session.engine.max_length + 1)
        for length in decision.lengths.tolist():
            counts[length] += 1
        return DecisionEvent(
            engine=session.engine.name,
            policy_seq=policy.seq,
            report_seq=policy.report_seq,
            t_s=self._wall(),
            steering=decision.arm is Arm.SMARTSPEC,
            reason=policy.reason,
            value_of_time=policy.value_of_time,
            depth=policy.depth,
            mode=decision.mode,
            length_counts=tuple(counts),
            predicted_goodput=decision.goodput,
            predicted_goodput_none=decision.goodput_none,
            predicted_goodput_static=static,
            acceptance=tuple(session.engine.acceptance.pooled_hazards().tolist()),
            num_probes=policy.num_probes,
            decide_s=session.decide_s,
            learn_s=session.learn_s,
            num_targets=decision.num_targets,
            num_targets_out_of_reach=decision.num_out_of_reach,
        )


def _link_counts(engine: Engine) -> LinkCounts:
    return LinkCounts(**{name: getattr(engine, name) for name in LinkCounts.__struct_fields__})


def _burst(per_s: float) -> float:
    """Reports that may come at once, as after a pause of the daemon: a quarter of a second's."""
    return max(64.0, per_s / 4)
