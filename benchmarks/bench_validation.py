"""Is the simulator right? A served run of vLLM on an RTX 4090, without speculation, simulated.

300 requests come within half a minute and are served in three (LLMServingSim's recording,
github.com/casys-kaist/LLMServingSim, MIT): the engine is full throughout, so that KV room and
preemption decide as much as step times do. Three things about the engine are not in the profile
and are calibrated on the first 150 arrivals, by the six figures below: KV room, a factor on all
step times, and the token budget of a step (512, vLLM's old default, or 2048); on a coarse grid,
then on a finer one around its best. What is read is the other 150. Requests' arrivals and lengths
are those of the run.

`<measure>_<statistic>_err_pct`: simulated over served less 1; times are counted from when the
engine queued a request. `calibration_...`: of the first half, which was fitted.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from figures import record

from smartspec.engine_adapter.simulator import acceptance, profile
from smartspec.engine_adapter.simulator.profile import Profile
from smartspec.engine_adapter.simulator.requests import F64, Traffic
from smartspec.lab.public_data import data_folder
from smartspec.lab.simulation.world import Cell, simulate

RUN = "serving_runs/llmservingsim_rtx4090_llama-3.1-8b_vllm_requests.jsonl"
NUM_CALIBRATED = 150
KV_TOKENS = range(37_000, 45_001, 1_000)
FACTORS = (0.94, 0.97, 1.0, 1.03)
BUDGETS = (512, 2048)
FINER_KV_TOKENS = (-750, -500, -250, 0, 250, 500, 750)
FINER_FACTORS = (-0.02, -0.01, 0.0, 0.01, 0.02)
NAMES = tuple(f"{m}_{s}" for m in ("ttft", "tpot", "e2e") for s in ("mean", "p90"))


class ServedRun(NamedTuple):
    """Columns [R], by the time of queueing; seconds."""

    traffic: Traffic
    time_to_first_s: F64
    time_per_token_s: F64
    latency_s: F64


class Engine(NamedTuple):
    """What is calibrated."""

    kv_tokens: int
    factor: float
    budget: int


def read(path: Path) -> ServedRun:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows.sort(key=lambda row: row["queued_ts"])
    queued, first, last, prompt, output = (
        np.array([row[name] for row in rows])
        for name in ("queued_ts", "first_token_ts", "last_token_ts", "input_toks", "output_toks")
    )
    return ServedRun(
        Traffic(queued - queued[0], prompt, output),
        first - queued,
        (last - first) / (output - 1),
        last - queued,
    )


def measures(first_s: F64, per_token_s: F64, latency_s: F64, half: slice) -> F64:
    """Mean and p90 of each, [6], as `NAMES`."""
    return np.array(
        [
            statistic(column[half])
            for column in (first_s, per_token_s, latency_s)
            for statistic in (np.mean, lambda values: np.quantile(values, 0.9))
        ]
    )


def simulated(base: Profile, engine: Engine, traffic: Traffic, half: slice) -> F64:
    """The measures of ``half``, all requests being served."""
    gpu = msgspec.structs.replace(
        base, kv_tokens=engine.kv_tokens, chunk_tokens=engine.budget, max_num_running=256
    )
    never = acceptance.draw(acceptance.Constant(0.0), traffic.num_output, max_length=1, seed=0)
    cell = Cell(
        gpu, "lookup", traffic, never, max_length=1, noise=0.0, cost_factor=lambda _: engine.factor
    )
    served = simulate("none", cell).served
    return measures(served.time_to_first_s, served.time_per_token_s, served.latency_s, half)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    path = data_folder() / RUN
    if not path.is_file():
        print(f"left out: no {path}; set SMARTSPEC_DATA to the folder of data")
        sys.exit(0)
    run, base = read(path), profile.load("rtx4090_8b")
    first, second = slice(0, NUM_CALIBRATED), slice(NUM_CALIBRATED, None)
    halves = [
        measures(run.time_to_first_s, run.time_per_token_s, run.latency_s, half)
        for half in (first, second)
    ]

    def loss(engine: Engine) -> float:
        ratio = simulated(base, engine, run.traffic, first) / halves[0]
        return float(np.mean(np.log(ratio) ** 2))

    coarse = min((Engine(k, f, b) for b in BUDGETS for k in KV_TOKENS for f in FACTORS), key=loss)
    print("coarse:", coarse, flush=True)
    best = min(
        (
            Engine(coarse.kv_tokens + k, coarse.factor + f, coarse.budget)
            for k in FINER_KV_TOKENS
            for f in FINER_FACTORS
        ),
        key=loss,
    )
    plain = Engine(base.kv_tokens, 1.0, base.chunk_tokens)
    figures: dict[str, float] = {}
    for prefix, engine, half, wanted in (
        ("", best, second, halves[1]),
        ("coarse_", coarse, second, halves[1]),
        ("calibration_", best, first, halves[0]),
        ("uncalibrated_", plain, second, halves[1]),
    ):
        errors = simulated(base, engine, run.traffic, half) / wanted - 1
        for name, error in zip(NAMES, errors, strict=True):
            figures[f"{prefix}{name}_err_pct"] = 100 * float(error)
    figures |= {f"calibrated_{name}": float(v) for name, v in best._asdict().items()}
    figures["worst_err_pct"] = max(abs(figures[f"{name}_err_pct"]) for name in NAMES)
    record("validation", figures)


if __name__ == "__main__":
    main()
