"""What a checkpoint takes of the loop's turn, and what a start from one takes.

For an engine with the widest table of today's limits (lookup, length 64, 8 graph sizes) and for the
demo's. Serialising is what the loop does; writing and fsync are the telemetry process'.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from figures import record
from learned_state import experienced

from smartspec.daemon.state.learned import check, decode, encode, restore
from smartspec.daemon.state.state_directory import StateDirectory


def timed(call: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median and 99th percentile in milliseconds, each call a little apart from the last."""
    took = []
    for _ in range(repeats):
        time.sleep(0.005)  # a turn of the loop finds cold caches
        began = time.perf_counter()
        call()
        took.append(time.perf_counter() - began)
    p50, p99 = np.percentile(took, (50, 99)) * 1e3
    return float(p50), float(p99)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=1000)
    args = parser.parse_args()
    figures = {}
    wide = {"max_length": 64, "graph_sizes": (1, 2, 4, 8, 16, 32, 64, 128)}
    for name, limits in (("demo", {"max_length": 8}), ("wide", wide)):
        engine = experienced(300, **limits)
        frame = encode(engine.learned.checkpoint())
        figures[f"{name}_bytes"] = len(frame)
        p50, p99 = timed(lambda e=engine: encode(e.learned.checkpoint()), args.repeats)
        figures[f"{name}_serialise_p50_ms"], figures[f"{name}_serialise_p99_ms"] = p50, p99
        p50, _ = timed(lambda f=frame: check(decode(f)), args.repeats // 10)
        figures[f"{name}_check_p50_ms"] = p50
        p50, p99 = timed(lambda f=frame: restore(decode(f)), args.repeats // 10)
        figures[f"{name}_restore_p50_ms"], figures[f"{name}_restore_p99_ms"] = p50, p99
        with tempfile.TemporaryDirectory() as folder:
            directory = StateDirectory(Path(folder))
            p50, p99 = timed(
                lambda d=directory, e=engine, f=frame: d.write(e.key.id, f), args.repeats // 10
            )
            figures[f"{name}_write_p50_ms"], figures[f"{name}_write_p99_ms"] = p50, p99
    record("state", figures)


if __name__ == "__main__":
    main()
