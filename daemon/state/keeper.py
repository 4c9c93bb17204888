"""What was learned, lent to engines that begin and published to be kept.

Stands between the engines, which learn, and the library, which remembers. Does no I/O of its own:
checkpoints go out on the bus, and another process writes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from smartspec.daemon.config import StateSettings
from smartspec.daemon.counters import Counters
from smartspec.daemon.engines import Engine
from smartspec.daemon.event_bus import Bus, CheckpointEvent
from smartspec.daemon.state.learned import (
    MAX_BYTES,
    Learned,
    ModelKey,
    RefusedState,
    encode,
    restore,
)
from smartspec.daemon.state.library import Library


class Keeper:
    """Lends and keeps what was learned.

    Parameters
    ----------
    settings : the section ``state``
    library : what was learned before
    bus : told of every checkpoint
    counters : the loop's own
    now : of the loop's clock, seconds
    wall : seconds of the calendar
    """

    def __init__(
        self,
        settings: StateSettings,
        library: Library,
        bus: Bus,
        counters: Counters,
        now: float,
        wall: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._library = library
        self._bus = bus
        self._counters = counters
        self._wall = wall
        self._saved_at = now
        self._to_save: list[Engine] = []

    def apply(self, settings: StateSettings) -> None:
        """Go on with another interval, since the last checkpoints."""
        self._settings = settings

    def lend(self, key: ModelKey, engines: Iterable[Engine]) -> tuple[Learned | None, str]:
        """A copy of what is known of an engine's kind, and where it is from, in words.

        ``engines`` are those that may know. Words without a copy say why there is none.
        """
        like = [e for e in engines if e.key == key and e.learned.num_steps]
        if like:
            best = max(like, key=lambda engine: engine.learned.num_steps)
            try:
                learned = restore(best.learned.checkpoint(best.name, self._wall()))
            except RefusedState:
                self._counters.failed("copying what was learned")
            else:
                steps = learned.num_steps
                return learned, f"starts from what engine {best.name} knows, of {steps} steps"
        if (found := self._library.find(key)) is not None:
            learned, checkpoint = found
            age_s = max(0.0, self._wall() - checkpoint.saved_s)
            return learned, (
                f"starts from what engine {checkpoint.engine} knew {age_s:.0f} s ago, of "
                f"{learned.num_steps} steps"
            )
        why = self._library.why_not(key)
        return None, "" if why is None else f"starts cold: {why}"

    def save_some(self, now: float, engines: Callable[[], Iterable[Engine]]) -> None:
        """One checkpoint a turn, so that no turn is long however many engines there are."""
        if now >= self._saved_at + self._settings.checkpoint_s:
            self._saved_at = now
            # Of engines of one kind, the one that has learned most since the last checkpoint.
            busiest: dict[ModelKey, tuple[int, Engine]] = {}
            for engine in engines():
                if engine.num_unsaved > busiest.get(engine.key, (0,))[0]:
                    busiest[engine.key] = engine.num_unsaved, engine
                engine.num_unsaved = 0
            self._to_save = [engine for _, engine in busiest.values()]
        if self._to_save:
            self.save(self._to_save.pop())

    def save(self, engine: Engine) -> CheckpointEvent | None:
        """Publish a checkpoint; None: nothing is to be kept, or it cannot be."""
        if not self._settings.enabled:
            return None
        try:
            checkpoint = engine.learned.checkpoint(engine.name, self._wall())
            frame = encode(checkpoint)
        except Exception:
            self._counters.failed("saving what was learned")
            return None
        engine.num_unsaved = 0
        self._library.put(checkpoint)
        if len(frame) > MAX_BYTES:
            self._counters["checkpoints_too_large"] += 1
            return None
        event = CheckpointEvent(
            t_s=checkpoint.saved_s, key_id=engine.key.id, frame=frame, engine=engine.name
        )
        self._bus.publish(event)
        self._counters["checkpoints"] += 1
        return event

    def save_all(self, engines: Iterable[Engine]) -> list[CheckpointEvent]:
        """All that was learned in this life, once more: for when the loop has ended."""
        last: dict[ModelKey, Engine] = {}
        for engine in engines:
            rival = last.get(engine.key)
            mine = (engine.num_unsaved, engine.learned.num_steps)
            if rival is None or mine > (rival.num_unsaved, rival.learned.num_steps):
                last[engine.key] = engine
        events = (self.save(e) for e in last.values() if e.num_reports or e.num_unsaved)
        return [event for event in events if event is not None]
