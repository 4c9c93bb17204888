"""Real vLLM on an accelerator: none, static lengths and SmartSpec by turns; and the same answers.

*Turns*: a target and a draft model of random weights (`--shape`; drawn on the device, so that
nothing is read or fetched), async scheduling and CUDA graphs as vLLM has them. What a pass costs
does not depend on weights; how many drafts are accepted is drawn by vLLM's own
`rejection_sample_method="synthetic"`, each with the same probability. So costs are real,
acceptance is made up, and answers mean nothing. At each batch size and acceptance all arms, in
random order within a round, decode the same requests on from one another, none of which ends or
begins meanwhile; seconds over tokens of whole steps count. The daemon is a process of its own and
begins knowing nothing. In the engine that speculates even length 0 has its drafter keep up, so
*none* is an engine of its own (`alone`), as is vLLM's own class with a static length.

*Overhead*: at one length, vLLM alone (`off_K`: its own dynamic length, nothing of ours) and all
that SmartSpec does with its lengths replaced by that one (`shadow_K`), by turns in one engine.

*Answers*: SmolLM2-135M (`make model`) in fp32, greedy, requests that join and leave: without
speculation, and for each method vLLM's own static length, lengths drawn at random for each request
and step, and SmartSpec. How many answers are those of no speculation, what vLLM's metrics say of
drafts and what ours do, and how many steps had which length.

Each engine is a process (vllm_arms.py); one that fails is told, tried again with less (without
async scheduling; without graphs and torch.compile), and does not end the rest.

Run: python benchmarks/bench_vllm_accelerator.py [--stages turns alone overhead answers]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from figures import FOLDER, record
from paired import paired_ratio

HERE = Path(__file__).parent
LONGEST = 5
ARMS = ("0", "1", "3", "5", "smartspec")
SAMPLE_TOKENS = 96
WORDS = (
    "Repeat: the quick brown fox jumps over the lazy dog. the quick brown fox",
    "Count: 1 2 3 4 5 6 7 8 9",
    "def add(a, b):\n    return a + b\n\ndef sub(a, b):",
    "A person as JSON, with name and number:",
    "Once upon a time there was a fox and a dog. The fox and the dog",
    "a b c a b c a b c a b",
    "List of fruits: apple, banana, apple, banana,",
    "The capital of France is Paris. The capital of Italy is",
)


class Shape(NamedTuple):
    """Sizes of the two models, as their configurations have them, and of the load."""

    target: dict[str, int]
    draft: dict[str, int]
    batches: tuple[int, ...]
    prompt: int
    max_model_len: int


def llama(hidden: int, layers: int, heads: int, kv_heads: int, wide: int, size: int, words: int):
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": wide,
        "head_dim": size,
        "vocab_size": words,
    }


SHAPES = {
    # Llama-3.1-8B's; the draft model is Llama-3.2-1B's with heads of the target's size, since
    # vLLM keeps both in one KV cache.
    "8b": Shape(
        llama(4096, 32, 32, 8, 14336, 128, 128_256),
        llama(2048, 16, 16, 8, 8192, 128, 128_256),
        (1, 8, 32, 128),
        256,
        4096,
    ),
    "tiny": Shape(
        llama(256, 4, 4, 2, 512, 64, 2048), llama(128, 1, 4, 2, 256, 64, 2048), (1, 4), 32, 1024
    ),
}
#: What an engine is tried with, one after the other.
FALLBACKS: tuple[dict[str, Any], ...] = (
    {},
    {"async_scheduling": False},
    {"async_scheduling": False, "enforce_eager": True},
)
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_USE_DEEP_GEMM": "0",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "TRITON_F32_DEFAULT": "ieee",  # else answers in fp32 are computed in tf32
}


def model(folder: Path, name: str, sizes: dict[str, int], max_model_len: int) -> str:
    """A directory with nothing but a configuration."""
    made = folder / name
    made.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "max_position_embeddings": max_model_len,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
        **sizes,
    }
    (made / "config.json").write_text(json.dumps(config))
    return str(made)


def has(python: str, package: str, what: str = "True") -> bool:
    """Whether ``python`` has a package of which ``what`` is true."""
    script = f"import importlib.util as u; assert u.find_spec({package!r})"
    if what != "True":
        script += f"; import {package}; assert {what}"
    return subprocess.run([python, "-c", script], stderr=subprocess.DEVNULL).returncode == 0


class Bench:
    """Stages, one after the other."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args = args
        self.folder = folder
        self.began = time.monotonic()
        self.shape = SHAPES[args.shape]
        self.daemon: subprocess.Popen[bytes] | None = None

    @property
    def left_s(self) -> float:
        return float(self.args.budget_s - (time.monotonic() - self.began))

    def say(self, what: str) -> None:
        print(f"[{time.monotonic() - self.began:.0f} s] {what}", flush=True)

    # -- the daemon -------------------------------------------------------------------------------

    def start_daemon(self) -> str:
        """A new one, that knows nothing; where it listens."""
        self.stop_daemon()
        runtime = Path(tempfile.mkdtemp(prefix="ss-", dir=self.folder))
        command = [sys.executable, "-m", "smartspec.daemon.cli", "run", "--runtime-dir", runtime]
        command += ["--set", "telemetry.enabled=false", "--set", "state.enabled=false"]
        log = (FOLDER / "vllm_accelerator_daemon.log").open("ab")
        cores = sorted(os.sched_getaffinity(0))
        theirs = set(cores[-4:]) if len(cores) >= 8 else set(cores)
        self.daemon = subprocess.Popen(
            [*map(str, command), "--log-level", "info"],
            stdout=log,
            stderr=log,
            preexec_fn=lambda: os.sched_setaffinity(0, theirs),
        )
        socket = runtime / "engines.sock"
        deadline = time.monotonic() + 30
        while not socket.exists():
            if self.daemon.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no daemon: see {log.name}")
            time.sleep(0.05)
        return f"ipc://{socket}"

    def stop_daemon(self) -> None:
        if self.daemon is not None:
            self.daemon.terminate()
            try:
                self.daemon.wait(10)
            except subprocess.TimeoutExpired:
                self.daemon.kill()
            self.daemon = None

    # -- an engine --------------------------------------------------------------------------------

    def run(self, name: str, stage: dict[str, Any], limit_s: float, **environment: str) -> bool:
        """Whether a stage ran to its end, with whatever of `FALLBACKS` it took."""
        for number, less in enumerate(FALLBACKS):
            if number and not self.args.fall_back:
                break
            limit = min(limit_s, self.left_s)
            if limit < self.args.least_s:
                self.say(f"{name}: no time left")
                return False
            engine = stage["engine"] | less
            if engine == stage["engine"] and number:
                continue
            if self.args.eager:
                engine["enforce_eager"] = True
            if self.args.backend and "attention_config" not in engine:
                engine["attention_config"] = {"backend": self.args.backend}
            label = name if not number else f"{name}_less_{number}"
            told = {
                **stage,
                "name": label,
                "raw": str(self.args.raw),
                "engine": engine,
                "budget_s": limit - 25,  # its start and end are beside it
            }
            if not stage.get("own_class"):
                told["endpoint"] = self.start_daemon()
            if self._child(label, told, limit, environment):
                return True
        return False

    def _child(
        self, label: str, stage: dict[str, Any], limit_s: float, environment: dict[str, str]
    ) -> bool:
        log = FOLDER / f"vllm_accelerator_{label}.log"
        self.say(f"{label}: begins, {limit_s:.0f} s at most")
        cores = sorted(os.sched_getaffinity(0))
        ours = set(cores[:-4]) if len(cores) >= 8 else set(cores)
        with log.open("wb") as sink:
            child = subprocess.Popen(
                [self.args.python, str(HERE / "vllm_arms.py"), json.dumps(stage)],
                stderr=sink,
                env={**ENVIRONMENT, **os.environ, **environment},
                preexec_fn=lambda: os.sched_setaffinity(0, ours),
            )
            try:
                code: int | None = child.wait(limit_s)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
                code = None
        self.say(f"{label}: " + ("out of time" if code is None else f"exit code {code}"))
        if code:
            lines = log.read_text("utf-8", "replace").splitlines()
            print("\n".join(line[:300] for line in lines[-self.args.tail :]), flush=True)
        return code == 0

    # -- stages -----------------------------------------------------------------------------------

    def _engine(self, speculation: dict[str, Any] | None, **more: Any) -> dict[str, Any]:
        """Of random weights."""
        engine: dict[str, Any] = {
            "model": self.target,
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "max_model_len": self.shape.max_model_len,
            "max_num_seqs": max(self.shape.batches),
            "max_num_batched_tokens": 8192 if self.args.shape == "8b" else 2048,
            "enable_prefix_caching": False,
            "gpu_memory_utilization": self.args.memory,
            "seed": 0,
        } | more
        if speculation:
            engine["speculative_config"] = speculation
            engine["async_scheduling"] = not self.args.sync
        return engine

    def _draft(self, length: int = LONGEST) -> dict[str, Any]:
        found: dict[str, Any] = {
            "method": "draft_model",
            "model": self.draft,
            "num_speculative_tokens": length,
        }
        if self.args.acceptance:
            rate = self.args.acceptance[0]
            found["rejection_sample_method"] = "synthetic"
            found["synthetic_acceptance_rates"] = [rate ** (k + 1) for k in range(length)]
        return found

    def _load(self, **more: Any) -> dict[str, Any]:
        return {
            "batches": list(self.args.batches or self.shape.batches),
            "acceptance": self.args.acceptance,
            "rounds": self.args.rounds,
            "turn_s": self.args.turn_s,
            "warm_up_s": self.args.warm_up_s,
            "prompt": self.shape.prompt,
        } | more

    def stages(self) -> None:
        self.target = model(self.folder, "target", self.shape.target, self.shape.max_model_len)
        self.draft = model(self.folder, "draft", self.shape.draft, self.shape.max_model_len)
        for stage in self.args.stages:
            getattr(self, stage)()
        self.stop_daemon()

    def smoke(self) -> None:
        """Whether vLLM runs here at all: tiny, without graphs and torch.compile."""
        tiny = SHAPES["tiny"]
        target = model(self.folder, "tiny", tiny.target, tiny.max_model_len)
        draft = model(self.folder, "tiny-draft", tiny.draft, tiny.max_model_len)
        engine = self._engine(
            self._draft() | {"model": draft},
            model=target,
            max_model_len=tiny.max_model_len,
            max_num_batched_tokens=2048,
            enforce_eager=True,
            gpu_memory_utilization=0.3,
        )
        load = self._load(batches=[4], rounds=1, turn_s=0.5, warm_up_s=1.0, prompt=tiny.prompt)
        self.run("smoke", {"engine": engine, "arms": ["5", "smartspec"], **load}, 100)

    def turns(self) -> None:
        self.run(
            "turns",
            {"engine": self._engine(self._draft()), "arms": list(ARMS), **self._load()},
            self.args.limit_s,
        )

    def overhead(self) -> None:
        arms = ["off_3", "shadow_3"]
        engine = self._engine(self._draft())
        stage = {"engine": engine, "arms": arms, **self._load(acceptance=self.args.acceptance[:1])}
        self.run("overhead", stage, self.args.limit_s)

    def alone(self) -> None:
        """vLLM without our class: no speculation, and static lengths by engines made for them."""
        for length in self.args.alone:
            engine = self._engine(self._draft(length) if length else None)
            stage = {"engine": engine, "own_class": True, "arms": [str(length)]}
            load = self._load(rounds=3) | ({} if length else {"acceptance": []})
            self.run(f"alone_{length}", {**stage, **load}, self.args.limit_s)

    def answers(self) -> None:
        sys.path.insert(0, str(HERE.parent / "tests" / "vllm"))
        from vllm_models import draft_dir, model_dir

        source = str(model_dir())
        engine: dict[str, Any] = {
            "model": source,
            "dtype": "float32",
            "skip_tokenizer_init": True,
            "max_model_len": 512,
            "max_num_seqs": 16,
            "max_num_batched_tokens": 512,
            "enable_prefix_caching": False,
            "gpu_memory_utilization": 0.3,
            "seed": 0,
        }
        if self.args.python == sys.executable:  # else on a CPU: it has one backend
            engine["attention_config"] = {"backend": "TRITON_ATTN"}
        prompts = [f"{n}. {WORDS[n % 8]}" if n > 7 else WORDS[n] for n in range(self.args.prompts)]
        stage = {"prompts": prompts, "max_tokens": SAMPLE_TOKENS, "tokenizer": source}
        ngram = {
            "method": "ngram",
            "num_speculative_tokens": LONGEST,
            "prompt_lookup_min": 2,
            "prompt_lookup_max": 5,
        }
        draft = {"method": "draft_model", "model": str(draft_dir()), "num_speculative_tokens": 4}
        limit = self.args.limit_s
        none = {"engine": engine, "own_class": True, "arms": ["none", "again"], **stage}
        self.run("answers_none", none, limit)
        for name, speculation, is_async in (
            ("draft_model_async", draft, True),
            ("ngram", ngram, False),
            ("draft_model", draft, False),
        ):
            if is_async and self.args.sync:
                continue
            length = str(speculation["num_speculative_tokens"])
            theirs = engine | {"speculative_config": speculation, "async_scheduling": is_async}
            arms = [length, "random", "smartspec"]
            self.run(f"answers_{name}", {"engine": theirs, "arms": arms, **stage}, limit)


