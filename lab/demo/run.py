"""`smartspec demo`: the same load without speculation, with static lengths, and steered.

Separate processes, as in production: a worker for each arm, and for SmartSpec's the daemon with its
telemetry and embedded Valkey. Where there is memory for all workers the arms take turns of a few
seconds, so that a machine that gets slower meanwhile gets so for all (turns.py). What was measured
is printed as it is.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
from rich.console import Console

from smartspec.lab import environment
from smartspec.lab.demo import arms as all_arms
from smartspec.lab.demo import schedule as schedules
from smartspec.lab.demo import summary
from smartspec.lab.demo.arms import Arm
from smartspec.lab.demo.calibration import Calibration
from smartspec.lab.demo.live import Display
from smartspec.lab.demo.player import PlayError
from smartspec.lab.demo.processes import ProcessFailed
from smartspec.lab.demo.schedule import Schedule
from smartspec.lab.demo.session import ArmPlayed, Session, warm_up_prompts
from smartspec.lab.demo.turns import TURN_S

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
NUM_QUICK_PROMPTS = 16
QUICK_MAX_TOKENS = 24
WORKER_BYTES = 2.3e9  #: of memory, with the default model in fp32, its packed copy and its cache
OTHER_BYTES = 0.5e9  #: of the daemon with its telemetry and Valkey, and of this process


def main(
    out: Path,
    arms: Sequence[str] = all_arms.NAMES,
    seed: int = 0,
    quick: bool = False,
) -> int:
    """Play, compare, and write ``out``/summary.json, requests.jsonl and two plots.

    Returns the exit code: 0 done, 1 a process failed, 2 bad arguments, 130 interrupted.
    """
    console = Console()
    errors = Console(stderr=True)

    def complain(text: object, code: int) -> int:
        errors.print(f"smartspec demo: {text}", markup=False, highlight=False, soft_wrap=True)
        return code

    try:
        chosen = all_arms.named(arms)
    except ValueError as error:
        return complain(error, EXIT_USAGE)
    try:
        with signals_raise():
            run(out, chosen, seed, quick, console)
    except KeyboardInterrupt:
        return complain("interrupted; all that it started has been stopped", EXIT_INTERRUPTED)
    except (ProcessFailed, PlayError, ValueError) as error:
        return complain(error, EXIT_FAILED)
    return 0


def run(out: Path, arms: Sequence[Arm], seed: int, quick: bool, console: Console) -> None:
    """The demonstration; `main` without exit codes."""
    began = time.monotonic()
    prompts = schedules.load_prompts()
    if quick:
        prompts = schedules.shortened(prompts, NUM_QUICK_PROMPTS, QUICK_MAX_TOKENS)
    display = Display(console)
    first, *rest = groups(arms, console)
    with Session(out, display, first) as session:
        ready = session.ready
        console.print(
            f"model {ready['model']} ({ready['dtype']} on {ready['device']}), {ready['proposer']} "
            f"proposer, up to {ready['max_length']} drafts per request and step",
            highlight=False,
            markup=False,
        )
        calibration = session.calibrate(prompts, seed)
        schedule = schedules.build(prompts, calibration.capacity_requests_per_s, seed)
        console.print(describe(calibration, schedule), highlight=False, markup=False)
        warm_up = warm_up_prompts(prompts, seed)
        played = session.play(schedule, warm_up, seed)
    for group in rest:
        with Session(out, display, group) as session:
            played += session.play(schedule, warm_up, seed)
    about = {
        "calibration": asdict(calibration),
        "schedule": [asdict(phase) for phase in schedule.phases],
        "worker": {k: v for k, v in ready.items() if k != "event"},
        "env": environment.describe(),
        "by_turns": len(first) > 1,
        "seed": seed,
        "quick": quick,
    }
    report(out, played, schedule, about, console)
    console.print(f"took {time.monotonic() - began:.0f} s", highlight=False)


def groups(arms: Sequence[Arm], console: Console) -> list[list[Arm]]:
    """Arms that take turns with each other: all, or where there is no room for that each alone."""
    needed, free = len(arms) * WORKER_BYTES + OTHER_BYTES, free_bytes()
    if len(arms) == 1:
        return [list(arms)]
    if needed <= free:
        console.print(f"the arms take turns of {TURN_S:.0f} s, each on a clock of its own")
        return [list(arms)]
    console.print(
        f"{free / 1e9:.1f} GB of memory are free, and workers for all arms would take about "
        f"{needed / 1e9:.1f}: the arms are played one after the other, and each meets the "
        f"machine as it is then",
        highlight=False,
    )
    return [[arm] for arm in arms]


def free_bytes(limit: Path = Path("/sys/fs/cgroup/memory.max")) -> int:
    """Of memory: what the machine has left, or the container's limit if that is less."""
    free: int = psutil.virtual_memory().available
    try:
        return min(free, int(limit.read_text()))
    except (OSError, ValueError):  # no such file, or "max"
        return free


