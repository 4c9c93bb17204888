"""Commands of the laboratory: what would be, rather than what is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from smartspec.daemon.cli_options import Assignments, ConfigFile, fail, load_settings, optional

app = typer.Typer()


@app.command()
def replay(
    file: Annotated[Path, typer.Argument(help="Of `smartspec record`.")],
    as_json: Annotated[bool, typer.Option("--json", help="For machines; stable keys.")] = False,
    config_file: ConfigFile = None,
    set_: Assignments = None,
) -> None:
    """Tell what would have been decided in a recording under these settings, starting cold.

    Exit code: 2 the file cannot be used.
    """
    settings = load_settings(config_file, set_)
    raise typer.Exit(optional("smartspec.lab.replay", "daemon").run(settings, file, as_json))


@app.command()
def simulate(
    file: Annotated[
        Path | None, typer.Argument(help="TOML with any of the options below (docs/simulator.md).")
    ] = None,
    profile: Annotated[str | None, typer.Option(help="GPU and model, or a file.")] = None,
    draft: Annotated[str | None, typer.Option(help="68m, 160m, 1b, eagle or lookup.")] = None,
    policies: Annotated[
        str | None, typer.Option(help="Comma-separated; ratios are to the first.")
    ] = None,
    loads: Annotated[
        str | None, typer.Option(help="Comma-separated, of what is served without speculation.")
    ] = None,
    acceptance: Annotated[float | None, typer.Option(help="Mean over requests, 0 to 1.")] = None,
    duration_s: Annotated[float | None, typer.Option(help="Seconds of arrivals.")] = None,
    num_seeds: Annotated[int | None, typer.Option(help="Repetitions.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Longest length that is drafted.")] = None,
    max_num_running: Annotated[int | None, typer.Option(help="Batch limit.")] = None,
    num_workers: Annotated[int, typer.Option(min=1, help="Processes.")] = os.cpu_count() or 1,
    json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Try speculation policies, SmartSpec among them, on a GPU that you need not have."""
    import msgspec

    experiment = optional("smartspec.lab.simulation.experiment", "daemon")
    report = optional("smartspec.lab.simulation.report", "daemon")
    given: dict[str, Any] = {
        "profile": profile,
        "draft": draft,
        "policies": policies.split(",") if policies else None,
        "acceptance": acceptance,
        "duration_s": duration_s,
        "num_seeds": num_seeds,
        "max_length": max_length,
        "max_num_running": max_num_running,
    }
    try:
        base = experiment.read(file) if file else experiment.Experiment()
        if loads:
            given["loads"] = [float(load) for load in loads.split(",")]
        changed = {name: value for name, value in given.items() if value is not None}
        merged = {**msgspec.to_builtins(base), **changed}
        wanted = msgspec.convert(merged, experiment.Experiment)
        report.show(wanted, num_workers, json)
    except (ValueError, msgspec.ValidationError) as error:
        fail(error)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Directory of the table, plots and summary.")] = Path(
        "build/demo"
    ),
    arms: Annotated[str, typer.Option(help="What to compare, by comma.")] = (
        "none,static_3,static_5,smartspec"
    ),
    seed: Annotated[int, typer.Option(help="Of arrivals and sampling.")] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="A short schedule, to see that it works.")
    ] = False,
) -> None:
    """Play one schedule of requests with and without SmartSpec, and compare."""
    wanted = [arm.strip() for arm in arms.split(",") if arm.strip()]
    if not wanted:
        fail("--arms: expected at least one")
    module = optional("smartspec.lab.demo.run", "demo")
    raise typer.Exit(module.main(out=out, arms=wanted, seed=seed, quick=quick))
