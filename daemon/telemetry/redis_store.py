"""State and history in Redis or Valkey (keys: docs/redis.md).

Written by a thread of its own, in batches, so that neither the event bus nor Prometheus wait for
it. Redis may be slow, stopped, full, read-only or gone: events wait in a bounded buffer, the
oldest give way, what was lost is counted and noted in the event stream on recovery.

Writes may be repeated after a time-out. Entries of an engine's streams carry ids chosen here, so
Redis refuses the repetition and no step is written twice; `events`, which several writers may
share, lets Redis choose.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import redis
from redis.backoff import ExponentialWithJitterBackoff, NoBackoff
from redis.credentials import CredentialProvider
from redis.exceptions import (
    ClusterDownError,
    ExecAbortError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
    WatchError,
)
from redis.retry import Retry

from smartspec.daemon.config import Settings
from smartspec.daemon.event_bus import (
    BusEvent,
    CheckpointEvent,
    DecisionEvent,
    EngineEvent,
    LoopEvent,
    NoteEvent,
    PresentEvent,
    StepEvent,
)
from smartspec.daemon.state.learned import RefusedState, check, decode, encode, merge
from smartspec.daemon.telemetry.embedded_valkey import EmbeddedValkey
from smartspec.daemon.telemetry.engine_state import EngineState, to_fields

log = logging.getLogger(__name__)

VERSION = "v1"  #: of the keys and their fields; raised when a reader would misread them
MAX_BUFFERED = 20_000  #: events kept while Redis is away (some 20 MB)
MAX_BATCH = 500  #: events per round trip
MAX_RACES = 5  #: in a row that a checkpoint may lose to other hosts' before it waits for a flush
FLUSH_INTERVAL_S = 0.5
PRUNE_S = 3600.0  #: between two looks for engines that have expired
SOCKET_TIMEOUT_S = 1.0
BACKOFF = ExponentialWithJitterBackoff(base=0.1, cap=5.0)
#: Errors that concern the server and pass, where repeating the batch is right; of those that the
#: client has no class for.
PASSING = ("MISCONF", "BUSY", "NOREPLICAS")
TOTALS = ("num_written", "num_lost", "num_failures")  #: of the store, in the daemon's hash
ALREADY_WRITTEN = "equal or smaller"


class Keys:
    """Names of the keys under a prefix."""

    def __init__(self, prefix: str) -> None:
        self.base = f"{prefix}{VERSION}:"
        self.engines = f"{self.base}engines"
        self.daemon = f"{self.base}daemon"
        self.events = f"{self.base}events"
        self.learned = f"{self.base}learned"

    def engine(self, name: str) -> str:
        return f"{self.base}engine:{name}"

    def steps(self, name: str) -> str:
        return f"{self.base}steps:{name}"

    def decisions(self, name: str) -> str:
        return f"{self.base}decisions:{name}"

    def learned_of(self, key_id: str) -> str:
        return f"{self.learned}:{key_id}"

    def learned_refused(self, key_id: str) -> str:
        return f"{self.base}learned-refused:{key_id}"

    def stream_of(self, event: BusEvent) -> str | None:
        """The stream that keeps ``event``; None: it is kept in a hash only."""
        match event:
            case StepEvent():
                return self.steps(event.engine)
            case DecisionEvent():
                return self.decisions(event.engine)
            case PresentEvent():
                return None
            case EngineEvent() | NoteEvent():
                return self.events
            case _:
                return None


class PasswordFile(CredentialProvider):
    """User and password for one connection: the file may be renewed while we run."""

    def __init__(self, username: str, path: Path) -> None:
        self._username = username
        self._path = path

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        try:
            password = self._path.read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise redis.ConnectionError(
                f"redis.password_file: {self._path} cannot be read ({type(error).__name__})"
            ) from error
        return (self._username, password) if self._username else (password,)


def connect_as(settings: Settings, timeout_s: float = SOCKET_TIMEOUT_S) -> redis.Redis:
    """A client of the server in the settings, with its user and certificates."""
    chosen = settings.redis
    options: dict[str, Any] = {}
    if chosen.password_file:
        path = Path(chosen.password_file)
        options["credential_provider"] = PasswordFile(chosen.username, path)
    if chosen.ca_file:
        options["ssl_ca_certs"] = chosen.ca_file
    return connect(settings.redis_url, timeout_s, **options)


def connect(url: str, timeout_s: float = SOCKET_TIMEOUT_S, **options: Any) -> redis.Redis:
    """A client that gives up after ``timeout_s`` and reconnects once by itself."""
    return redis.Redis.from_url(
        url,
        **options,
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        retry=Retry(BACKOFF, 1, supported_errors=(redis.ConnectionError,)),
        max_connections=2,
    )


def read_learned(client: redis.Redis, keys: Keys, count: int) -> dict[str, bytes]:
    """The newest ``count`` checkpoints by their key's id. Raises RedisError."""
    newest: Any = client.zrevrange(keys.learned, 0, count - 1)
    ids = [member.decode("utf-8", "replace") for member in newest]
    frames: Any = client.mget([keys.learned_of(key_id) for key_id in ids]) if ids else []
    return {key_id: frame for key_id, frame in zip(ids, frames, strict=True) if frame is not None}


