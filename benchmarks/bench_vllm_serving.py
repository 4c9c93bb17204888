"""What vLLM gains: its own HTTP server under load, without speculation, with its own, steered.

The load is `vllm bench serve`'s. Arms: *none* (no speculation configured), the best static length,
vLLM's own table of lengths by batch size, and SmartSpec. A *pilot* without SmartSpec comes first:
it finds the load that the server bears without speculation, the best static length (least mean
latency over all rates) and, from tokens per second at 1 to 16 requests at a time, the table. Then
the arms take turns: in each repetition, every rate and a schedule through all of them is played to
each arm in an order drawn by lot, the same arrivals to all. SmartSpec is warm: it has been steering
for a while before.

"The best other" is the arm of the lowest mean over all repetitions, which favours it: it is chosen
with the very numbers that it is compared by. `paired.py` gives the statistics. Needs an environment
with vLLM, which `make test-vllm` makes. What was measured is in build/figures/vllm_serving.jsonl,
line by line; figures go to build/figures/vllm_serving.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import vllm_servers as vs
from figures import FOLDER, record
from kept_runs import lines
from paired import paired_ratio
from pinning import pin
from vllm_bench_serve import Answered, BenchServe, Stretch

from smartspec.lab import environment
from smartspec.lab.demo.schedule import Prompt, load_prompts, mixed

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "vllm"))
from vllm_models import model_dir

SMARTSPEC = "smartspec"
SHARES = (0.2, 0.6, 1.1)  #: rates, of what is borne without speculation
RATE_S = 8.0  #: of arrivals, each rate by itself
SCHEDULE_S = 5.0  #: of arrivals, each rate in the schedule
SCHEDULE = (0, 2, 1)  #: its rates in order
LENGTHS = (1, 3, 5)
AT_ONCE = (1, 4, 8, 16)
TURNS, FEWEST = 3, 8  #: of so many at once, in the pilot, and requests at least
WARM_UP_S = 10.0


class Rate(NamedTuple):
    """Seconds of arrivals, at so many per second."""

    seconds: float
    per_second: float


def parts(capacity: float, rate_s: float, schedule_s: float) -> dict[str, list[Rate]]:
    """What is played in a repetition."""
    rates = [share * capacity for share in SHARES]
    played = {f"rate_{i}": [Rate(rate_s, rate)] for i, rate in enumerate(rates)}
    return played | {"schedule": [Rate(schedule_s, rates[i]) for i in SCHEDULE]}


def stretches(prompts: Sequence[Prompt], rates: Sequence[Rate], seed: int) -> list[Stretch]:
    """Prompts at each rate, as many for every seed.

    All prompts come in a mixed order, then again in another.
    """
    rng = np.random.default_rng(seed)
    order: list[Prompt] = []
    made: list[Stretch] = []
    begin_s = 0.0
    for rate in rates:
        count = max(1, round(rate.seconds * rate.per_second))
        while len(order) < count:
            order = [*mixed(prompts, rng), *order]
        drawn = [order.pop() for _ in range(count)]
        made.append(Stretch(begin_s, drawn, rate.per_second, seed=int(rng.integers(1 << 30))))
        begin_s += rate.seconds
    return made


def row_of(answers: Sequence[Answered]) -> dict[str, Any]:
    """What is kept of a play."""
    return {
        "latency_mean_s": float(np.mean([one.latency_s for one in answers])),
        "ttft_mean_s": float(np.mean([one.first_s - one.sent_s for one in answers])),
        "num_tokens": sum(one.num_tokens for one in answers),
        "requests": [
            [one.id, *(round(t, 3) for t in (one.sent_s, one.first_s, one.end_s)), one.num_tokens]
            for one in answers
        ],
        "answers": {one.id: one.text for one in answers},
    }


class Run:
    """Plays loads to servers, and keeps what came of it."""

    def __init__(self, raw: Path, seed: int, load: BenchServe) -> None:
        self.raw = raw
        self.seed = seed
        self.load = load
        self.prompts = load_prompts()
        self.answers: dict[str, str] = {}  #: of the first arm that was asked
        self.num_different = 0
        self.rows: list[dict[str, Any]] = []

    def keep(self, row: dict[str, Any]) -> None:
        for prompt, text in row.pop("answers", {}).items():
            self.num_different += self.answers.setdefault(prompt, text) != text
        self.rows.append(row)
        with self.raw.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def pilot(self, running: Mapping[str, vs.Server]) -> dict[str, Any]:
        """Tokens per second by length and requests at a time, then latencies by length and rate."""
        speeds: dict[str, dict[int, float]] = {name: {} for name in running}
        capacity = 0.0
        for at_once in AT_ONCE:
            order = mixed(self.prompts, np.random.default_rng(self.seed + at_once))
            busy = Stretch(0.0, order[: max(FEWEST, TURNS * at_once)], at_once=at_once)
            for name, server in running.items():
                done = self.load.play(server.port, [busy])
                tokens = sum(one.num_tokens for one in done)
                speed = at_once * tokens / sum(one.latency_s for one in done)
                speeds[name][at_once] = speed
                if name == "none":
                    capacity = max(capacity, speed * len(done) / tokens)
        latencies: dict[str, dict[str, float]] = {name: {} for name in running}
        for part, rates in parts(capacity, RATE_S, SCHEDULE_S).items():
            if part == "schedule":
                continue
            asked = stretches(self.prompts, rates, self.seed + 99)
            for name, server in running.items():
                row = row_of(self.load.play(server.port, asked))
                latencies[name][part] = row["latency_mean_s"]
        static = {
            n: np.mean([values[f"rate_{i}"] for i in range(len(SHARES))])
            for n, values in latencies.items()
            if n in {f"static_{k}" for k in LENGTHS}
        }
        found = {
            "pilot": True,
            "capacity_requests_per_s": capacity,
            "tokens_per_s": speeds,
            "latency_mean_s": latencies,
            "best_static": int(min(static, key=lambda n: float(static[n])).rsplit("_", 1)[1]),
            "table": table_of(speeds),
        }
        return found

    def repetition(self, number: int, running: Mapping[str, vs.Server], capacity: float) -> None:
        rng = np.random.default_rng((self.seed, number))
        played = parts(capacity, RATE_S, SCHEDULE_S)
        for part in rng.permutation(list(played)).tolist():
            asked = stretches(self.prompts, played[part], int(rng.integers(1 << 30)))
            for place, name in enumerate(rng.permutation(list(running)).tolist()):
                server = running[name]
                before, steal = server.counters(), psutil.cpu_times().steal
                began = time.monotonic()
                row = row_of(self.load.play(server.port, asked))
                wall_s = time.monotonic() - began
                after = server.counters()
                self.keep(
                    {
                        "repetition": number,
                        "part": part,
                        "arm": name,
                        "place": place,
                        **row,
                        "wall_s": round(wall_s, 2),
                        "stolen_share": (psutil.cpu_times().steal - steal)
                        / wall_s
                        / psutil.cpu_count(),
                        **{key: after[key] - before[key] for key in after},
                    }
                )
        means = {
            name: np.mean(
                [
                    r["latency_mean_s"]
                    for r in self.rows
                    if r.get("repetition") == number and r["arm"] == name
                ]
            )
            for name in running
        }
        print(
            f"repetition {number}: "
            + ", ".join(f"{name} {value:.2f} s" for name, value in means.items()),
            flush=True,
        )


def table_of(speeds: Mapping[str, Mapping[int, float]]) -> list[list[int]]:
    """vLLM's table: the fastest lengths by batch size, of those that do not rise with it.

    The fastest of each size by itself would follow the pilot's noise. Greatest product of speeds;
    between two measured sizes the boundary is their geometric mean.
    """
    falling = itertools.combinations_with_replacement((*reversed(LENGTHS), 0), len(AT_ONCE))

    def speed(lengths: Sequence[int]) -> float:
        pairs = zip(AT_ONCE, lengths, strict=True)
        return math.prod(speeds[f"static_{length}"][size] for size, length in pairs)

    rows: list[list[int]] = []
    low = 1
    for i, length in enumerate(max(falling, key=speed)):
        last = i == len(AT_ONCE) - 1
        high = vs.MAX_NUM_SEQS if last else int(math.sqrt(AT_ONCE[i] * AT_ONCE[i + 1]))
        if rows and rows[-1][2] == length:
            rows[-1][1] = high
        else:
            rows.append([low, high, length])
        low = high + 1
    return rows


def figures_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Figures over repetitions; ratios below 1: SmartSpec is faster."""
    means: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        by_arm = means.setdefault(row["part"], {})
        by_arm.setdefault(row["arm"], []).append(row["latency_mean_s"])
    figures: dict[str, float] = {}
    for part in sorted(means):
        by_arm = means[part]
        others = {name: values for name, values in by_arm.items() if name != SMARTSPEC}
        best = min(others, key=lambda name: float(np.mean(others[name])))
        ratio = paired_ratio(by_arm[SMARTSPEC], others[best])
        figures |= ratio.figures(f"{part}_vs_best")
        for name, values in others.items():
            figures[f"{part}_vs_{name}"] = paired_ratio(by_arm[SMARTSPEC], values).value
        for name, values in by_arm.items():
            figures[f"{part}_{name}_latency_mean_s"] = float(np.mean(values))
            of_arm = [r for r in rows if r["part"] == part and r["arm"] == name]
            figures[f"{part}_{name}_ttft_mean_s"] = float(
                np.mean([r["ttft_mean_s"] for r in of_arm])
            )
            figures[f"{part}_{name}_drafted_per_token"] = sum(r["drafted"] for r in of_arm) / sum(
                r["num_tokens"] for r in of_arm
            )
    return figures


