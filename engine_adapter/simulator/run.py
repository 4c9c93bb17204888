"""One or more engines, until all requests are served."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from smartspec.engine_adapter.simulator.engine import Engine
from smartspec.engine_adapter.simulator.events.arrival import Arrival
from smartspec.engine_adapter.simulator.events.base import Queue
from smartspec.engine_adapter.simulator.events.daemon_turn import HeartbeatTurn

HEARTBEAT_S = 0.2


def run(queue: Queue, engines: Sequence[Engine], turn: Callable[[], object] | None = None) -> None:
    """Let ``engines`` serve; ``turn``: the daemon's, taken for its heartbeats."""
    for engine in engines:
        if engine.traffic.size:
            queue.put(max(float(engine.traffic.arrival_s[0]), queue.now_s), Arrival(engine, 0))
    if turn is not None:
        queue.put(queue.now_s, HeartbeatTurn(turn, HEARTBEAT_S))
    queue.run()
