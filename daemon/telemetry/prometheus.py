"""Prometheus exporter: events in, metrics of metric_ids.py out.

Beside the metrics there is ``/health``, for probes: 200 while the daemon's loop is heard, else 503.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    start_http_server,
)

from smartspec.daemon.event_bus import (
    NOTES,
    STATES,
    USUAL,
    BusEvent,
    DecisionEvent,
    EngineEvent,
    GainEvent,
    LoopEvent,
    NoteEvent,
    PresentEvent,
    StepEvent,
)
from smartspec.daemon.telemetry import metric_ids as ids
from smartspec.daemon.telemetry.checkpoint_writer import CheckpointWriter
from smartspec.daemon.telemetry.engine_state import EngineState
from smartspec.daemon.telemetry.redis_store import RedisStore

HEALTHY_S = 10.0  #: since the loop, which speaks once a second, was heard
_KINDS = {"counter": Counter, "gauge": Gauge}


class PrometheusExporter:
    """Keeps the metrics; `serve` lets them be scraped. One thread notes, others may scrape.

    The series of an engine disappear when it leaves, so that names do not pile up.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self._metrics: dict[ids.Metric, Any] = {m: self._make(m) for m in ids.ALL}
        self._last: dict[tuple[ids.Metric, tuple[str, ...]], float] = {}
        self._series: dict[str, set[tuple[ids.Metric, tuple[str, ...]]]] = {}
        self._server: Any = None
        self._heard_at = -math.inf  #: of `time.monotonic`
        self._build: tuple[str, str] | None = None
        # What first appears at 1 has not increased, to Prometheus: the first would go unseen.
        for state in STATES:
            self._of(ids.ENGINE_EVENTS, state)
        for kind, level in NOTES.items():
            self._of(ids.NOTES, level, kind)
        for topic in USUAL:
            self._of(ids.BUS_MISSED, topic)
        self._of(ids.RELOADED).set(1)  # until told otherwise

    def _make(self, metric: ids.Metric) -> Any:
        if metric.kind == "histogram":
            return Histogram(
                metric.id,
                metric.help,
                metric.labels,
                buckets=metric.buckets,
                registry=self.registry,
            )
        return _KINDS[metric.kind](metric.id, metric.help, metric.labels, registry=self.registry)

    def _of(self, metric: ids.Metric, *labels: str) -> Any:
        family = self._metrics[metric]
        if not labels:
            return family
        if metric.labels[0] == "engine":
            self._series.setdefault(labels[0], set()).add((metric, labels))
        return family.labels(*labels)

    def serve(self, port: int, address: str = "127.0.0.1") -> int:
        """Listen at ``port`` (0: any) and return the port. Raises OSError."""
        self._server, _ = start_http_server(port, address, self.registry)
        metrics = self._server.get_app()

        def answer(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
            if environ.get("PATH_INFO") != "/health":
                found: Iterable[bytes] = metrics(environ, start)
                return found
            healthy = self.is_healthy
            start("200 OK" if healthy else "503 Service Unavailable", [("Content-Length", "0")])
            return [b""]

        self._server.set_app(answer)
        return int(self._server.server_port)

    @property
    def is_healthy(self) -> bool:
        """Whether the daemon's loop was heard of late."""
        return time.monotonic() - self._heard_at < HEALTHY_S

    def close(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def note(self, event: BusEvent, state: EngineState | None) -> None:
        """Count an event; ``state`` is that of its engine, with the event in it."""
        if state is not None and state.state != "connected" and not isinstance(event, EngineEvent):
            return  # its series are gone, and a straggler does not bring them back
        match event:
            case StepEvent():
                self._note_step(event, state)
            case DecisionEvent():
                self._note_decision(event)
            case GainEvent():
                self._note_gain(event)
            case EngineEvent():
                if not isinstance(event, PresentEvent):
                    self._of(ids.ENGINE_EVENTS, event.state).inc()
                if event.state == "connected":
                    self._of(ids.CONNECTED, event.engine).set(1)
                else:
                    self.forget(event.engine)
            case NoteEvent():
                self._of(ids.NOTES, event.level, event.kind).inc()
            case LoopEvent():
                self._note_loop(event)

    def note_telemetry(
        self,
        num_missed: dict[str, int],
        store: RedisStore | None,
        writer: CheckpointWriter | None = None,
    ) -> None:
        """What the telemetry process knows of itself."""
        for topic, total in num_missed.items():
            self._raise_to(ids.BUS_MISSED, total, topic)
        if store is not None:
            self._of(ids.REDIS_UP).set(store.up)
            self._of(ids.REDIS_BUFFERED).set(store.num_buffered)
            self._raise_to(ids.REDIS_FAILURES, store.num_failures)
            self._raise_to(ids.REDIS_LOST, store.num_lost)
        if writer is not None:
            self._raise_to(ids.STATE_WRITTEN, writer.num_written)
            self._raise_to(ids.STATE_FAILURES, writer.num_failures)

    def note_load(self, state: EngineState) -> None:
        """What an engine has to do, and does: nothing, once it is idle."""
        self._of(ids.NUM_RUNNING, state.engine).set(state.num_running)
        self._of(ids.NUM_WAITING, state.engine).set(state.num_waiting)
        self._set(ids.GOODPUT, state.goodput, state.engine)

    def forget(self, engine: str) -> None:
        """Drop all series of an engine."""
        for metric, labels in self._series.pop(engine, ()):
            self._metrics[metric].remove(*labels)
            self._last.pop((metric, labels), None)

    def _raise_to(self, metric: ids.Metric, total: float, *labels: str) -> None:
        """Bring a counter to a total kept elsewhere; a lower one means a restart there."""
        last = self._last.get((metric, labels), 0.0)
        self._last[metric, labels] = total
        counter = self._of(metric, *labels)
        counter.inc(total - last if total >= last else total)

    def _note_loop(self, event: LoopEvent) -> None:
        self._heard_at = time.monotonic()
        self._of(ids.HEARD).set(event.t_s)
        self._of(ids.STARTED).set(event.started_s)
        self._of(ids.NUM_ENGINES).set(event.num_engines)
        self._of(ids.RELOADED).set(event.is_reloaded)
        self._set(ids.MEMORY, event.resident_bytes)
        self._raise_to(ids.CPU_SECONDS, event.cpu_user_s, "user")
        self._raise_to(ids.CPU_SECONDS, event.cpu_system_s, "system")
        build = event.version, str(event.protocol)
        if build != self._build:  # a daemon of another release has come
            self._metrics[ids.BUILD].clear()
            self._build = build
        self._of(ids.BUILD, *build).set(1)
        for name, total in event.counters.items():
            self._raise_to(ids.LOOP, total, name)
        for engine, counts in event.links.items():
            for how in counts.__struct_fields__:
                total = getattr(counts, how)
                self._raise_to(ids.REPORTS_LOST, total, engine, how.removeprefix("num_"))

    def _note_step(self, event: StepEvent, state: EngineState | None) -> None:
        engine = event.engine
        self._of(ids.CONNECTED, engine).set(1)
        self._of(ids.STEPS, engine, event.source).inc()
        self._of(ids.DRAFTED, engine).inc(event.num_drafted)
        self._of(ids.ACCEPTED, engine).inc(event.num_accepted)
        self._of(ids.EMITTED, engine).inc(event.num_emitted)
        self._of(ids.STEP_SECONDS, engine).observe(event.step_s)
        self._of(ids.KV_USAGE, engine).set(event.kv_usage)
        if event.staleness_steps is not None:
            self._of(ids.STALENESS, engine).observe(event.staleness_steps)
        if state is not None:
            self.note_load(state)
            self._set(ids.PREDICTION_ERROR, state.prediction_error, engine)

    def _note_gain(self, event: GainEvent) -> None:
        engine = event.engine
        for over in ("none", "static"):
            for metric, prefix in ((ids.GAIN, "gain"), (ids.MEASURED_GAIN, "measured")):
                for bound, suffix in (("mean", ""), ("low", "_low"), ("high", "_high")):
                    value = getattr(event, f"{prefix}_over_{over}{suffix}")
                    self._set(metric, value, engine, over, bound)
            self._set(ids.BIAS, getattr(event, f"bias_{over}"), engine, over)
            num_compared = getattr(event, f"num_compared_{over}")
            self._raise_to(ids.COMPARISONS, num_compared, engine, over)
        for stance in ids.STANCES:
            self._of(ids.STANCE, engine, stance).set(stance == event.stance)
        self._of(ids.EVIDENCE_WORSE, engine).set(event.evidence_worse)
        self._raise_to(ids.RETREATS, event.num_retreats, engine)

    def _note_decision(self, event: DecisionEvent) -> None:
        engine = event.engine
        self._of(ids.DECISIONS, engine, "yes" if event.steering else "no").inc()
        self._of(ids.STEERING, engine).set(event.steering)
        self._of(ids.DEPTH, engine).set(event.depth)
        self._of(ids.VALUE_OF_TIME, engine).set(event.value_of_time)
        self._of(ids.PROBES, engine).inc(event.num_probes)
        out = event.num_targets_out_of_reach
        self._of(ids.TARGETS, engine, "within").set(event.num_targets - out)
        self._of(ids.TARGETS, engine, "out").set(out)
        self._of(ids.DECIDE_SECONDS, engine).observe(event.decide_s)
        self._of(ids.LEARN_SECONDS, engine).observe(event.learn_s)
        for length, count in enumerate(event.length_counts):
            self._of(ids.REQUESTS_AT_LENGTH, engine, str(length)).set(count)
        for depth, share in enumerate(event.acceptance, 1):
            self._of(ids.ACCEPTANCE, engine, str(depth)).set(share)
        self._of(ids.PREDICTED_GOODPUT, engine, "chosen").set(event.predicted_goodput)
        self._of(ids.PREDICTED_GOODPUT, engine, "none").set(event.predicted_goodput_none)
        self._of(ids.PREDICTED_GOODPUT, engine, "static").set(event.predicted_goodput_static)

    def _set(self, metric: ids.Metric, value: float | None, *labels: str) -> None:
        if value is not None:
            self._of(metric, *labels).set(value)
