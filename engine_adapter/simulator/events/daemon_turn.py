"""The daemon takes a turn: some time after a report was sent, and for every heartbeat."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from smartspec.engine_adapter.simulator.events.base import Queue


@dataclass(frozen=True)
class DaemonTurn:
    turn: Callable[[], object]
    order: ClassVar[int] = 3

    def happen(self, queue: Queue) -> None:
        self.turn()


@dataclass(frozen=True)
class HeartbeatTurn:
    """Goes on for as long as anything else is to happen."""

    turn: Callable[[], object]
    every_s: float
    order: ClassVar[int] = 4

    def happen(self, queue: Queue) -> None:
        self.turn()
        if len(queue):
            queue.put(queue.now_s + self.every_s, self)
