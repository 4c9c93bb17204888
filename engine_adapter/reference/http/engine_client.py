"""The decode process, as the event loop sees it: a child that is sent lines and answers with lines.

What is in the child is counted here: a place is taken when a request comes in, and given back when
the child has said its last word about it, also when nobody listens any more.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, TypeAlias

import msgspec

from smartspec.engine_adapter.reference import replies
from smartspec.engine_adapter.reference.commands import Cancel, Stop, Submit
from smartspec.engine_adapter.reference.commands import Stats as AskStats
from smartspec.engine_adapter.reference.http.errors import ApiError
from smartspec.engine_adapter.reference.http.turnover import Turnover

log = logging.getLogger("smartspec.http")

State: TypeAlias = Literal["starting", "ready", "draining", "dead"]

GONE = "the decode process has ended; the server stops, and is to be started again"
STOP_GRACE_S = 5.0  #: for the child to say goodbye, then as long again to end on SIGTERM
STATS_TIMEOUT_S = 2.0  #: a step with a long prompt in it takes a while
RETRY_AFTER_S = 1  #: where there is nothing to reckon with
_MAX_READ_BYTES = 1 << 18

_encode = msgspec.json.Encoder().encode


class Lost:
    """The decode process has ended before the answer."""


Event: TypeAlias = replies.Token | replies.Finished | replies.Error | Lost


class Observer(Protocol):
    """Hears of every reply about a request, as it arrives (metrics.py)."""

    def token(self, choice: Choice, num_new: int, now_s: float) -> None: ...

    def finished(self, choice: Choice, now_s: float) -> None: ...


class Choice:
    """One answer of a generation: what is known of it. Times on the monotonic clock."""

    __slots__ = (
        "arrived_s",
        "finish_reason",
        "first_token_s",
        "last_token_s",
        "name",
        "num_accepted",
        "num_drafted",
        "num_prompt_tokens",
        "num_tokens",
        "token_time_s",
        "token_time_target_s",
    )

    def __init__(self, request: Submit, arrived_s: float) -> None:
        self.name = request.id
        self.num_prompt_tokens = len(request.prompt_token_ids or ())
        self.token_time_target_s = request.token_time_target_s
        self.token_time_s: float | None = None  #: as the decode process measured it
        self.arrived_s = arrived_s
        self.first_token_s: float | None = None
        self.last_token_s = arrived_s
        self.num_tokens = 0
        self.num_drafted = 0
        self.num_accepted = 0
        self.finish_reason: str | None = None  #: the child's; "error" where it refused


class Generation:
    """The answers to one HTTP request. Use as a context: leaving it cancels what still runs.

    Between `EngineClient.reserve` and `submit` it only holds its places.
    """

    def __init__(self, engine: EngineClient, num_choices: int) -> None:
        self.choices: list[Choice] = []
        self.num_reserved = num_choices
        self._engine = engine
        self._arrived_s = time.monotonic()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._closed = False

    def __enter__(self) -> Generation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, request: Submit) -> None:
        """Send the next of its requests; ``request.id`` must be unique.

        Raises `ApiError` when the engine has gone meanwhile.
        """
        choice = Choice(request, self._arrived_s)
        self._engine._submit(self, len(self.choices), choice, request)
        self.choices.append(choice)

    async def events(self) -> list[tuple[int, Event]]:
        """What has arrived, by index of the choice; waits while there is nothing."""
        events = [await self._events.get()]
        while not self._events.empty():
            events.append(self._events.get_nowait())
        return events

    @property
    def done(self) -> bool:
        """Whether every choice has had its last event."""
        return all(choice.finish_reason is not None for choice in self.choices)

    def close(self) -> None:
        """Give back what is reserved and cancel what runs. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._engine._release(self)

    def hear(self, index: int, event: Event, observer: Observer) -> None:
        """Take note of a reply about a choice, and pass it on if anybody still listens."""
        choice = self.choices[index]
        now_s = time.monotonic()
        match event:
            case replies.Token():
                num_new = event.num_tokens - choice.num_tokens
                choice.num_tokens = event.num_tokens
                observer.token(choice, num_new, now_s)
                if choice.first_token_s is None:
                    choice.first_token_s = now_s
                choice.last_token_s = now_s
            case replies.Finished():
                choice.finish_reason = event.reason
                choice.num_tokens = event.num_tokens
                choice.num_drafted = event.num_drafted
                choice.num_accepted = event.num_accepted
                choice.token_time_s = event.token_time_s
                observer.finished(choice, now_s)
            case replies.Error() | Lost():
                choice.finish_reason = "error"
                observer.finished(choice, now_s)
        if not self._closed:
            self._events.put_nowait((index, event))


