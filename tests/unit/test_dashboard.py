"""Dashboard and alerts name metrics and labels that exist, and alerts fire when they should."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from smartspec.daemon.telemetry import dashboard
from smartspec.daemon.telemetry import metric_ids as ids
from smartspec.daemon.telemetry.prometheus import PrometheusExporter

PROMTOOL = shutil.which("promtool")
METRICS = {name: metric for metric in ids.ALL for name in metric.series}
FUNCTIONS = {"rate", "increase", "sum", "max", "by", "histogram_quantile", "time", "absent"}
FUNCTIONS |= {"and", "or", "on"}
SCRAPE = {"up", "instance", "job"}  #: a series and labels that Prometheus makes itself
PANELS = [panel for panel in dashboard.build()["panels"] if panel["type"] != "row"]
QUERIES = [(t["expr"], t["legendFormat"]) for panel in PANELS for t in panel["targets"]]


@pytest.fixture(scope="module")
def alerts(repository: Path) -> list[dict[str, Any]]:
    text = (repository / "dashboards" / "alerts.yml").read_text("utf-8")
    return [rule for group in yaml.safe_load(text)["groups"] for rule in group["rules"]]


def check(expression: str, legend: str = "") -> set[str]:
    """Assert that all names and labels are known; returns the metrics."""
    for opening, closing in ("()", "{}", "[]"):
        assert expression.count(opening) == expression.count(closing)
    bare = re.sub(r'"[^"]*"|\[[^]]*\]', "", expression)
    labels = set(re.findall(r'(\w+)(?:=~|!~|!=|=)"', expression))
    for group in re.findall(r"(?:by|on) \(([^)]*)\)", bare):
        labels |= {name.strip() for name in group.split(",") if name.strip()}
    labels |= set(re.findall(r"\{\{(\w+)\}\}", legend))
    rest = re.sub(r"\{[^}]*\}|(?:by|on) \([^)]*\)", "", bare)
    names = set(re.findall(r"[a-zA-Z_]\w*", rest)) - FUNCTIONS - SCRAPE
    assert names, expression
    assert names <= METRICS.keys(), names - METRICS.keys()
    known = {"le"}.union(*(METRICS[name].labels for name in names))
    assert labels <= known | SCRAPE, (expression, labels - known)
    return names


def test_file_is_what_the_ids_make(repository: Path) -> None:
    """`python -m smartspec.daemon.telemetry.dashboard > dashboards/smartspec.json` renews it."""
    text = (repository / "dashboards" / "smartspec.json").read_text("utf-8")
    assert json.loads(text) == dashboard.build()
    assert text == dashboard.to_json()


@pytest.mark.parametrize(("expression", "legend"), QUERIES)
def test_every_expression_names_what_is_exported(expression: str, legend: str) -> None:
    check(expression, legend)


def test_engines_of_one_name_are_told_apart_by_their_hosts(alerts: list[dict[str, Any]]) -> None:
    """vLLM's engines are named after their model, alike on every host of a fleet."""
    for expression in [expression for expression, _ in QUERIES] + [r["expr"] for r in alerts]:
        groups = re.findall(r"\b(sum|max)(?: (?:by|on) \(([^)]*)\))?", expression)
        assert all("instance" in by for _, by in groups), expression
    for expression, legend in QUERIES:
        assert 'instance=~"$instance"' in expression
        assert legend.startswith("{{instance}}")


def test_every_metric_is_shown() -> None:
    shown = set().union(*(check(expression) for expression, _ in QUERIES))
    assert {METRICS[name] for name in shown} == set(ids.ALL)


def test_series_are_the_names_of_a_scrape() -> None:
    exported = {family.name: family.type for family in PrometheusExporter().registry.collect()}
    for metric in ids.ALL:
        assert exported[metric.id] == metric.kind


