"""What being steered adds to vLLM's scheduler: ``schedule()`` plus ``update_from_output()``.

No model: vLLM's own scheduler with a worker that counts (tests/vllm/scheduler_only.py), with our
class and without it, step by step in turns on a core of their own, the daemon on another. A turn is
what an engine does between two launches: it waits, as it would for a GPU, takes in the results, and
schedules the next step right after that. Then the daemon is stopped (lengths come from
the learned fallback, then from the engine's configuration), and last killed. Loads: *steady*, a
draft model's lengths and a batch that stays; *churn*, the same with requests that come and go at
most steps; *lookup*, drafts that are not known before ``schedule()``.

``*_added_us`` is the median over steps of the difference between neighbouring steps of the two
(steered steps are shorter, and so cost vLLM less; in churn the two hold other requests);
``*_own_us`` the time in our own code in the two calls; ``*_meanwhile_us`` the same in
``get_grammar_bitmask()``, which vLLM calls once the model runs.

Needs an environment with vLLM, which `make test-vllm` makes. Writes build/figures/vllm.json.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TESTS = HERE.parent / "tests"
LOADS = {"steady": "draft_model", "churn": "draft_model", "lookup": "ngram"}  #: and their methods
CHURN_TOKENS = 20, 200  #: of an answer
WARM_UP = 40
STEPS = 200
TTL_S = 1.0
FALLBACK_S = 20.0  #: longer than a phase without the daemon takes
OURS = ("own", "meanwhile")  #: times in our own code, in the two calls and while the model runs


def inside(endpoint: str, load: str, size: int, daemon: int, step_s: float) -> dict[str, Any]:
    """By vLLM's Python: times of both schedulers, [steps] seconds each, by phase."""
    os.sched_setaffinity(0, {0})
    sys.path.insert(0, str(TESTS / "vllm"))
    import numpy as np
    from scheduler_only import Rig, configuration, make_scheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    from smartspec.engine_adapter.vllm import SmartSpecScheduler

    method = LOADS[load]
    lengths = np.random.default_rng(size)  # of answers

    def fill(rig: Any) -> None:
        alive = sum(not request.is_finished() for request in rig.requests.values())
        for _ in range(size - alive):
            most = int(lengths.integers(*CHURN_TOKENS)) if load == "churn" else 2000
            rig.add(len(rig.requests), 16, most)

    rigs = {}
    for name, kind in (("plain", Scheduler), ("steered", SmartSpecScheduler)):
        config = configuration(method, False, size, 16_384, endpoint)
        scheduler = make_scheduler(kind, config, 128 * size + 1)
        rigs[name] = Rig(scheduler, 1, np.random.default_rng(size), is_lookup=method == "ngram")
        fill(rigs[name])
        rigs[name].begin()
    spent = dict.fromkeys([*rigs, *OURS], 0.0)
    for name, rig in rigs.items():
        for method in ("schedule", "update_from_output"):
            _time(rig.scheduler, method, spent, name)
    steering = rigs["steered"].scheduler.steering
    for method in ("before_schedule", "after_schedule", "before_update", "after_update"):
        _time(steering, method, spent, "own")
    _time(steering, "while_running", spent, "meanwhile")

    def steps(count: int) -> dict[str, list[float]]:
        times: dict[str, list[float]] = {name: [] for name in spent}
        for i in range(count):
            spent.update(dict.fromkeys(OURS, 0.0))
            for name in sorted(rigs, reverse=bool(i % 2)):
                rig = rigs[name]
                spent[name] = 0.0
                time.sleep(step_s)
                rig.end()
                if load == "churn":
                    fill(rig)
                rig.begin()
                times[name].append(spent[name])
            for name in OURS:
                times[name].append(spent[name])
        return times

    steps(WARM_UP)
    found: dict[str, Any] = {}
    link = steering.source.stats
    before = steering.stats.num_steered_steps, link.num_policies
    found["with_daemon"] = steps(STEPS)
    found["steered_share"] = (steering.stats.num_steered_steps - before[0]) / STEPS
    found["policies_per_step"] = (link.num_policies - before[1]) / STEPS
    os.kill(daemon, signal.SIGSTOP)
    over_s = time.monotonic() + 2 * TTL_S + FALLBACK_S
    time.sleep(2 * TTL_S)
    steps(WARM_UP)
    found["daemon_stopped"] = steps(STEPS)
    assert link.state == "fallback", link.state
    time.sleep(max(over_s - time.monotonic(), 0.0))
    steps(WARM_UP)
    found["fallback_over"] = steps(STEPS)
    assert link.state == "own", link.state
    os.kill(daemon, signal.SIGKILL)
    for rig in rigs.values():  # their answers are about to end
        for name, request in rig.requests.items():
            if not request.is_finished():
                rig.abort(name)
        fill(rig)
    steps(WARM_UP)
    found["daemon_dead"] = steps(STEPS)
    assert link.state == "own", link.state
    assert rigs["steered"].scheduler.smartspec_stats.num_errors == link.num_errors == 0
    return found


