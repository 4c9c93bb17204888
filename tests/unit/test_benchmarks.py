"""Benchmarks are run by hand, and rarely: that each can be, imports and all, is seen here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

RUN_ALL = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
for path in sys.argv[2:]:
    try:
        runpy.run_path(path, run_name="looked_at")
    except BaseException as error:
        sys.exit(f"{path}: {error!r}")
"""


def test_every_benchmark_can_be_loaded() -> None:
    paths = sorted(map(str, BENCHMARKS.glob("*.py")))
    assert len(paths) > 20
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL, str(BENCHMARKS), *paths],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
