"""Tables and pictures of bench_paper.py, as docs/reproduction.md shows them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import paper_results
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from paper_grid import FULL, Setting
from paper_results import Result
from paper_runs import COLD, WARM, Run

SHOWN = ("table", "tiers", "authors", "bandit", "switch_off", "informed", COLD, WARM)
HEADS = {COLD: "SmartSpec cold", WARM: "SmartSpec warm", "switch_off": "switch-off"}
LINES = {
    "none": ("#8a8a8a", "-"),
    "static1": ("#b9d3e3", "-"),
    "static3": ("#7aa6c2", "-"),
    "static5": ("#33658a", "-"),
    "static4": ("#d8b4dd", "-"),  # of trees alone
    "static8": ("#b07cc6", "-"),
    "static16": ("#6a3d9a", "-"),
    "authors": ("#6a994e", "--"),
    COLD: ("#d1495b", ":"),
    WARM: ("#d1495b", "-"),
}


def line(setting: Setting, load: float, runs: Sequence[Run]) -> str:
    """What a setting gave at a load, while others run: seconds, or requests per second."""
    value = "served_per_s" if load == FULL else "latency_s"
    mean = paper_results.means(paper_results.by_policy(runs, load, value))
    shown = ", ".join(f"{policy} {number:.3f}" for policy, number in mean.items())
    return f"{setting.name}@{load:g}: {shown}"


def write(results: Sequence[Result], folder: Path, shown: Sequence[str] = SHOWN) -> None:
    """``tables.md``, ``paper_latency.png`` and ``paper_speedup.png``.

    ``shown``: the policies of the tables, warm SmartSpec last.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tables.md").write_text(tables(results, shown))
    latency(results, folder / "paper_latency.png")
    speedup(results, folder / "paper_speedup.png")


def tables(results: Sequence[Result], shown: Sequence[str] = SHOWN) -> str:
    """A table for each pair, and one of the best static lengths."""
    parts = []
    for pair_name, group in groupby(results, lambda result: result.setting.pair_name):
        parts.append(f"### {pair_name}\n\n{_pair_table(list(group), shown)}")
    loads = sorted({load for result in results for load in result.latency_s})
    rows = [["setting", *(f"{load:g}" for load in loads)]]
    for result in results:
        best = [result.best_static.get(load, "") for load in loads]
        rows.append([result.setting.name, *map(_length, best)])
    parts.append(f"### Best static length by load\n\n{_table(rows)}")
    return "\n".join(parts)


def _pair_table(results: Sequence[Result], shown: Sequence[str]) -> str:
    setting = results[0].setting
    shown = [p for p in shown if p in (*setting.others, COLD, WARM)]
    chains = [p for p in setting.others if p.startswith("chain")]
    rows = [["traffic", "load", "none", "best static", *(["best chain"] if chains else []),
             *(HEADS.get(p, p) for p in shown), "95% bound", "speed-up"]]  # fmt: skip
    for result in results:
        for cell in result.cells:
            ratio = cell.vs_best_static
            best = f"{cell.latency_s[cell.best_static]:.2f} s ({_length(cell.best_static)})"
            rows.append(
                [
                    result.setting.traffic_name,
                    f"{cell.load:g}",
                    f"{cell.latency_s['none']:.2f} s",
                    best,
                    *_best_chain(chains, {p: ratio[p].value for p in chains}, min),
                    *(f"{ratio[p].value:.3f}" for p in shown),
                    f"{ratio[WARM].upper95:.3f}",
                    f"{1 / cell.vs_none[WARM].value:.2f}",
                ]
            )
            if cell.misses:
                rows[-1][-3] = f"**{rows[-1][-3]}**"
        full = result.full
        if full is None:
            continue
        best = f"{full.served_per_s[full.best_static]:.1f}/s ({_length(full.best_static)})"
        warm = f"{full.vs_best_static[WARM].value:.3f}"
        rows.append(
            [
                result.setting.traffic_name,
                "full",
                f"{full.served_per_s['none']:.1f}/s",
                best,
                *_best_chain(chains, {p: full.vs_best_static[p].value for p in chains}, max),
                *(f"{full.vs_best_static[p].value:.3f}" for p in shown[:-1]),
                f"**{warm}**" if full.misses else warm,
                "",
                f"{full.served_per_s[WARM] / full.served_per_s['none']:.2f}",
            ]
        )
    return _table(rows)


