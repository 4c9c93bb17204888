"""The page that an operator opens when an alert fires has something to say of each."""

from __future__ import annotations

from pathlib import Path

import yaml


def test_every_alert_has_a_heading_that_its_runbook_can_point_to(repository: Path) -> None:
    rules = yaml.safe_load((repository / "dashboards/alerts.yml").read_text("utf-8"))
    alerts = {rule["alert"] for group in rules["groups"] for rule in group["rules"]}
    page = (repository / "docs/operations.md").read_text("utf-8")
    headings = {line[4:] for line in page.splitlines() if line.startswith("### ")}
    assert alerts and alerts <= headings
