"""An event, and the queue that they wait in."""

from __future__ import annotations

import heapq
from typing import ClassVar, Protocol


class Event(Protocol):
    """Something that happens at a moment."""

    order: ClassVar[int]  #: among events of the same moment; lower is earlier

    def happen(self, queue: Queue) -> None:
        """Do it, and schedule what follows."""


class Queue:
    """Events by (time, order, when they were scheduled); its time is the clock of all."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._heap: list[tuple[float, int, int, Event]] = []
        self._count = 0

    def __len__(self) -> int:
        return len(self._heap)

    def clock(self) -> float:
        """Seconds since the beginning."""
        return self.now_s

    def put(self, at_s: float, event: Event) -> None:
        """Schedule; raises ValueError for the past."""
        if at_s < self.now_s:
            raise ValueError(f"{type(event).__name__} at {at_s}, before now ({self.now_s})")
        self._count += 1
        heapq.heappush(self._heap, (at_s, event.order, self._count, event))

    def run(self) -> None:
        """Let everything happen, until nothing is left."""
        while self._heap:
            self.now_s, _, _, event = heapq.heappop(self._heap)
            event.happen(self)
