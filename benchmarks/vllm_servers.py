"""vLLM's own HTTP servers for a benchmark: one per arm, all running, load sent to one at a time.

An idle server takes no processor time to speak of (`idle_share` says how much), so that arms can
take turns within seconds. With two cores the engine's process (scheduler, model) has the first to
itself; HTTP, daemon and load generator share the second, which stands for the host's other cores
beside a GPU: what the sidecar does in its own process takes nothing from the engine.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from pinning import pin

ENGINE_CORE = {0}
OTHER_CORE = {1}
START_S = 300.0
IDLE_S = 5.0
MAX_LENGTH = 5
NAME = "m"  #: that the model is served by
MAX_NUM_SEQS = 16
MAX_MODEL_LEN = 512
BLOCK_SIZE = 32
NGRAM = {"method": "ngram", "prompt_lookup_min": 2, "prompt_lookup_max": 5}


@dataclass(frozen=True, slots=True)
class Arm:
    """A way to run vLLM: what is added to its command line."""

    name: str
    options: tuple[str, ...] = ()


def speculating(length: int, **more: object) -> tuple[str, ...]:
    """Options for prompt lookup of ``length`` drafts."""
    return ("--speculative-config", json.dumps({**NGRAM, "num_speculative_tokens": length, **more}))


def none() -> Arm:
    """No speculation is configured at all."""
    return Arm("none")


def static(length: int) -> Arm:
    """Always so many drafts; 0: configured, and switched off by vLLM's own table."""
    if length:
        return Arm(f"static_{length}", speculating(length))
    return table([[1, MAX_NUM_SEQS, 0]], "static_0")


def table(rows: Sequence[Sequence[int]], name: str = "table") -> Arm:
    """vLLM's own table: drafts by the number of requests in the step."""
    rows = [list(row) for row in rows]
    return Arm(name, speculating(MAX_LENGTH, num_speculative_tokens_per_batch_size=rows))


def smartspec(endpoint: str) -> Arm:
    """Under a daemon."""
    settings = json.dumps({"smartspec": {"endpoint": endpoint}})
    scheduler = ("--scheduler-cls", "smartspec.engine_adapter.vllm.SmartSpecScheduler")
    return Arm("smartspec", (*speculating(MAX_LENGTH), *scheduler, "--additional-config", settings))


class Server:
    """One server: an arm, its port and its processes."""

    def __init__(self, python: str, model: Path, arm: Arm, folder: Path, dtype: str) -> None:
        self.arm = arm
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.log = folder / f"{arm.name}.log"
        command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        command += ["--served-model-name", NAME, "--dtype", dtype, "--enforce-eager", "--seed", "0"]
        command += ["--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", str(MAX_NUM_SEQS)]
        blocks = MAX_NUM_SEQS * MAX_MODEL_LEN // BLOCK_SIZE
        command += ["--block-size", str(BLOCK_SIZE), "--num-gpu-blocks-override", str(blocks)]
        # The same prompts come again: what is computed must not depend on which came before.
        command += ["--no-enable-prefix-caching", "--host", "127.0.0.1", "--port", str(self.port)]
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "NUMBA_NUM_THREADS": "1",  # two that wait by spinning do not share a core
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            # Else the model has a process of its own, which the engine's waits for by spinning.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "TOKENIZERS_PARALLELISM": "false",
        }
        with self.log.open("wb") as sink:
            self.process = subprocess.Popen(
                [*command, *arm.options],
                stdout=sink,
                stderr=sink,
                env=environment,
                start_new_session=True,
                # Ours may have been pinned already; it starts twice as fast on both.
                preexec_fn=lambda: os.sched_setaffinity(0, ENGINE_CORE | OTHER_CORE),
            )

    def wait_ready(self) -> None:
        """Return once it answers, its processes pinned."""
        deadline = time.monotonic() + START_S
        while not self._is_ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                words = self.log.read_text("utf-8", "replace")[-4000:]
                raise SystemExit(f"{self.arm.name} does not start:\n{words}")
            time.sleep(0.5)
        pin(self.process.pid, OTHER_CORE)
        for child in self._children():
            pin(child.pid, ENGINE_CORE)

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                return True
        except OSError:
            return False

    def _children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def cpu_s(self) -> float:
        """Processor seconds of all its processes so far."""
        times = [p.cpu_times() for p in (psutil.Process(self.process.pid), *self._children())]
        return sum(t.user + t.system for t in times)

    def counters(self) -> dict[str, float]:
        """Drafts and accepted drafts so far, by vLLM's own metrics."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=10) as page:
            lines = page.read().decode().splitlines()
        wanted = {
            "vllm:spec_decode_num_draft_tokens_total": "drafted",
            "vllm:spec_decode_num_accepted_tokens_total": "accepted",
        }
        found = dict.fromkeys(wanted.values(), 0.0)
        for line in lines:
            name = wanted.get(line.split("{")[0].split(" ")[0])
            if name:
                found[name] += float(line.rsplit(" ", 1)[1])
        return found

    def stop(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # its engine too
        self.process.wait()


@contextmanager
def servers(
    python: str, model: Path, arms: Sequence[Arm], folder: Path, dtype: str
) -> Iterator[Mapping[str, Server]]:
    """Servers of all arms, ready, by name."""
    started: dict[str, Server] = {}
    try:
        for arm in arms:
            began = time.monotonic()
            started[arm.name] = Server(python, model, arm, folder, dtype)
            started[arm.name].wait_ready()
            print(f"{arm.name} is ready after {time.monotonic() - began:.0f} s", flush=True)
        yield started
    finally:
        for server in started.values():
            server.stop()


@contextmanager
def daemon(runtime_dir: str, log: Path) -> Iterator[psutil.Process]:
    """SmartSpec's daemon, pinned beside the load generator."""
    command = [sys.executable, "-m", "smartspec.daemon.cli", "run", "--runtime-dir", runtime_dir]
    for setting in ("telemetry.enabled=false", "state.enabled=false"):
        command += ["--set", setting]
    with log.open("wb") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=sink)
    try:
        time.sleep(2.0)
        if process.poll() is not None:
            raise SystemExit(f"the daemon does not start:\n{log.read_text('utf-8', 'replace')}")
        pin(process.pid, OTHER_CORE)
        yield psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(15)


def idle_share(running: Mapping[str, Server]) -> dict[str, float]:
    """Share of a core that each server takes while nothing is asked of it."""
    before: dict[str, Any] = {name: server.cpu_s() for name, server in running.items()}
    time.sleep(IDLE_S)
    return {name: (server.cpu_s() - before[name]) / IDLE_S for name, server in running.items()}
