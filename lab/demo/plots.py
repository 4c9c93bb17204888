"""Two pictures: lengths and load over time, and latencies side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from smartspec.lab.demo.player import Played, RequestRecord
from smartspec.lab.demo.schedule import Schedule
from smartspec.lab.demo.summary import OVERALL, stats_in

BIN_S = 1.0
BUSY_COLOUR = "#f3d9c9"
COLOURS = {"none": "#8a8a8a", "static_3": "#7aa6c2", "static_5": "#33658a", "smartspec": "#d1495b"}


def _shade(axes: Axes, schedule: Schedule) -> None:
    for phase in schedule.phases:
        if phase.name == "busy":
            axes.axvspan(phase.begin_s, phase.end_s, color=BUSY_COLOUR, zorder=0)
        axes.text(
            (phase.begin_s + phase.end_s) / 2,
            1.02,
            phase.name.replace("_", " "),
            transform=axes.get_xaxis_transform(),
            ha="center",
        )


def lengths_over_time(played: Played, schedule: Schedule, path: Path) -> None:
    """Load above, chosen lengths below: shares of the requests at each length, and the mean."""
    steps = [step for step in played.steps if step.lengths]
    figure = Figure(figsize=(10, 6), layout="constrained")
    load, lengths = figure.subplots(2, 1, sharex=True)
    _shade(load, schedule)
    at_s = [step.at_s for step in steps]
    load.step(at_s, [step.num_running for step in steps], where="post", label="running")
    load.step(at_s, [step.num_waiting for step in steps], where="post", label="waiting")
    load.set_ylabel("requests")
    load.legend(loc="upper right")

    longest = max((max(step.lengths) for step in steps), default=0)
    num_bins = int(max(at_s, default=0.0) // BIN_S) + 1
    counts = np.zeros((longest + 1, num_bins))
    for step in steps:
        np.add.at(counts[:, int(step.at_s // BIN_S)], list(step.lengths), 1)
    totals = counts.sum(axis=0)
    shares = counts / np.maximum(totals, 1)
    edges = np.arange(num_bins) * BIN_S
    bottom = np.zeros(num_bins)
    for length, share in enumerate(shares):
        grey = 0.95 - 0.75 * length / max(longest, 1)
        lengths.bar(
            edges,
            share,
            BIN_S,
            bottom,
            align="edge",
            color=(grey * 0.8, grey * 0.9, grey),
            label=f"length {length}",
        )
        bottom += share
    lengths.set_ylabel("share of requests")
    lengths.set_xlabel("seconds since the start")
    mean = lengths.twinx()
    mean.plot(
        edges + BIN_S / 2,
        np.where(totals > 0, np.arange(longest + 1) @ counts / np.maximum(totals, 1), np.nan),
        color=COLOURS["smartspec"],
        label="mean length",
    )
    mean.set_ylim(0, max(longest, 1))
    mean.set_ylabel("mean length", color=COLOURS["smartspec"])
    figure.legend(
        *lengths.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=longest + 1,
        fontsize="small",
    )
    figure.suptitle("SmartSpec: load, and the speculation lengths chosen")
    figure.savefig(path, dpi=110)


def latencies(arms: Mapping[str, Sequence[RequestRecord]], path: Path) -> None:
    """Mean latency of each arm by phase, with the p99 as a mark."""
    groups = [*dict.fromkeys(r.phase for requests in arms.values() for r in requests), OVERALL]
    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(arms)
    for place, (name, requests) in enumerate(arms.items()):
        stats = [stats_in(requests, group) for group in groups]
        x = np.arange(len(groups)) + (place - (len(arms) - 1) / 2) * width
        bars = axes.bar(
            x, [s.latency_mean_s for s in stats], width * 0.92, label=name, color=COLOURS.get(name)
        )
        axes.bar_label(bars, fmt="%.2f", fontsize="small")
        label = "p99" if place == len(arms) - 1 else None
        axes.plot(x, [s.latency_p99_s for s in stats], "k_", markersize=9, label=label)
    axes.set_xticks(range(len(groups)), [group.replace("_", " ") for group in groups])
    axes.set_ylabel("request latency (s): mean, and p99 as a mark")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, dpi=110)