def put_learned_aside(client: redis.Redis, keys: Keys, key_id: str) -> str:
    """Keep a checkpoint that was refused under another key, which is returned."""
    aside = keys.learned_refused(key_id)
    pipe = client.pipeline()
    pipe.rename(keys.learned_of(key_id), aside)
    pipe.zrem(keys.learned, key_id)
    pipe.execute()
    return aside


def _merged(ours: bytes, theirs: bytes, key_id: str) -> bytes:
    """What both have learned; ours alone where the other cannot be used."""
    try:
        other = decode(theirs, key_id)
        check(other)
        return encode(merge(decode(ours, key_id), other))
    except RefusedState as error:
        log.warning("learned state in Redis is replaced: %s", error)
        return ours


def _passes(error: RedisError) -> bool:
    """Whether the server is the trouble, not what was asked of it."""
    _, _, text = str(error).rpartition("caused error: ")  # the client says which command it was
    if isinstance(error, ExecAbortError):
        return "NOPERM" not in text
    passing = (ReadOnlyError, OutOfMemoryError, ClusterDownError, TryAgainError)
    return isinstance(error, passing) or text.startswith(PASSING)


class _Entry:
    """An event on its way to a stream; its id is fixed when it is first sent."""

    __slots__ = ("event", "id", "stream")

    def __init__(self, stream: str, event: BusEvent) -> None:
        self.stream = stream
        self.event = event
        self.id: str | None = None


