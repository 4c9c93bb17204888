"""Both of our schedulers, without a model, under random lengths: what no worker could run is found.

The async form keeps two or three steps in flight. vLLM does not offer it on a CPU: this is the only
test of it here.
"""

from __future__ import annotations

import json
import subprocess

import pytest
from scheduler_only import COMPARED, FAILING, MAX_ADAPTERS, PLAYS
from serving import HERE, vllm_python

from smartspec.daemon.views import doctor
from smartspec.engine_adapter.vllm import compatibility

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

SEEDS = 20


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, int]]]:
    """What scheduler_only.py tells of every play, seed by seed."""
    out = tmp_path_factory.mktemp("scheduler") / "told.json"
    script = str(HERE / "scheduler_only.py")
    done = subprocess.run(
        [vllm_python(), script, str(out), f"--seeds={SEEDS}"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    told: dict[str, list[dict[str, int]]] = json.loads(out.read_text("utf-8"))
    return told


@pytest.mark.parametrize(("method", "depth"), PLAYS)
def test_invariants_hold_with_steps_in_flight(
    method: str, depth: int, told: dict[str, list[dict[str, int]]]
) -> None:
    runs = told[f"{method} {depth}"]
    assert len(runs) == SEEDS
    for run in runs:  # answers and drafts were checked by the worker
        assert run["errors"] == run["leaked"] == run["too_long"] == 0, run
        assert run["checked"] > 100 and run["accepted"] < run["drafted"], run
        # Only steps whose results vLLM drops are not reported: requests gone or preempted since.
        assert run["counted"] <= run["drafted"], run
        assert run["left"] <= depth, run
    assert sum(run["preempted"] for run in runs) > SEEDS
    assert sum(run["aborted"] for run in runs) > SEEDS
    assert max(run["deepest"] for run in runs) == 5
    assert min(run["siblings"] for run in runs) > 0  # of requests with n > 1
    # What is known of a lookup is told, also where nobody asked for it in time.
    assert all((run["featureless"] == 0) == (method == "ngram") for run in runs)
    assert max(run["adapters"] for run in runs) == MAX_ADAPTERS
    assert sum(run["emitted"] for run in runs) <= sum(run["grown"] for run in runs)
    if depth == 1:
        assert sum(run["counted"] for run in runs) == sum(run["drafted"] for run in runs)
        assert sum(run["emitted"] for run in runs) == sum(run["grown"] for run in runs)
        assert sum(run["useless"] for run in runs) == 0  # nothing is drafted beyond an answer's end


@pytest.mark.parametrize("fails", FAILING)
@pytest.mark.parametrize("method", [method for method, _ in COMPARED])
def test_engine_runs_as_without_our_class_when_nobody_steers_and_when_ours_fails(
    method: str, fails: str, told: dict[str, list[dict[str, int]]]
) -> None:
    for run in told[f"{method} {fails}"]:
        assert run["different"] == 0 and run["drafted"] > 100, run
        assert run["errors"] == 1 and not run["steered_at_end"], run


def test_doctor_finds_the_installed_vllm_good() -> None:
    found = {finding.check: finding for finding in doctor.examine_vllm(vllm_python())}
    tested = any(found["vllm"].text.startswith(version) for version in compatibility.TESTED)
    assert found["vllm"].state == ("ok" if tested else "warning"), found["vllm"]
    assert "SmartSpecScheduler" in found["scheduler"].text
    assert found["daemon"].state in ("ok", "failed")
