"""A live view of all engines in the terminal: what each does, why, what it brings, what happened.

Shows what `inspect` reads. Reading has a thread of its own: a slow Redis never holds up a key.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

from rich.console import Group
from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import BindingType
from textual.message import Message
from textual.screen import Screen
from textual.widgets import DataTable, Footer, Static

from smartspec.daemon import commands
from smartspec.daemon.commands import Command
from smartspec.daemon.config import Settings
from smartspec.daemon.telemetry.engine_state import EngineState
from smartspec.daemon.views import inspect
from smartspec.daemon.views.inspect import InspectError, PastEvent, View, shown

INTERVAL_S = 1.0
NUM_EVENTS = 50  #: kept on the screen, newest first
BAR_WIDTH = 30  #: characters of a bar that stands for 100%
EXIT_NO_TERMINAL = 2
NARROW_ACCEPTANCE = 4  #: depths shown in the table


class Column(NamedTuple):
    """One column: how an engine is shown in it, and ordered by it."""

    heading: str
    text: Callable[[View], str]
    value: Callable[[View], float | str | None]  #: None goes last, numbers from the largest


def _of(name: str) -> Callable[[View], Any]:
    return lambda view: getattr(view.state, name)


def _column(heading: str, name: str, text: Callable[[Any], str]) -> Column:
    value = _of(name)
    return Column(heading, lambda view: text(value(view)), value)


def _first_acceptance(view: View) -> float | None:
    return view.state.acceptance[0] if view.state.acceptance else None


def _acceptance(view: View) -> str:
    shares = view.state.acceptance[:NARROW_ACCEPTANCE]
    more = " …" if len(view.state.acceptance) > len(shares) else ""
    return " ".join(f"{100 * share:.0f}" for share in shares) + more if shares else "-"


def _mean_length(view: View) -> float | None:
    counts = view.state.length_counts
    return sum(k * n for k, n in enumerate(counts)) / sum(counts) if sum(counts) else None


def _lengths(view: View) -> str:
    return inspect.lengths(view.state).replace(" requests", "").replace(" at ", "@")


COLUMNS = (
    _column("engine", "engine", str),
    Column("state", inspect.condition, inspect.condition),
    _column("run", "num_running", str),
    _column("wait", "num_waiting", str),
    _column("KV", "kv_usage", inspect.percent),
    Column("lengths", _lengths, _mean_length),
    _column("tok/s", "goodput", inspect.number),
    _column("predicted", "predicted_goodput", inspect.number),
    _column("gain/none", "gain_over_none", inspect.signed),
    _column("gain/own", "gain_over_static", inspect.signed),
    _column("value of time", "value_of_time", inspect.number),
    Column("accepted % by depth", _acceptance, _first_acceptance),
    _column("error", "prediction_error", inspect.percent),
    _column("stale", "staleness_steps", lambda n: "-" if n is None else f"{n} steps"),
)


def ordered(views: list[View], column: Column, reverse: bool) -> list[View]:
    """Views by a column: numbers from the largest, text from A; ``reverse``: the other way.

    What is not known comes last either way.
    """
    known = [view for view in views if column.value(view) is not None]
    unknown = [view for view in views if column.value(view) is None]
    numeric = all(isinstance(column.value(view), int | float) for view in known)
    known.sort(key=lambda view: view.state.engine)
    by_value: Callable[[View], Any] = column.value
    known.sort(key=by_value, reverse=numeric != reverse)
    return [*known, *unknown]


def bars(state: EngineState) -> Text:
    """Acceptance by depth, one bar a line.

    >>> print(bars(EngineState(engine="a", acceptance=(0.5,))))
    depth  1 ███████████████                 50%
    """
    lines = []
    for depth, share in enumerate(state.acceptance, 1):
        # What is read may have been written by anything.
        share = min(1.0, max(0.0, share)) if math.isfinite(share) else 0.0
        bar = "█" * round(BAR_WIDTH * share)
        lines.append(f"depth {depth:2d} {bar:<{BAR_WIDTH}} {100 * share:3.0f}%")
    return Text("\n".join(lines))


def _events(events: list[PastEvent]) -> Text:
    text = Text()
    for event in events:
        style = {"warning": "yellow", "error": "bold red"}.get(event.level, "")
        name = f"{event.engine}: " if event.engine else ""
        line = shown(f"{name}{inspect.event_text(event)}")
        line.stylize(style)
        text.append_text(line).append("\n")
    return text


class Read(Message):
    """What a look at Redis brought: views, or why there are none."""

    def __init__(self, views: list[View], problem: str) -> None:
        super().__init__()
        self.views = views
        self.problem = problem


class Told(Message):
    """What the daemon said to a command."""

    def __init__(self, text: str, ok: bool) -> None:
        super().__init__()
        self.text = text
        self.ok = ok


class EngineScreen(Screen[None]):
    """All that is known of one engine."""

    BINDINGS: ClassVar[list[BindingType]] = [("escape", "app.pop_screen", "Back")]

    def __init__(self, engine: str) -> None:
        super().__init__()
        self.engine = engine

    def compose(self) -> ComposeResult:
        yield Static(id="details")
        yield Footer()

    def show(self, views: list[View]) -> None:
        """Show the engine's newest view; one that has vanished keeps its last."""
        for view in views:
            if view.state.engine == self.engine:
                details = inspect.render([view])
                self.query_one("#details", Static).update(Group(details, bars(view.state)))


