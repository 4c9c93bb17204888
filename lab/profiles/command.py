"""`smartspec profile`: a simulator profile of one's own engine, and what its drafts brought."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from smartspec.daemon.recording import RecordingError
from smartspec.engine_adapter.messages import Limits
from smartspec.engine_adapter.simulator.profile import Profile
from smartspec.lab.profiles import answers, observed
from smartspec.lab.profiles.observed import AcceptanceSeen, Observed
from smartspec.lab.simulation.workload import Workload

EXIT_UNUSABLE = 2


def choose(found: dict[str, Observed], engine: str | None) -> Observed:
    """The engine asked for, or the only one. Raises ValueError naming those there are."""
    names = ", ".join(found) or "none"
    if engine is None and len(found) != 1:
        raise ValueError(
            f"{len(found)} engines introduced themselves ({names}): name one, --engine"
        )
    if engine is not None and engine not in found:
        raise ValueError(f"no engine {engine!r} in it: {names}")
    return found[engine] if engine is not None else next(iter(found.values()))


def run(recording: Path, engine: str | None, out: Path | None, as_json: bool) -> int:
    """Write or print the profile of an engine in a recording; returns the exit code."""
    try:
        seen = choose(observed.of_recording(recording), engine)
        made = observed.fit(seen, out.stem if out else seen.hello.engine)
        text = msgspec.json.format(msgspec.json.encode(made), indent=1)
        if out is not None:
            out.write_bytes(text + b"\n")
    except (RecordingError, ValueError, OSError) as error:
        print(f"smartspec profile: {error}", file=sys.stderr)
        return EXIT_UNUSABLE
    acceptance = seen.acceptance()
    if as_json:
        told = acceptance._asdict() if acceptance else None
        print(msgspec.json.encode({"profile": made, "acceptance": told}).decode())
    else:
        draft = "lookup" if seen.hello.limits.drafts_known_first else "own"
        _show(made, acceptance, draft, out)
        if out is not None and acceptance is not None:
            print(_as_recorded(recording, seen.hello.limits))
    return 0


def _as_recorded(recording: Path, limits: Limits) -> str:
    """How drafts are played as recorded, or why they cannot be."""
    max_length = min(limits.max_length, Workload().max_length)
    try:
        answers.load(recording, is_lookup=limits.drafts_known_first, max_length=max_length)
    except ValueError as error:
        return f"not with drafts as recorded (--drafts): {error}"
    return f"with drafts as recorded: --drafts {recording} in place of --acceptance" + (
        f", and --max-length {max_length}" if max_length < Workload().max_length else ""
    )


def _show(made: Profile, acceptance: AcceptanceSeen | None, draft: str, out: Path | None) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{made.target} on {made.accelerator}", title_justify="left")
    for heading in ("term", "how", "from"):
        table.add_column(heading)
    for one in made.sources:
        table.add_row(one.term, one.label, one.note)
    Console().print(table)
    print(
        f"steps that the fit had not seen: off by {made.fit_error_mean:.1%} on average, "
        f"p95 {made.fit_error_p95:.1%}"
    )
    if acceptance is None:
        print("nothing was drafted: acceptance is not known")
    else:
        print(
            f"acceptance {acceptance.acceptance:.2f} (Beta over requests, concentration "
            f"{acceptance.concentration:.1f}); drafts were to be had {acceptance.presence:.0%} "
            "of the time"
        )
    if out is None:
        print("not written: name a file, --out FILE.json")
    elif acceptance is not None:
        print(
            f"smartspec simulate --profile {out} --draft {draft} "
            f"--acceptance {acceptance.acceptance:.2f}"
        )