def _time(owner: Any, method: str, spent: dict[str, float], name: str) -> None:
    inner = getattr(owner, method)

    def timed(*args: Any) -> Any:
        began = time.perf_counter()
        try:
            return inner(*args)
        finally:
            spent[name] += time.perf_counter() - began

    setattr(owner, method, timed)


def measure(python: str, load: str, size: int, step_s: float) -> dict[str, float]:
    """By our own Python: a daemon, and vLLM beside it."""
    import numpy as np

    folder = tempfile.mkdtemp(prefix="ss-")
    out = Path(folder) / "times.json"
    command = [sys.executable, "-m", "smartspec.daemon.cli", "run", "--runtime-dir", folder]
    for setting in (
        "telemetry.enabled=false",
        "state.enabled=false",
        "adoption.check_loss=0",  # else some steps are the engine's own
        f"control.ttl_s={TTL_S}",
        f"control.fallback_s={FALLBACK_S}",
    ):
        command += ["--set", setting]
    daemon = subprocess.Popen(
        [*command, "--log-level", "warning"],
        # Woken on the engine's core it would take its decisions in the middle of the next step.
        preexec_fn=lambda: os.sched_setaffinity(0, set(range(1, os.cpu_count() or 1)) or {0}),
    )
    try:
        endpoint = f"ipc://{folder}/engines.sock"
        arguments = ["--endpoint", endpoint, "--load", load, "--size", size]
        arguments += ["--daemon", daemon.pid, "--out", out]
        subprocess.run(
            [python, __file__, "--step-ms", str(1000 * step_s), *map(str, arguments)], check=True
        )
    finally:
        daemon.send_signal(signal.SIGCONT)
        daemon.terminate()
        daemon.wait()
    found = json.loads(out.read_text("utf-8"))
    place = f"{load}_{size}"
    figures = {
        f"{place}_{name}": found.pop(name) for name in ("steered_share", "policies_per_step")
    }
    for phase, told in found.items():
        times = {name: 1e6 * np.array(values) for name, values in told.items()}
        for name in OURS:
            figures[f"{place}_{phase}_{name}_us"] = float(np.median(times[name]))
        figures[f"{place}_{phase}_plain_us"] = float(np.median(times["plain"]))
        added = times["steered"] - times["plain"]
        for name, share in (("added", 50), ("added_p25", 25), ("added_p75", 75)):
            figures[f"{place}_{phase}_{name}_us"] = float(np.percentile(added, share))
    return figures


def main() -> None:
    """Run all, print a table, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = HERE.parent / ".venv-vllm" / "bin" / "python"
    parser.add_argument("--python", default=os.environ.get("SMARTSPEC_VLLM_PYTHON", str(default)))
    parser.add_argument("--step-ms", type=float, default=5.0, help="what the engine waits")
    parser.add_argument("--load", choices=LOADS, help="this one only")
    for name, kind in (("endpoint", str), ("size", int), ("daemon", int), ("out", Path)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args()
    step_s = args.step_ms / 1000
    if args.out:
        told = inside(args.endpoint, args.load, args.size, args.daemon, step_s)
        args.out.write_text(json.dumps(told))
        return
    if not Path(args.python).exists():
        print(f"{args.python} does not exist: `make test-vllm` makes an environment with vLLM")
        return
    from figures import record

    figures: dict[str, float] = {}
    for load in [args.load] if args.load else LOADS:
        for size in (64, 256):
            print(f"{load}, {size} requests", flush=True)
            figures |= measure(args.python, load, size, step_s)
    record("vllm", figures, seed=64)


if __name__ == "__main__":
    main()
