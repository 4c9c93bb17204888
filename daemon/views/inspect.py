"""What the engines are doing, why, and what it brings: read from Redis, for people and for scripts.

Exit codes: 0 shown, 2 Redis cannot be read, 3 no such engine.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec
import redis
from msgspec import Struct

from smartspec.daemon.config import Settings
from smartspec.daemon.redis_url import redacted
from smartspec.daemon.telemetry.engine_state import IDLE_S, EngineState, from_fields
from smartspec.daemon.telemetry.redis_store import Keys, connect_as

EXIT_NO_REDIS = 2
EXIT_NO_ENGINE = 3
NUM_EVENTS = 5  #: shown per engine
EVENTS_SEARCHED = 200
STALE_S = 5.0  #: silent for longer, the daemon is shown as gone


class InspectError(Exception):
    """Nothing can be shown; ``code`` is the exit code."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


class PastEvent(Struct, frozen=True, kw_only=True):
    """One entry of the events stream."""

    t_s: float
    type: str
    engine: str = ""
    kind: str = ""
    level: str = "info"
    text: str = ""
    state: str = ""


class View(Struct, frozen=True, kw_only=True):
    """One engine as shown: its state (docs/redis.md), its age and its last events."""

    state: EngineState
    age_s: float  #: since its last event
    daemon_age_s: float | None  #: since the daemon's last word; None: it never said one
    events: list[PastEvent]  #: newest first

    def as_json(self) -> dict[str, Any]:
        """Stable keys: all fields of `EngineState`, and those of this struct."""
        plain: dict[str, Any] = msgspec.to_builtins(self)
        state: dict[str, Any] = plain.pop("state")
        return {**state, **plain}


def read(
    settings: Settings, engine: str | None, now: float, num_events: int = NUM_EVENTS
) -> list[View]:
    """The engines known (or the one named), by name. Raises `InspectError`."""
    client = connect_as(settings, timeout_s=2.0)
    keys = Keys(settings.redis.key_prefix)
    try:
        names = sorted(name.decode("utf-8", "replace") for name in _members(client, keys))
        states = _states(client, keys, names)
        events = _events(client, keys)
        heard_s = _daemon_heard_s(client, keys)
    except redis.RedisError as error:
        raise InspectError(_no_redis(settings, error), EXIT_NO_REDIS) from error
    finally:
        client.close()
    if engine is not None:
        if not any(state.engine == engine for state in states):
            known = ", ".join(state.engine for state in states) or "none"
            raise InspectError(f"no engine {engine!r}; known: {known}", EXIT_NO_ENGINE)
        states = [state for state in states if state.engine == engine]
    if not states:
        raise InspectError(
            "no engine has reported yet: start one (`smartspec worker`, or an adapter) that "
            f"connects to {settings.endpoint}",
            EXIT_NO_ENGINE,
        )
    return [
        View(
            state=state,
            age_s=max(0.0, round(now - state.updated_s, 3)),
            daemon_age_s=None if heard_s is None else max(0.0, round(now - heard_s, 3)),
            events=[e for e in events if e.engine in ("", state.engine)][:num_events],
        )
        for state in states
    ]


def _members(client: redis.Redis, keys: Keys) -> set[bytes]:
    members: Any = client.smembers(keys.engines)
    return set(members)


def _states(client: redis.Redis, keys: Keys, names: list[str]) -> list[EngineState]:
    pipe = client.pipeline(transaction=False)
    for name in names:
        pipe.hgetall(keys.engine(name))
    found = (_state(fields) for fields in pipe.execute())
    return [state for state in found if state is not None]


def _state(fields: Any) -> EngineState | None:
    try:
        return from_fields(EngineState, fields) if fields else None  # None: expired
    except (msgspec.ValidationError, msgspec.DecodeError):
        return None  # written by something else


def _daemon_heard_s(client: redis.Redis, keys: Keys) -> float | None:
    raw: Any = client.hget(keys.daemon, "t_s")
    try:
        return float(raw)
    except (TypeError, ValueError):
        return None


def _events(client: redis.Redis, keys: Keys) -> list[PastEvent]:
    entries: Any = client.xrevrange(keys.events, count=EVENTS_SEARCHED)
    events = []
    for _, fields in entries:
        try:
            events.append(from_fields(PastEvent, fields))
        except (msgspec.ValidationError, msgspec.DecodeError):
            continue
    return events


