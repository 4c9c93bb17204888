"""Benchmarks are run by hand, and rarely: that each can be, imports and all, is seen here."""

from __future__ import annotations

import re
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


def test_documents_name_only_benchmarks_that_there_are_and_results_names_all() -> None:
    root = BENCHMARKS.parent
    documents = [*root.glob("*.md"), *root.glob("docs/**/*.md"), root / "Makefile"]
    there = {path.stem.removeprefix("bench_") for path in BENCHMARKS.glob("bench_*.py")}
    named: dict[Path, set[str]] = {}
    for path in documents:
        found = re.findall(r"NAME=([a-z_]+)|bench_([a-z_]+)\.py", path.read_text())
        named[path] = {a or b for a, b in found}
        assert named[path] <= there, path
    assert named[root / "docs" / "results.md"] == there