def complete(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the repetitions that were played to their end."""
    played = [row for row in rows if "repetition" in row]
    arms = {row["arm"] for row in played}
    all_parts = {row["part"] for row in played}
    counts = {
        n: sum(r["repetition"] == n for r in played) for n in {r["repetition"] for r in played}
    }
    return [row for row in played if counts[row["repetition"]] == len(arms) * len(all_parts)]


def measure(options: argparse.Namespace, raw: Path) -> None:
    """Servers, pilot, repetitions; everything is appended to ``raw``."""
    model, folder = model_dir(), Path(tempfile.mkdtemp(prefix="ss-"))
    with ExitStack() as stack:
        pin_self()
        load = BenchServe(options.python, model, vs.NAME)
        stack.callback(load.close)
        run = Run(raw, options.seed, load)

        def started(arms: Sequence[vs.Arm]) -> dict[str, vs.Server]:
            made = vs.servers(options.python, model, arms, folder, options.dtype)
            return dict(stack.enter_context(made))

        daemon = stack.enter_context(vs.daemon(str(folder), folder / "daemon.log"))
        running = started([vs.none()])
        done = [row for row in lines(raw) if row.get("pilot")] + complete(lines(raw))
        raw.write_text("".join(json.dumps(row) + "\n" for row in done))
        found = next((row for row in done if row.get("pilot")), None)
        if found is None:
            with ExitStack() as only:
                arms = [vs.static(length) for length in (0, *LENGTHS)]
                made = vs.servers(options.python, model, arms, folder, options.dtype)
                found = run.pilot({**running, **only.enter_context(made)})
            run.keep({**found, "env": environment.describe(), "dtype": options.dtype})
        print(json.dumps(found), flush=True)
        running |= started(
            [
                vs.static(found["best_static"]),
                vs.table(found["table"]),
                vs.smartspec(f"ipc://{folder}/engines.sock"),
            ]
        )
        run.keep({"idle_share": vs.idle_share(running)})
        capacity = found["capacity_requests_per_s"]
        for name, server in running.items():
            shares = (*SHARES, SHARES[1]) if name == SMARTSPEC else SHARES[1:2]
            warm_up = [Rate(WARM_UP_S, share * capacity) for share in shares]
            load.play(server.port, stretches(run.prompts, warm_up, options.seed + 7))
        first = 1 + max((row["repetition"] for row in complete(done)), default=-1)
        for number in range(first, options.repetitions):
            spent = daemon.cpu_times().user
            run.repetition(number, running, capacity)
            run.keep({"daemon_cpu_s": daemon.cpu_times().user - spent})
        run.keep({"num_different_answers": run.num_different})


def pin_self() -> None:
    """The load generator, which inherits it, shares a core with all that is not the engine."""
    pin(os.getpid(), vs.OTHER_CORE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).parents[1] / ".venv-vllm" / "bin" / "python"
    parser.add_argument("--python", default=os.environ.get("SMARTSPEC_VLLM_PYTHON", str(default)))
    parser.add_argument("--repetitions", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--resume", action="store_true", help="go on with vllm_serving.jsonl")
    parser.add_argument("--figures", type=Path, help="only work out the figures of this raw file")
    args = parser.parse_args()
    raw: Path = args.figures or FOLDER / "vllm_serving.jsonl"
    if not args.figures:
        if not Path(args.python).exists():
            print(f"{args.python} does not exist: `make test-vllm` makes an environment with vLLM")
            return
        FOLDER.mkdir(parents=True, exist_ok=True)
        if not args.resume:
            raw.unlink(missing_ok=True)
        measure(args, raw)
    rows = complete(lines(raw))
    figures = {"num_repetitions": len({row["repetition"] for row in rows}), **figures_of(rows)}
    record("vllm_serving", figures, seed=args.seed)


if __name__ == "__main__":
    main()
