"""Engine processes on one daemon: those of one kind share what was learned, others never touch."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import live_daemon
import pytest
from fakes import PATIENCE_S

from smartspec.daemon.config import Settings
from smartspec.daemon.event_bus import (
    DecisionEvent,
    EngineEvent,
    NoteEvent,
    StepEvent,
    Subscriber,
    subscribe,
)
from smartspec.daemon.state.learned import WARM_STEPS

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

MAX_LENGTH = 2  #: so that no answer takes fewer than 150 steps


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


class Heard:
    """What the daemon has told of each engine."""

    def __init__(self, subscriber: Subscriber) -> None:
        self._subscriber = subscriber
        self.num_steered: dict[str, int] = defaultdict(int)  #: steps under a policy
        self.swept: set[str] = set()  #: engines that were made to try every length
        self.notes: dict[str, dict[str, str]] = defaultdict(dict)  #: texts by kind
        self.fingerprints: dict[str, dict[str, str]] = {}

    def listen_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 4 * PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, "waited in vain"
            match self._subscriber.poll(0.2):
                case StepEvent(engine=engine, source="policy" | "probe"):
                    self.num_steered[engine] += 1
                case DecisionEvent(engine=engine, reason=reason) if "seed sweep" in reason:
                    self.swept.add(engine)
                case NoteEvent(engine=engine, kind=kind, text=text):
                    self.notes[engine][kind] = text
                case EngineEvent(engine=engine, state="connected", fingerprint=fingerprint):
                    self.fingerprints[engine] = fingerprint


def worker(stack: ExitStack, settings: Settings, model: Path, name: str, *options: str) -> None:
    """A reference worker in a process of its own, with something to decode."""
    command = [sys.executable, "-m", "smartspec.daemon.cli", "worker", "--engine", name]
    command += ["--endpoint", settings.endpoint, "--model", str(model), "--device", "cpu"]
    command += ["--threads", "1", "--max-length", str(MAX_LENGTH), "--max-model-len", "512"]
    command += options
    process = stack.enter_context(
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    )
    stack.callback(process.kill)
    assert process.stdin is not None
    for i in range(4):
        request = {"op": "submit", "id": str(i), "prompt": "abcabcabc", "max_tokens": 450}
        process.stdin.write(json.dumps(request | {"ignore_eos": True}).encode() + b"\n")
    process.stdin.flush()


@pytest.mark.slow
def test_second_engine_starts_from_what_the_first_knows_and_one_of_another_kind_does_not(
    stack: ExitStack, tiny_model_dir: Path
) -> None:
    folder = stack.enter_context(live_daemon.folder())
    settings, _ = stack.enter_context(live_daemon.daemon(folder, telemetry__enabled=False))
    subscriber = subscribe(settings.bus_endpoint)
    stack.callback(subscriber.close)
    heard = Heard(subscriber)
    worker(stack, settings, tiny_model_dir, "first")
    heard.listen_until(lambda: heard.num_steered["first"] > WARM_STEPS + 20)
    worker(stack, settings, tiny_model_dir, "second")
    worker(stack, settings, tiny_model_dir, "other", "--dtype", "float64")
    heard.listen_until(lambda: min(heard.num_steered["second"], heard.num_steered["other"]) > 20)
    assert heard.fingerprints["second"] == heard.fingerprints["first"]
    assert heard.fingerprints["other"] != heard.fingerprints["first"]
    assert "starts from what engine first knows" in heard.notes["second"]["warm_start"]
    assert not {"warm_start", "cold_start"} & heard.notes["other"].keys()
    assert heard.swept == {"first", "other"}
