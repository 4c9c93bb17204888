"""Commands of the laboratory: what would be, rather than what is."""

from __future__ import annotations

import enum
import math
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from smartspec.daemon.cli_options import Assignments, ConfigFile, fail, load_settings, optional

app = typer.Typer()
NUM_CORES = os.cpu_count() or 1


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


Profile = Annotated[str | None, typer.Option(help="GPU and model, or a file.")]
Draft = Annotated[str | None, typer.Option(help="68m, 160m, 1b, eagle or lookup.")]
Acceptance = Annotated[float | None, typer.Option(help="Mean over requests, 0 to 1.")]
Duration = Annotated[float | None, typer.Option(help="Seconds of arrivals.")]
MaxLength = Annotated[int | None, typer.Option(help="Longest length that is drafted.")]
MaxNumRunning = Annotated[int | None, typer.Option(help="Batch limit.")]
NumSeeds = Annotated[int | None, typer.Option(help="Repetitions.")]
Arrivals = Annotated[
    str | None, typer.Option(help="poisson, gamma (in bursts) or diurnal (one day in the time).")
]
Trace = Annotated[
    str | None, typer.Option(help="File of requests: Azure's, Mooncake's or ServeGen's.")
]
NumWorkers = Annotated[int, typer.Option(min=1, help="Processes.")]
Drafts = Annotated[
    str | None,
    typer.Option(help="File of recorded drafts in place of acceptance: of `smartspec record`."),
]
Json = Annotated[bool, typer.Option("--json", help="For scripts.")]
Options = Annotated[
    Path | None, typer.Argument(help="TOML with any of the options (docs/simulator.md).")
]


def _wanted(kind: Any, file: Path | None, loads: str | None, **flags: Any) -> Any:
    """Options from a file, and from flags, which win; raises ValueError for bad ones."""
    workload = optional("smartspec.lab.simulation.workload", "daemon")
    given = {name: value for name, value in flags.items() if value is not None}
    if loads is not None:
        try:
            given["loads"] = [float(load) for load in loads.split(",")]
        except ValueError:
            fail(f"--loads {loads}: expected numbers, e.g. 0.1,0.5,0.8")
    if file is None:
        return workload.made(kind, given)
    return workload.read(file, kind, given)


@app.command()
def simulate(
    file: Options = None,
    profile: Profile = None,
    draft: Draft = None,
    policies: Annotated[
        str | None, typer.Option(help="Comma-separated; ratios are to the first.")
    ] = None,
    loads: Annotated[
        str | None, typer.Option(help="Comma-separated, of what is served without speculation.")
    ] = None,
    acceptance: Acceptance = None,
    drafts: Drafts = None,
    duration_s: Duration = None,
    arrivals: Arrivals = None,
    trace: Trace = None,
    num_seeds: NumSeeds = None,
    max_length: MaxLength = None,
    max_num_running: MaxNumRunning = None,
    trees: Annotated[
        bool | None, typer.Option("--trees", help="Draft trees; lengths are numbers of nodes.")
    ] = None,
    copies: Annotated[
        str | None, typer.Option(help="File of recorded lookups, as branches of the trees.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for report.html, plots and results.json.")
    ] = None,
    num_workers: NumWorkers = NUM_CORES,
    json: Json = False,
) -> None:
    """Try speculation policies, SmartSpec among them, on a GPU that you need not have."""
    experiment = optional("smartspec.lab.simulation.experiment", "daemon")
    report = optional("smartspec.lab.simulation.report", "daemon")
    if out is not None:
        optional("matplotlib", "demo")
    try:
        wanted = _wanted(
            experiment.Experiment,
            file,
            loads,
            profile=profile,
            draft=draft,
            policies=None if policies is None else policies.split(","),
            acceptance=acceptance,
            drafts=drafts,
            duration_s=duration_s,
            arrivals=arrivals,
            trace=trace,
            num_seeds=num_seeds,
            max_length=max_length,
            max_num_running=max_num_running,
            trees=trees,
            copies=copies,
        )
        report.show(wanted, num_workers, json, out)
    except (ValueError, OSError) as error:
        fail(error)


@app.command()
def tune(
    file: Options = None,
    profile: Profile = None,
    state: Annotated[
        str | None,
        typer.Option(help="Learned state, a file or a directory, in place of profile and draft."),
    ] = None,
    draft: Draft = None,
    acceptance: Acceptance = None,
    drafts: Drafts = None,
    loads: Annotated[
        str | None, typer.Option(help="Comma-separated; where the table is tried.")
    ] = None,
    duration_s: Duration = None,
    arrivals: Arrivals = None,
    trace: Trace = None,
    num_seeds: NumSeeds = None,
    max_length: MaxLength = None,
    max_num_running: MaxNumRunning = None,
    json: Json = False,
) -> None:
    """Print the best static table of lengths for engines without a sidecar, and what it gives up.

    For vLLM, TensorRT-LLM and SGLang.
    """
    if state and (profile or draft or acceptance is not None):
        fail("--state: stands in place of --profile, --draft and --acceptance")
    tuning = optional("smartspec.lab.simulation.tune", "daemon")
    try:
        wanted = _wanted(
            tuning.Tuning,
            file,
            loads,
            profile=profile,
            state=state,
            draft=draft,
            acceptance=acceptance,
            drafts=drafts,
            duration_s=duration_s,
            arrivals=arrivals,
            trace=trace,
            num_seeds=num_seeds,
            max_length=max_length,
            max_num_running=max_num_running,
        )
        tuning.show(wanted, json)
    except (ValueError, OSError) as error:
        fail(error)


