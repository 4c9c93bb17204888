"""The evaluation of SmartSpec (arXiv 2406.14066), in the simulator.

Pairs of target and draft, with traffics of several acceptances, at several loads, over several
seeds (paper.toml): mean request latency under SmartSpec, cold and warm, against every static
length, none, and rivals; and what each can serve. docs/reproduction.md says what differs from the
paper.

Settings that were run are kept in build/paper and not run again, unless the grid or the code has
changed since; `--keep` takes them whatever the code. `--quick`: two settings, two seeds, recorded
as `paper_quick`; `--settings`: these alone. Tables and pictures are written beside them.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import msgspec
import paper_grid
import paper_pages
import paper_results
from figures import ROOT, record
from paper_grid import Setting
from paper_runs import Run, play

FOLDER = ROOT / "build" / "paper"
CODE = ("daemon", "estimators", "engine_adapter", "lab")
QUICK = ("a100_7b_160m.chat_70", "a100_7b_lookup.news_80")


class Kept(msgspec.Struct, frozen=True):
    """The runs of a setting at a load."""

    code: str  #: digest of all that could change a number
    setting: Setting
    load: float
    runs: tuple[Run, ...]


Job = tuple[Setting, float]


def code_digest() -> str:
    """Of the sources that runs depend on."""
    digest = hashlib.sha256()
    for folder in CODE:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".json"):
                digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    digest.update((ROOT / "benchmarks" / "paper_runs.py").read_bytes())
    return digest.hexdigest()[:16]


def kept(job: Job, code: str | None) -> tuple[Run, ...] | None:
    """The runs of a job, if it was run as it is now; ``code`` None: with any code."""
    path = _path(job)
    if not path.exists():
        return None
    found = msgspec.json.decode(path.read_bytes(), type=Kept)
    same = (found.setting, found.load) == job and code in (None, found.code)
    return found.runs if same else None


def keep(job: Job, code: str, runs: Sequence[Run]) -> None:
    """Write what a job gave, whole or not at all."""
    path = _path(job)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_bytes(msgspec.json.encode(Kept(code, *job, tuple(runs))))
    part.replace(path)


def _path(job: Job) -> Path:
    setting, load = job
    return FOLDER / f"{setting.name}@{load:g}-{setting.num_seeds}.json"


def played(jobs: Sequence[Job], num_workers: int) -> Iterator[tuple[Job, list[Run]]]:
    """Jobs and their runs, in order."""
    if num_workers == 1:
        for job in jobs:
            yield job, play(*job)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, context) as pool:
        found = pool.map(play, *zip(*jobs, strict=True))
        yield from zip(jobs, found, strict=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two settings, two seeds")
    parser.add_argument("--keep", action="store_true", help="take what other code has given too")
    parser.add_argument("--so-far", action="store_true", help="report what was run; run nothing")
    parser.add_argument("--workers", type=int, default=1)
    grid = paper_grid.read().settings()
    names = [setting.name for setting in grid]
    parser.add_argument("--settings", nargs="*", default=names, choices=names, metavar="NAME")
    options = parser.parse_args()
    settings = [setting for setting in grid if setting.name in options.settings]
    if options.quick:
        settings = [
            msgspec.structs.replace(setting, num_seeds=2)
            for setting in settings
            if setting.name in QUICK
        ]
    code = code_digest()
    runs: dict[str, list[Run]] = {setting.name: [] for setting in settings}
    missing: list[Job] = []
    for setting in settings:
        for load in setting.all_loads:
            found = kept((setting, load), None if options.keep else code)
            if found is None:
                missing.append((setting, load))
            else:
                runs[setting.name] += found
    num_jobs = sum(len(setting.all_loads) for setting in settings)
    print(f"{num_jobs} settings and loads, {len(missing)} of them to run", flush=True)
    for job, new in played([] if options.so_far else missing, options.workers):
        keep(job, code, new)
        runs[job[0].name] += new
        print(paper_pages.line(*job, new), flush=True)
    results = [paper_results.of(one, runs[one.name]) for one in settings if runs[one.name]]
    paper_pages.write(results, FOLDER)
    name = "paper_quick" if options.quick else "paper"
    record(name, paper_results.figures(results), notes=paper_results.misses(results))


if __name__ == "__main__":
    main()