def describe(calibration: Calibration, schedule: Schedule) -> str:
    """What is about to be played, and how it relates to what the machine can do."""
    phases = "; ".join(
        f"{phase.name.replace('_', ' ')} {phase.end_s - phase.begin_s:.0f} s at "
        f"{phase.requests_per_s / calibration.capacity_requests_per_s:.0%} of capacity"
        for phase in schedule.phases
    )
    return (
        f"without speculation this machine serves {calibration.capacity_requests_per_s:.2f} "
        f"requests/s ({calibration.capacity_tokens_per_s:.0f} tokens/s)\n"
        f"{len(schedule.arrivals)} requests, the same for every arm: {phases}"
    )


def report(
    out: Path,
    played: Sequence[ArmPlayed],
    schedule: Schedule,
    about: dict[str, Any],
    console: Console,
) -> None:
    """Print the table and the sentences; write summary, requests and plots."""
    requests = {result.arm.name: result.played.requests for result in played}
    comparisons = summary.compare(requests)
    answers = summary.compare_answers(requests)

    console.print(summary.table_of(requests))
    for comparison in comparisons:
        console.print(str(comparison), highlight=False, markup=False)
    if answers.num_compared:
        console.print(
            f"{answers.num_identical} of {answers.num_compared} answers are identical in all arms.",
            highlight=False,
        )
    for prompt, differing in answers.different.items():
        console.print(f"  {prompt} differs in {', '.join(differing)}", highlight=False)
    steered = [result for result in played if result.arm.length is None]
    for result in steered:
        shares = ", ".join(f"{n} by {source}" for source, n in result.steps_by_source.items())
        console.print(f"SmartSpec's steps: {shares}", highlight=False)
        for note in result.notes:
            console.print(f"  the daemon noted: {note}", highlight=False, markup=False)

    out.mkdir(parents=True, exist_ok=True)
    content = {
        "arms": {name: summary.arm_summary(records) for name, records in requests.items()},
        "comparisons": [asdict(comparison) for comparison in comparisons],
        "answers": asdict(answers),
        "steps_by_source": {result.arm.name: result.steps_by_source for result in played},
        **about,
    }
    (out / "summary.json").write_text(json.dumps(content, indent=1) + "\n")
    write_requests(out / "requests.jsonl", played)

    from smartspec.lab.demo import plots

    written = ["summary.json", "requests.jsonl", "latencies.png"]
    plots.latencies(requests, out / "latencies.png")
    for result in steered:
        plots.lengths_over_time(result.played, schedule, out / "lengths.png")
        written.append("lengths.png")
    console.print(f"written to {out}: {', '.join(written)}", highlight=False, soft_wrap=True)


def write_requests(path: Path, played: Sequence[ArmPlayed]) -> None:
    """One line per request and arm, as measured."""
    with path.open("w") as file:
        for result in played:
            for request in result.played.requests:
                file.write(json.dumps({"arm": result.arm.name, **asdict(request)}) + "\n")


@contextlib.contextmanager
def signals_raise() -> Iterator[None]:
    """SIGTERM and a closed terminal end the run like Ctrl-C: what was started is stopped."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        # Once is enough: a second one must not interrupt the clean-up.
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main(Path("build/demo")))
