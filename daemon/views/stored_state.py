"""What `smartspec state` shows: the checkpoints on disk, and why any was refused."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import msgspec
from msgspec import Struct

from smartspec.daemon.config import Settings
from smartspec.daemon.state.state_directory import Stored
from smartspec.daemon.state.warm_start import state_directory
from smartspec.daemon.views.inspect import shown

EXIT_UNREADABLE = 2


class View(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One file. What follows ``why_not`` is absent where it was refused."""

    file: str
    why_not: str | None  #: None: an engine of this kind starts from it
    num_bytes: int
    age_s: float | None = None  #: since it was learned
    num_steps: int = 0
    num_steered: int = 0
    engine: str = ""  #: that learned it
    release: str = ""
    fingerprint: dict[str, str] = {}
    max_length: int = 0
    graph_sizes: tuple[int, ...] = ()
    drafts_known_first: bool = False
    buckets: tuple[str, ...] = ()  #: features that the acceptance table is cut by


def view(stored: Stored, now: float) -> View:
    """What is to be said of a file at the time ``now``, in seconds since the Unix epoch."""
    try:
        num_bytes = stored.path.lstat().st_size
    except OSError:
        num_bytes = 0
    checkpoint = stored.checkpoint
    if checkpoint is None:
        return View(file=stored.path.name, why_not=stored.why_not, num_bytes=num_bytes)
    key = checkpoint.key
    return View(
        file=stored.path.name,
        why_not=None,
        num_bytes=num_bytes,
        age_s=round(max(0.0, now - checkpoint.saved_s), 1),
        num_steps=checkpoint.num_steps,
        num_steered=checkpoint.num_steered,
        engine=checkpoint.engine,
        release=checkpoint.release,
        fingerprint=msgspec.to_builtins(key.fingerprint),
        max_length=key.max_length,
        graph_sizes=key.graph_sizes,
        drafts_known_first=key.drafts_known_first,
        buckets=tuple(axis.feature for axis in key.axes),
    )


def run(settings: Settings, as_json: bool = False, wall: Callable[[], float] = time.time) -> int:
    """Print what is stored; returns the exit code."""
    try:
        views = [view(stored, wall()) for stored in state_directory(settings).entries()]
    except OSError as error:
        print(
            f"smartspec state: state.directory: {settings.state.directory} cannot be read "
            f"({error.strerror}): run this as the daemon's user, or name another directory",
            file=sys.stderr,
        )
        return EXIT_UNREADABLE
    if as_json:
        content = {"directory": settings.state.directory, "files": views}
        print(msgspec.json.format(msgspec.json.encode(content), indent=2).decode())
        return 0
    from rich.console import Console

    Console().print(_table(settings.state.directory, views))
    return 0


def _table(directory: str, views: list[View]) -> Any:
    from rich.table import Table

    if not views:
        return shown(f"nothing is stored in {directory}")
    table = Table(title=shown(directory), title_justify="left")
    for heading in ("model", "length", "steps", "learned by", "age", "file"):
        table.add_column(heading)
    for one in views:
        if one.why_not is not None:
            cells = (f"refused: {one.why_not}", "-", "-", "-", "-", one.file)
        else:
            cells = (
                " ".join(value for value in one.fingerprint.values() if value),
                str(one.max_length),
                f"{one.num_steps} ({one.num_steered} steered)",
                one.engine,
                _age(one.age_s or 0.0),
                one.file,
            )
        table.add_row(*map(shown, cells))
    return table


def _age(seconds: float) -> str:
    """Seconds as people say them.

    >>> _age(90), _age(7200), _age(5)
    ('2 min', '2 h', '5 s')
    """
    for size_s, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= size_s:
            return f"{round(seconds / size_s)} {unit}"
    return f"{round(seconds)} s"