def _no_redis(settings: Settings, error: redis.RedisError) -> str:
    url = redacted(settings.redis_url)
    advice = (
        "check redis.url and the server"
        if settings.redis.url
        else "is `smartspec run` running, with the same runtime_dir and telemetry.enabled?"
    )
    return f"Redis cannot be read at {url} ({error}): {advice}"


# -- for people ---------------------------------------------------------------------------------


def render(views: list[View]) -> Any:
    """A rich renderable: details of one engine, or a table of several."""
    from rich.console import Group

    if len(views) > 1:
        return Group(_overview(views), "`smartspec inspect ENGINE` shows one in detail.")
    return _details(views[0])


def _overview(views: list[View]) -> Any:
    from rich.table import Table

    table = Table(title="Engines")
    for heading in ("engine", "state", "run", "wait", "lengths", "tok/s", "gain"):
        table.add_column(heading, no_wrap=True)
    table.add_column("why")
    for view in views:
        state = view.state
        cells = (
            state.engine,
            condition(view),
            str(state.num_running),
            str(state.num_waiting),
            lengths(state).replace(" requests", ""),
            number(state.goodput),
            signed(state.gain_over_none),
            state.reason or "-",
        )
        table.add_row(*map(shown, cells))
    return table


def shown(text: str) -> Any:
    """Text as it is: names and reasons come from elsewhere, and must not steer the terminal."""
    from rich.text import Text

    return Text("".join(c if c.isprintable() else "?" for c in text))


def _details(view: View) -> Any:
    from rich import box
    from rich.panel import Panel
    from rich.table import Table

    state = view.state
    staleness = "-" if state.staleness_steps is None else state.staleness_steps
    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    rows = [
        ("state", f"{condition(view)}, last heard {view.age_s:.1f} s ago"),
        ("model", " ".join(v for v in state.fingerprint.values() if v) or "-"),
        (
            "load",
            (
                f"{state.num_running} running, {state.num_waiting} waiting, "
                f"KV {100 * state.kv_usage:.0f}% full, {state.context_tokens} tokens of context"
            ),
        ),
        ("lengths", lengths(state) + (f" ({state.mode})" if state.mode else "")),
        ("why", state.reason or "no decision yet"),
        (
            "goodput",
            (
                f"{number(state.goodput)} tokens/s measured, "
                f"{number(state.predicted_goodput)} predicted"
            ),
        ),
        ("stance", _stance(state)),
        ("estimated gain", _gains(state, "gain")),
        ("measured gain", _gains(state, "measured")),
        ("acceptance", _acceptance(state)),
        (
            "trust",
            (
                f"step times mispredicted by {percent(state.prediction_error)}; policies "
                f"{staleness} steps old; chosen by {state.source or '-'}"
            ),
        ),
        ("targets", _targets(state)),
        ("probes", f"{state.num_probes} requests drafted for only to learn"),
    ]
    for name, text in rows:
        table.add_row(name, shown(text))
    for place, event in enumerate(view.events):
        table.add_row("last events" if place == 0 else "", shown(event_text(event)))
    return Panel(table, title=shown(f"engine {state.engine}"), title_align="left", expand=False)


def condition(view: View) -> str:
    """What becomes of an engine, in few words."""
    state = view.state
    if state.state != "connected":
        return state.state
    if view.daemon_age_s is None or view.daemon_age_s > STALE_S:
        return "not steered: the daemon is silent"
    steering = {None: "learning", True: "steering", False: "observing"}[state.steering]
    if state.stance in ("canary", "paused", "retreated"):
        steering = state.stance
    elif state.stance == "control":
        steering = "steering"  # a block of something else is no news
    return f"{steering}, idle" if view.age_s > IDLE_S else steering


def lengths(state: EngineState) -> str:
    """Requests by length.

    >>> lengths(EngineState(engine="a", length_counts=(2, 0, 0, 7)))
    '2 requests at 0, 7 at 3'
    """
    parts = [f"{n} at {k}" for k, n in enumerate(state.length_counts) if n]
    return ", ".join(parts).replace(" at", " requests at", 1) if parts else "-"