class EngineClient:
    """Starts the decode process and speaks its lines.

    Parameters
    ----------
    command, env : of the child; its standard error is ours
    max_num_waiting : requests that may wait for a place in the batch; further ones are refused
    observer : hears of tokens and ends
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        max_num_waiting: int = 256,
        observer: Observer,
    ) -> None:
        self.state: State = "starting"
        self.facts: replies.Ready | None = None
        self.started = asyncio.Event()  #: the child has said "ready", or ended
        self._command = command
        self._env = env
        self._max_num_waiting = max_num_waiting
        self._observer = observer
        self._process: asyncio.subprocess.Process | None = None
        self._routes: dict[str, tuple[Generation, int]] = {}
        self._num_reserved = 0
        self._turnover = Turnover()
        self._idle = asyncio.Event()
        self._idle.set()
        self._stats: deque[asyncio.Future[replies.Stats | None]] = deque()

    @property
    def num_in_flight(self) -> int:
        """Places taken: by requests in the child, and by those on their way to it."""
        return len(self._routes) + self._num_reserved

    @property
    def capacity(self) -> int:
        return (0 if self.facts is None else self.facts.max_num_running) + self._max_num_waiting

    # -- the child's life -------------------------------------------------------------------------

    async def run(self) -> int:
        """Start the child and listen until it ends. Returns its exit status.

        Started from the thread that runs the event loop, which lives as long as the process: the
        child is told to end with it.
        """
        try:
            # A session of its own: Ctrl-C is for us, who then stop it when its work is done.
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                env=self._env,
                start_new_session=True,
            )
            assert self._process.stdout is not None
            rest = b""
            while chunk := await self._process.stdout.read(_MAX_READ_BYTES):
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    self._hear(line)
            return await self._process.wait()
        finally:
            if self._process is not None and self._process.returncode is None:
                self._process.kill()
            self._lose()

    async def stop(self) -> None:
        """Cancel what runs and end the child: asked first, then made to."""
        process = self._process
        if process is None or process.returncode is not None:
            return
        for name in list(self._routes):
            self._send(Cancel(name))
        self._send(Stop())
        for end in (process.terminate, process.kill):
            try:
                await asyncio.wait_for(process.wait(), STOP_GRACE_S)
                return
            except TimeoutError:
                end()
        await process.wait()

    def _lose(self) -> None:
        """The child has gone: everybody who waits for it hears so."""
        self.state = "dead"
        self.started.set()
        for name, (generation, index) in list(self._routes.items()):
            self._drop(name)
            generation.hear(index, Lost(), self._observer)
        while self._stats:
            self._stats.popleft().set_result(None)

    # -- requests ---------------------------------------------------------------------------------

    def require_ready(self) -> replies.Ready:
        """The child's facts. Raises `ApiError` (503) unless new requests are taken."""
        match self.state:
            case "starting":
                raise ApiError(
                    503,
                    "the model is being loaded; try again when /health/ready answers with 200",
                    code="starting",
                    retry_after_s=RETRY_AFTER_S,
                )
            case "draining":
                raise ApiError(
                    503,
                    "the server is shutting down and takes no new requests; send it elsewhere",
                    code="shutting_down",
                    retry_after_s=RETRY_AFTER_S,
                )
            case "dead":
                raise ApiError(503, GONE, code="engine_dead", retry_after_s=RETRY_AFTER_S)
        assert self.facts is not None
        return self.facts

    def reserve(self, num_choices: int) -> Generation:
        """Places for so many answers. Raises `ApiError`: 503, 400 (never) or 429 (not now)."""
        self.require_ready()
        if num_choices > self.capacity:
            raise ApiError(
                400,
                f"{num_choices} answers (prompts times n) can never run here; ask for at most "
                f"{self.capacity} at once",
                param="n",
                code="too_many_choices",
            )
        num_missing = self.num_in_flight + num_choices - self.capacity
        if num_missing > 0:
            raise ApiError(
                429,
                f"{self.num_in_flight} of {self.capacity} places are taken; try again later",
                code="queue_full",
                retry_after_s=self._turnover.wait_s(num_missing),
            )
        self._num_reserved += num_choices
        self._idle.clear()
        return Generation(self, num_choices)

    def drain(self) -> None:
        """Take no new requests from now on."""
        if self.state in ("starting", "ready"):
            self.state = "draining"

    async def idle(self) -> None:
        """Wait until nothing is in flight."""
        await self._idle.wait()

    async def stats(self) -> replies.Stats | None:
        """The child's own numbers; None when it does not answer in time."""
        if self.facts is None or self.state == "dead":
            return None
        future: asyncio.Future[replies.Stats | None] = asyncio.get_running_loop().create_future()
        self._stats.append(future)
        self._send(AskStats())
        # Not cancelled when it takes too long: its answer still comes, and wants its place.
        done, _ = await asyncio.wait({future}, timeout=STATS_TIMEOUT_S)
        return future.result() if done else None

    def _submit(self, generation: Generation, index: int, choice: Choice, request: Submit) -> None:
        if self.state == "dead":
            raise ApiError(503, GONE, code="engine_dead", retry_after_s=RETRY_AFTER_S)
        self._routes[request.id] = (generation, index)
        generation.num_reserved -= 1
        self._num_reserved -= 1
        self._send(request)

    def _release(self, generation: Generation) -> None:
        self._num_reserved -= generation.num_reserved
        generation.num_reserved = 0
        for choice in generation.choices:
            if choice.finish_reason is None:
                self._send(Cancel(choice.name))
        self._check_idle()

    def _drop(self, name: str) -> None:
        del self._routes[name]
        self._check_idle()

    def _check_idle(self) -> None:
        if self.num_in_flight == 0:
            self._idle.set()

    def _send(self, command: Any) -> None:
        if self._process is None or self._process.stdin is None or self.state == "dead":
            return
        # Not awaited: the child reads all the time, and what may be in flight is bounded.
        self._process.stdin.write(_encode(command) + b"\n")

    def _hear(self, line: bytes) -> None:
        try:
            reply = replies.decode(line)
        except msgspec.DecodeError:
            log.warning("decode process printed: %s", line[:200].decode("utf-8", "replace"))
            return
        match reply:
            case replies.Token() | replies.Finished() | replies.Error():
                route = self._routes.get(reply.id or "")
                if route is None:
                    # A cancellation that crossed the end of its request is answered with an error.
                    log.debug("decode process: %s", reply)
                    return
                if not isinstance(reply, replies.Token):
                    room = 0 if self.facts is None else self.facts.max_num_running
                    self._turnover.ended(others_waited=len(self._routes) > room)
                    self._drop(reply.id or "")
                route[0].hear(route[1], reply, self._observer)
            case replies.Stats():
                if self._stats:
                    self._stats.popleft().set_result(reply)
            case replies.Ready():
                self.facts = reply
                if self.state == "starting":
                    self.state = "ready"
                self.started.set()
            case _:
                pass
