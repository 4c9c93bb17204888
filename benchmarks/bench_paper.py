"""The evaluation of SmartSpec (arXiv 2406.14066), in the simulator.

Pairs of target and draft, with traffics of several acceptances, at several loads, over several
seeds (paper.toml): mean request latency under SmartSpec, cold and warm, against every static
length, none, and rivals; and what each can serve. docs/reproduction.md says what differs from the
paper.

Settings that were run are kept in build/paper and not run again, unless the grid or the code has
changed since; `--keep` takes them whatever the code. `--quick`: two settings, two seeds, recorded
as `paper_quick`. Tables and pictures are written beside them.
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
QUICK = ("a100_7b_160m.chat_70", "a100_7b_lookup.chat_lookup")


class Kept(msgspec.Struct, frozen=True):
    """A setting that was run."""

    code: str  #: digest of all that could change a number
    setting: Setting
    runs: tuple[Run, ...]


def code_digest() -> str:
    """Of the sources that runs depend on."""
    digest = hashlib.sha256()
    for folder in CODE:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".json"):
                digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    digest.update((ROOT / "benchmarks" / "paper_runs.py").read_bytes())
    return digest.hexdigest()[:16]


def kept(setting: Setting, code: str | None) -> tuple[Run, ...] | None:
    """The runs of a setting, if it was run as it is now; ``code`` None: with any code."""
    path = _path(setting)
    if not path.exists():
        return None
    found = msgspec.json.decode(path.read_bytes(), type=Kept)
    return found.runs if found.setting == setting and code in (None, found.code) else None


def keep(setting: Setting, code: str, runs: Sequence[Run]) -> None:
    """Write what a setting gave, whole or not at all."""
    path = _path(setting)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_bytes(msgspec.json.encode(Kept(code, setting, tuple(runs))))
    part.replace(path)


def _path(setting: Setting) -> Path:
    return FOLDER / f"{setting.name}-{setting.num_seeds}.json"


def played(settings: Sequence[Setting], num_workers: int) -> Iterator[tuple[Setting, list[Run]]]:
    """Settings and their runs, in order."""
    if num_workers == 1:
        for setting in settings:
            yield setting, play(setting)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, context) as pool:
        yield from zip(settings, pool.map(play, settings), strict=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two settings, two seeds")
    parser.add_argument("--keep", action="store_true", help="take what other code has given too")
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    settings = paper_grid.read().settings()
    if options.quick:
        settings = [
            msgspec.structs.replace(setting, num_seeds=2)
            for setting in settings
            if setting.name in QUICK
        ]
    code = code_digest()
    runs = {one.name: kept(one, None if options.keep else code) for one in settings}
    missing = [one for one in settings if runs[one.name] is None]
    print(f"{len(settings)} settings, {len(missing)} of them to run", flush=True)
    for setting, found in played(missing, options.workers):
        keep(setting, code, found)
        runs[setting.name] = tuple(found)
        print(paper_pages.line(paper_results.of(setting, found)), flush=True)
    results = [paper_results.of(one, runs[one.name] or ()) for one in settings]
    paper_pages.write(results, FOLDER)
    name = "paper_quick" if options.quick else "paper"
    record(name, paper_results.figures(results), notes=paper_results.misses(results))


if __name__ == "__main__":
    main()
