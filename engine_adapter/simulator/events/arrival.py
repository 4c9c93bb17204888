"""A request comes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from smartspec.engine_adapter.simulator.engine import Engine
from smartspec.engine_adapter.simulator.events.base import Queue
from smartspec.engine_adapter.simulator.events.step_begin import StepBegin


@dataclass(frozen=True)
class Arrival:
    engine: Engine
    request: int  #: index in the engine's traffic; arrivals of one engine are a chain
    order: ClassVar[int] = 1

    def happen(self, queue: Queue) -> None:
        engine = self.engine
        if engine.is_idle:
            queue.put(queue.now_s, StepBegin(engine))
        engine.arrive(self.request)
        following = self.request + 1
        if following < engine.traffic.size:
            at_s = max(float(engine.traffic.arrival_s[following]), queue.now_s)
            queue.put(at_s, Arrival(engine, following))
