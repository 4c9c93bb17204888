"""From rows of bench_vllm_accelerator.py to its figures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from paired import paired_ratio


def read(raw: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows by stage."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in raw.read_text("utf-8").splitlines():
        row = json.loads(line)
        found.setdefault(row["stage"], []).append(row)
    return found


def places(rows: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, list[dict[str, Any]]]]]:
    """Turns of each batch size and acceptance, by arm, for rounds that all arms have."""
    turns = [row for row in rows if row.get("round", -1) >= 0]
    for batch, rate in dict.fromkeys((row["batch"], row["acceptance"]) for row in turns):
        here = [row for row in turns if (row["batch"], row["acceptance"]) == (batch, rate)]
        arms = {row["arm"] for row in here}
        rounds = {row["round"] for row in here}
        for number in rounds.copy():
            if {row["arm"] for row in here if row["round"] == number} != arms:
                rounds.discard(number)
        if rounds:
            name = f"batch_{batch}" + ("" if rate is None else f"_accept_{100 * rate:.0f}")
            kept = sorted((r for r in here if r["round"] in rounds), key=lambda r: r["round"])
            yield name, {arm: [row for row in kept if row["arm"] == arm] for arm in sorted(arms)}


def seconds_per_token(turns: list[dict[str, Any]]) -> list[float]:
    return [turn["s"] / turn["tokens"] for turn in turns]


def summary(found: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Figures of all stages that have any."""
    figures: dict[str, float] = {}
    for stage, rows in found.items():
        if stage.startswith(("turns", "alone", "overhead")):
            for place, arms in places(rows):
                figures |= _of_turns(f"{stage}_{place}", arms)
    for stage, rows in found.items():
        if stage.startswith("answers"):
            figures |= _of_answers(stage, rows, found.get("answers_none", []))
    return figures


def _of_turns(name: str, arms: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    figures: dict[str, float] = {}
    for arm, turns in arms.items():
        figures[f"{name}_{arm}_tokens_per_s"] = 1 / float(np.mean(seconds_per_token(turns)))
        figures[f"{name}_{arm}_step_ms"] = float(np.mean([turn["step_ms"] for turn in turns]))
    ours = arms.get("smartspec") or arms.get("shadow_3") or []
    for key in ("own_us", "meanwhile_us") if ours else ():
        figures[f"{name}_{key}"] = float(np.median([turn[key] for turn in ours]))
    if "smartspec" in arms:
        steps = sum(turn["steps"] for turn in ours)
        figures[f"{name}_mean_to_draft"] = sum(turn["to_draft"] for turn in ours) / steps
        cost = {arm: seconds_per_token(turns) for arm, turns in arms.items()}
        statics = [arm for arm in arms if arm != "smartspec"]
        best = min(statics, key=lambda arm: float(np.mean(cost[arm])))
        figures[f"{name}_best_static"] = float(best)
        for other, what in ((best, "best_static"), ("0", "length_0")):
            ratio = paired_ratio(cost["smartspec"], cost[other])
            figures |= ratio.figures(f"{name}_smartspec_over_{what}")
    if "shadow_3" in arms and "off_3" in arms:
        times = [[turn["s"] / turn["steps"] for turn in arms[arm]] for arm in ("shadow_3", "off_3")]
        figures |= paired_ratio(*times).figures(f"{name}_step_with_over_without")
    return figures


def _of_answers(
    stage: str, rows: list[dict[str, Any]], plain: list[dict[str, Any]]
) -> dict[str, float]:
    figures: dict[str, float] = {}
    expected = next((row["answers"] for row in plain if row.get("arm") == "none"), None)
    for row in rows:
        if "answers" not in row or expected is None:
            continue
        name = f"{stage}_{row['arm']}"
        same = sum(a == b for a, b in zip(row["answers"], expected, strict=True))
        figures |= {f"{name}_same": same, f"{name}_of": len(expected)}
        figures |= {f"{name}_{key}": row[key] for key in ("drafted", "accepted")}
        if "ours" in row:
            figures[f"{name}_counted_drafted"] = row["ours"][0]
            figures[f"{name}_counted_accepted"] = row["ours"][1]
    return figures
