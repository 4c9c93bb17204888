"""`smartspec top`, driven by keys, on what a real Valkey holds."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
from fakes import PATIENCE_S
from textual.pilot import Pilot
from textual.widgets import DataTable, Static

from smartspec.daemon import config
from smartspec.daemon.commands import Answer, Command
from smartspec.daemon.config import Settings
from smartspec.daemon.event_bus import LoopEvent, NoteEvent
from smartspec.daemon.telemetry.embedded_valkey import EmbeddedValkey
from smartspec.daemon.telemetry.engine_state import EngineState
from smartspec.daemon.telemetry.redis_store import RedisStore, connect_as
from smartspec.daemon.views import top
from smartspec.daemon.views.inspect import InspectError, View

pytestmark = pytest.mark.integration

Drive = Callable[[Pilot[None], top.Top], Coroutine[Any, Any, None]]


def state(name: str, **more: Any) -> EngineState:
    values: dict[str, Any] = {
        "num_running": 12,
        "num_waiting": 3,
        "kv_usage": 0.4,
        "updated_s": time.time(),
        "steering": True,
        "reason": f"{name}: drafting 3 deep pays, 4 does not",
        "length_counts": (2, 0, 0, 10),
        "value_of_time": 640.0,
        "goodput": 600.0,
        "predicted_goodput": 640.0,
        "gain_over_none": 0.6,
        "acceptance": (0.8, 0.7, 0.6, 0.5, 0.4),
        "prediction_error": 0.04,
        "staleness_steps": 1,
    }
    return EngineState(engine=name, **{**values, **more})


@pytest.fixture(scope="module")
def settings() -> Iterator[Settings]:
    folder = tempfile.mkdtemp(prefix="ss-")
    made = config.load(None, {}, {"runtime_dir": folder})
    server = EmbeddedValkey(made.embedded_socket)
    try:
        server.ensure()
        yield made
    finally:
        server.close()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def store(settings: Settings) -> Iterator[RedisStore]:
    client = connect_as(settings)
    client.flushall()
    made = RedisStore(client, settings.redis.key_prefix, 100, 1000)
    made.add(LoopEvent(num_engines=2))
    made.put_states([state("a"), state("b", num_running=99, goodput=None)])
    made.add(NoteEvent(engine="b", kind="drift", level="warning", text="steps take twice as long"))
    made.flush()
    yield made
    made.close()


def drive(
    read: Callable[[], list[View]],
    how: Drive,
    tell: Callable[[Command], Answer | None] = lambda command: None,
) -> None:
    async def run() -> None:
        app = top.Top(read, interval_s=0.05, tell=tell)
        async with app.run_test(size=(180, 40)) as pilot:
            await how(pilot, app)

    asyncio.run(run())


async def until(pilot: Pilot[None], condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        await pilot.pause(0.02)


def rows(app: top.Top) -> list[str]:
    table = app.screen_stack[0].query_one("#engines", DataTable)
    return [str(key.value) for key in table.rows]


def toasts(app: top.Top) -> str:
    return " ".join(notification.message for notification in app._notifications)


def said(app: top.Top, where: str) -> str:
    screen = app.screen if where == "#details" else app.screen_stack[0]
    return str(screen.query_one(where, Static).render())


def test_engines_are_shown_with_the_reason_of_the_one_selected(
    settings: Settings, store: RedisStore
) -> None:
    async def how(pilot: Pilot[None], app: top.Top) -> None:
        await until(pilot, lambda: rows(app) == ["a", "b"])
        table = app.screen_stack[0].query_one("#engines", DataTable)
        shown = " ".join(str(cell) for cell in table.get_row("a"))
        for part in ("steering", "12", "2@0, 10@3", "600.0", "640.0", "+60%", "80 70 60 50 …"):
            assert part in shown
        assert "a: drafting 3 deep pays" in said(app, "#why")
        assert "steps take twice as long" in said(app, "#events")
        assert "2 engines, 111 requests running" in said(app, "#status")
        await pilot.press("down")
        await until(pilot, lambda: "b: drafting" in said(app, "#why"))

    drive(lambda: top.look(settings), how)


def test_figures_follow_redis_and_the_cursor_stays_with_its_engine(
    settings: Settings, store: RedisStore
) -> None:
    async def how(pilot: Pilot[None], app: top.Top) -> None:
        await until(pilot, lambda: rows(app) == ["a", "b"])
        await pilot.press("down")
        store.put_states([state("0"), state("b", num_running=7)])
        await asyncio.to_thread(store.flush)
        await until(pilot, lambda: rows(app) == ["0", "a", "b"])
        assert app.selected == "b"
        table = app.screen_stack[0].query_one("#engines", DataTable)
        assert str(table.get_cell("b", "run")) == "7"

    drive(lambda: top.look(settings), how)


def test_keys_sort_and_reverse(settings: Settings, store: RedisStore) -> None:
    async def how(pilot: Pilot[None], app: top.Top) -> None:
        await until(pilot, lambda: rows(app) == ["a", "b"])
        await pilot.press("s", "s")
        await until(pilot, lambda: rows(app) == ["b", "a"])  # by requests running
        assert "sorted by run" in said(app, "#status")
        await pilot.press("r")
        await until(pilot, lambda: rows(app) == ["a", "b"])

    drive(lambda: top.look(settings), how)


def test_enter_opens_an_engine_and_escape_returns(settings: Settings, store: RedisStore) -> None:
    async def how(pilot: Pilot[None], app: top.Top) -> None:
        await until(pilot, lambda: rows(app) == ["a", "b"])
        await pilot.press("enter")
        await until(pilot, lambda: isinstance(app.screen, top.EngineScreen))
        svg = ""

        def drawn() -> bool:
            nonlocal svg
            svg = app.export_screenshot().replace("&#160;", " ")
            return "depth  5" in svg

        await until(pilot, drawn)
        for part in ("engine a", "12 running, 3 waiting", "600.0 tokens/s measured"):
            assert part in svg
        await pilot.press("escape")
        await until(pilot, lambda: not isinstance(app.screen, top.EngineScreen))

    drive(lambda: top.look(settings), how)


def test_an_outage_is_told_and_the_last_figures_stay(settings: Settings, store: RedisStore) -> None:
    down = False

    def read() -> list[View]:
        if down:
            raise InspectError("Redis cannot be read", 2)
        return top.look(settings)

    async def how(pilot: Pilot[None], app: top.Top) -> None:
        nonlocal down
        await until(pilot, lambda: rows(app) == ["a", "b"])
        down = True
        await until(pilot, lambda: "Redis cannot be read; trying again" in said(app, "#status"))
        assert rows(app) == ["a", "b"]
        down = False
        await until(pilot, lambda: "2 engines" in said(app, "#status"))

    drive(read, how)


def test_names_from_elsewhere_cannot_steer_the_terminal(
    settings: Settings, store: RedisStore
) -> None:
    store.put_states([state("a", reason="[red]x[/red]\x1b[2J", fingerprint={"target": "\x1b]0;"})])
    store.flush()

    async def how(pilot: Pilot[None], app: top.Top) -> None:
        await until(pilot, lambda: "[red]x[/red]?[2J" in said(app, "#why"))

    drive(lambda: top.look(settings), how)


@pytest.mark.parametrize("column", top.COLUMNS, ids=lambda column: column.heading)
def test_every_column_shows_and_orders_engines_of_which_nothing_is_known(
    column: top.Column,
) -> None:
    views = [
        View(state=one, age_s=0.0, daemon_age_s=None, events=[])
        for one in (EngineState(engine="new"), state("b"), state("a"))
    ]
    assert all(column.text(view) for view in views)
    for reverse in (False, True):
        assert len(top.ordered(views, column, reverse)) == 3


def test_keys_pause_and_release_the_engine_selected(settings: Settings, store: RedisStore) -> None:
    told: list[Command] = []

    def tell(command: Command) -> Answer | None:
        told.append(command)
        return Answer(text=f"{command.engine}: [b]done[/b]") if len(told) < 3 else None

    async def how(pilot: Pilot[None], app: top.Top) -> None:
        await until(pilot, lambda: rows(app) == ["a", "b"])
        await pilot.press("down", "p")
        await until(pilot, lambda: "b: [b]done[/b]" in toasts(app))
        await pilot.press("u")
        await until(pilot, lambda: len(told) == 2)
        await pilot.press("p")
        await until(pilot, lambda: "no daemon answers" in toasts(app))
        assert [(c.action, c.engine) for c in told] == [
            ("pause", "b"),
            ("release", "b"),
            ("pause", "b"),
        ]

    drive(lambda: top.look(settings), how, tell)