def _stance(state: EngineState) -> str:
    text = {
        None: "-",
        "observe": "observe: learns and predicts, steers nothing",
        "canary": f"canary: steers a share of the time, now {_ARMS.get(state.arm)}",
        "control": f"control: steers, now {_ARMS.get(state.arm)}",
        "paused": "paused by an operator: the engine's own setting; `smartspec release` ends it",
        "retreated": (
            "retreated, since the engine's own setting is measurably better; tried again in "
            f"{number(state.retry_s)} s"
        ),
    }
    return text.get(state.stance, str(state.stance))


_ARMS = {
    None: "-",
    "smartspec": "SmartSpec",
    "own": "the engine's own setting, to compare",
    "none": "no speculation, to compare",
}


def _gains(state: EngineState, prefix: str) -> str:
    """Both gains with their intervals.

    >>> _gains(EngineState(engine="a", measured_over_static=0.1, measured_over_static_low=0.05,
    ...     measured_over_static_high=0.15, num_compared_static=9), "measured")
    "- over no speculation, +10% (+5% to +15%) in 9 comparisons over the engine's own setting"
    """
    parts = []
    for over, words in (("none", "no speculation"), ("static", "the engine's own setting")):
        value, low, high = (
            getattr(state, f"{prefix}_over_{over}{bound}") for bound in ("", "_low", "_high")
        )
        part = signed(value)
        if value is not None:
            part += f" ({signed(low)} to {signed(high)})"
            num_compared = getattr(state, f"num_compared_{over}")
            part += f" in {num_compared} comparisons" if prefix == "measured" else ""
        parts.append(f"{part} over {words}")
    return ", ".join(parts)


def _targets(state: EngineState) -> str:
    if not state.num_targets:
        return "no request asks for a time per token"
    out = state.num_targets_out_of_reach
    reach = f", {out} of them out of reach even if all others gave way" if out else ""
    asking = "1 request asks" if state.num_targets == 1 else f"{state.num_targets} requests ask"
    return f"{asking} for a time per token{reach}"


def _acceptance(state: EngineState) -> str:
    parts = [f"{j}: {100 * share:.0f}%" for j, share in enumerate(state.acceptance, 1)]
    return "by depth " + ", ".join(parts) if parts else "-"


def event_text(event: PastEvent) -> str:
    """One line, with the local time of day."""
    at = time.strftime("%H:%M:%S", time.localtime(event.t_s))
    what = f"engine {event.state}" if event.type == "engine" else f"{event.kind}: {event.text}"
    return f"{at} {what}"


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def percent(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{100 * value:{sign}.0f}%"


signed = partial(percent, sign="+")


# -- the command --------------------------------------------------------------------------------


def run(
    settings: Settings,
    engine: str | None = None,
    as_json: bool = False,
    watch: bool = False,
    interval_s: float = 1.0,
    wall: Callable[[], float] = time.time,
) -> int:
    """Print what is known; returns the exit code. ``watch``: again and again, until Ctrl-C."""
    try:
        if watch and not as_json:
            _watch(settings, engine, interval_s, wall)
        while True:
            views = read(settings, engine, wall())
            if as_json:
                engines = [view.as_json() for view in views]
                line = msgspec.json.encode({"engines": engines})
                text = line if watch else msgspec.json.format(line, indent=2)
                print(text.decode(), flush=True)
            else:
                _print(render(views))
            if not watch:
                return 0
            time.sleep(interval_s)
    except KeyboardInterrupt:
        return 0
    except InspectError as error:
        print(f"smartspec inspect: {error}", file=sys.stderr)
        return error.code


def _print(renderable: Any) -> None:
    from rich.console import Console

    Console().print(renderable)


def _watch(
    settings: Settings, engine: str | None, interval_s: float, wall: Callable[[], float]
) -> None:
    """A screen that is redrawn; an outage is shown on it and waited out."""
    from rich.live import Live

    first = render(read(settings, engine, wall()))  # what is wrong from the start is an error
    with Live(first, refresh_per_second=4) as live:
        while True:
            time.sleep(interval_s)
            try:
                live.update(render(read(settings, engine, wall())))
            except InspectError as error:
                live.update(shown(f"{error}; trying again"))