def _best_chain(
    chains: Sequence[str], ratio: dict[str, float], best_of: Callable[..., str]
) -> list[str]:
    """A cell of the table: the chain that is best in hindsight; nothing where there are none."""
    if not chains:
        return []
    best = best_of(chains, key=ratio.__getitem__)
    return [f"{ratio[best]:.3f} ({best.removeprefix('chain')})"]


def _length(policy: str) -> str:
    return policy.removeprefix("static").replace("none", "0")


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]) + "\n"


def latency(results: Sequence[Result], path: Path) -> None:
    """Mean latency against load, a panel for each setting; a logarithmic scale."""
    columns = 4
    num_rows = -(-len(results) // columns)
    figure = Figure(figsize=(3.1 * columns, 2.3 * num_rows), layout="constrained")
    grid = figure.subplots(num_rows, columns, squeeze=False).ravel()
    for axes in grid[len(results) :]:
        axes.set_axis_off()
    for axes, result in zip(grid, results, strict=False):
        _panel(axes, result)
    handles = {}
    for axes in grid:
        lines, labels = axes.get_legend_handles_labels()
        handles |= dict(zip(labels, lines, strict=True))
    order = [HEADS.get(policy, policy) for policy in LINES if HEADS.get(policy, policy) in handles]
    known = [handles[label] for label in order]
    figure.legend(known, order, loc="outside upper center", ncols=len(order), fontsize="small")
    figure.supxlabel("load (1: what is served without speculation)", fontsize="small")
    figure.supylabel("mean request latency (s)", fontsize="small")
    figure.savefig(path, dpi=75)


def _panel(axes: Axes, result: Result) -> None:
    trees = bool(result.setting.pair.tree_sizes)
    for policy, (colour, style) in LINES.items():
        if policy == "static4" and not trees:  # one line in between is enough of chains
            continue
        points = [(load, of[policy]) for load, of in result.latency_s.items() if policy in of]
        if not points:
            continue
        label = HEADS.get(policy, policy)
        axes.plot(*zip(*points, strict=True), style, color=colour, label=label, lw=1.3)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.tick_params(which="both", labelsize="x-small")
    axes.set_title(result.setting.name, fontsize="small")


def speedup(results: Sequence[Result], path: Path) -> None:
    """Two maps, settings by loads: speed-up over none, and latency over the best static length."""
    loads = results[0].setting.loads
    figure = Figure(figsize=(9.5, 0.34 * len(results) + 1.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    gain, rest = np.full((2, len(results), len(loads)), np.nan)
    for row, result in enumerate(results):
        for cell in result.cells:
            at = row, loads.index(cell.load)
            gain[at], rest[at] = 1 / cell.vs_none[WARM].value, cell.vs_best_static[WARM].value
    most = float(np.nanmax(gain))
    _map(left, gain, loads, "speed-up over no speculation", "{:.2f}", "YlGn", 1.0, most)
    _map(right, rest, loads, "latency / best static length's", "{:.3f}", "RdYlGn_r", 0.92, 1.08)
    left.set_yticks(range(len(results)), [one.setting.name for one in results], fontsize="small")
    figure.suptitle("SmartSpec, warm", fontsize="medium")
    figure.savefig(path, dpi=80)


def _map(
    axes: Axes,
    values: np.ndarray,
    loads: Sequence[float],
    title: str,
    form: str,
    colours: str,
    low: float,
    high: float,
) -> None:
    axes.imshow(values, cmap=colours, vmin=low, vmax=high, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        text = "" if np.isnan(value) else form.format(value)
        axes.text(column, row, text, ha="center", va="center", fontsize="small")
    axes.set_xticks(range(len(loads)), [f"{load:g}" for load in loads])
    axes.set_xlabel("load")
    axes.set_title(title, fontsize="small")
