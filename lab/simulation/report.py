"""What `smartspec simulate` shows: progress while it runs, then a table or JSON."""

from __future__ import annotations

import msgspec
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from smartspec.lab.simulation import experiment
from smartspec.lab.simulation.experiment import Experiment


def show(wanted: Experiment, num_workers: int, as_json: bool) -> None:
    """Play ``wanted`` and print what came of it. Raises ValueError for what cannot be played."""
    experiment.check(wanted)
    num_runs = len(wanted.policies) * len(wanted.loads) * wanted.num_seeds
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("simulating", total=num_runs)
        runs = experiment.play_all(wanted, num_workers, lambda: progress.advance(task))
    lines = experiment.summarise(runs)
    if as_json:
        print(msgspec.json.encode({"experiment": wanted, "summary": lines, "runs": runs}).decode())
        return
    table = Table(
        title=f"mean request latency: {wanted.profile}, draft {wanted.draft}, "
        f"acceptance {wanted.acceptance:g}",
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
    Console().print(table)
    print(
        f"x: of {wanted.policies[0]}, geometric mean (lowest-highest) of {wanted.num_seeds} seeds. "
        "A load of 1 is what is served without speculation."
    )
