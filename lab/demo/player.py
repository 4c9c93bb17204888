"""Plays a schedule to an engine, open loop, and measures on one clock: its own."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from smartspec.lab.demo.schedule import Arrival, Prompt

TICK_S = 0.1  #: longest wait between two looks at the clock
STALLED_S = 120.0  #: with requests open and no word from the engine for this long, give up


class PlayError(RuntimeError):
    """The engine did not do what was asked of it."""


class Engine(Protocol):
    """What the player needs of an engine (see processes.py)."""

    def submit(self, request_id: str, prompt: Prompt, max_tokens: int) -> None: ...

    def poll(self, timeout_s: float) -> tuple[float, dict[str, Any]] | None:
        """The next event and when it arrived (on the player's clock), or None after a while."""
        ...


@dataclass(slots=True)
class RequestRecord:
    """A request from its arrival to its last token; times in seconds from the schedule's start."""

    id: str
    kind: str
    phase: str
    arrived_s: float  #: as scheduled, whenever it was sent
    first_token_s: float = float("nan")
    finished_s: float = float("nan")
    num_tokens: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    reason: str = ""  #: why it ended
    text: str = ""  #: the answer

    @property
    def latency_s(self) -> float:
        return self.finished_s - self.arrived_s

    @property
    def ttft_s(self) -> float:
        """Time to the first token."""
        return self.first_token_s - self.arrived_s

    @property
    def tpot_s(self) -> float:
        """Time per output token after the first; NaN for an answer of one token."""
        if self.num_tokens < 2:
            return float("nan")
        return (self.finished_s - self.first_token_s) / (self.num_tokens - 1)


@dataclass(frozen=True, slots=True)
class StepRecord:
    """A step of the engine, when its report was read."""

    at_s: float
    lengths: tuple[int, ...]  #: of the decoding requests
    num_running: int
    num_waiting: int
    step_s: float
    num_prefill_tokens: int
    source: str  #: who chose the lengths
    num_drafted: tuple[int, ...] = ()  #: verified, of each
    num_accepted: tuple[int, ...] = ()
    target_s: float = 0.0
    draft_s: float = 0.0  #: with looking for what could be drafted


@dataclass(slots=True)
class Played:
    """All that was seen while a schedule was played."""

    requests: list[RequestRecord] = field(default_factory=list)
    steps: list[StepRecord] = field(default_factory=list)
    begin_clock_s: float = 0.0  #: the schedule's start on the player's clock
    num_tokens: int = 0  #: emitted so far
    num_finished: int = 0
    end_s: float = 0.0  #: when the last request had finished


def burst(prompts: Sequence[Prompt], phase: str) -> list[Arrival]:
    """The prompts, all at once."""
    return [Arrival(0.0, prompt, phase) for prompt in prompts]


class Play:
    """A schedule on its way: each arrival is submitted at its time, whatever the engine does.

    Parameters
    ----------
    arrivals : in order of time
    engine : idle
    tag : makes request ids unique among several plays
    max_tokens : limit on top of the prompts' own
    clock : seconds, monotonic; the one that `Engine.poll` stamps events with
    """

    def __init__(
        self,
        arrivals: Sequence[Arrival],
        engine: Engine,
        *,
        tag: str,
        max_tokens: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.played = Played(begin_clock_s=clock())
        self._engine = engine
        self._tag = tag
        self._max_tokens = max_tokens
        self._clock = clock
        self._pending = deque(arrivals)
        self._running: dict[str, RequestRecord] = {}
        self._heard_at = self.played.begin_clock_s

    @property
    def now_s(self) -> float:
        """Since the schedule's start; when all is answered, when that was."""
        return self.played.end_s or self._clock() - self.played.begin_clock_s

    @property
    def done(self) -> bool:
        """Whether all is answered: the engine is idle again."""
        return not self._pending and not self._running

    def go_on(self) -> None:
        """Submit what is due and take in one event, or wait for one for TICK_S at most.

        Raises `PlayError` when a request is refused or the engine stalls.
        """
        pending, running, played = self._pending, self._running, self.played
        now_s = self.now_s
        while pending and pending[0].at_s <= now_s:
            self._submit(pending.popleft())
        timeout_s = TICK_S if not pending else min(TICK_S, pending[0].at_s - now_s)
        got = self._engine.poll(max(timeout_s, 0.0))
        if got is not None:
            at, event = got
            if at >= played.begin_clock_s:  # else it is of what was played before, long ago maybe
                self._heard_at = at
                _note(event, at - played.begin_clock_s, running, played)
        elif running and self._clock() - self._heard_at > STALLED_S:
            raise PlayError(
                f"no word from the worker for {STALLED_S:.0f} s with {len(running)} requests open"
            )
        elif not running:
            self._heard_at = self._clock()
        if self.done:
            played.end_s = self.now_s

    def _submit(self, arrival: Arrival) -> None:
        prompt = arrival.prompt
        request = RequestRecord(prompt.id, prompt.kind, arrival.phase, arrival.at_s)
        request_id = f"{self._tag}/{prompt.id}"
        self._running[request_id] = request
        self.played.requests.append(request)
        most = prompt.max_tokens if self._max_tokens is None else self._max_tokens
        self._engine.submit(request_id, prompt, min(most, prompt.max_tokens))


def play(
    arrivals: Sequence[Arrival],
    engine: Engine,
    *,
    on_tick: Callable[[float, Played], None] = lambda now_s, played: None,
    **how: Any,
) -> Played:
    """Play until all is answered. The parameters are those of `Play`.

    ``on_tick`` : called with the time since the start after every event, and every TICK_S without
    """
    playing = Play(arrivals, engine, **how)
    while not playing.done:
        playing.go_on()
        on_tick(playing.now_s, playing.played)
    return playing.played


def _note(
    event: dict[str, Any], at_s: float, running: dict[str, RequestRecord], played: Played
) -> None:
    """Enter an event into the records."""
    match event.get("event"):
        case "token":
            request = running.get(event["id"])
            if request is None:
                return
            if not request.num_tokens:
                request.first_token_s = at_s
            request.text += event["text"]
            num_tokens = int(event["num_tokens"])
            played.num_tokens += num_tokens - request.num_tokens
            request.num_tokens = num_tokens
        case "finished":
            request = running.pop(event["id"], None)
            if request is None:
                return
            if event["reason"] not in ("eos", "stop", "length"):
                raise PlayError(f"request {event['id']} ended with {event['reason']!r}")
            request.finished_s = at_s
            request.reason = event["reason"]
            request.num_drafted = int(event["num_drafted"])
            request.num_accepted = int(event["num_accepted"])
            played.num_finished += 1
        case "step":
            played.steps.append(
                StepRecord(
                    at_s=at_s,
                    lengths=tuple(event["lengths"]),
                    num_running=int(event["num_running"]),
                    num_waiting=int(event["num_waiting"]),
                    step_s=float(event["step_s"]),
                    num_prefill_tokens=int(event["num_prefill_tokens"]),
                    source=str(event["source"]),
                    num_drafted=tuple(event["num_drafted"]),
                    num_accepted=tuple(event["num_accepted"]),
                    target_s=float(event["target_s"]),
                    draft_s=float(event["draft_s"]),
                )
            )
        case "error":
            raise PlayError(f"the worker says: {event.get('message', event)}")
