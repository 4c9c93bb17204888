"""What a person sees while an arm is played: a live panel, or plain lines where there is none."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from smartspec.lab.demo.player import Played

REFRESH_S = 0.25
PLAIN_REFRESH_S = 5.0
WINDOW_S = 1.0  #: of the histogram of lengths
BAR_WIDTH = 24


@dataclass(frozen=True, slots=True)
class View:
    """The state to show."""

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


def view_of(
    played: Played, *, title: str, phase: str, now_s: float, duration_s: float, num: int, why: str
) -> View:
    """Sum up what has been played so far."""
    lengths: Counter[int] = Counter()
    for step in reversed(played.steps):
        if step.at_s < now_s - WINDOW_S:
            break
        lengths.update(step.lengths)
    last = played.steps[-1] if played.steps else None
    open_requests = len(played.requests) - played.num_finished
    return View(
        title=title,
        phase=phase,
        now_s=now_s,
        duration_s=duration_s,
        num_finished=played.num_finished,
        num_requests=num,
        num_running=last.num_running if last and open_requests else 0,
        num_waiting=last.num_waiting if last and open_requests else 0,
        lengths=dict(sorted(lengths.items())),
        why=why,
        goodput=played.num_tokens / now_s if now_s > 0 else 0.0,
    )


def line_of(view: View) -> str:
    """The view in one line."""
    total = sum(view.lengths.values())
    shares = " ".join(f"{k}:{n / total:.0%}" for k, n in view.lengths.items()) if total else "-"
    return (
        f"{view.title} | {view.now_s:4.0f} s {view.phase:<12} | "
        f"{view.num_running} running, {view.num_waiting} waiting, "
        f"{view.num_finished}/{view.num_requests} done | lengths {shares} | "
        f"{view.goodput:.0f} tok/s | {view.why}"
    )


def panel_of(view: View) -> Panel:
    """The view as a panel."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", min_width=8)
    grid.add_column()
    grid.add_row("phase", f"{view.phase}   {view.now_s:.0f} of about {view.duration_s:.0f} s")
    grid.add_row(
        "load",
        f"{view.num_running} running, {view.num_waiting} waiting, "
        f"{view.num_finished} of {view.num_requests} answered",
    )
    total = sum(view.lengths.values())
    bars = Text("-" if not total else "")
    for length, count in view.lengths.items():
        share = count / total
        bar = "█" * round(share * BAR_WIDTH)
        bars.append(f"{length}  {bar} {share:.0%}\n", style="cyan" if length else "yellow")
    bars.rstrip()
    grid.add_row("lengths", bars)
    grid.add_row("why", view.why)
    grid.add_row("goodput", f"{view.goodput:.0f} tokens/s so far")
    return Panel(grid, title=view.title, title_align="left", width=100)


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

    def show(self, view: View) -> None:
        now = self._clock()
        if self._live is not None:
            self._next_at = now + REFRESH_S
            self._live.update(panel_of(view), refresh=True)
        else:
            self._next_at = now + PLAIN_REFRESH_S
            self.console.print(line_of(view), highlight=False, markup=False, soft_wrap=True)

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
