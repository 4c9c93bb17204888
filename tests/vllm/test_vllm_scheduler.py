"""Both of our schedulers, without a model, under random lengths: what no worker could run is found.

The async form keeps two or three steps in flight. vLLM does not offer it on a CPU: this is the only
test of it here. Nor does it offer it for ngram anywhere, only for ngram_gpu, whose drafts the
scheduler knows as little as a draft model's.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from serving import HERE, vllm_python

from smartspec.daemon.views import doctor

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

SEEDS = 20


def played(out: Path, *arguments: str) -> list[dict[str, int]]:
    """What scheduler_only.py tells, seed by seed."""
    script = str(HERE / "scheduler_only.py")
    done = subprocess.run(
        [vllm_python(), script, str(out), *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    told: list[dict[str, int]] = json.loads(out.read_text("utf-8"))
    return told


@pytest.mark.parametrize(
    ("method", "depth"),
    [("draft_model", 1), ("ngram", 1), ("draft_model", 2), ("draft_model", 3), ("ngram_gpu", 2)],
)
def test_invariants_hold_with_steps_in_flight(method: str, depth: int, tmp_path: Path) -> None:
    runs = played(
        tmp_path / "told.json", f"--method={method}", f"--depth={depth}", f"--seeds={SEEDS}"
    )
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
    assert sum(run["emitted"] for run in runs) <= sum(run["grown"] for run in runs)
    if depth == 1:
        assert sum(run["counted"] for run in runs) == sum(run["drafted"] for run in runs)
        assert sum(run["emitted"] for run in runs) == sum(run["grown"] for run in runs)
        assert sum(run["useless"] for run in runs) == 0  # nothing is drafted beyond an answer's end


@pytest.mark.parametrize("method", ["draft_model", "ngram"])
@pytest.mark.parametrize("fails", ["choose", "prepare", "report"])
def test_engine_runs_as_without_our_class_when_nobody_steers_and_when_ours_fails(
    method: str, fails: str, tmp_path: Path
) -> None:
    depth = 2 if method == "draft_model" else 1
    arguments = f"--method={method}", f"--depth={depth}", f"--fails={fails}"
    for run in played(tmp_path / "told.json", *arguments, "--seeds=3"):
        assert run["different"] == 0 and run["drafted"] > 100, run
        assert run["errors"] == 1 and not run["steered_at_end"], run


def test_doctor_finds_the_installed_vllm_good() -> None:
    found = {finding.check: finding for finding in doctor.examine_vllm(vllm_python())}
    assert found["vllm"].state == "ok", found["vllm"]
    assert "SmartSpecScheduler" in found["scheduler"].text
    assert found["daemon"].state in ("ok", "failed")
