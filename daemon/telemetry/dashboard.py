"""The Grafana dashboard, made from the metrics' ids.

``python -m smartspec.daemon.telemetry.dashboard > dashboards/smartspec.json`` writes the file; a
test compares the two. Every expression is built from `metric_ids`, so that none names a metric or
label that is not there.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import msgspec

from smartspec.daemon.telemetry import metric_ids as ids
from smartspec.daemon.telemetry.metric_ids import Metric

SCHEMA_VERSION = 39  #: of Grafana's dashboard JSON; newer releases migrate older files
COLUMNS = 24  #: of Grafana's grid
WIDTH = HEIGHT = 8  #: of a graph
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
RATE = "$__rate_interval"
PERCENT, SECONDS, RATE_UNIT, SHORT, BYTES = "percentunit", "s", "reqps", "short", "bytes"


class Query(NamedTuple):
    """An expression whose series keep their host, which is put before the legend."""

    expression: str
    legend: str


class Panel(NamedTuple):
    """One graph."""

    title: str
    unit: str
    about: str
    queries: tuple[Query, ...]
    stacked: bool


def panel(title: str, unit: str, about: str, *queries: Query, stacked: bool = False) -> Panel:
    return Panel(title, unit, about, queries, stacked)


def selected(metric: Metric, suffix: str = "", **labels: str) -> str:
    """The series of a metric: of the hosts chosen, and of the engines where it has engines.

    >>> selected(ids.STEPS, "_total", source="policy")
    'smartspec_steps_total{instance=~"$instance",engine=~"$engine",source="policy"}'
    """
    unknown = set(labels) - set(metric.labels)
    if unknown:
        raise ValueError(f"{metric.id} has no label {', '.join(sorted(unknown))}")
    chosen = ['instance=~"$instance"']
    chosen += ['engine=~"$engine"'] if "engine" in metric.labels else []
    chosen += [f'{name}="{value}"' for name, value in labels.items()]
    return f"{metric.id}{suffix}{{{','.join(chosen)}}}"


def rate(metric: Metric, *by: str, **labels: str) -> str:
    """Growth of a counter per second, summed over all labels but the host and ``by``."""
    return _summed("rate", selected(metric, "_total", **labels), by)


def increase(metric: Metric, *by: str) -> str:
    """Growth of a counter, likewise."""
    return _summed("increase", selected(metric, "_total"), by)


def _summed(function: str, series: str, by: tuple[str, ...]) -> str:
    return f"sum by ({', '.join(('instance', *by))}) ({function}({series}[{RATE}]))"


def quantile(q: float, metric: Metric) -> str:
    """A quantile of a histogram, by host and engine."""
    buckets = f"rate({selected(metric, '_bucket')}[{RATE}])"
    return f"histogram_quantile({q:g}, sum by (le, instance, engine) ({buckets}))"


def _gauge(metric: Metric, **labels: str) -> Query:
    shown = [name for name in metric.labels if name not in labels]
    return Query(selected(metric, **labels), " ".join(f"{{{{{name}}}}}" for name in shown))


def _quantiles(metric: Metric) -> tuple[Query, ...]:
    return tuple(Query(quantile(q, metric), f"{{{{engine}}}} p{100 * q:g}") for q in (0.5, 0.99))


ROWS: dict[str, tuple[Panel, ...]] = {
    "What it brings": (
        panel(
            "Goodput",
            SHORT,
            "Tokens per second: measured, and expected of the lengths chosen, of none and of the "
            "engine's static length.",
            Query(selected(ids.GOODPUT), "{{engine}} measured"),
            _gauge(ids.PREDICTED_GOODPUT),
        ),
        panel(
            "Estimated gain",
            PERCENT,
            "Goodput over that without speculation and over the engine's own setting, less 1; with "
            "95% intervals.",
            _gauge(ids.GAIN),
        ),
        panel(
            "Measured gain",
            PERCENT,
            "The same, by neighbouring blocks of time that were run either way.",
            _gauge(ids.MEASURED_GAIN),
        ),
        panel(
            "Bias of predictions",
            PERCENT,
            "Goodput of the alternative when it was run: measured over predicted, less 1.",
            _gauge(ids.BIAS),
        ),
        panel(
            "Tokens",
            SHORT,
            "Per second of the clock, idle time included.",
            Query(rate(ids.EMITTED, "engine"), "{{engine}} answered"),
            Query(rate(ids.DRAFTED, "engine"), "{{engine}} drafted"),
            Query(rate(ids.ACCEPTED, "engine"), "{{engine}} accepted"),
        ),
    ),
    "What it does": (
        panel(
            "Requests by length",
            SHORT,
            "How many requests draft how far, in the last decision.",
            Query(
                f"sum by (instance, length) ({selected(ids.REQUESTS_AT_LENGTH)})",
                "length {{length}}",
            ),
            stacked=True,
        ),
        panel(
            "Steps by who chose their lengths",
            SHORT,
            "policy and probe: SmartSpec; fallback: the table it left; own: the engine.",
            Query(rate(ids.STEPS, "source"), "{{source}}"),
            stacked=True,
        ),
        panel(
            "Value of time",
            SHORT,
            "Tokens that a second of step time must bring; and the longest length in force.",
            _gauge(ids.VALUE_OF_TIME),
            Query(selected(ids.DEPTH), "{{engine}} depth"),
        ),
        panel(
            "Steering",
            SHORT,
            "1 while SmartSpec chooses the lengths, and while the engine reports.",
            _gauge(ids.STEERING),
            Query(selected(ids.CONNECTED), "{{engine}} connected"),
        ),
        panel(
            "How engines are treated",
            SHORT,
            "Engines by stance (docs/adoption.md), and pairs of blocks compared.",
            Query(f"sum by (instance, stance) ({selected(ids.STANCE)})", "{{stance}}"),
            Query(increase(ids.COMPARISONS, "over"), "comparisons with {{over}}"),
        ),
        panel(
            "Retreats",
            SHORT,
            "Evidence that the engine's own setting is better, from 1000 on of which it is left to "
            "that for a while; and how often it was.",
            _gauge(ids.EVIDENCE_WORSE),
            Query(f"increase({selected(ids.RETREATS, '_total')}[1d])", "{{engine}} in a day"),
        ),
        panel(
            "Probes and decisions",
            SHORT,
            "Per second. Probes are drafted for only to learn, within control.probe_share.",
            Query(rate(ids.DECISIONS, "engine"), "{{engine}} decisions"),
            Query(rate(ids.PROBES, "engine"), "{{engine}} probes"),
        ),
        panel(
            "Requests with a target",
            SHORT,
            "That ask for a time per token. out: not even if all others gave way.",
            _gauge(ids.TARGETS),
        ),
    ),
    "Whether to trust it": (
        panel(
            "Error of predicted step times",
            PERCENT,
            "Sum of absolute errors over the sum of step times.",
            _gauge(ids.PREDICTION_ERROR),
        ),
        panel(
            "Acceptance by depth",
            PERCENT,
            "P(the draft at this depth is accepted | those before it were).",
            _gauge(ids.ACCEPTANCE),
        ),
        panel(
            "Staleness of policies",
            SHORT,
            "Steps from the report that a policy knew to the step that obeyed it.",
            *_quantiles(ids.STALENESS),
        ),
    ),
    "Load": (
        panel(
            "Requests",
            SHORT,
            "Decoding, and queued.",
            Query(selected(ids.NUM_RUNNING), "{{engine}} running"),
            Query(selected(ids.NUM_WAITING), "{{engine}} waiting"),
        ),
        panel("KV room in use", PERCENT, "0 to 100%.", _gauge(ids.KV_USAGE)),
        panel("Step time", SECONDS, "Of the engine.", *_quantiles(ids.STEP_SECONDS)),
    ),
    "The service": (
        panel(
            "Decision time",
            SECONDS,
            "Report received to policy sent; and learning from a report, after it.",
            *_quantiles(ids.DECIDE_SECONDS),
            Query(quantile(0.5, ids.LEARN_SECONDS), "{{engine}} learning"),
        ),
        panel(
            "Reports that taught nothing",
            RATE_UNIT,
            "Dropped by the engine, missed (those included), repeated, refused, throttled.",
            Query(rate(ids.REPORTS_LOST, "engine", "how"), "{{engine}} {{how}}"),
        ),
        panel(
            "Notes and engine events",
            SHORT,
            "What `smartspec inspect` tells in words.",
            Query(increase(ids.NOTES, "level", "kind"), "{{level}} {{kind}}"),
            Query(increase(ids.ENGINE_EVENTS, "state"), "engine {{state}}"),
        ),
        panel(
            "Redis",
            SHORT,
            "Steering does not depend on it.",
            Query(selected(ids.REDIS_UP), "up"),
            Query(selected(ids.REDIS_BUFFERED), "events waiting"),
            Query(rate(ids.REDIS_FAILURES), "failures/s"),
            Query(rate(ids.REDIS_LOST), "events lost/s"),
        ),
        panel(
            "Saved state",
            SHORT,
            "Checkpoints of what was learned, in files.",
            Query(rate(ids.STATE_WRITTEN), "written/s"),
            Query(rate(ids.STATE_FAILURES), "failures/s"),
        ),
        panel(
            "Daemon",
            SHORT,
            "The loop's own counters, and events that telemetry was too slow for.",
            Query(selected(ids.NUM_ENGINES), "engines"),
            Query(f"time() - {selected(ids.HEARD)}", "seconds since it was heard"),
            Query(rate(ids.BUS_MISSED, "topic"), "missed {{topic}}/s"),
            Query(
                rate(ids.LOOP, "counter") + " > 0",
                "{{counter}}/s",
            ),
        ),
        panel(
            "Processor time of the daemon",
            PERCENT,
            "Of one core. That of telemetry is process_cpu_seconds_total.",
            Query(rate(ids.CPU_SECONDS, "mode"), "{{mode}}"),
            stacked=True,
        ),
        panel("Memory of the daemon", BYTES, "In use.", Query(selected(ids.MEMORY), "resident")),
        panel(
            "What runs",
            SHORT,
            "Releases, uptimes, and whether the last reload went well.",
            _gauge(ids.BUILD),
            Query(selected(ids.RELOADED), "settings are those of the file"),
            Query(f"time() - {selected(ids.STARTED)}", "seconds since its start"),
        ),
    ),
}


def _variable(name: str, kind: str, query: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "type": kind, "query": query, "label": name, "hide": 0, **more}


def _values(label: str, series: str) -> dict[str, Any]:
    """A variable: some or all of the values that ``label`` has in ``series``."""
    query = f"label_values({series}, {label})"
    return _variable(
        label,
        "query",
        query,
        datasource=DATASOURCE,
        definition=query,
        includeAll=True,
        multi=True,
        allValue=".*",
        current={"text": ["All"], "value": ["$__all"]},
        refresh=2,
        sort=1,
    )


def _panel(number: int, shown: Panel, x: int, y: int) -> dict[str, Any]:
    stacking = {"mode": "normal" if shown.stacked else "none", "group": "A"}
    return {
        "id": number,
        "type": "timeseries",
        "title": shown.title,
        "description": shown.about,
        "datasource": DATASOURCE,
        "gridPos": {"h": HEIGHT, "w": WIDTH, "x": x, "y": y},
        "fieldConfig": {
            "defaults": {
                "unit": shown.unit,
                "custom": {"fillOpacity": 30 if shown.stacked else 0, "stacking": stacking},
            },
            "overrides": [],
        },
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": DATASOURCE,
                "expr": query.expression,
                "legendFormat": f"{{{{instance}}}} {query.legend}",
                "range": True,
            }
            for index, query in enumerate(shown.queries)
        ],
    }


def build() -> dict[str, Any]:
    """The dashboard as Grafana imports it."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS.items():
        place = {"h": 1, "w": COLUMNS, "x": 0, "y": y}
        number = len(panels) + 1
        panels.append(
            {"id": number, "type": "row", "title": title, "gridPos": place, "panels": []}
            | {"collapsed": False}
        )
        y += 1
        x = 0
        for one in row:
            if x + WIDTH > COLUMNS:
                x, y = 0, y + HEIGHT
            panels.append(_panel(len(panels) + 1, one, x, y))
            x += WIDTH
        y += HEIGHT
    return {
        "uid": "smartspec",
        "title": "SmartSpec",
        "description": "What speculation brings, what is decided, and whether to trust it.",
        "tags": ["llm", "speculative-decoding"],
        "schemaVersion": SCHEMA_VERSION,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "",
        "annotations": {"list": []},
        "links": [],
        "templating": {
            "list": [
                _variable("datasource", "datasource", "prometheus"),
                _values("instance", ids.HEARD.id),
                _values("engine", f'{ids.CONNECTED.id}{{instance=~"$instance"}}'),
            ]
        },
        "panels": panels,
    }


def to_json() -> str:
    """The file's text."""
    return msgspec.json.format(msgspec.json.encode(build()), indent=2).decode() + "\n"


if __name__ == "__main__":
    sys.stdout.write(to_json())
