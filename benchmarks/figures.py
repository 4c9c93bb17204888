"""How a benchmark reports: a table for people, ``build/figures/<name>.json`` for the record.

The environment variable FIGURES_FOLDER names another folder.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from smartspec.lab import environment

ROOT = Path(__file__).parents[1]
FOLDER = Path(os.environ.get("FIGURES_FOLDER") or ROOT / "build" / "figures").absolute()


def record(
    name: str,
    figures: Mapping[str, float],
    *,
    seed: int = 0,
    notes: Mapping[str, str] | None = None,
) -> Path:
    """Print ``figures`` as a table and write them with where they were measured.

    What is not finite is left out: a single pair has no bound, and JSON no NaN.

    ``notes``: what else belongs to the record, such as where its input comes from.
    """
    figures = {key: value for key, value in figures.items() if math.isfinite(value)}
    table = Table(title=name, title_justify="left")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for key, value in figures.items():
        table.add_row(key, f"{value:.4g}")
    Console().print(table)
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{name}.json"
    content = {"name": name, "figures": figures, "env": environment.describe(), "seed": seed}
    if notes:
        content["notes"] = dict(notes)
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"written to {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}")
    return path


def percentiles_ms(seconds: list[float], prefix: str) -> dict[str, float]:
    """``<prefix>_p50_ms`` and ``<prefix>_p99_ms``."""
    p50, p99 = np.percentile(seconds, (50, 99)) * 1e3
    return {f"{prefix}_p50_ms": float(p50), f"{prefix}_p99_ms": float(p99)}
