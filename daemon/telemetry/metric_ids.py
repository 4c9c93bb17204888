"""Names of all metrics, in one place: dashboards and alerts depend on them.

A name is an interface: it is never reused for something else. Counters are scraped with the
suffix ``_total``, histograms with ``_bucket``, ``_sum`` and ``_count``.
"""

from __future__ import annotations

from typing import Literal, NamedTuple


class Metric(NamedTuple):
    id: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ("engine",)
    buckets: tuple[float, ...] = ()

    @property
    def series(self) -> tuple[str, ...]:
        """Names under which it is scraped."""
        suffixes = {"counter": ("_total",), "gauge": ("",), "histogram": _OF_HISTOGRAM}
        return tuple(self.id + suffix for suffix in suffixes[self.kind])


_OF_HISTOGRAM = ("_bucket", "_sum", "_count")
_SECONDS = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 3e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
_STEP_SECONDS = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 5.0)

# what engines do
STEPS = Metric("smartspec_steps", "counter", "Engine steps.", ("engine", "source"))
DRAFTED = Metric("smartspec_draft_tokens", "counter", "Draft tokens verified.")
ACCEPTED = Metric("smartspec_accepted_tokens", "counter", "Draft tokens accepted.")
EMITTED = Metric("smartspec_emitted_tokens", "counter", "Tokens added to answers.")
STEP_SECONDS = Metric(
    "smartspec_step_seconds", "histogram", "Duration of engine steps.", buckets=_STEP_SECONDS
)
NUM_RUNNING = Metric("smartspec_running_requests", "gauge", "Requests decoding.")
NUM_WAITING = Metric("smartspec_waiting_requests", "gauge", "Requests queued.")
KV_USAGE = Metric("smartspec_kv_usage_ratio", "gauge", "Share of the KV room in use.")
CONNECTED = Metric("smartspec_engine_connected", "gauge", "1 while the engine reports.")
REPORTS_LOST = Metric(
    "smartspec_lost_reports",
    "counter",
    "Reports that taught nothing: dropped by the engine, missed (those included), repeated, "
    "refused or throttled.",
    ("engine", "how"),
)
ENGINE_EVENTS = Metric(
    "smartspec_engine_events", "counter", "Engines that came or went.", ("state",)
)

# what is decided
DECISIONS = Metric("smartspec_decisions", "counter", "Decisions taken.", ("engine", "steering"))
STEERING = Metric(
    "smartspec_steering",
    "gauge",
    "1 while SmartSpec chooses the lengths, 0 while observing, paused, retreated or compared with.",
)
DEPTH = Metric("smartspec_depth_tokens", "gauge", "Longest speculation length in force.")
REQUESTS_AT_LENGTH = Metric(
    "smartspec_requests_at_length", "gauge", "Requests by length chosen.", ("engine", "length")
)
VALUE_OF_TIME = Metric(
    "smartspec_value_of_time_tokens_per_second", "gauge", "Tokens that a second is worth."
)
TARGETS = Metric(
    "smartspec_requests_with_target",
    "gauge",
    "Requests that ask for a time per token; out of reach: not even if all others gave way.",
    ("engine", "reach"),
)
PROBES = Metric("smartspec_probes", "counter", "Requests drafted for only to learn.")
DECIDE_SECONDS = Metric(
    "smartspec_decide_seconds", "histogram", "Report received to policy sent.", buckets=_SECONDS
)
LEARN_SECONDS = Metric(
    "smartspec_learn_seconds", "histogram", "Learning from a report.", buckets=_SECONDS
)

