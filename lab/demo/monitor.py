"""Why the daemon does what it does, as it says on its event bus."""

from __future__ import annotations

from smartspec.daemon.event_bus import DecisionEvent, NoteEvent, subscribe


class Monitor:
    """Listens to the daemon and never holds it up."""

    def __init__(self, bus_endpoint: str) -> None:
        self._subscriber = subscribe(bus_endpoint, ("decision", "note"))
        self.reason = ""  #: of the newest decision; empty before the first
        self.notes: list[str] = []  #: warnings and errors

    def drain(self) -> None:
        """Take in whatever has come."""
        while (event := self._subscriber.poll(0)) is not None:
            match event:
                case DecisionEvent():
                    self.reason = event.reason
                case NoteEvent() if event.level in ("warning", "error"):
                    self.notes.append(event.text)

    def close(self) -> None:
        self._subscriber.close()
