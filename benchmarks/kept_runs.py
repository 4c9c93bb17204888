"""Runs of bench_shift.py's schedule, kept one by one: whoever is interrupted goes on from there.

A run is a line of JSON in build/figures/<name>_raw.jsonl: set-up, batch limit, seed, policy, the
length of its phases, and what it measured.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from figures import FOLDER

Key = tuple[str, int, int, str]  #: setting, batch limit, seed, policy
Runs = dict[Key, dict[str, float]]
Play = Callable[[str, int, int, str, float], dict[str, float]]  #: of a key, and seconds of a phase


def parser(
    doc: str, settings: Iterable[str], limits: Sequence[int], **defaults: float
) -> argparse.ArgumentParser:
    """What can be asked of such a benchmark; ``defaults``: of the options but these two."""
    made = argparse.ArgumentParser(description=doc.splitlines()[0])
    made.add_argument("--settings", nargs="*", default=[*settings], choices=[*settings])
    made.add_argument("--limits", nargs="*", type=int, default=[*limits])
    made.add_argument("--seeds", type=int, help="how many")
    made.add_argument("--first-seed", type=int, default=0)
    made.add_argument("--phase-s", type=float)
    made.add_argument("--workers", type=int, default=2)
    made.add_argument("--resume", action="store_true", help="keep the runs that there are")
    made.set_defaults(**defaults)
    return made


def lines(raw: Path) -> list[Any]:
    """Of a file of JSON lines, if it is there; a last line that was cut off is left out."""
    found = []
    for line in raw.read_text().splitlines() if raw.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def read(raw: Path, phase_s: float) -> Runs:
    """Runs kept so far with phases of this length."""
    return {
        (row["setting"], row["limit"], row["seed"], row["policy"]): row
        for row in lines(raw)
        if row["phase_s"] == phase_s
    }


def play_all(
    name: str, play: Play, policies: Iterable[str], options: argparse.Namespace
) -> tuple[Runs, list[tuple[str, int]], range]:
    """Play what is not kept yet: runs, set-ups with their limits, seeds."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    raw = FOLDER / f"{name}_raw.jsonl"
    if not options.resume:
        raw.unlink(missing_ok=True)
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    cells = list(itertools.product(options.settings, options.limits))
    known = read(raw, options.phase_s)
    # Seed by seed, so that what is there when it is interrupted is whole seeds.
    jobs = [(*cell, seed, policy) for seed in seeds for cell in cells for policy in policies]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, context) as pool:
        wanted = {pool.submit(play, *j, options.phase_s): j for j in jobs if j not in known}
        for number, future in enumerate(as_completed(wanted), 1):
            setting, limit, seed, policy = wanted[future]
            row = {"setting": setting, "limit": limit, "seed": seed, "policy": policy}
            found = future.result()
            with raw.open("a") as file:
                file.write(json.dumps({**row, "phase_s": options.phase_s, **found}) + "\n")
            seconds = next(iter(found.values()))
            run = f"{setting} {limit} seed {seed} {policy}"
            print(f"{number}/{len(wanted)} {run}: {seconds:.3f} s", flush=True)
    return read(raw, options.phase_s), cells, seeds
