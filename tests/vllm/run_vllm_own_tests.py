"""vLLM's own tests of its scheduler, with our class in its place.

    python tests/vllm/run_vllm_own_tests.py SOURCE --python PATH

SOURCE is a tree of vLLM's source of the version that PATH, a Python with vLLM, pytest,
pytest-asyncio and tblib, has installed (the tests are not in its wheels). They are run three
times: with vLLM's own classes (*theirs*), with ours and nobody to steer them (*ours*), and with
ours under a source that steers every step to the full length (*steered*), by which nothing should
change but tests of vLLM's own table of lengths. An error that our class contained fails the test.

There is no hub: the model that the tests name is answered for by the default model (`make model`);
tests that name others fail in all three, as do those that need a GPU.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

HERE = Path(__file__).parent
FILES = (
    "v1/core/test_scheduler.py",
    "v1/core/test_async_scheduler.py",
    "v1/core/test_priority_scheduler_random.py",
    "v1/core/test_priority_preemption_bug.py",
    "v1/core/test_deferred_block_free.py",
    "v1/core/test_repetition_detection.py",
    "v1/spec_decode/test_dynamic_sd.py",
)
ARMS = ("theirs", "ours", "steered")
ARM = "SMARTSPEC_VLLM_TESTS_ARM"
MODEL = "facebook/opt-125m"  #: what the tests name


# -- inside vLLM's Python: a plugin of pytest ------------------------------------------------------


def _classes(steered: bool) -> tuple[type, type]:
    from smartspec.engine_adapter.lengths import Choice
    from smartspec.engine_adapter.vllm import scheduler

    class Full:
        """Steers every step to the longest lengths."""

        may_steer = False

        def choose(self, batch: Any) -> Any:
            return Choice(batch.ceiling.astype("int64"), source="policy")

        def prepare(self, batch: Any, features: Any = None) -> None:
            pass

        ready = report = idle = close = lambda self, *_: None

    def make(base: Any) -> Any:
        class Substitute(base):  # type: ignore[misc]
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)
                made.append(self)

            def make_source(self, wanted: Any) -> Any:
                return Full() if steered else super().make_source(wanted)

        return Substitute

    return make(scheduler.SmartSpecScheduler), make(scheduler.SmartSpecAsyncScheduler)


made: list[Any] = []  #: schedulers, by the present test


def pytest_configure() -> None:
    """Before tests are imported: their `Scheduler` is to be ours."""
    arm = os.environ.get(ARM, "theirs")
    if arm == "theirs":
        return
    from vllm.v1.core.sched import async_scheduler, scheduler

    from smartspec.engine_adapter.vllm import compatibility

    problems = compatibility.problems()  # of vLLM's classes, not of ours in their place
    compatibility.problems = lambda: problems
    importlib.import_module("vllm.v1.core.sched.diffusion_scheduler")  # its bases stay vLLM's
    plain, asynchronous = _classes(arm == "steered")
    scheduler.Scheduler = plain  # type: ignore[misc]
    async_scheduler.AsyncScheduler = asynchronous  # type: ignore[misc]


@pytest.fixture(autouse=True)
def nothing_contained(record_property: Any) -> Iterator[None]:
    made.clear()
    yield
    record_property("steered", sum(one.steering is not None for one in made))
    assert all(one.smartspec_stats.num_errors == 0 for one in made)
    for one in made:
        if one.steering is not None:
            one.steering.close()


# -- outside ---------------------------------------------------------------------------------------


def _hub(folder: Path) -> None:
    """A cache of the hub in which the default model goes by the name that the tests use."""
    from vllm_models import model_dir

    repository = folder / "hub" / f"models--{MODEL.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / ("0" * 40)).symlink_to(model_dir())


def _play(python: str, folder: Path, arm: str, select: str) -> dict[str, tuple[str, int]]:
    """Outcome of each test, and schedulers under steering in it."""
    report, output = folder / f"{arm}.xml", folder / f"{arm}.log"
    paths = [str(HERE), str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", Path(__file__).stem]
    command += ["-k", select] if select else []
    with output.open("wb") as log:
        subprocess.run(
            [*command, f"--junitxml={report}", *(f"tests/{file}" for file in FILES)],
            cwd=folder,
            env={
                **os.environ,
                ARM: arm,
                "HF_HOME": str(folder),
                "HF_HUB_OFFLINE": "1",
                "PYTHONPATH": os.pathsep.join(paths),
                "VLLM_LOGGING_LEVEL": "ERROR",
            },
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    if not report.exists():
        said = output.read_text("utf-8", "replace")
        raise SystemExit(f"{python} does not run the tests:\n{said}")
    modules = {f"tests/{file}".removesuffix(".py").replace("/", "."): file for file in FILES}
    told: dict[str, tuple[str, int]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        bad = case.find("failure") is not None or case.find("error") is not None
        outcome = "failed" if bad else "skipped" if case.find("skipped") is not None else "passed"
        steered = [p.get("value", "0") for p in case.iter("property") if p.get("name") == "steered"]
        module = case.get("classname", "")
        file = next((f for name, f in modules.items() if module.startswith(name)), module)
        told[f"{file}::{case.get('name')}"] = outcome, int(steered[0]) if steered else 0
    return told


def main() -> None:
    """Run all, print a table and the tests that only ours fail."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("--python", default=os.environ.get("SMARTSPEC_VLLM_PYTHON"))
    parser.add_argument("--select", default="", help="only tests that fit this, as pytest's -k")
    parser.add_argument("--logs", type=Path, help="keep pytest's output and results here")
    chosen = parser.parse_args()
    if not chosen.python:
        parser.error("--python or SMARTSPEC_VLLM_PYTHON: the Python of an environment with vLLM")
    told: dict[str, dict[str, tuple[str, int]]] = {arm: {} for arm in ARMS}
    with tempfile.TemporaryDirectory(prefix="ss-") as scratch:
        folder = Path(scratch)
        _hub(folder)
        # A copy: beside the tests lies a package of vLLM's that was never built.
        shutil.copytree(chosen.source / "tests", folder / "tests")
        for arm in ARMS:
            told[arm] = _play(chosen.python, folder, arm, chosen.select)
        print("| file | " + " | ".join(f"{arm}: passed, failed, skipped" for arm in ARMS) + " |")
        for file in FILES:
            cells = []
            for arm in ARMS:
                of_file = [what for name, (what, _) in told[arm].items() if name.startswith(file)]
                count = Counter(of_file)
                cells.append(f"{count['passed']}, {count['failed']}, {count['skipped']}")
            print(f"| `{file}` | {' | '.join(cells)} |", flush=True)
        if chosen.logs:
            chosen.logs.mkdir(parents=True, exist_ok=True)
            (chosen.logs / "told.json").write_text(json.dumps(told, indent=1))
            for log in folder.glob("*.log"):
                shutil.copy(log, chosen.logs)
    good = {name for name, (outcome, _) in told["theirs"].items() if outcome == "passed"}
    for arm in ARMS[1:]:
        active = sum(told[arm].get(name, ("", 0))[1] > 0 for name in good)
        lost = sorted(name for name in good if told[arm].get(name, ("", 0))[0] != "passed")
        print(f"{arm}: {len(good) - len(lost)} of the {len(good)} that pass with theirs, ", end="")
        print(f"{active} with an adapter at work in them; not passed: {lost or 'none'}")


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    main()
