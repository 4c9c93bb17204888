"""An engine that has learned something, and its checkpoint: for tests of what is kept."""

from __future__ import annotations

from typing import Any

import msgspec
from fakes import step_report
from scripted_engine import hello

from smartspec.daemon.engines import Engine
from smartspec.daemon.state.learned import encode


def experienced(steps: int = 150, **limits: Any) -> Engine:
    greeting = hello()
    changed = msgspec.structs.replace(greeting.limits, **limits)
    engine = Engine(msgspec.structs.replace(greeting, limits=changed))
    for seq in range(1, steps + 1):
        engine.learn(engine.observe(step_report(seq, roster=seq == 1)))
    return engine


ENGINE = experienced()
CHECKPOINT = ENGINE.learned.checkpoint("gpu0", 1e9)
FRAME = encode(CHECKPOINT)
