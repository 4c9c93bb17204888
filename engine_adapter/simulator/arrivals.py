"""When requests come: made up at a rate, or read from public traces."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

import numpy as np

from smartspec.engine_adapter.simulator.requests import F64, I64, Traffic


def poisson(rate: float, until_s: float, rng: np.random.Generator) -> F64:
    """Arrivals of a Poisson process; ``rate`` per second."""
    return gamma(rate, until_s, 1.0, rng)


def gamma(rate: float, until_s: float, cv: float, rng: np.random.Generator) -> F64:
    """Gamma-distributed gaps of coefficient of variation ``cv``; 1 is Poisson, above is bursty."""
    if not (rate > 0 and cv > 0):
        raise ValueError(f"rate and cv must be > 0, got {rate} and {cv}")
    shape = cv**-2
    times = np.empty(0)
    last = 0.0
    while last < until_s:
        count = int(rate * (until_s - last) * 1.2) + 16
        more = last + np.cumsum(rng.gamma(shape, 1 / (rate * shape), count))
        times = np.concatenate([times, more])
        last = float(times[-1])
    return times[times < until_s]


def piecewise(phases: Sequence[tuple[float, float]], rng: np.random.Generator) -> F64:
    """Poisson arrivals in phases of (seconds, rate), one after the other."""
    begin, parts = 0.0, []
    for seconds, rate in phases:
        parts.append(begin + poisson(rate, seconds, rng))
        begin += seconds
    return np.concatenate(parts)


def varying(
    rate: Callable[[F64], F64], highest: float, until_s: float, rng: np.random.Generator
) -> F64:
    """Poisson arrivals at ``rate(t)``, by thinning (Lewis and Shedler 1979).

    Raises ValueError where the rate exceeds ``highest``.
    """
    times = poisson(highest, until_s, rng)
    wanted = rate(times)
    if len(wanted) and wanted.max() > highest * (1 + 1e-9):
        raise ValueError(f"rate reaches {wanted.max():g}, above highest = {highest:g}")
    return times[rng.random(len(times)) * highest < wanted]


def diurnal(
    mean_rate: float, swing: float, until_s: float, rng: np.random.Generator, day_s: float = 86400.0
) -> F64:
    """A rate that swings as a sine over the day: lowest at its begin, ``swing`` in [0, 1]."""

    def rate(t: F64) -> F64:
        wave: F64 = mean_rate * (1 - swing * np.cos(2 * np.pi * t / day_s))
        return wave

    return varying(rate, mean_rate * (1 + swing), until_s, rng)


def exponential_lengths(
    arrival_s: F64, mean_prompt: float, mean_output: float, rng: np.random.Generator
) -> Traffic:
    """Traffic with exponentially distributed lengths, of at least one token."""

    def lengths(mean: float) -> I64:
        drawn: I64 = np.maximum(np.rint(rng.exponential(mean, len(arrival_s))), 1).astype(np.int64)
        return drawn

    return Traffic(arrival_s, lengths(mean_prompt), lengths(mean_output))


def azure(path: Path) -> Traffic:
    """Azure's LLM inference traces of 2023 (github.com/Azure/AzurePublicDataset, CC-BY-4.0)."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    # Seven digits of a second are given; six are what a datetime takes.
    times = [datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp() for row in rows]
    return _sorted(
        times, [row["ContextTokens"] for row in rows], [row["GeneratedTokens"] for row in rows]
    )


def mooncake(path: Path) -> Traffic:
    """Mooncake's traces (github.com/kvcache-ai/Mooncake, Apache-2.0); cached prefixes count."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return _sorted(
        [row["timestamp"] / 1e3 for row in rows],
        [row["input_length"] for row in rows],
        [row["output_length"] for row in rows],
    )


def servegen(path: Path) -> Traffic:
    """What ServeGen writes (github.com/alibaba/ServeGen): CSV with `timestamp` in seconds,
    `input_tokens` and `output_tokens`, among other columns.
    """
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return _sorted(
        [float(row["timestamp"]) for row in rows],
        [float(row["input_tokens"]) for row in rows],
        [float(row["output_tokens"]) for row in rows],
    )


READERS: dict[str, Callable[[Path], Traffic]] = {
    "azure": azure,
    "mooncake": mooncake,
    "servegen": servegen,
}


def read(path: Path, trace_format: str = "auto") -> Traffic:
    """A trace in one of `READERS`' formats; "auto" tells them by the first line.

    Raises ValueError, naming the file, for one that is not of that format, and OSError.
    """
    if trace_format == "auto":
        with path.open(errors="replace") as file:
            first = file.readline()
        trace_format = (
            "mooncake"
            if first.startswith("{")
            else "azure"
            if "ContextTokens" in first
            else "servegen"
        )
    try:
        return READERS[trace_format](path)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a trace of the format {trace_format} ({error!r})") from error


def _sorted(
    times: Sequence[float], prompts: Sequence[object], outputs: Sequence[object]
) -> Traffic:
    arrival = np.array(times, np.float64)
    if not np.isfinite(arrival).all():
        raise ValueError("times must be finite")
    order = np.argsort(arrival, kind="stable")
    arrival = arrival[order] - (arrival.min() if len(arrival) else 0.0)

    def lengths(values: Sequence[object]) -> I64:
        column: I64 = np.maximum(np.array(values).astype(np.int64)[order], 1)
        return column

    return Traffic(arrival, lengths(prompts), lengths(outputs))
