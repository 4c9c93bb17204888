"""Why the daemon does what it does, as it says on its event bus."""

from __future__ import annotations

import time
from dataclasses import dataclass

from smartspec.daemon.event_bus import DecisionEvent, NoteEvent, subscribe


@dataclass(frozen=True, slots=True)
class Decision:
    """One decision: when it was heard (monotonic), and what it expects in tokens per second."""

    clock_s: float
    reason: str
    predicted_goodput: float
    predicted_goodput_none: float
    num_probes: int
    decide_s: float


class Monitor:
    """Listens to the daemon and never holds it up."""

    def __init__(self, bus_endpoint: str) -> None:
        self._subscriber = subscribe(bus_endpoint, ("decision", "note"))
        self.decisions: list[Decision] = []
        self.notes: list[str] = []  #: warnings and errors

    @property
    def reason(self) -> str:
        """The newest reason; empty before the first."""
        return self.decisions[-1].reason if self.decisions else ""

    def drain(self) -> None:
        """Take in whatever has come."""
        while (event := self._subscriber.poll(0)) is not None:
            match event:
                case DecisionEvent():
                    self.decisions.append(
                        Decision(
                            time.monotonic(),
                            event.reason,
                            event.predicted_goodput,
                            event.predicted_goodput_none,
                            event.num_probes,
                            event.decide_s,
                        )
                    )
                case NoteEvent() if event.level in ("warning", "error"):
                    self.notes.append(event.text)

    def close(self) -> None:
        self._subscriber.close()
