"""The telemetry process: reads the event bus, writes Redis and checkpoints, serves Prometheus.

A process of its own, since whatever shares an interpreter with the loop delays decisions. It may
be killed at any time: the daemon starts it again, and what happened meanwhile is missing from the
history, nothing else.
"""

from __future__ import annotations

import copy
import logging
import math
import os
import time
from collections.abc import Callable

from smartspec.daemon.config import Settings
from smartspec.daemon.event_bus import (
    USUAL,
    BusEvent,
    CheckpointEvent,
    DecisionEvent,
    EngineEvent,
    GainEvent,
    StepEvent,
    Subscriber,
    subscribe,
)
from smartspec.daemon.process.notify import Notifier
from smartspec.daemon.process.stopping import Stop
from smartspec.daemon.state.warm_start import state_directory
from smartspec.daemon.telemetry.checkpoint_writer import CheckpointWriter
from smartspec.daemon.telemetry.embedded_valkey import EmbeddedValkey
from smartspec.daemon.telemetry.engine_state import EngineTracker
from smartspec.daemon.telemetry.prometheus import PrometheusExporter
from smartspec.daemon.telemetry.redis_store import RedisStore, connect_as

log = logging.getLogger(__name__)

TURN_S = 0.5  #: events are taken in batches: every wake-up disturbs an engine on a CPU
PORT_RETRY_S = 5.0  #: when Prometheus' port is taken
NICENESS = 10  #: engine and daemon go first
MAX_EVENTS_PER_TURN = 2000  #: then it sees to its other duties, even if more events wait


class Telemetry:
    """Everything the process holds, apart from signals.

    Parameters
    ----------
    subscriber : the event bus
    store, exporter, writer : None: not wanted
    clock : monotonic seconds
    """

    def __init__(
        self,
        subscriber: Subscriber,
        store: RedisStore | None,
        exporter: PrometheusExporter | None,
        writer: CheckpointWriter | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._subscriber = subscriber
        self._store = store
        self._exporter = exporter
        self._writer = writer
        self._clock = clock
        self._trackers: dict[str, EngineTracker] = {}
        self._changed: set[str] = set()

    def turn(self) -> float:
        """Take in what has come, hand the states on; returns the seconds until the next turn."""
        wait_s = 0.0  # unless all is taken in: what does not fit the socket's queue is lost
        for _ in range(MAX_EVENTS_PER_TURN):
            event = self._subscriber.poll(0.0)
            if event is None:
                wait_s = TURN_S
                break
            self._note(event)
        self._hand_on()
        return wait_s

    def _note(self, event: BusEvent) -> None:
        tracker = None
        if isinstance(event, (StepEvent, DecisionEvent, GainEvent, EngineEvent)):
            tracker = self._trackers.get(event.engine)
            if tracker is None:
                tracker = EngineTracker(event.engine, self._clock())
                self._trackers[event.engine] = tracker
        if tracker is not None:
            tracker.note(event, self._clock())  # type: ignore[arg-type]  # it is one of the four
            self._changed.add(tracker.state.engine)
        if self._exporter is not None:
            self._exporter.note(event, tracker.state if tracker else None)
        if self._store is not None:
            self._store.add(event)
        if self._writer is not None and isinstance(event, CheckpointEvent):
            self._writer.add(event)

    def _hand_on(self) -> None:
        now = self._clock()
        for name, tracker in self._trackers.items():
            if tracker.state.state == "connected" and tracker.rests(now):
                self._changed.add(name)
                if self._exporter is not None:
                    self._exporter.note_load(tracker.state)
        if self._store is not None:
            self._store.put_states(copy.copy(self._trackers[n].state) for n in self._changed)
        for name in self._changed:
            if self._trackers[name].state.state != "connected":
                del self._trackers[name]
        self._changed.clear()
        if self._exporter is not None:
            self._exporter.note_telemetry(self._subscriber.num_missed, self._store, self._writer)

    def close(self) -> None:
        self.turn()
        self._subscriber.close()


def run(settings: Settings, stop: Stop) -> None:
    """Serve until ``stop``. Never raises for a Redis or a port that cannot be had."""
    os.nice(NICENESS)  # its Valkey inherits it
    exporter = port = None
    if number := settings.telemetry.prometheus_port:
        exporter = PrometheusExporter()
        port = Port(exporter, number, settings.telemetry.prometheus_address)
        port.open()
    store = RedisStore(
        connect_as(settings),
        settings.redis.key_prefix,
        settings.redis.stream_maxlen,
        settings.redis.ttl_s,
        server=None if settings.redis.url else EmbeddedValkey(settings.embedded_socket),
        max_learned=settings.state.max_kept,
    )
    store.start()
    writer = None
    if settings.state.enabled:
        writer = CheckpointWriter(state_directory(settings), tell=store.add)
        writer.start()
    telemetry = Telemetry(subscribe(settings.bus_endpoint, USUAL), store, exporter, writer)
    notifier = Notifier(os.environ)
    notifier.ready(f"events from {settings.bus_endpoint}")
    try:
        wait_s = TURN_S
        while not stop.wait(wait_s):
            if port is not None:
                port.open()
            wait_s = telemetry.turn()
            notifier.alive(None)
    finally:
        notifier.stopping()
        telemetry.close()
        if writer is not None:
            writer.close()
        store.close()
        if exporter is not None:
            exporter.close()


class Port:
    """Where Prometheus is served, as soon as it can be: another process may hold it for a while.

    Parameters
    ----------
    exporter : to serve
    number, address : where
    clock : monotonic seconds
    """

    def __init__(
        self,
        exporter: PrometheusExporter,
        number: int,
        address: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._exporter = exporter
        self._number = number
        self._address = address
        self._clock = clock
        self._try_at = clock()
        self._has_failed = False

    def open(self) -> None:
        """Listen, unless that is done or was tried just now. Never raises."""
        now = self._clock()
        if now < self._try_at:
            return
        try:
            self._exporter.serve(self._number, self._address)
        except OSError as error:
            self._try_at = now + PORT_RETRY_S
            if not self._has_failed:  # once, not once per attempt
                self._has_failed = True
                log.error(
                    "telemetry.prometheus_port: cannot listen on %s:%d (%s): nothing can be "
                    "scraped until it can; choose another port, or 0 for no exporter",
                    self._address,
                    self._number,
                    error.strerror,
                )
            return
        self._try_at = math.inf
        if self._has_failed:
            log.info("Prometheus is served on %s:%d after all", self._address, self._number)
