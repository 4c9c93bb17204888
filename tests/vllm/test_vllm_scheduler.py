"""Both of our schedulers, without a model, under random lengths: what no worker could run is found.

The async form keeps two or three steps in flight. vLLM does not offer it on a CPU: this is the only
test of it here.
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


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_invariants_hold_with_steps_in_flight(depth: int, tmp_path: Path) -> None:
    out = tmp_path / "told.json"
    done = subprocess.run(
        [
            vllm_python(),
            str(HERE / "scheduler_only.py"),
            str(out),
            f"--depth={depth}",
            f"--seeds={SEEDS}",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    runs = json.loads(out.read_text("utf-8"))
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
    if depth == 1:
        assert sum(run["counted"] for run in runs) == sum(run["drafted"] for run in runs)


def test_doctor_finds_the_installed_vllm_good() -> None:
    found = {finding.check: finding for finding in doctor.examine_vllm(vllm_python())}
    assert found["vllm"].state == "ok", found["vllm"]
    assert "SmartSpecScheduler" in found["scheduler"].text
    assert found["daemon"].state in ("ok", "failed")
