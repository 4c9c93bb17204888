"""An engine begins a step, if it has anything to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from smartspec.engine_adapter.simulator.engine import Engine
from smartspec.engine_adapter.simulator.events.base import Queue
from smartspec.engine_adapter.simulator.events.step_end import StepEnd


@dataclass(frozen=True)
class StepBegin:
    engine: Engine
    order: ClassVar[int] = 2

    def happen(self, queue: Queue) -> None:
        seconds = self.engine.begin_step(queue.now_s)
        if seconds is not None:
            queue.put(queue.now_s + seconds, StepEnd(self.engine, self))