class Top(App[None]):
    """The application.

    Parameters
    ----------
    read : all engines, or raises `InspectError`; called in a thread
    interval_s : seconds between two reads
    tell : gives a command to the daemon; called in a thread
    """

    TITLE = "smartspec top"
    ENABLE_COMMAND_PALETTE = False
    CSS = """
    #status { height: 1; background: $panel; padding: 0 1; }
    #engines { height: 1fr; }
    #why { height: auto; max-height: 3; padding: 0 1; background: $panel; }
    #events { height: 9; padding: 0 1; }
    #details { padding: 0 1; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        ("q", "quit", "Quit"),
        ("s", "sort", "Sort by next column"),
        ("r", "reverse", "Reverse"),
        ("enter", "open", "Open engine"),
        ("p", "pause", "Pause engine"),
        ("u", "release", "Release it"),
    ]

    def __init__(
        self,
        read: Callable[[], list[View]],
        where: str = "",
        interval_s: float = INTERVAL_S,
        tell: Callable[[Command], commands.Answer | None] = lambda command: None,
    ) -> None:
        super().__init__()
        self._read = read
        self._tell = tell
        self._where = where
        self._interval_s = interval_s
        self._reading = False
        self._problem = "looking"
        self.views: list[View] = []
        self.sorted_by = 0  #: index into COLUMNS
        self.reversed = False

    def compose(self) -> ComposeResult:
        yield Static(id="status")
        yield DataTable[Text](id="engines", cursor_type="row", zebra_stripes=True)
        yield Static(id="why")
        yield Static(id="events")
        yield Footer()

    def on_mount(self) -> None:
        for column in COLUMNS:
            self._table.add_column(column.heading, key=column.heading)
        self._show()
        self.set_interval(self._interval_s, self._look)
        self._look()

    @property
    def _table(self) -> DataTable[Text]:
        # From the bottom screen: an engine's own may lie over it.
        return self.screen_stack[0].query_one("#engines", DataTable)

    # -- reading --------------------------------------------------------------------------------

    def _look(self) -> None:
        if not self._reading:  # a slow server is asked once, not once a second
            self._reading = True
            self.run_worker(self._look_once, thread=True)

    def _look_once(self) -> None:
        try:
            self.post_message(Read(self._read(), ""))
        except InspectError as error:
            self.post_message(Read([], str(error)))
        finally:
            self._reading = False

    def on_read(self, message: Read) -> None:
        self._problem = message.problem
        if message.views:  # in an outage the last that was known stays, and is said to be old
            self.views = message.views
        if self.screen_stack:  # what comes while the application ends has nothing to be shown on
            self._show()

    # -- showing --------------------------------------------------------------------------------

    def _show(self) -> None:
        views = ordered(self.views, COLUMNS[self.sorted_by], self.reversed)
        self._show_status()
        self._show_table(views)
        self._show_why()
        events = {e: None for view in views for e in view.events}
        newest = sorted(events, key=lambda event: -event.t_s)[:NUM_EVENTS]
        bottom = self.screen_stack[0]
        bottom.query_one("#events", Static).update(_events(newest))
        if isinstance(self.screen, EngineScreen):
            self.screen.show(views)

    def _show_status(self) -> None:
        order = COLUMNS[self.sorted_by].heading + (", reversed" if self.reversed else "")
        if self._problem:
            text = f"{self._problem}; trying again"
        else:
            running = sum(view.state.num_running for view in self.views)
            waiting = sum(view.state.num_waiting for view in self.views)
            goodput = sum(view.state.goodput or 0.0 for view in self.views)
            text = (
                f"{len(self.views)} engines, {running} requests running, {waiting} waiting, "
                f"{goodput:.0f} tokens/s   sorted by {order}   {self._where}"
            )
        self.screen_stack[0].query_one("#status", Static).update(shown(text))

    def _show_table(self, views: list[View]) -> None:
        table = self._table
        selected = self.selected
        names = [view.state.engine for view in views]
        present = [str(row.value) for row in table.rows]
        if names != present:
            table.clear()
            for view in views:
                cells = [shown(column.text(view)) for column in COLUMNS]
                table.add_row(*cells, key=view.state.engine)
            if selected in names:
                table.move_cursor(row=names.index(selected))
            return
        for view in views:
            for column in COLUMNS:
                table.update_cell(
                    view.state.engine,
                    column.heading,
                    shown(column.text(view)),
                    update_width=True,
                )

    def _show_why(self) -> None:
        why = self.screen_stack[0].query_one("#why", Static)
        for view in self.views:
            if view.state.engine == self.selected:
                why.update(shown(f"{self.selected}: {view.state.reason or 'no decision yet'}"))

    @property
    def selected(self) -> str | None:
        """The engine under the cursor."""
        table = self._table
        if not table.row_count:
            return None
        row = table.coordinate_to_cell_key(table.cursor_coordinate).row_key
        return str(row.value)

    # -- keys -----------------------------------------------------------------------------------

    def on_data_table_row_highlighted(self, event: DataTable.RowHighlighted) -> None:
        self._show_why()

    def on_data_table_row_selected(self, event: DataTable.RowSelected) -> None:
        screen = EngineScreen(str(event.row_key.value))
        self.push_screen(screen)
        self.call_after_refresh(screen.show, self.views)

    def on_data_table_header_selected(self, event: DataTable.HeaderSelected) -> None:
        self._sort_by(event.column_index)

    def action_open(self) -> None:
        self._table.action_select_cursor()

    def action_sort(self) -> None:
        self._sort_by((self.sorted_by + 1) % len(COLUMNS))

    def _sort_by(self, index: int) -> None:
        self.reversed = False
        self.sorted_by = index
        self._show()

    def action_pause(self) -> None:
        self._command("pause")

    def action_release(self) -> None:
        self._command("release")

    def _command(self, action: Literal["pause", "release"]) -> None:
        if self.selected is not None:
            command = Command(action=action, engine=self.selected)
            self.run_worker(partial(self._command_once, command), thread=True)

    def _command_once(self, command: Command) -> None:
        answer = self._tell(command)
        if answer is None:
            self.post_message(Told(f"{command.action}: no daemon answers on this machine", False))
        else:
            self.post_message(Told(answer.text, answer.ok))

    def on_told(self, message: Told) -> None:
        self.notify(message.text, severity="information" if message.ok else "error", markup=False)

    def action_reverse(self) -> None:
        self.reversed = not self.reversed
        self._show()


def run(settings: Settings, interval_s: float = INTERVAL_S) -> int:
    """Show until ``q``; returns the exit code."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        print(
            "smartspec top: needs a terminal (`ssh -t`, `kubectl exec -it`); `smartspec inspect` "
            "shows the same once",
            file=sys.stderr,
        )
        return EXIT_NO_TERMINAL
    tell = partial(commands.send, commands.endpoint(settings))
    app = Top(partial(look, settings), settings.endpoint, interval_s, tell)
    app.run()
    return app.return_code or 0


def look(settings: Settings) -> list[View]:
    """All engines with as many events as fit. Raises `InspectError`."""
    return inspect.read(settings, None, time.time(), num_events=NUM_EVENTS)