def test_documented_metrics_are_those_exported(repository: Path) -> None:
    text = (repository / "docs" / "monitoring.md").read_text("utf-8")
    rows = re.findall(r"^\| `(smartspec_\w+)` \| (\w+) \| ([^|]*) \|", text, re.MULTILINE)
    documented = {name: (kind, re.findall(r"\w+", labels)) for name, kind, labels in rows}
    assert documented == {
        metric.id + ("_total" if metric.kind == "counter" else ""): (metric.kind, [*metric.labels])
        for metric in ids.ALL
    }


def test_a_label_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="smartspec_steps has no label over"):
        dashboard.selected(ids.STEPS, over="none")


def test_panels_are_whole_and_do_not_overlap() -> None:
    built = dashboard.build()
    assert {"uid", "title", "schemaVersion", "panels", "templating", "time"} <= built.keys()
    assert [variable["name"] for variable in built["templating"]["list"]] == [
        "datasource",
        "instance",
        "engine",
    ]
    every = [panel["id"] for panel in built["panels"]]
    assert len(set(every)) == len(every)
    places = []
    for panel in built["panels"]:
        place = panel["gridPos"]
        assert 0 <= place["x"] and place["x"] + place["w"] <= dashboard.COLUMNS
        places.append(place)
    for a, b in combinations(places, 2):
        apart = (
            a["x"] + a["w"] <= b["x"]
            or b["x"] + b["w"] <= a["x"]
            or a["y"] + a["h"] <= b["y"]
            or b["y"] + b["h"] <= a["y"]
        )
        assert apart, (a, b)
    for panel in PANELS:
        assert panel["description"] and panel["datasource"] == dashboard.DATASOURCE
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


# -- alerts -------------------------------------------------------------------------------------


def test_alerts_name_what_is_exported_and_say_what_to_do(alerts: list[dict[str, Any]]) -> None:
    assert len({rule["alert"] for rule in alerts}) == len(alerts)
    for rule in alerts:
        check(rule["expr"])
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        assert rule["annotations"]["summary"].endswith(".")
        assert rule["annotations"]["description"]
        used = set(re.findall(r"\$labels\.(\w+)", str(rule["annotations"])))
        by = re.search(r"by \(([^)]*)\)", rule["expr"])
        labels = by.group(1) if by else " ".join(METRICS[next(iter(check(rule["expr"])))].labels)
        assert all(name in labels for name in used - {"instance"}), rule["alert"]
        assert "instance" in used, f"{rule['alert']} does not say on which host"
        page = f"docs/operations.md#{rule['alert'].lower()}"
        assert rule["annotations"]["runbook_url"] == page


def test_each_alert_is_tried_with_what_fires_it_and_with_what_does_not(
    repository: Path, alerts: list[dict[str, Any]]
) -> None:
    trials = yaml.safe_load((repository / "dashboards" / "alerts_test.yml").read_text("utf-8"))
    found: dict[str, set[bool]] = {}
    for trial in trials["tests"]:
        for one in trial["promql_expr_test"]:
            name = re.search(r'alertname="(\w+)"', one["expr"])
            assert name is not None
            found.setdefault(name.group(1), set()).add(bool(one["exp_samples"]))
    assert found == {rule["alert"]: {True, False} for rule in alerts}


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed")
def test_alerts_fire_when_they_should(repository: Path) -> None:
    assert PROMTOOL is not None
    folder = repository / "dashboards"
    for command in (["check", "rules", "alerts.yml"], ["test", "rules", "alerts_test.yml"]):
        done = subprocess.run([PROMTOOL, *command], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed")
def test_expressions_are_promql(tmp_path: Path) -> None:
    """As recording rules, with Grafana's variables filled in."""
    assert PROMTOOL is not None
    rules = [
        {"record": f"query:{number}", "expr": text}
        for number, (expression, _) in enumerate(QUERIES)
        for text in [re.sub(r"\$(engine|instance)", ".*", expression)]
        for text in [text.replace("$__rate_interval", "1m")]
    ]
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}), "utf-8")
    command = [PROMTOOL, "check", "rules", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