@app.command()
def profile(
    recording: Annotated[Path, typer.Argument(help="Of `smartspec record`.")],
    engine: Annotated[str | None, typer.Option(help="Whose; default: the only one.")] = None,
    out: Annotated[Path | None, typer.Option(help="File to write, .json.")] = None,
    json: Json = False,
) -> None:
    """Make a simulator profile from an engine's own reports.

    Exit code: 2 the recording cannot be used.
    """
    command = optional("smartspec.lab.profiles.command", "daemon")
    raise typer.Exit(command.run(recording, engine, out, json))


class Loss(enum.StrEnum):
    kl = "kl"
    reverse_kl = "reverse-kl"
    tv = "tv"


@app.command()
def distill(
    prompts: Annotated[
        Path | None, typer.Argument(help='JSON lines, each with a "prompt".')
    ] = None,
    own_prompts: Annotated[
        int, typer.Option(min=0, help="So many the model makes up itself, in a user's place.")
    ] = 0,
    out: Annotated[
        Path | None, typer.Option(help="The drafter's file; none: only answer the prompts.")
    ] = None,
    work: Annotated[Path, typer.Option(help="Folder of the answers.")] = Path("build/distill"),
    unlike: Annotated[
        Path | None,
        typer.Option(help="JSON lines to test on: what has 8 words of them in a row is not asked."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Hugging Face id or local path.")] = None,
    start: Annotated[Path | None, typer.Option(help="A drafter to train on from.")] = None,
    train_only: Annotated[
        bool, typer.Option("--train-only", help="Make do with the answers that are in --work.")
    ] = False,
    layers: Annotated[
        str | None,
        typer.Option(metavar="I,J,...", help="It reads the target's states after these layers."),
    ] = None,
    num_draft_tokens: Annotated[
        int, typer.Option(min=2, help="It drafts the most frequent of them.")
    ] = 8192,
    intermediate_size: Annotated[int, typer.Option(min=1, help="Width of its layer.")] = 1536,
    max_prompt_tokens: Annotated[int, typer.Option(min=1, help="Longer ones are left out.")] = 800,
    max_answer_tokens: Annotated[int, typer.Option(min=2, help="Longer ones are ended.")] = 192,
    hot: Annotated[float, typer.Option(min=0, help="Temperature of every third answer.")] = 0.8,
    part: Annotated[int, typer.Option(min=0, help="Answer this part of the prompts only.")] = 0,
    parts: Annotated[int, typer.Option(min=1, help="Of so many, for a process each.")] = 1,
    answer_minutes: Annotated[
        float, typer.Option(min=0, help="No prompt is begun later.", show_default="no end")
    ] = math.inf,
    num_rounds: Annotated[
        int, typer.Option(min=1, help="Drafts in a row that it is trained for.")
    ] = 5,
    loss: Annotated[Loss, typer.Option(help="What is made small.")] = Loss.kl,
    epochs: Annotated[int, typer.Option(min=1, help="Times that each answer is shown.")] = 3,
    train_minutes: Annotated[
        float, typer.Option(min=0, help="Fewer epochs if they take longer.", show_default="no end")
    ] = math.inf,
    learning_rate: Annotated[float, typer.Option(min=0, help="At its highest.")] = 1e-3,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Of a step, about.")] = 2048,
    seed: Annotated[int, typer.Option(help="Of answers and training.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...; auto: cuda if any.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Of torch on the CPU.")] = None,
    json: Json = False,
) -> None:
    """Make a drafter for `smartspec worker --proposer eagle`, from the model's own answers.

    What is in --work is not answered again. Exit code: 2 it cannot be made.
    """
    command = optional("smartspec.lab.distill.command", "worker")
    try:
        recipe = command.Recipe(
            layers=command.parse_layers(layers),
            num_draft_tokens=num_draft_tokens,
            intermediate_size=intermediate_size,
            own_prompts=own_prompts,
            max_prompt_tokens=max_prompt_tokens,
            max_answer_tokens=max_answer_tokens,
            hot=hot,
            part=part,
            parts=parts,
            answer_minutes=answer_minutes,
            num_rounds=num_rounds,
            loss=loss.value,
            epochs=epochs,
            train_minutes=train_minutes,
            learning_rate=learning_rate,
            batch_tokens=batch_tokens,
            seed=seed,
        )
    except ValueError:
        fail(f"--layers {layers}: expected layer numbers, e.g. 3,15,30")
    if train_only and out is None:
        fail("--train-only: give --out, the file to write")
    if train_only and (own_prompts or unlike is not None or answer_minutes < math.inf):
        fail("--train-only asks nothing: leave --own-prompts, --unlike and --answer-minutes out")
    if part >= parts:
        fail(f"--part {part}: expected one of 0 to {parts - 1}, with --parts {parts}")
    if prompts is None and not own_prompts and not train_only:
        fail("nothing to answer: give a file of prompts, or --own-prompts")
    raise typer.Exit(
        command.run(
            prompts,
            out,
            work,
            recipe,
            model=model,
            unlike=unlike,
            start=start,
            train_only=train_only,
            device=device,
            threads=threads,
            as_json=json,
        )
    )


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
