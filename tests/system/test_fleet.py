"""Daemons that share one Redis: what each has learned of one kind of engine becomes one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import live_daemon
import numpy as np
import pytest
from fakes import PATIENCE_S
from scripted_engine import Costs, ScriptedEngine, hello

from smartspec.daemon.config import Settings
from smartspec.daemon.event_bus import NoteEvent, subscribe
from smartspec.daemon.state import learned
from smartspec.daemon.telemetry.embedded_valkey import EmbeddedValkey
from smartspec.daemon.telemetry.redis_store import Keys, connect
from smartspec.engine_adapter.link import EngineLink
from smartspec.estimators.step_cost import StepShape

pytestmark = pytest.mark.system

COSTS = Costs(base_s=0.01, token_s=0.0002, knee=64, beyond_s=0.004)
KEYS = Keys("smartspec:")
KEY_ID = learned.ModelKey.of(hello()).id


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


def host(stack: ExitStack, url: str) -> Settings:
    """A daemon with files of its own and the fleet's Redis."""
    folder = stack.enter_context(live_daemon.folder())
    settings, _ = stack.enter_context(
        live_daemon.daemon(
            folder,
            redis__url=url,
            state__enabled=True,
            state__directory=f"{folder}/state",
            state__checkpoint_s=0.5,
        )
    )
    return settings


def engine(stack: ExitStack, settings: Settings, name: str, acceptance: Any) -> ScriptedEngine:
    link = EngineLink(settings.endpoint, hello(name))
    stack.callback(link.close)
    return ScriptedEngine(link, acceptance, COSTS)


def stored(client: Any, num_steps: int = 0) -> learned.Checkpoint | None:
    """What the fleet knows, once it is of so many steps."""
    frame = client.get(KEYS.learned_of(KEY_ID))
    found = None if frame is None else learned.decode(frame, KEY_ID)
    return found if found is not None and found.num_steps >= num_steps else None


def error(checkpoint: learned.Checkpoint, batch: int, tokens: int) -> float:
    """Of the cost of a step, as a share of it."""
    true = COSTS.base_s + COSTS.token_s * tokens + COSTS.beyond_s * max(0, tokens - COSTS.knee)
    shape = StepShape(batch, tokens, context_tokens=200 * batch)
    return abs(learned.restore(checkpoint).step_cost.seconds(shape) / true - 1)


def test_third_host_starts_from_what_two_others_have_learned(stack: ExitStack) -> None:
    url_path = Path(stack.enter_context(live_daemon.folder())) / "fleet.sock"
    server = EmbeddedValkey(url_path)
    server.ensure()
    stack.callback(server.close)
    url = f"unix://{url_path}"
    client = connect(url)
    stack.callback(client.close)
    # Two hosts whose engines of one kind have seen different loads.
    first, second = host(stack, url), host(stack, url)
    quiet = engine(stack, first, "quiet", np.full(4, 0.9))
    busy = engine(stack, second, "busy", np.full(48, 0.3))

    def work(condition: Any, *engines: ScriptedEngine) -> Any:
        deadline = time.monotonic() + 3 * PATIENCE_S
        while not (found := condition()):
            assert time.monotonic() < deadline, "waited in vain"
            for one in engines:
                one.step()
            time.sleep(0.005)
        return found

    alone = work(lambda: stored(client, 200), quiet)
    assert error(alone, 48, 150) > 0.3  # it has never seen such a step

    def both() -> learned.Checkpoint | None:
        found = stored(client)
        assert found is not None
        good = error(found, 4, 12) < 0.2 and error(found, 48, 150) < 0.2
        return found if good else None

    work(both, quiet, busy)
    third = host(stack, url)
    subscriber = subscribe(third.bus_endpoint)
    stack.callback(subscriber.close)
    work(lambda: subscriber.poll(0.1), quiet)  # it is there, and heard
    late = engine(stack, third, "late", np.full(4, 0.9))

    def told() -> bool:
        event = subscriber.poll(0.0)
        if not isinstance(event, NoteEvent) or event.kind not in ("warm_start", "cold_start"):
            return False
        assert (event.engine, event.kind) == ("late", "warm_start"), event.text
        return True

    work(told, late)
