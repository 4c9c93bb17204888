"""What `smartspec simulate` shows: progress, then a table or JSON; and files where asked for."""

from __future__ import annotations

from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from smartspec.lab.simulation import experiment
from smartspec.lab.simulation.experiment import Experiment, Line, Run


def show(wanted: Experiment, num_workers: int, as_json: bool, out: Path | None = None) -> None:
    """Play ``wanted`` and print what came of it; ``out``: folder for report, plots and results.

    Raises ValueError for what cannot be played, OSError when ``out`` cannot be written.
    """
    experiment.check(wanted)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    num_runs = len(wanted.policies) * len(wanted.loads) * wanted.num_seeds
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("simulating", total=num_runs)
        runs = experiment.play_all(
            wanted, num_workers, lambda: progress.advance(task), watched=out is not None
        )
    lines = experiment.summarise(runs)
    if out is not None:
        write(wanted, lines, runs, out)
    if as_json:
        bare = [msgspec.structs.replace(run, timeline=None) for run in runs]
        print(_json(wanted, lines, bare).decode())
        return
    Console().print(_table(wanted, lines))
    print(
        f"x: of {wanted.policies[0]}, geometric mean (lowest-highest) of {wanted.num_seeds} seeds. "
        "A load of 1 is what is served without speculation."
    )
    if wanted.drafts:
        print(_drafts(wanted))
    if out is not None:
        print(f"report: {out / 'report.html'}")


def _drafts(wanted: Experiment) -> str:
    """How well recorded answers cover the lengths of those that are simulated."""
    sizes = wanted.recorded_drafts().sizes
    asked = wanted.traffic(wanted.loads[0], seed=0).num_output
    return (
        f"Drafts: of {len(sizes)} recorded answers of {sizes.min()} to {sizes.max()} tokens, each "
        f"request has those of one of the nearest length; {(asked > sizes.max()).mean():.0%} of "
        "the requests are longer than any, and have theirs repeated."
    )


def write(wanted: Experiment, lines: list[Line], runs: list[Run], out: Path) -> None:
    """The page, its pictures as PNG, and all numbers, timelines too, as JSON."""
    from smartspec.lab.simulation import page, plots

    figures = plots.draw(wanted, lines, runs)
    for name, figure in figures.items():
        plots.save(figure, out / f"{name}.png")
    (out / "report.html").write_text(page.render(wanted, lines, figures, runs), "utf-8")
    (out / "results.json").write_bytes(_json(wanted, lines, runs) + b"\n")


def _json(wanted: Experiment, lines: list[Line], runs: list[Run]) -> bytes:
    return msgspec.json.encode({"experiment": wanted, "summary": lines, "runs": runs})


def _table(wanted: Experiment, lines: list[Line]) -> Table:
    table = Table(
        title=f"mean request latency: {wanted.profile}, draft {wanted.draft}, "
        f"{wanted.source_of_drafts}",
        title_justify="left",
    )
    table.add_column("policy")
    for load in wanted.loads:
        table.add_column(f"load {load:g}", justify="right")
    for policy in wanted.policies:
        cells = [
            f"{line.latency_mean_s:.3f} s  {line.over_first:.2f}x "
            f"({line.lowest:.2f}-{line.highest:.2f})"
            for line in lines
            if line.policy == policy
        ]
        table.add_row(policy, *cells)
    return table