# -- what came of it ------------------------------------------------------------------------------


def read(raw: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows by stage."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in raw.read_text("utf-8").splitlines():
        row = json.loads(line)
        found.setdefault(row["stage"], []).append(row)
    return found


def places(rows: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, list[dict[str, Any]]]]]:
    """Turns of each batch size and acceptance, by arm, for rounds that all arms have."""
    turns = [row for row in rows if row.get("round", -1) >= 0]
    for batch, rate in dict.fromkeys((row["batch"], row["acceptance"]) for row in turns):
        here = [row for row in turns if (row["batch"], row["acceptance"]) == (batch, rate)]
        arms = {row["arm"] for row in here}
        rounds = {row["round"] for row in here}
        for number in rounds.copy():
            if {row["arm"] for row in here if row["round"] == number} != arms:
                rounds.discard(number)
        if rounds:
            name = f"batch_{batch}" + ("" if rate is None else f"_accept_{100 * rate:.0f}")
            kept = sorted((r for r in here if r["round"] in rounds), key=lambda r: r["round"])
            yield name, {arm: [row for row in kept if row["arm"] == arm] for arm in sorted(arms)}


def seconds_per_token(turns: list[dict[str, Any]]) -> list[float]:
    return [turn["s"] / turn["tokens"] for turn in turns]