# what it brings, and whether to trust it
GOODPUT = Metric(
    "smartspec_goodput_tokens_per_second", "gauge", "Measured, smoothed over 5 s of steps."
)
PREDICTED_GOODPUT = Metric(
    "smartspec_predicted_goodput_tokens_per_second",
    "gauge",
    "Expected of the lengths chosen, of none, and of the engine's static length.",
    ("engine", "lengths"),
)
GAIN = Metric(
    "smartspec_estimated_gain_ratio",
    "gauge",
    "Goodput over that of the alternative, less 1: estimate and 95% interval.",
    ("engine", "over", "bound"),
)
MEASURED_GAIN = Metric(
    "smartspec_measured_gain_ratio",
    "gauge",
    "The same, measured by neighbouring blocks of time: mean and 95% interval.",
    ("engine", "over", "bound"),
)
COMPARISONS = Metric(
    "smartspec_comparisons", "counter", "Pairs of blocks compared.", ("engine", "over")
)
BIAS = Metric(
    "smartspec_prediction_bias_ratio",
    "gauge",
    "Goodput of the alternative, when it was run: measured over predicted, less 1.",
    ("engine", "over"),
)
STANCES = ("observe", "canary", "control", "paused", "retreated")
STANCE = Metric(
    "smartspec_stance", "gauge", "1 for how the engine is treated now.", ("engine", "stance")
)
EVIDENCE_WORSE = Metric(
    "smartspec_evidence_worse",
    "gauge",
    "That the engine's own setting is better by more than the tolerance; from 1000 on it retreats.",
)
RETREATS = Metric("smartspec_retreats", "counter", "Times that an engine was left to itself.")
ACCEPTANCE = Metric(
    "smartspec_acceptance_ratio",
    "gauge",
    "P(draft at this depth is accepted | those before were).",
    ("engine", "depth"),
)
PREDICTION_ERROR = Metric(
    "smartspec_step_prediction_error_ratio",
    "gauge",
    "Absolute error of predicted step times over their sum; smoothed.",
)
STALENESS = Metric(
    "smartspec_staleness_steps",
    "histogram",
    "Steps from the report that a policy knew to the step that obeyed it.",
    buckets=(0, 1, 2, 3, 4, 6, 8, 16, 32),
)

# the daemon and its telemetry
HEARD = Metric(
    "smartspec_daemon_heard_timestamp_seconds", "gauge", "When the daemon last said a word.", ()
)
STARTED = Metric("smartspec_daemon_start_time_seconds", "gauge", "When the daemon was started.", ())
CPU_SECONDS = Metric(
    "smartspec_daemon_cpu_seconds",
    "counter",
    "Processor time of the daemon (process_*: of the telemetry process, which serves this).",
    ("mode",),
)
MEMORY = Metric("smartspec_daemon_resident_memory_bytes", "gauge", "Memory of the daemon.", ())
BUILD = Metric(
    "smartspec_build_info", "gauge", "1: the daemon's release and wire.", ("version", "protocol")
)
RELOADED = Metric(
    "smartspec_config_reload_success",
    "gauge",
    "0 when the last SIGHUP found settings or keys that cannot be used: those before stay.",
    (),
)
NUM_ENGINES = Metric("smartspec_engines", "gauge", "Engines served.", ())
LOOP = Metric("smartspec_loop_events", "counter", "The loop's own counters.", ("counter",))
NOTES = Metric("smartspec_notes", "counter", "Notes to the operator.", ("level", "kind"))
BUS_MISSED = Metric(
    "smartspec_bus_missed_events", "counter", "Events this process was too slow for.", ("topic",)
)
REDIS_UP = Metric("smartspec_redis_up", "gauge", "1 when the last write to Redis went well.", ())
REDIS_FAILURES = Metric("smartspec_redis_failures", "counter", "Writes to Redis that failed.", ())
REDIS_LOST = Metric("smartspec_redis_lost_events", "counter", "Events never written to Redis.", ())
REDIS_BUFFERED = Metric(
    "smartspec_redis_buffered_events", "gauge", "Events waiting to be written.", ()
)
STATE_WRITTEN = Metric("smartspec_state_written", "counter", "Checkpoints written to files.", ())
STATE_FAILURES = Metric(
    "smartspec_state_failures", "counter", "Checkpoints that could not be written to files.", ()
)

ALL: tuple[Metric, ...] = tuple(v for v in list(globals().values()) if isinstance(v, Metric))
