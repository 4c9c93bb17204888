"""Arms take turns of a few seconds, so that what the machine does meanwhile meets all alike.

A worker works in its turn only: between steps it is held, and the clock that its arrivals and
latencies are read from stands still until it goes on.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from smartspec.lab.demo.player import STALLED_S, Engine, Play, PlayError
from smartspec.lab.demo.schedule import Prompt

TURN_S = 2.0


class Holdable(Engine, Protocol):
    """An engine that can be made to wait between two steps (see processes.py)."""

    def hold(self) -> None:
        """Have it take no further step; it says ``held`` when none is under way."""
        ...

    def resume(self) -> None: ...


class Lane:
    """An engine as its player sees it, who does not notice that it is held between turns."""

    def __init__(self, engine: Holdable, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine = engine
        self._clock = clock
        self._kept: deque[tuple[float, dict[str, Any]]] = deque()  # said while being held
        self._away_s = 0.0  # in turns of others
        self._held_at: float | None = clock()
        self._resumed = False

    def clock(self) -> float:
        """Seconds of its own turns."""
        return (self._clock() if self._held_at is None else self._held_at) - self._away_s

    def submit(self, request_id: str, prompt: Prompt, max_tokens: int) -> None:
        self._engine.submit(request_id, prompt, max_tokens)

    def poll(self, timeout_s: float) -> tuple[float, dict[str, Any]] | None:
        if not self._resumed:  # only now: what arrived meanwhile takes part in its next step
            self._engine.resume()
            self._resumed = True
        if self._kept:
            return self._kept.popleft()
        got = self._engine.poll(timeout_s)
        return None if got is None else (got[0] - self._away_s, got[1])

    def go_on(self) -> None:
        """Its turn begins."""
        assert self._held_at is not None
        self._away_s += self._clock() - self._held_at
        self._held_at = None
        self._resumed = False

    def hold(self) -> None:
        """Its turn ends with the step under way. Raises `PlayError`."""
        self._engine.hold()
        asked_at = self._clock()
        while self._held_at is None:
            got = self._engine.poll(0.1)
            if got is not None and got[1].get("event") == "held":
                self._held_at = got[0]
            elif got is not None:
                self._kept.append((got[0] - self._away_s, got[1]))
            elif self._clock() - asked_at > STALLED_S:
                raise PlayError(f"the worker has not finished its step for {STALLED_S:.0f} s")


class Contender(Protocol):
    """Who takes turns."""

    @property
    def lane(self) -> Lane: ...

    @property
    def playing(self) -> Play:
        """On the lane, by its clock."""
        ...


def take_turns(
    contenders: Sequence[Contender],
    rng: np.random.Generator,
    on_tick: Callable[[int], None],
    turn_s: float = TURN_S,
) -> None:
    """Play all to the end, round by round, in an order drawn for each round.

    ``on_tick`` : called with the place of the contender in turn whenever its play went on

    Raises `PlayError` when a request is refused or an engine stalls.
    """
    places = list(range(len(contenders)))
    while places:
        for place in rng.permutation(places).tolist():
            lane, playing = contenders[place].lane, contenders[place].playing
            lane.go_on()
            until = lane.clock() + turn_s if len(places) > 1 else math.inf
            while not playing.done and lane.clock() < until:
                playing.go_on()
                on_tick(place)
            if not playing.done:  # else it is idle, and may be asked for other things
                lane.hold()
        places = [place for place in places if not contenders[place].playing.done]
