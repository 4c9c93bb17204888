"""vLLM under a real daemon that is stopped, killed and started again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import live_daemon
import pytest
from serving import assert_same, command

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

STEERED = {"policy", "probe"}


class Engine:
    """serve.py, going on in rounds until it is told that it was enough."""

    def __init__(self, folder: Path, endpoint: str) -> None:
        self.out, self.enough = folder / "told.json", folder / "enough"
        self.log = (folder / "log").open("w+b")
        self.process = subprocess.Popen(
            command(
                "ngram", "daemon", self.out, f"--endpoint={endpoint}", f"--until={self.enough}"
            ),
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )

    def states(self, count: int) -> list[str]:
        """Who chose the lengths, over the next steps."""
        assert self.process.stdout is not None
        found: list[str] = []
        for line in self.process.stdout:
            if line.startswith("step "):
                found.append(line.split()[2])
                if len(found) == count:
                    return found
        self.log.seek(0)
        raise AssertionError("it ended: " + self.log.read().decode("utf-8", "replace")[-4000:])

    def until(self, wanted: set[str], steps: int = 600) -> None:
        assert any(self.states(1)[0] in wanted for _ in range(steps)), f"never {wanted}"

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.log.close()

    def finish(self) -> dict[str, Any]:
        self.enough.touch()
        assert self.process.stdout is not None
        self.process.stdout.read()
        assert self.process.wait() == 0
        told: dict[str, Any] = json.loads(self.out.read_text("utf-8"))
        return told


def test_no_request_is_harmed_when_the_daemon_is_stopped_and_killed(
    plain: dict[str, Any], tmp_path: Path
) -> None:
    with ExitStack() as stack:
        runtime_dir = stack.enter_context(live_daemon.folder())

        def start() -> tuple[str, subprocess.Popen[bytes]]:
            settings, process = stack.enter_context(
                live_daemon.daemon(runtime_dir, telemetry__enabled=False)
            )
            return settings.endpoint, process

        endpoint, daemon = start()
        engine = Engine(tmp_path, endpoint)
        stack.callback(engine.close)
        engine.until(STEERED)
        os.kill(daemon.pid, signal.SIGSTOP)
        engine.until({"fallback", "own"})
        engine.states(20)
        os.kill(daemon.pid, signal.SIGCONT)
        engine.until(STEERED)
        daemon.kill()
        engine.until({"fallback", "own"})
        engine.states(20)
        start()
        engine.until(STEERED)
        engine.states(20)
        told = engine.finish()
    assert told["errors"] == 0
    assert told["refusal"] == ""
    assert_same(plain, told)
    assert told["ours"] == told["theirs"]
    assert told["ours"][1] > 100
