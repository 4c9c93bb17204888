"""Readers of LLMServingSim's profiles (github.com/casys-kaist/LLMServingSim, MIT), in CSV."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from smartspec.lab.profiles.tables import Line, Surface

#: Run once for the whole model; everything else once a layer.
ONCE = {"embedding", "final_layernorm", "lm_head", "sampler"}
#: The operators of a layer that appear under one name, and run more than once.
TIMES = {"layernorm": 2}


def _rows(path: Path) -> Iterator[dict[str, str]]:
    with path.open(newline="") as file:
        yield from csv.DictReader(file)


def whole_model(
    path: Path, num_layers: int, without: tuple[str, ...] = (), only: tuple[str, ...] = ()
) -> Line:
    """Seconds of a whole model's operators by tokens (or sequences): all, or some of them.

    Reads both generations of the format: latencies in ns over ``input`` tokens, and times in us
    over ``tokens`` or ``sequences``.
    """
    points: dict[int, float] = {}
    for row in _rows(path):
        name = row.get("layer") or row["layer_name"]
        if name in without or (only and name not in only):
            continue
        size = int(row.get("tokens") or row.get("sequences") or row["input"])
        ns = row.get("latency(ns)")
        seconds = 1e-9 * float(ns) if ns else 1e-6 * float(row["time_us"])
        times = 1 if name in ONCE else num_layers * TIMES.get(name, 1)
        points[size] = points.get(size, 0.0) + times * seconds
    return Line(points)


def attention(path: Path, num_layers: int) -> tuple[Surface, Surface]:
    """Seconds of all layers' attention: decoding by (requests, context of each), and prefill by
    (tokens of the chunk, tokens before it).
    """
    decode, prefill = [], []
    for row in _rows(path):
        chunk, before = int(row["prefill_chunk"]), int(row["kv_prefill"])
        decoding, context = int(row["n_decode"]), int(row["kv_decode"])
        seconds = num_layers * 1e-6 * float(row["time_us"])
        if chunk == 0:
            decode.append((decoding, context, seconds))
        elif decoding == 0:
            prefill.append((chunk, before, seconds))
    return Surface(decode), Surface(prefill)
