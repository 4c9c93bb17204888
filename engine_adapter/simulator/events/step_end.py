"""A step is over: tokens are out, the report goes to whom it may concern."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from smartspec.engine_adapter.simulator.engine import Engine
from smartspec.engine_adapter.simulator.events.base import Event, Queue


@dataclass(frozen=True)
class StepEnd:
    engine: Engine
    following: Event
    order: ClassVar[int] = 0

    def happen(self, queue: Queue) -> None:
        self.engine.end_step(queue.now_s)
        queue.put(queue.now_s, self.following)