class RedisStore:
    """Writes what it is told, when it can.

    Parameters
    ----------
    client : from `connect`
    prefix, stream_maxlen, ttl_s : as configured
    server : an embedded one, which the writing thread starts, revives after a failed write, and
        closes at its end; None: the server is not ours
    max_buffered : events kept while Redis is away
    max_learned : checkpoints kept in Redis; the oldest are deleted

    Attributes
    ----------
    num_written, num_lost, num_failures : events in Redis, events given up, attempts that failed
    """

    def __init__(
        self,
        client: redis.Redis,
        prefix: str,
        stream_maxlen: int,
        ttl_s: int,
        server: EmbeddedValkey | None = None,
        max_buffered: int = MAX_BUFFERED,
        max_learned: int = 64,
    ) -> None:
        self._client = client
        self.keys = Keys(prefix)
        self._stream_maxlen = stream_maxlen
        self._ttl_s = ttl_s
        self._server = server
        self._max_buffered = max_buffered
        self._max_learned = max_learned
        self._lock = threading.Lock()
        self._entries: deque[_Entry] = deque()
        self._states: dict[str, Any] = {}
        self._daemon: Mapping[Any, Any] = {}
        self._checkpoints: dict[str, CheckpointEvent] = {}
        self._last_ids: dict[str, tuple[int, int]] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.up = False
        self.num_written = 0
        self.num_lost = 0
        self.num_failures = 0
        self._num_lost_noted = 0
        self._failures_in_a_row = 0
        self._prune_at = time.monotonic()
        self._may_watch = True
        self._transacts: bool | None = None  # whether batches are transactions; None: not asked yet
        # It repeats by itself, and knows that it does: what the client would send again unseen was
        # refused as too old, and counted as lost.
        client.set_retry(Retry(NoBackoff(), 0))

    # -- any thread --

    def add(self, event: BusEvent) -> None:
        """Take note of an event; never waits."""
        stream = self.keys.stream_of(event)
        with self._lock:
            if isinstance(event, LoopEvent):
                self._daemon = to_fields(event)
            elif isinstance(event, CheckpointEvent):
                self._checkpoints[event.key_id] = event
            if stream is None:
                return
            self._entries.append(_Entry(stream, event))
            while len(self._entries) > self._max_buffered:
                self._entries.popleft()
                self.num_lost += 1

    def put_states(self, states: Iterable[EngineState]) -> None:
        """The newest state of engines that have changed."""
        flat = {state.engine: to_fields(state) for state in states}
        with self._lock:
            self._states.update(flat)

    @property
    def num_buffered(self) -> int:
        return len(self._entries)

    # -- the writing thread --

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="redis-store", daemon=True)
        self._thread.start()

    def close(self, timeout_s: float = 2 * SOCKET_TIMEOUT_S) -> None:
        """Write what can still be written within ``timeout_s``, then stop."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout_s)
        self._client.close()

    def _run(self) -> None:
        wait_s = 0.0
        try:
            while not self._stop.wait(wait_s):
                wait_s = self._attempt()
            if self.up:
                self._attempt()
        finally:
            if self._server is not None:
                self._server.close()

    def _attempt(self) -> float:
        """Write all that waits; returns the seconds to wait before the next time."""
        try:
            if self._server is not None and not self.up:
                self._server.ensure()
            self.flush()
        except (RedisError, OSError) as error:
            self._failed(error)
            return float(BACKOFF.compute(min(self._failures_in_a_row, 16)))
        return FLUSH_INTERVAL_S

    def _failed(self, error: Exception) -> None:
        self.num_failures += 1
        self._failures_in_a_row += 1
        if self.up or self._failures_in_a_row == 1:  # once per outage, not once per attempt
            log.warning("Redis cannot be written (%s): events wait, the oldest are dropped", error)
        self.up = False
        # A connection that timed out may still deliver the old answer: never reuse it.
        self._client.connection_pool.disconnect()

    def flush(self) -> None:
        """Write everything that waits, in batches. Raises RedisError or OSError."""
        while True:
            with self._lock:
                batch = [self._entries[i] for i in range(min(MAX_BATCH, len(self._entries)))]
                states, self._states = self._states, {}
                checkpoints, self._checkpoints = self._checkpoints, {}
                daemon = self._daemon
            try:
                self._write(batch, states, daemon)
                states = {}
                self._forget(batch)
                if checkpoints:
                    self._write_learned(checkpoints)
            finally:  # what was not written waits, unless there is newer
                with self._lock:
                    self._states = {**states, **self._states}
                    self._checkpoints = {**checkpoints, **self._checkpoints}
            self._recovered()
            if len(batch) < MAX_BATCH:
                break
        if time.monotonic() >= self._prune_at:
            self._prune_at = time.monotonic() + PRUNE_S
            self._prune()

    def _forget(self, batch: list[_Entry]) -> None:
        with self._lock:
            # The buffer may have overflowed meanwhile and dropped part of the batch.
            written = set(map(id, batch))
            while self._entries and id(self._entries[0]) in written:
                self._entries.popleft()

    def _prune(self) -> None:
        """Take the names off the list whose engines have expired. Raises RedisError.

        One that comes back in this very moment is on it again with the next word about it.
        """
        names: Any = list(self._client.smembers(self.keys.engines))
        pipe = self._client.pipeline(transaction=False)
        for name in names:
            pipe.hget(self.keys.engine(name.decode("utf-8", "replace")), "engine")
        found = pipe.execute(raise_on_error=False)  # what is of another type is there
        gone = [name for name, engine in zip(names, found, strict=True) if engine is None]
        try:
            if gone:
                self._client.srem(self.keys.engines, *gone)
        except NoPermissionError:  # as documented before it was needed
            log.warning(
                "%d engines that are no more stay listed: Redis' user needs +srem", len(gone)
            )

    def _recovered(self) -> None:
        if not self.up and self._failures_in_a_row:
            log.info("Redis is written again after %d failures", self._failures_in_a_row)
        self.up = True
        self._failures_in_a_row = 0
        if (lost := self.num_lost - self._num_lost_noted) > 0:
            self._num_lost_noted = self.num_lost
            text = f"{lost} events were dropped while Redis could not be written"
            self.add(NoteEvent(kind="redis_gap", level="warning", text=text))

    def _write(
        self, batch: list[_Entry], states: dict[str, Any], daemon: Mapping[Any, Any]
    ) -> None:
        repeated = [entry.id is not None for entry in batch]
        for entry in batch:
            entry.id = entry.id or self._next_id(entry)
        answers = self._execute(batch, states, daemon)
        repeated += [False] * (len(answers) - len(batch))
        refused = [
            self._is_refused(answer, again) for answer, again in zip(answers, repeated, strict=True)
        ]
        if any(refused):
            first = answers[refused.index(True)]
            log.error("Redis refused %d writes, the first: %s", sum(refused), first)
        num_refused = sum(refused[: len(batch)])
        self.num_lost += num_refused
        self.num_written += len(batch) - num_refused

    def _execute(
        self, batch: list[_Entry], states: dict[str, Any], daemon: Mapping[Any, Any]
    ) -> list[Any]:
        """The answers, those to ``batch`` first. Raises RedisError.

        All or nothing: a replica that took over in the middle would refuse the first entries and
        take the last, and the first, repeated, would be too old for it.
        """
        if self._transacts is None:
            self._transacts = self._may_transact()
        pipe = self._client.pipeline(transaction=self._transacts)
        self._fill(pipe, batch, states, daemon)
        try:
            return pipe.execute(raise_on_error=False)
        except ResponseError as error:
            if _passes(error) or not self._transacts:
                raise
            # One command that this user may never send: the others are written without it.
            self._divide(error)
        return self._execute(batch, states, daemon)

    def _may_transact(self) -> bool:
        """Whether transactions are to be had, asked with one that does nothing. Raises RedisError.

        Where MULTI is refused, what follows it would be run, and sent again doubled.
        """
        try:
            with self._client.pipeline() as pipe:
                pipe.ping()
                pipe.execute()
        except ResponseError as error:
            if _passes(error):
                raise
            self._divide(error)
            return False
        return True

    def _divide(self, error: ResponseError) -> None:
        """From now on a batch may be written in part."""
        self._transacts = False
        self._client.connection_pool.disconnect()  # it may still be within MULTI
        log.warning(
            "Redis takes no batch whole (%s): a failover in the middle of one may lose steps", error
        )

    def _fill(
        self,
        pipe: Any,
        batch: list[_Entry],
        states: dict[str, Any],
        daemon: Mapping[Any, Any],
    ) -> None:
        touched: dict[str, None] = {}
        for entry in batch:
            fields: Any = to_fields(entry.event)
            fields["type"] = entry.event.__struct_config__.tag
            pipe.xadd(
                entry.stream, fields, entry.id or "*", maxlen=self._stream_maxlen, approximate=True
            )
            touched[entry.stream] = None
        for name, state in states.items():
            # A field that is None now must not keep its old value.
            pipe.hset(self.keys.engine(name), mapping=state)
            if absent := [f for f in EngineState.__struct_fields__ if f not in state]:
                pipe.hdel(self.keys.engine(name), *absent)
            pipe.sadd(self.keys.engines, name)
            touched |= {self.keys.engine(name): None, self.keys.engines: None}
        totals: dict[Any, Any] = {name: getattr(self, name) for name in TOTALS}
        pipe.hset(self.keys.daemon, mapping={**daemon, **totals})
        touched[self.keys.daemon] = None
        for key in touched:
            pipe.expire(key, self._ttl_s)

    def _write_learned(self, checkpoints: dict[str, CheckpointEvent]) -> None:
        """Unlike the rest it does not expire: it is for the day that an engine returns.

        Takes out of ``checkpoints`` what is written. Raises RedisError.
        """
        for key_id, event in list(checkpoints.items()):
            try:
                if self._merge_learned(event):
                    del checkpoints[key_id]
            except ResponseError as error:
                if self._is_refused(error, repeated=False):
                    log.error("Redis refused what was learned: %s", error)
                    self.num_failures += 1
                    del checkpoints[key_id]
                    return
        oldest: Any = self._client.zrange(self.keys.learned, 0, -self._max_learned - 1)
        for member in oldest:
            self._client.delete(self.keys.learned_of(member.decode("utf-8", "replace")))
            self._client.zrem(self.keys.learned, member)

    def _merge_learned(self, event: CheckpointEvent) -> bool:
        """Merge a checkpoint with what is there; False: others were faster, again and again.

        What is there may be another daemon's, and may change while it is merged: two hosts that
        keep time with each other would else lose the same one's part every time.
        """
        key = self.keys.learned_of(event.key_id)
        pipe: Any
        with self._client.pipeline() as pipe:
            try:
                for _ in range(MAX_RACES):
                    self._watch(pipe, key)
                    found: Any = self._client.mget([key])
                    (theirs,) = found
                    frame = event.frame
                    if theirs is not None:
                        frame = _merged(frame, theirs, event.key_id)
                    pipe.multi()
                    pipe.set(key, frame)
                    pipe.zadd(self.keys.learned, {event.key_id: event.t_s})
                    with contextlib.suppress(WatchError):
                        pipe.execute()
                        return True
            except BaseException:
                # The pipeline would ask the server to watch no more, and where that fails, too,
                # never give its connection back: of two there would be one.
                if pipe.connection is not None:
                    pipe.connection.disconnect()
                pipe.watching = False
                raise
        return False

    def _watch(self, pipe: Any, key: str) -> None:
        if self._may_watch:
            try:
                pipe.watch(key)
            except NoPermissionError:  # as documented before it was needed
                self._may_watch = False
                log.warning("hosts may lose what others learned: Redis' user needs +watch")

    @staticmethod
    def _is_refused(answer: Any, repeated: bool) -> bool:
        """Whether a command failed for good; raises when the server is the trouble."""
        if not isinstance(answer, RedisError):
            return False
        if _passes(answer):
            raise answer
        return not (repeated and ALREADY_WRITTEN in str(answer))

    def _next_id(self, entry: _Entry) -> str:
        """An id later than all in the stream, by the event's time where that is possible."""
        if entry.stream == self.keys.events:
            return "*"
        last = self._last_ids.get(entry.stream)
        if last is None:
            newest: Any = self._client.xrevrange(entry.stream, count=1)
            milliseconds, _, count = newest[0][0].partition(b"-") if newest else (b"0", b"", b"0")
            last = (int(milliseconds), int(count))
        t_s = entry.event.t_s if math.isfinite(entry.event.t_s) else 0.0
        now = int(max(min(t_s, time.time()), 0.0) * 1000)
        # Redis refuses 0-0; a clock that was set back continues in the last millisecond.
        following = (now, 1) if now > last[0] else (last[0], last[1] + 1)
        self._last_ids[entry.stream] = following
        return f"{following[0]}-{following[1]}"
