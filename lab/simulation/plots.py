"""Pictures of an experiment: what each policy costs, and what SmartSpec did over time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.ticker
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from smartspec.lab.simulation.experiment import Experiment, Line, Run
from smartspec.lab.simulation.timeline import Timeline

#: Text as outlines, and ids from names alone: the same experiment gives the same bytes.
STYLE: Any = {
    "svg.hashsalt": "smartspec",
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8b949e",
    "axes.labelcolor": "#3d444d",
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e8eb",
    "grid.linewidth": 0.8,
    "xtick.color": "#59636e",
    "ytick.color": "#59636e",
    "legend.frameon": False,
}
SMARTSPEC, BUSY = "#d1495b", "#33658a"
NAMED = {
    "smartspec": SMARTSPEC,
    "none": "#6e7781",
    "informed": "#1f2328",
    "clairvoyant": "#1f2328",
    "table": "#8a5fbf",
    "tiers": "#2a9d8f",
    "authors": "#e09f3e",
    "bandit": "#9c6644",
    "switch_off": "#c77dbb",
}
STATIC = ("#bcd7ea", "#94bfdd", "#6ba5cd", "#4489b8", "#2a6a99", "#184e77")
MOST_PANELS = 4


def colour(policy: str) -> str:
    """Of a policy, the same in all pictures."""
    if policy.startswith("static") and policy[6:].isdigit():
        return STATIC[min(int(policy[6:]), len(STATIC) - 1)]
    return NAMED.get(policy, "#57606a")


def _stroke(policy: str) -> dict[str, Any]:
    """How a policy's line is drawn: bounds dashed, SmartSpec on top."""
    bound = policy.startswith("informed") or policy == "clairvoyant"
    ours = policy == "smartspec"
    return {
        "color": colour(policy),
        "label": policy,
        "linestyle": ":" if policy == "clairvoyant" else "--" if bound else "-",
        "linewidth": 2.6 if ours else 1.5,
        "zorder": 5 if ours else 3,
    }


def focus(policies: Sequence[str]) -> str:
    """The policy that is shown over time."""
    return "smartspec" if "smartspec" in policies else policies[-1]


def latency(wanted: Experiment, lines: Sequence[Line]) -> Figure:
    """Mean latency against rate, and its ratio to the first policy's, with 95% intervals."""
    figure = Figure(figsize=(10.5, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    full = wanted.rate(1.0)
    rates = np.array([wanted.rate(load) for load in wanted.loads])
    nudge = (rates.max() - rates.min() or rates.max()) * 0.006
    for place, policy in enumerate(wanted.policies):
        mine = [line for line in lines if line.policy == policy]
        # Side by side: intervals at the same rate would hide each other.
        x = rates + (place - (len(wanted.policies) - 1) / 2) * nudge
        for axes, (mean, low, high) in (
            (left, ("latency_mean_s", "latency_low_s", "latency_high_s")),
            (right, ("over_first", "over_first_low", "over_first_high")),
        ):
            y = np.array([getattr(line, mean) for line in mine])
            ends = np.array([[getattr(line, low), getattr(line, high)] for line in mine])
            stroke = _stroke(policy)
            axes.plot(x, y, marker="o", markersize=4, **stroke)
            known = np.isfinite(ends).all(axis=1)
            if known.any():
                lowest = np.maximum(ends[known, 0], y[known] * 0.02)  # an axis of ratios has no 0
                axes.vlines(
                    x[known], lowest, ends[known, 1],
                    color=stroke["color"], linewidth=5, alpha=0.25, zorder=stroke["zorder"] - 1,
                )  # fmt: skip
    left.set_yscale("log")
    left.set_title("mean request latency (s, log)")
    right.set_title(f"the same, over that of {wanted.policies[0]}: below 1 is better")
    for axes in (left, right):
        axes.set_xlabel("requests per second")
        axes.set_xlim(left=0)
        top = axes.secondary_xaxis("top", functions=(lambda x: x / full, lambda x: x * full))
        top.set_xticks(list(wanted.loads), [f"load {load:g}" for load in wanted.loads])
        top.tick_params(length=0, labelsize=8, labelcolor="#8b949e")
        top.spines["top"].set_visible(False)
        axes.set_title(axes.get_title(loc="left"), pad=20)
    left.yaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda y, _: f"{y:g}"))
    left.yaxis.set_minor_formatter(mpl.ticker.FuncFormatter(_minor))
    right.axhline(1.0, color="#8b949e", linewidth=1, zorder=2)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 9))
    return figure


def _minor(y: float, _: int) -> str:
    return f"{y:.1g}" if f"{y:e}"[0] in "235" else ""


def _watched(wanted: Experiment, runs: Sequence[Run], policy: str) -> dict[float, Timeline]:
    """Timelines of a policy by load, of as many loads as there is room for."""
    found = {
        run.load: run.timeline for run in runs if run.policy == policy and run.timeline is not None
    }
    loads = list(wanted.loads)
    if len(loads) > MOST_PANELS:
        places = np.linspace(0, len(loads) - 1, MOST_PANELS).round().astype(int)
        loads = [loads[i] for i in places]
    return {load: found[load] for load in loads if load in found}


def _columns(count: int, rows: int, height: float, share_y: bool = True) -> tuple[Figure, Any]:
    figure = Figure(figsize=(10.5, height), layout="constrained")
    return figure, figure.subplots(
        rows, count, sharey="row" if share_y else "none", sharex="col", squeeze=False
    )


def _at(timeline: Timeline) -> np.ndarray:
    return (np.arange(len(timeline.running)) + 0.5) * timeline.bin_s