def summary(found: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Figures of all stages that have any."""
    figures: dict[str, float] = {}
    for stage, rows in found.items():
        if stage.startswith(("turns", "alone", "overhead")):
            for place, arms in places(rows):
                figures |= _of_turns(f"{stage}_{place}", arms)
    for stage, rows in found.items():
        if stage.startswith("answers"):
            figures |= _of_answers(stage, rows, found.get("answers_none", []))
    return figures


def _of_turns(name: str, arms: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    figures: dict[str, float] = {}
    for arm, turns in arms.items():
        figures[f"{name}_{arm}_tokens_per_s"] = 1 / float(np.mean(seconds_per_token(turns)))
        figures[f"{name}_{arm}_step_ms"] = float(np.mean([turn["step_ms"] for turn in turns]))
    ours = arms.get("smartspec") or arms.get("shadow_3") or []
    for key in ("own_us", "meanwhile_us") if ours else ():
        figures[f"{name}_{key}"] = float(np.median([turn[key] for turn in ours]))
    if "smartspec" in arms:
        steps = sum(turn["steps"] for turn in ours)
        figures[f"{name}_mean_to_draft"] = sum(turn["to_draft"] for turn in ours) / steps
        cost = {arm: seconds_per_token(turns) for arm, turns in arms.items()}
        statics = [arm for arm in arms if arm != "smartspec"]
        best = min(statics, key=lambda arm: float(np.mean(cost[arm])))
        figures[f"{name}_best_static"] = float(best)
        for other, what in ((best, "best_static"), ("0", "length_0")):
            ratio = paired_ratio(cost["smartspec"], cost[other])
            figures |= ratio.figures(f"{name}_smartspec_over_{what}")
    if "shadow_3" in arms and "off_3" in arms:
        times = [[turn["s"] / turn["steps"] for turn in arms[arm]] for arm in ("shadow_3", "off_3")]
        figures |= paired_ratio(*times).figures(f"{name}_step_with_over_without")
    return figures


def _of_answers(
    stage: str, rows: list[dict[str, Any]], plain: list[dict[str, Any]]
) -> dict[str, float]:
    figures: dict[str, float] = {}
    expected = next((row["answers"] for row in plain if row.get("arm") == "none"), None)
    for row in rows:
        if "answers" not in row or expected is None:
            continue
        name = f"{stage}_{row['arm']}"
        same = sum(a == b for a, b in zip(row["answers"], expected, strict=True))
        figures |= {f"{name}_same": same, f"{name}_of": len(expected)}
        figures |= {f"{name}_{key}": row[key] for key in ("drafted", "accepted")}
        if "ours" in row:
            figures[f"{name}_counted_drafted"] = row["ours"][0]
            figures[f"{name}_counted_accepted"] = row["ours"][1]
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--stages",
        nargs="+",
        default=["turns", "alone", "overhead", "answers"],
        choices=("smoke", "turns", "alone", "overhead", "answers"),
    )
    parser.add_argument("--shape", choices=SHAPES, help="default: 8b; tiny on a CPU")
    parser.add_argument("--python", default=os.environ.get("SMARTSPEC_VLLM_PYTHON", sys.executable))
    parser.add_argument("--batches", type=int, nargs="+", help="default: the shape's")
    parser.add_argument("--acceptance", type=float, nargs="*", default=[0.8, 0.5])
    parser.add_argument("--alone", type=int, nargs="+", default=[0, 3], help="lengths of `alone`")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--turn-s", type=float, default=0.35)
    parser.add_argument("--warm-up-s", type=float, default=4.0, help="at each batch size")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--memory", type=float, default=0.85, help="share of the device's to take")
    parser.add_argument("--backend", default="", help="of attention; default: vLLM's choice")
    parser.add_argument("--sync", action="store_true", help="without async scheduling")
    parser.add_argument("--eager", action="store_true", help="without graphs and torch.compile")
    parser.add_argument("--no-fall-back", dest="fall_back", action="store_false")
    parser.add_argument("--limit-s", type=float, default=600.0, help="of an engine")
    parser.add_argument("--least-s", type=float, default=45.0, help="that an engine is begun with")
    parser.add_argument("--budget-s", type=float, default=3600.0, help="of all")
    parser.add_argument("--tail", type=int, default=30, help="lines shown of what failed")
    parser.add_argument("--raw", type=Path, default=FOLDER / "vllm_accelerator.jsonl")
    parser.add_argument("--summary-only", action="store_true", help="of what --raw has")
    args = parser.parse_args()
    if not args.summary_only and not has(args.python, "vllm"):
        print(f"{args.python} has no vLLM: name one that has, --python PATH")
        return
    if args.shape is None:
        on_cpu = not has(args.python, "torch", "torch.cuda.is_available()")
        args.shape = "tiny" if on_cpu else "8b"
        if on_cpu:  # has neither graphs, nor async scheduling, nor synthetic sampling
            args.sync = args.eager = True
            args.acceptance, args.memory = [], 0.3
    for folder in (FOLDER, args.raw.parent):
        folder.mkdir(parents=True, exist_ok=True)
    if not args.summary_only:
        args.raw.write_text("")
        with tempfile.TemporaryDirectory(prefix="ss-") as scratch:
            bench = Bench(args, Path(scratch))
            try:
                bench.stages()
            finally:
                bench.stop_daemon()
    found = read(args.raw)
    facts = next((row["facts"] for rows in found.values() for row in rows if "facts" in row), {})
    notes = {key: str(facts[key]) for key in ("device", "vllm", "torch") if key in facts}
    record("vllm_accelerator", summary(found), notes={**notes, "shape": args.shape})


if __name__ == "__main__":
    main()
