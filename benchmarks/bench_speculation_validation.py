"""Does the simulator know what speculation does? A real worker, and itself simulated.

The reference worker (SmolLM2-135M-Instruct, prompt lookup, greedy) serves the demo's prompts, which
come by a Poisson process, under no speculation, length 3 and SmartSpec. Worker: one core; daemon:
another. A run at random lengths before that, other requests at other times, is recorded by
`smartspec record`, and what `smartspec profile` makes of it is all that the simulator knows of
engine and drafts. It then serves requests at the same times with the same lengths; the luck of
drafts is drawn, over several seeds. `<arm>_err_pct`: mean latency simulated over served, less 1.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import live_daemon
import psutil
from figures import record

from smartspec.engine_adapter.base import DecodeBatch, FixedLength, LengthSource
from smartspec.engine_adapter.lengths import Choice
from smartspec.engine_adapter.link import EngineLink
from smartspec.engine_adapter.messages import Fingerprint, Hello, Limits
from smartspec.engine_adapter.reference import model as models
from smartspec.engine_adapter.reference.events import Finished
from smartspec.engine_adapter.reference.prompt_lookup import PromptLookup
from smartspec.engine_adapter.reference.sequence import Request
from smartspec.engine_adapter.reference.worker import Worker
from smartspec.engine_adapter.simulator import acceptance, arrivals
from smartspec.engine_adapter.simulator.requests import F64, Traffic
from smartspec.lab.demo.schedule import load_prompts, mixed
from smartspec.lab.profiles import observed
from smartspec.lab.simulation.world import Cell, simulate

MAX_LENGTH = 5
MAX_NUM_RUNNING = 16
ARMS = ("none", "static3", "smartspec")
NUM_SEEDS = 8


class RandomLength(FixedLength):
    """A length from 0 to `MAX_LENGTH` for all, drawn for every step."""

    def __init__(self) -> None:
        super().__init__(0)
        self._rng = np.random.default_rng(0)

    def choose(self, batch: DecodeBatch) -> Choice:
        self.length = int(self._rng.integers(MAX_LENGTH + 1))
        return super().choose(batch)


def make_worker(loaded: models.LoadedModel, source: LengthSource | None) -> Worker:
    return Worker(
        loaded.model,
        None,
        PromptLookup(MAX_LENGTH),
        source,
        max_num_running=MAX_NUM_RUNNING,
        max_model_len=1024,
        eos_token_ids=loaded.eos_token_ids,
        seed=0,
    )


def link(endpoint: str, worker: Worker, own: LengthSource | None = None) -> EngineLink:
    limits = Limits(
        max_length=MAX_LENGTH,
        max_num_running=MAX_NUM_RUNNING,
        static_length=3,
        features=worker.features,
        drafts_known_first=True,
    )
    fingerprint = Fingerprint(target="SmolLM2-135M-Instruct", proposer="lookup", engine="reference")
    hello = Hello(engine="worker", epoch=time.time_ns(), fingerprint=fingerprint, limits=limits)
    return EngineLink(endpoint, hello, own)


def serve(worker: Worker, requests: list[Request], at_s: F64) -> tuple[F64, F64]:
    """Let ``requests`` come at their times; latencies from then on, and tokens of answers."""
    began = time.perf_counter()
    added: dict[int, int] = {}
    done: dict[int, tuple[float, Finished]] = {}
    following = 0
    while following < len(requests) or worker.has_work:
        now = time.perf_counter() - began
        while following < len(requests) and at_s[following] <= now:
            added[worker.add_request(requests[following])] = following
            following += 1
        if worker.has_work:
            for event in worker.step().events:
                if isinstance(event, Finished):
                    done[added[event.id]] = time.perf_counter() - began, event
        else:
            worker.length_source.idle()
            time.sleep(0.01)
    order = range(len(requests))
    latency = np.array([done[i][0] for i in order]) - at_s
    num_output = np.array([len(done[i][1].tokens) for i in order])
    return latency, num_output


def pin(process: psutil.Process, cores: list[int]) -> None:
    for one in (process, *process.children(recursive=True)):
        one.cpu_affinity(cores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rate", type=float, default=0.6, help="requests per second")
    parser.add_argument("--seconds", type=float, default=60.0, help="of arrivals, for each arm")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    loaded = models.load(None)
    made: dict[int, tuple[list[Request], F64]] = {}
    for seed in (1, 2):
        rng = np.random.default_rng(seed)
        at_s = arrivals.poisson(options.rate, options.seconds, rng)
        prompts = mixed(load_prompts(), rng)
        requests = []
        for i in range(len(at_s)):
            prompt = prompts[i % len(prompts)]
            text = loaded.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt.prompt}],
                tokenize=False,
                add_generation_prompt=True,
            )
            ids = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
            requests.append(Request(ids, prompt.max_tokens))
        made[seed] = requests, at_s
    real: dict[str, F64] = {}
    with live_daemon.folder() as folder:
        file = Path(folder) / "worker.rec"
        with live_daemon.daemon(folder, mode="observe", telemetry__enabled=False) as (settings, it):
            pin(psutil.Process(it.pid), cores[-1:])
            os.sched_setaffinity(0, cores[:1])
            recorder = subprocess.Popen(
                [sys.executable, "-m", "smartspec.daemon.cli", "record", str(file), "--seconds",
                 "3600", "--runtime-dir", folder],
            )  # fmt: skip
            pin(psutil.Process(recorder.pid), cores[-1:])
            time.sleep(8.0)
            worker = make_worker(loaded, None)
            worker.length_source = link(settings.endpoint, worker, RandomLength())
            serve(worker, *made[1])
            time.sleep(1.0)
            recorder.terminate()
            recorder.wait(20)
            worker.length_source.close()
        for arm in ("none", "static3"):
            worker = make_worker(loaded, FixedLength(0 if arm == "none" else 3))
            real[arm], num_output = serve(worker, *made[2])
            print(arm, float(real[arm].mean()), flush=True)
        with live_daemon.daemon(folder, telemetry__enabled=False) as (settings, it):
            pin(psutil.Process(it.pid), cores[-1:])
            time.sleep(3.0)
            worker = make_worker(loaded, None)
            worker.length_source = link(settings.endpoint, worker)
            real["smartspec"], _ = serve(worker, *made[2])
            worker.length_source.close()
        seen = observed.of_recording(file)["worker"]
    profile = observed.fit(seen, "worker")
    drafts = seen.acceptance()
    assert drafts is not None
    requests, at_s = made[2]
    traffic = Traffic(at_s - at_s[0], np.array([len(r.prompt) for r in requests]), num_output)
    figures: dict[str, float] = {
        "num_requests": len(requests),
        "num_steps_recorded": len(seen.steps),
        "fit_error_mean_pct": 100 * profile.fit_error_mean,
        "fit_error_p95_pct": 100 * profile.fit_error_p95,
        **drafts._asdict(),
    }
    for arm in ARMS:
        ours = []
        for seed in range(NUM_SEEDS):
            outcomes = acceptance.draw(
                acceptance.BetaOverRequests(drafts.acceptance, drafts.concentration),
                traffic.num_output,
                max_length=MAX_LENGTH,
                seed=seed,
                presence=min(drafts.presence, 1.0),
            )
            cell = Cell(profile, "lookup", traffic, outcomes, max_length=MAX_LENGTH, seed=seed)
            ours.append(float(simulate(arm, cell).served.latency_s.mean()))
        name = "static" if arm == "static3" else arm
        figures[f"{name}_served_s"] = float(real[arm].mean())
        figures[f"{name}_simulated_s"] = float(np.mean(ours))
        figures[f"{name}_err_pct"] = 100 * (float(np.mean(ours)) / float(real[arm].mean()) - 1)
    record("speculation_validation", figures)


if __name__ == "__main__":
    main()