def lengths(wanted: Experiment, runs: Sequence[Run]) -> Figure:
    """Load above, lengths chosen below, over time; a column for each load."""
    watched = _watched(wanted, runs, focus(wanted.policies))
    figure, panels = _columns(len(watched), 2, 5.0)
    num_lengths = wanted.max_length + 1
    shades = [
        mpl.colormaps["Blues"](0.08 + 0.82 * k / wanted.max_length) for k in range(num_lengths)
    ]
    for column, (load, timeline) in enumerate(watched.items()):
        upper: Axes = panels[0][column]
        lower: Axes = panels[1][column]
        at_s = _at(timeline)
        upper.plot(at_s, timeline.running, color=BUSY, label="running")
        upper.plot(at_s, timeline.waiting, color="#e09f3e", label="waiting")
        upper.set_title(f"load {load:g}")
        share = np.nan_to_num(np.array(timeline.length_share))
        lower.stackplot(
            at_s, share.T, colors=shades, labels=[f"length {k}" for k in range(num_lengths)]
        )
        lower.set_ylim(0, 1)
        lower.grid(False)
        lower.set_xlabel("seconds")
        mean = lower.twinx()
        mean.spines["right"].set_visible(False)
        mean.grid(False)
        chosen = np.array(timeline.length_share) @ np.arange(num_lengths)
        mean.plot(at_s, chosen, color=SMARTSPEC, linewidth=1.8, label="mean length")
        mean.set_ylim(0, wanted.max_length)
        mean.tick_params(colors=SMARTSPEC, labelright=column == len(watched) - 1, length=0)
        if column == len(watched) - 1:
            mean.set_ylabel("mean length", color=SMARTSPEC)
        if column == 0:
            upper.set_ylabel("requests")
            lower.set_ylabel("share of requests")
            upper.legend(loc="upper left", ncols=2)
            handles = lower.get_legend_handles_labels(), mean.get_legend_handles_labels()
            figure.legend(
                handles[0][0] + handles[1][0], handles[0][1] + handles[1][1],
                loc="outside lower center", ncols=num_lengths + 1,
            )  # fmt: skip
    for axes in panels[0]:
        axes.set_ylim(bottom=0)
    return figure


def prediction_error(timeline: Timeline) -> float:
    """Mean absolute error of the predicted goodput over bins, relative to what came.

    NaN where there was no prediction.
    """
    told, came = np.array(timeline.predicted_goodput), np.array(timeline.goodput)
    known = np.isfinite(told) & (came > 0)
    return float(np.mean(np.abs(told[known] / came[known] - 1))) if known.any() else math.nan


def goodput(wanted: Experiment, runs: Sequence[Run]) -> Figure | None:
    """Goodput as the daemon predicted it, and as it came; None where no daemon steered."""
    watched = _watched(wanted, runs, "smartspec")
    if not watched:
        return None
    figure, panels = _columns(len(watched), 1, 3.0, share_y=False)
    for column, (load, timeline) in enumerate(watched.items()):
        axes: Axes = panels[0][column]
        axes.plot(_at(timeline), timeline.goodput, color=BUSY, label="measured")
        axes.plot(
            _at(timeline), timeline.predicted_goodput,
            color=SMARTSPEC, linewidth=1.2, label="predicted, a step ahead",
        )  # fmt: skip
        axes.set_title(f"load {load:g}: off by {prediction_error(timeline):.0%}")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("seconds")
        if column == 0:
            axes.set_ylabel("tokens per second")
            handles, labels = axes.get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


def gain(wanted: Experiment, runs: Sequence[Run]) -> Figure:
    """Seconds of waiting that each policy has saved by then, over the first policy."""
    first = _watched(wanted, runs, wanted.policies[0])
    figure, panels = _columns(len(first), 1, 3.4, share_y=False)
    for policy in wanted.policies[1:]:
        for column, (load, timeline) in enumerate(_watched(wanted, runs, policy).items()):
            come = min(len(timeline.latency_sum_s), len(first[load].latency_sum_s))
            saved = np.cumsum(first[load].latency_sum_s[:come]) - np.cumsum(
                timeline.latency_sum_s[:come]
            )
            axes: Axes = panels[0][column]
            axes.plot((np.arange(come) + 1) * timeline.bin_s, saved, **_stroke(policy))
    for column, load in enumerate(first):
        axes = panels[0][column]
        axes.axhline(0.0, color="#8b949e", linewidth=1, zorder=2)
        axes.set_title(f"load {load:g}")
        axes.set_xlabel("seconds")
        axes.set_xlim(0, wanted.duration_s)
    panels[0][0].set_ylabel(f"seconds saved over {wanted.policies[0]}")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(max(len(labels), 1), 9))
    return figure


def draw(wanted: Experiment, lines: Sequence[Line], runs: Sequence[Run]) -> dict[str, Figure]:
    """All pictures by name. ``runs`` of seed 0 are to have timelines."""
    with mpl.rc_context(STYLE):
        made = {
            "latency": latency(wanted, lines),
            "lengths": lengths(wanted, runs),
            "goodput": goodput(wanted, runs),
            "gain": gain(wanted, runs) if len(wanted.policies) > 1 else None,
        }
    return {name: figure for name, figure in made.items() if figure is not None}


def save(figure: Figure, path: Path) -> None:
    """As PNG or SVG, by the suffix; the same bytes for the same figure."""
    with mpl.rc_context(STYLE):
        told = {"Date": None} if path.suffix == ".svg" else {"Software": None}
        figure.savefig(path, dpi=140, metadata=told)
