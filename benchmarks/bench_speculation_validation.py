"""Does the simulator know what speculation does? A real worker, and itself simulated.

The reference worker (SmolLM2-135M-Instruct, prompt lookup, greedy) serves the demo's prompts under
no speculation, length 3 and SmartSpec, in rounds. In every round a stretch is recorded first, by
`smartspec record`: the same prompts, in another order and at other times, at the engine's own fixed
length of 5. Recording and arms share the machine's pace so, which drifts. Worker: one core;
daemons: another.

All that the simulator knows of engine and drafts is the recording: what steps cost (`smartspec
profile`), and what drafts brought at each position of each answer (`lab.profiles.answers`). It
serves requests of the arms' times and lengths. `<arm>_err_pct`: mean latency simulated over served,
less 1; `<arm>_steps_err_pct`: the same of the number of steps; `<arm>_cost_err_pct`: the profile's
seconds of the very steps that were served over what they took, less 1. Then with less that is
known: `untold`, the engine tells none of its lookup's features; `nearest`, each request has the
drafts of another of them, of the nearest length, as `smartspec simulate --drafts` gives them;
`others`, of any other, at random; `drawn`, drafts are drawn as the command does without that, with
the recording's mean, spread and presence.

`--keep FILE` writes what was measured, `--from FILE` simulates that again.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import live_daemon
import psutil
from figures import record
from pinning import pin

from smartspec.engine_adapter.base import FixedLength, LengthSource, StepFacts
from smartspec.engine_adapter.link import EngineLink
from smartspec.engine_adapter.messages import Fingerprint, Hello, Limits
from smartspec.engine_adapter.reference import model as models
from smartspec.engine_adapter.reference.events import Finished
from smartspec.engine_adapter.reference.prompt_lookup import PromptLookup
from smartspec.engine_adapter.reference.sequence import Request
from smartspec.engine_adapter.reference.worker import Worker
from smartspec.engine_adapter.simulator import acceptance
from smartspec.engine_adapter.simulator.requests import F64, Traffic
from smartspec.lab.demo.schedule import load_prompts, mixed
from smartspec.lab.profiles import answers, observed
from smartspec.lab.profiles.observed import Step
from smartspec.lab.simulation.world import Cell, simulate

MAX_LENGTH = 5
MAX_NUM_RUNNING = 16
ARMS = ("none", "static3", "smartspec")
NUM_SEEDS = 8
KNOWN_LESS = ("untold_", "nearest_", "others_", "drawn_")
BETWEEN_S = 15.0  #: from one round's last arrival to the next round, simulated


class Arm(msgspec.Struct):
    """What was served under one policy, all rounds together; by request, or by step."""

    latency_s: list[float] = []
    answers: list[list[int]] = []
    steps: list[Step] = []


class Measured(msgspec.Struct):
    """A run. Requests are numbered through all rounds, as the arms serve them."""

    round_of: list[int]
    at_s: list[float]  #: since the round began
    num_prompt: list[int]
    recorded: list[int]  #: requests as the recorded stretches served them
    arms: dict[str, Arm]
    recording: bytes  #: file of `smartspec record`


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


def step_of(facts: StepFacts) -> Step:
    size, drafted = len(facts.num_drafted), int(facts.num_drafted.sum())
    prefill, context = facts.batch.num_prefill_tokens, facts.context_tokens
    assert facts.target_s is not None and facts.draft_s is not None
    return Step(
        size, size + drafted, prefill, context, 0, 0, facts.target_s, facts.draft_s, facts.step_s
    )


def serve(
    worker: Worker, requests: list[Request], at_s: F64, arm: Arm, others: list[LengthSource]
) -> None:
    """Let ``requests`` come at their times; ``others`` keep in touch with their daemons."""
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
            output = worker.step()
            for event in output.events:
                if isinstance(event, Finished):
                    done[added[event.id]] = time.perf_counter() - began, event
            if output.facts is not None:
                arm.steps.append(step_of(output.facts))
        else:
            worker.length_source.idle()
            time.sleep(0.01)
        for other in others:
            other.idle()
    for i in range(len(requests)):
        arm.latency_s.append(done[i][0] - float(at_s[i]))
        arm.answers.append(done[i][1].tokens)


def measure(rate: float, seconds: float, num_rounds: int) -> Measured:
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    loaded = models.load(None)
    rng = np.random.default_rng(2)
    each = round(rate * seconds)
    requests = []
    for prompt in mixed(load_prompts(), rng)[: each * num_rounds]:
        text = loaded.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt.prompt}], tokenize=False, add_generation_prompt=True
        )
        ids = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
        requests.append(Request(ids, prompt.max_tokens))
    size = len(requests)
    round_of = np.arange(size) // each
    at_s = np.empty(size)  # Poisson arrivals, given their number
    recorded: list[int] = []
    arms = {name: Arm() for name in ("recorded", *ARMS)}
    with live_daemon.folder() as watched, live_daemon.folder() as steered:
        file = Path(watched) / "worker.rec"
        with contextlib.ExitStack() as stack:
            settings, observer = stack.enter_context(
                live_daemon.daemon(watched, mode="observe", telemetry__enabled=False)
            )
            steering, steerer = stack.enter_context(
                live_daemon.daemon(steered, telemetry__enabled=False)
            )
            recorder = subprocess.Popen(
                [sys.executable, "-m", "smartspec.daemon.cli", "record", str(file), "--seconds",
                 "3600", "--runtime-dir", watched],
            )  # fmt: skip
            for process in (observer, steerer, recorder):
                daemon = psutil.Process(process.pid)
                for one in (daemon, *daemon.children(recursive=True)):
                    pin(one.pid, {cores[-1]})
            os.sched_setaffinity(0, cores[:1])
            time.sleep(8.0)
            workers = {name: make_worker(loaded, None) for name in arms}
            workers["none"].length_source = FixedLength(0)
            workers["static3"].length_source = FixedLength(3)
            observing = link(settings.endpoint, workers["recorded"], FixedLength(MAX_LENGTH))
            steering_link = link(steering.endpoint, workers["smartspec"])
            workers["recorded"].length_source = observing
            workers["smartspec"].length_source = steering_link
            for r in range(num_rounds):
                at = np.flatnonzero(round_of == r)
                at_s[at] = np.sort(rng.uniform(0, seconds, len(at)))
                shuffled = rng.permutation(at)
                recorded += shuffled.tolist()
                # Faster, since speculation is: the batch must become as large as without.
                times = {"recorded": np.sort(rng.uniform(0, seconds / 2, len(at)))}
                for name in ("recorded", *rng.permutation(ARMS).tolist()):
                    others = [
                        source
                        for source in (observing, steering_link)
                        if source is not workers[name].length_source
                    ]
                    which = shuffled if name == "recorded" else at
                    serve(
                        workers[name],
                        [requests[i] for i in which],
                        times.get(name, at_s[at]),
                        arms[name],
                        others,
                    )
                    latest = arms[name].latency_s[-len(at) :]
                    print(f"round {r}, {name}: {np.mean(latest):.2f} s", flush=True)
            time.sleep(1.0)
            recorder.terminate()
            recorder.wait(20)
            observing.close()
            steering_link.close()
        recording = file.read_bytes()
    return Measured(
        round_of.tolist(),
        at_s.tolist(),
        [len(request.prompt) for request in requests],
        recorded,
        arms,
        recording,
    )


def simulated(measured: Measured) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "worker.rec"
        file.write_bytes(measured.recording)
        seen = observed.of_recording(file, with_visits=True)["worker"]
    profile = observed.fit(seen, "worker")
    drafts = seen.acceptance()
    assert drafts is not None
    figures: dict[str, float] = {
        "num_requests": len(measured.at_s),
        "num_steps_recorded": len(seen.steps),
        "fit_error_mean_pct": 100 * profile.fit_error_mean,
        "fit_error_p95_pct": 100 * profile.fit_error_p95,
        **drafts._asdict(),
    }
    # Worker's ids count from 1, in the order of the recorded stretches.
    id_of = {request: i for i, request in enumerate(measured.recorded, 1)}
    ids = [id_of[request] for request in range(len(measured.at_s))]
    rounds = np.array(measured.round_of)
    at_s = np.array(measured.at_s) + rounds * (max(measured.at_s) + BETWEEN_S)
    # How much of an answer could be drafted: of long ones, and of the others.
    size = np.array([len(answer) for answer in measured.arms["none"].answers])
    recorded = answers.of_visits(seen, ids)
    own = np.arange(len(ids))
    share = np.array([(answer.run > 0).mean() for answer in recorded.answers])
    is_long = size > np.median(size)
    figures["copied_share_long"] = float(share[is_long].mean())
    figures["copied_share_short"] = float(share[~is_long].mean())
    for name in ARMS:
        arm = measured.arms[name]
        num_output = np.array([len(answer) for answer in arm.answers])
        traffic = Traffic(at_s - at_s[0], np.array(measured.num_prompt), num_output)
        served_s = float(np.mean(arm.latency_s))
        step_s = sum(step.step_s for step in arm.steps)
        figures[f"{name}_served_s"] = served_s
        for kind in ("", *KNOWN_LESS) if name != "none" else ("",):
            ours, steps = [], []
            for seed in range(NUM_SEEDS):
                if kind == "drawn_":
                    outcomes = acceptance.draw(
                        acceptance.BetaOverRequests(drafts.acceptance, drafts.concentration),
                        num_output,
                        max_length=MAX_LENGTH,
                        seed=seed,
                        presence=min(drafts.presence, 1.0),
                    )
                else:
                    which = own.tolist()
                    if kind == "nearest_":
                        which = recorded.nearest(num_output, seed, own)
                    elif kind == "others_":
                        which = np.random.default_rng(seed).permutation(own).tolist()
                    outcomes = recorded.outcomes(which, num_output, max_length=MAX_LENGTH)
                if kind == "untold_":
                    outcomes = replace(outcomes, feature_names=(), features=None)
                cell = Cell(profile, "lookup", traffic, outcomes, max_length=MAX_LENGTH, seed=seed)
                engine = simulate(name, cell)
                ours.append(float(engine.served.latency_s.mean()))
                steps.append(engine.num_steps)
            figures[f"{name}_{kind}simulated_s"] = float(np.mean(ours))
            figures[f"{name}_{kind}err_pct"] = 100 * (float(np.mean(ours)) / served_s - 1)
            figures[f"{name}_{kind}steps_err_pct"] = 100 * (np.mean(steps) / len(arm.steps) - 1)
        cost_s = sum(observed.seconds(profile, step) for step in arm.steps)
        figures[f"{name}_cost_err_pct"] = 100 * (cost_s / step_s - 1)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rate", type=float, default=0.6, help="requests per second")
    parser.add_argument("--seconds", type=float, default=24.0, help="of arrivals, a round and arm")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="write what was measured")
    parser.add_argument("--from", type=Path, dest="kept", help="simulate what was kept")
    options = parser.parse_args()
    if options.kept is not None:
        measured = msgspec.msgpack.decode(options.kept.read_bytes(), type=Measured)
    else:
        measured = measure(options.rate, options.seconds, options.rounds)
        if options.keep is not None:
            options.keep.write_bytes(msgspec.msgpack.encode(measured))
    record("speculation_validation", simulated(measured))


if __name__ == "__main__":
    main()
