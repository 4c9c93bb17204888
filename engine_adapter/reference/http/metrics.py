"""What a scrape sees. Names are vLLM's where they mean the same, so that its dashboards work."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from smartspec.engine_adapter.reference.http.engine_client import Choice
from smartspec.engine_adapter.reference.replies import Stats

CONTENT_TYPE = CONTENT_TYPE_LATEST

_SHORT_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 5)
_LONG_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
_TOKENS = tuple(float(1 << i) for i in range(18))

#: vLLM's `finished_reason`, by the worker's.
_REASONS = {"eos": "stop", "stop": "stop", "length": "length", "cancelled": "abort"}
_FINISHED_REASONS = ("stop", "length", "abort", "error")


class Metrics(Collector):
    """Counts and times of one server.

    Requests are observed as their tokens arrive from the decode process; what only that process
    knows comes from its `Stats`, asked for at each scrape.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self._labels = {"model_name": "", "engine": "0"}
        self._stats: Stats | None = None
        names = tuple(self._labels)
        counter = partial(Counter, registry=self.registry)
        gauge = partial(Gauge, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, names, registry=self.registry, buckets=buckets)

        self._first_token = histogram(
            "vllm:time_to_first_token_seconds", "From arrival to the first token.", _LONG_S
        )
        self._inter_token = histogram(
            "vllm:inter_token_latency_seconds",
            "Between steps that brought a request tokens, one or several.",
            _SHORT_S,
        )
        self._per_token = histogram(
            "vllm:request_time_per_output_token_seconds",
            "Mean time per output token of a request, after its first.",
            _SHORT_S,
        )
        self._latency = histogram(
            "vllm:e2e_request_latency_seconds", "From arrival to the last token.", _LONG_S
        )
        self._prompt_sizes = histogram(
            "vllm:request_prompt_tokens", "Prompt tokens of a request.", _TOKENS
        )
        self._answer_sizes = histogram(
            "vllm:request_generation_tokens", "Output tokens of a request.", _TOKENS
        )
        self._prompt_tokens = counter(
            "vllm:prompt_tokens", "Prompt tokens of answered requests.", names
        )
        self._tokens = counter("vllm:generation_tokens", "Output tokens.", names)
        self._finished = counter(
            "vllm:request_success", "Requests by how they ended.", (*names, "finished_reason")
        )
        self._responses = counter("smartspec_http_responses", "HTTP responses.", ("path", "status"))
        self._disconnects = counter(
            "smartspec_http_disconnects", "Clients that left before their answer was complete."
        )
        self._in_flight = gauge(
            "smartspec_http_requests_in_flight",
            "Places taken, in the decode process and on the way to it.",
        )
        self._tasks = gauge("smartspec_http_tasks", "Tasks of the event loop.")
        ProcessCollector(registry=self.registry)
        self.registry.register(self)

    def name(self, model: str) -> None:
        """Label what is to come with the model's name."""
        self._labels["model_name"] = model
        for reason in _FINISHED_REASONS:
            self._finished.labels(*self._labels.values(), reason)

    def token(self, choice: Choice, num_new: int, now_s: float) -> None:
        values = tuple(self._labels.values())
        if choice.first_token_s is None:
            self._first_token.labels(*values).observe(now_s - choice.arrived_s)
        else:
            self._inter_token.labels(*values).observe(now_s - choice.last_token_s)
        self._tokens.labels(*values).inc(num_new)

    def finished(self, choice: Choice, now_s: float) -> None:
        values = tuple(self._labels.values())
        reason = _REASONS.get(choice.finish_reason or "", "error")
        self._finished.labels(*values, reason).inc()
        if reason in ("abort", "error"):
            return
        self._prompt_tokens.labels(*values).inc(choice.num_prompt_tokens)
        self._prompt_sizes.labels(*values).observe(choice.num_prompt_tokens)
        self._answer_sizes.labels(*values).observe(choice.num_tokens)
        self._latency.labels(*values).observe(now_s - choice.arrived_s)
        if choice.first_token_s is not None and choice.num_tokens > 1:
            took_s = choice.last_token_s - choice.first_token_s
            self._per_token.labels(*values).observe(took_s / (choice.num_tokens - 1))

    def response(self, path: str, status: int) -> None:
        self._responses.labels(path, str(status)).inc()

    def disconnected(self) -> None:
        self._disconnects.inc()

    def exposition(self, stats: Stats | None, num_in_flight: int, num_tasks: int) -> bytes:
        """Text for Prometheus.

        Parameters
        ----------
        stats : the decode process's; None when it does not answer
        num_in_flight : places taken, in the decode process and on the way to it
        num_tasks : of the event loop
        """
        self._stats = stats
        self._in_flight.set(num_in_flight)
        self._tasks.set(num_tasks)
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Metric]:
        """What the decode process knows."""
        stats = self._stats
        if stats is None:
            return
        names, values = tuple(self._labels), tuple(self._labels.values())
        for name, text, value in (
            ("vllm:num_requests_running", "Requests in the batch.", stats.num_running),
            ("vllm:num_requests_waiting", "Requests waiting for a place.", stats.num_waiting),
            ("vllm:kv_cache_usage_perc", "KV room that holds tokens, 0 to 1.", stats.kv_usage),
        ):
            gauge = GaugeMetricFamily(name, text, labels=names)
            gauge.add_metric(values, value)
            yield gauge
        for name, text, count in (
            ("vllm:spec_decode_num_drafts", "Drafts verified.", stats.num_drafts),
            ("vllm:spec_decode_num_draft_tokens", "Draft tokens verified.", stats.num_drafted),
            ("vllm:spec_decode_num_accepted_tokens", "Of these, accepted.", stats.num_accepted),
            ("smartspec_decode_steps", "Steps of the decode loop.", stats.num_steps),
            ("smartspec_decode_busy_seconds", "Seconds spent in steps.", stats.busy_s),
        ):
            counter = CounterMetricFamily(name, text, labels=names)
            counter.add_metric(values, count)
            yield counter
        positions = CounterMetricFamily(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Drafts whose token at this position was accepted.",
            labels=(*names, "position"),
        )
        for position, count in enumerate(stats.num_accepted_per_position):
            positions.add_metric((*values, str(position)), count)
        yield positions


class CountResponses:
    """Counts responses by route and status; paths that are no route of ours are one."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: frozenset[str]) -> None:
        self._app = app
        self._metrics = metrics
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self._paths else "other"

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.response(path, message["status"])
            await send(message)

        await self._app(scope, receive, counted)
