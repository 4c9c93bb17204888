"""What a person sees while arms are played: a live panel, or plain lines where there is none."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from smartspec.lab.demo.player import Play
from smartspec.lab.demo.schedule import Schedule

REFRESH_S = 0.25
PLAIN_REFRESH_S = 5.0
WINDOW_S = 1.0  #: of the histogram of lengths
BAR_WIDTH = 24


@dataclass(frozen=True, slots=True)
class View:
    """What is to be seen of an arm."""

    title: str
    phase: str
    now_s: float
    duration_s: float
    num_finished: int
    num_requests: int
    num_running: int
    num_waiting: int
    lengths: dict[int, int]  #: requests x steps at each length, over the last WINDOW_S
    why: str
    goodput: float  #: tokens of answers per second so far
    done: bool
    steered: bool  #: whether ``why`` changes with the decisions

    @property
    def shares(self) -> str:
        """Of the lengths, in words."""
        total = sum(self.lengths.values())
        return " ".join(f"{k}:{n / total:.0%}" for k, n in self.lengths.items()) if total else "-"


def view_of(playing: Play, schedule: Schedule, title: str, why: str, steered: bool = False) -> View:
    """Sum up what has been played so far."""
    played, now_s = playing.played, playing.now_s
    lengths: Counter[int] = Counter()
    for step in reversed(played.steps):
        if step.at_s < now_s - WINDOW_S:
            break
        lengths.update(step.lengths)
    last = played.steps[-1] if played.steps else None
    open_requests = len(played.requests) - played.num_finished
    return View(
        title=title,
        phase=schedule.phase_at(now_s),
        now_s=now_s,
        duration_s=schedule.duration_s,
        num_finished=played.num_finished,
        num_requests=len(schedule.arrivals),
        num_running=last.num_running if last and open_requests else 0,
        num_waiting=last.num_waiting if last and open_requests else 0,
        lengths=dict(sorted(lengths.items())),
        why=why,
        goodput=played.num_tokens / now_s if now_s > 0 else 0.0,
        done=playing.done,
        steered=steered,
    )


def line_of(title: str, view: View) -> str:
    """The view in one line."""
    return (
        f"{title}{view.title} | {view.now_s:4.0f} s {view.phase:<12} | "
        f"{view.num_running} running, {view.num_waiting} waiting, "
        f"{view.num_finished}/{view.num_requests} done | lengths {view.shares} | "
        f"{view.goodput:.0f} tok/s | {view.why}"
    )


def panel_of(title: str, views: Sequence[View], place: int) -> Panel:
    """All arms, and more of the one in turn, at ``place``."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("arm", min_width=16)
    for name in ("answered", "running", "waiting", "tokens/s"):
        table.add_column(name, justify="right")
    table.add_column("lengths of the last second", min_width=BAR_WIDTH)
    for number, view in enumerate(views):
        table.add_row(
            view.title,
            f"{view.num_finished} of {view.num_requests}",
            str(view.num_running),
            str(view.num_waiting),
            f"{view.goodput:.0f}",
            "done" if view.done else bar_of(view),
            style="bold" if number == place else "",
        )
    shown = views[place]
    head = f"{shown.phase.replace('_', ' ')}, {shown.now_s:.0f} of about {shown.duration_s:.0f} s"
    told = next((view for view in views if view.steered), shown)
    return Panel(
        Group(Text(head), Text(""), table, Text(""), Text(f"{told.title}: {told.why}")),
        title=title + ("the arms take turns" if len(views) > 1 else shown.title),
        title_align="left",
        width=110,
    )


def bar_of(view: View) -> Text:
    """Lengths as a strip of digits, each as wide as its share."""
    total = sum(view.lengths.values())
    strip = Text("" if total else "-")
    for length, count in view.lengths.items():
        text = str(length) * round(count / total * BAR_WIDTH)
        strip.append(text, style="cyan" if length else "yellow")
    return strip


class Display:
    """Shows views, no oftener than people can read: drawing takes CPU from what is measured.

    Parameters
    ----------
    console : a terminal gets a panel, anything else plain lines
    clock : monotonic seconds
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self.console = console
        self._clock = clock
        self._live: Live | None = None
        self._next_at = 0.0

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live = Live(console=self.console, auto_refresh=False, transient=True)
            self._live.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.__exit__(kind, error, traceback)
            self._live = None

    @property
    def due(self) -> bool:
        """Whether it is time for another view."""
        return self._clock() >= self._next_at

    def show(self, title: str, views: Sequence[View], place: int) -> None:
        """``title`` and all arms; where there is no panel, the arm in turn, at ``place``."""
        now = self._clock()
        if self._live is not None:
            self._next_at = now + REFRESH_S
            self._live.update(panel_of(title, views, place), refresh=True)
        else:
            self._next_at = now + PLAIN_REFRESH_S
            line = line_of(title, views[place])
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[Callable[[float, str], None]]:
        """Show that something is under way; gives ``say(seconds so far, progress in words)``."""
        if not self.console.is_terminal:
            self.console.print(f"{what} ...", highlight=False, markup=False)
        next_at = self._clock() + PLAIN_REFRESH_S

        with self.console.status(escape(what)) as status:

            def say(so_far_s: float, progress: str) -> None:
                nonlocal next_at
                now = self._clock()
                if self.console.is_terminal:
                    status.update(escape(f"{what}: {so_far_s:.0f} s  {progress}"[:160]))
                elif now >= next_at:
                    next_at = now + PLAIN_REFRESH_S
                    line = f"  {so_far_s:.0f} s  {progress}"
                    self.console.print(line, highlight=False, markup=False)

            yield say
