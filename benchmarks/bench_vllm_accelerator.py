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

Each engine is a process (vllm_arms.py); one that fails, or takes too long, does not end the rest.

Run: python benchmarks/bench_vllm_accelerator.py [--stages turns alone overhead answers]; on the
last run's rows: --summary-only --raw benchmarks/data/vllm_accelerator.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from figures import FOLDER, record
from vllm_accelerator_figures import read, summary

HERE = Path(__file__).parent
LONGEST = 5
STAGES = ("turns", "alone", "overhead", "answers")
ARMS = ("0", "1", "3", "5", "smartspec")
DAEMON_CORES = 4  #: of a machine that has twice as many
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


def llama(
    hidden: int, layers: int, heads: int, kv_heads: int, wide: int, size: int, words: int
) -> dict[str, int]:
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
        self.target = model(folder, "target", self.shape.target, self.shape.max_model_len)
        self.draft = model(folder, "draft", self.shape.draft, self.shape.max_model_len)
        self.daemon: subprocess.Popen[bytes] | None = None

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
        self.daemon = subprocess.Popen(
            [*map(str, command), "--log-level", "info"],
            stdout=log,
            stderr=log,
            preexec_fn=partial(os.sched_setaffinity, 0, self.cores(is_engine=False)),
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

    @staticmethod
    def cores(*, is_engine: bool) -> set[int]:
        """Of an engine, or of its daemon: where there are enough, none is both's."""
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) < 2 * DAEMON_CORES:
            return set(cores)
        return set(cores[:-DAEMON_CORES] if is_engine else cores[-DAEMON_CORES:])

    def run(self, name: str, stage: dict[str, Any]) -> None:
        """An engine through a stage, to its end or as far as it comes."""
        limit_s = self.args.limit_s
        if self.args.eager:
            stage["engine"]["enforce_eager"] = True
        # Its start and end are beside its budget.
        stage |= {"name": name, "raw": str(self.args.raw), "budget_s": limit_s - 25}
        if not stage.get("own_class"):
            stage["endpoint"] = self.start_daemon()
        log = FOLDER / f"vllm_accelerator_{name}.log"
        self.say(f"{name}: begins, {limit_s:.0f} s at most")
        with log.open("wb") as sink:
            child = subprocess.Popen(
                [self.args.python, str(HERE / "vllm_arms.py"), json.dumps(stage)],
                stderr=sink,
                env=ENVIRONMENT | os.environ,
                preexec_fn=partial(os.sched_setaffinity, 0, self.cores(is_engine=True)),
            )
            try:
                said = f"exit code {child.wait(limit_s)}"
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
                said = "out of time"
        self.say(f"{name}: {said}; its log: {log}")

    # -- stages -----------------------------------------------------------------------------------

    def _engine(self, speculation: dict[str, Any] | None) -> dict[str, Any]:
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
        }
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

    def turns(self) -> None:
        self.run("turns", {"engine": self._engine(self._draft()), "arms": ARMS, **self._load()})

    def overhead(self) -> None:
        engine = self._engine(self._draft())
        load = self._load(acceptance=self.args.acceptance[:1])
        self.run("overhead", {"engine": engine, "arms": ["off_3", "shadow_3"], **load})

    def alone(self) -> None:
        """vLLM without our class: no speculation, and static lengths by engines made for them."""
        for length in self.args.alone:
            engine = self._engine(self._draft(length) if length else None)
            stage = {"engine": engine, "own_class": True, "arms": [str(length)]}
            load = self._load(rounds=3) | ({} if length else {"acceptance": []})
            self.run(f"alone_{length}", {**stage, **load})

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
        none = {"engine": engine, "own_class": True, "arms": ["none", "again"], **stage}
        self.run("answers_none", none)
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
            self.run(f"answers_{name}", {"engine": theirs, "arms": arms, **stage})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--stages",
        nargs="+",
        default=STAGES,
        choices=STAGES,
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
    parser.add_argument("--sync", action="store_true", help="without async scheduling")
    parser.add_argument("--eager", action="store_true", help="without graphs and torch.compile")
    parser.add_argument("--limit-s", type=float, default=600.0, help="of an engine")
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
                for stage in args.stages:
                    getattr(bench, stage)()
            finally:
                bench.stop_daemon()
    found = read(args.raw)
    facts = next((row["facts"] for rows in found.values() for row in rows if "facts" in row), {})
    notes = {key: str(facts[key]) for key in ("device", "vllm", "torch") if key in facts}
    record("vllm_accelerator", summary(found), notes={**notes, "shape": args.shape})


if __name__ == "__main__":
    main()
