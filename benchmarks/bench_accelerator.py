"""What verification costs on an accelerator, and none, static lengths and SmartSpec side by side.

Target and draft model have random weights: what a pass costs does not depend on them. What they
say is scripted (`Script`): the target's next token follows from the one before and its position,
so that outputs do not depend on what else is in the pass, and drafts are right as often as their
request's class has it, with calibrated confidences. So acceptance is made up, and costs are real.

First the target's pass alone: requests at a context, so many tokens each, median of some passes.
Then, at each batch size, one worker whose batch never empties; who decides lengths changes every
few seconds, in random order, so that each round is a comparison within seconds. What counts is
seconds over tokens emitted, in steps that carry no prompts. The daemon is a process of its own and
begins knowing nothing; batch sizes come one after the other, as when load rises.

Run: python benchmarks/bench_accelerator.py [--shape 1b] [--raw FILE]; --shape tiny on a CPU
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from figures import FOLDER, record
from paired import paired_ratio
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from smartspec.engine_adapter.base import FixedLength
from smartspec.engine_adapter.link import EngineLink
from smartspec.engine_adapter.reference.draft_model import DraftModel
from smartspec.engine_adapter.reference.model_runner import ModelRunner, Segment
from smartspec.engine_adapter.reference.replies import Ready
from smartspec.engine_adapter.reference.sequence import Request
from smartspec.engine_adapter.reference.service import link_to
from smartspec.engine_adapter.reference.worker import Worker
from smartspec.lab.demo.processes import DaemonProcess

MOST = 8
STATIC = (0, 1, 3, 5)
ACCURACY = (0.8, 0.7, 0.55, 0.4)  #: of drafts, by class of request
SPREAD = 0.15  #: of confidences around that: half of the drafts above, half below
SAID = 1e4  #: logit of what the target says
REPEATS = 7  #: passes timed for each cell of the cost table
LEFT_OUT = 2  #: steps after a change: begun, or drafted for, under the arm before
WARM_UP_S = 8.0


class Shape(NamedTuple):
    """Sizes of models and load."""

    target: dict[str, int]
    draft: dict[str, int]
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    max_model_len: int
    prompt: tuple[int, int]  #: tokens, least and most
    max_tokens: int


def llama(
    hidden: int, layers: int, heads: int, kv_heads: int, wide: int, words: int
) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": wide,
        "vocab_size": words,
    }


SHAPES = {
    # Llama-3.2-1B's; the draft is of its width and vocabulary, with one layer.
    "1b": Shape(
        llama(2048, 16, 32, 8, 8192, 128_256),
        llama(2048, 1, 32, 8, 8192, 128_256),
        (1, 8, 32, 64, 128),
        (128, 1024, 4096),
        1024,
        (64, 512),
        192,
    ),
    "tiny": Shape(
        llama(64, 4, 4, 2, 128, 512),
        llama(64, 1, 4, 2, 128, 512),
        (1, 4),
        (32, 128),
        256,
        (8, 32),
        48,
    ),
}


class Script:
    """Who says what: a token's class is its remainder, which an answer keeps from its prompt on.

    Parameters
    ----------
    num_words : of the vocabulary
    """

    def __init__(self, num_words: int) -> None:
        self._num_words = num_words // len(ACCURACY)  # of a class

    def following(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """What the target says after each of ``tokens``, all [M]."""
        word = _mixed(tokens, positions, 1) % self._num_words
        return word * len(ACCURACY) + tokens % len(ACCURACY)

    def drafted(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """What the draft model says, and how sure it is, which is how often it is right."""
        said = self.following(tokens, positions)
        mean = torch.tensor(ACCURACY, device=tokens.device)[tokens % len(ACCURACY)]
        mood = _mixed(tokens, positions, 2) % 2 * 2 - 1
        sure = mean + SPREAD * mood
        wrong = _mixed(tokens, positions, 3) / 2**31 >= sure
        beside = (said + len(ACCURACY)) % (self._num_words * len(ACCURACY))
        return torch.where(wrong, beside, said), sure


def _mixed(tokens: Tensor, positions: Tensor, salt: int) -> Tensor:
    """Whole numbers in [0, 2**31), as good as drawn, and always the same."""
    mixed = tokens * 6_364_136_223_846_793_005 + positions * 1_442_695_040_888_963_407 + salt
    for _ in range(2):  # as SplitMix64 does, on integers with a sign
        mixed = (mixed ^ (mixed >> 31 & 0x1_FFFF_FFFF)) * 3_935_559_000_370_003_845
    return mixed >> 33 & 0x7FFF_FFFF


def say(model: LlamaForCausalLM, speak: Callable[[Tensor, Tensor, Tensor], None]) -> None:
    """Let ``speak(tokens, positions, logits)`` change what each pass gives, in place."""

    def hook(_module: Any, _args: Any, options: dict[str, Any], output: Any) -> None:
        keep = options["logits_to_keep"]
        speak(options["input_ids"][0][keep], options["position_ids"][0][keep], output.logits[0])

    model.register_forward_hook(hook, with_kwargs=True)


def script(target: LlamaForCausalLM, draft: LlamaForCausalLM) -> None:
    words = Script(target.config.vocab_size)

    def of_target(tokens: Tensor, positions: Tensor, logits: Tensor) -> None:
        logits.scatter_(1, words.following(tokens, positions)[:, None], SAID)

    def of_draft(tokens: Tensor, positions: Tensor, logits: Tensor) -> None:
        said, sure = words.drafted(tokens, positions)
        own = logits.float().logsumexp(-1) + torch.logit(sure)
        logits.scatter_(1, said[:, None], own.to(logits.dtype)[:, None])

    say(target, of_target)
    say(draft, of_draft)


def make(sizes: dict[str, int], device: str, max_model_len: int) -> Any:
    """A model of random weights: bfloat16 on an accelerator."""
    torch.manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    config = LlamaConfig(max_position_embeddings=max_model_len)
    for name, size in sizes.items():
        setattr(config, name, size)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    return model.to(dtype).eval()


def wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def costs(target: LlamaForCausalLM, shape: Shape, device: str) -> list[dict[str, float]]:
    """Milliseconds of the target's pass by requests, tokens of each and context."""
    found = []
    rng = np.random.default_rng(0)
    for context in shape.contexts:
        runner = ModelRunner(target, max(shape.batches), context + MOST + 1)
        for batch in shape.batches:
            for size in (1, 2, 3, 4, 6, 9):
                words = rng.integers(0, target.config.vocab_size, size).tolist()
                segments = [Segment(row, context, words, size) for row in range(batch)]
                times = []
                for _ in range(REPEATS + 2):
                    wait(device)
                    begin = time.perf_counter()
                    runner.forward(segments).argmax(-1).tolist()
                    times.append(time.perf_counter() - begin)
                ms = 1e3 * float(np.median(times[2:]))
                found.append({"context": context, "batch": batch, "tokens": size, "ms": ms})
        del runner
    return found


class Turns:
    """A worker whose batch never empties, under one arm after the other."""

    def __init__(self, worker: Worker, shape: Shape, num_words: int, link: EngineLink) -> None:
        self._worker = worker
        self._shape = shape
        self._num_words = num_words
        self._link = link
        self._rng = np.random.default_rng(0)
        self.lengths: list[float] = []

    def _request(self) -> Request:
        low, high = self._shape.prompt
        prompt = self._rng.integers(0, self._num_words, int(self._rng.integers(low, high + 1)))
        return Request(prompt.tolist(), self._shape.max_tokens)

    def run(self, length: int | None, batch: int, seconds: float) -> tuple[float, int]:
        """Seconds and tokens of the next ``seconds``; length None: SmartSpec's."""
        self._worker.length_source = self._link if length is None else FixedLength(length)
        spent, tokens, num_steps = 0.0, 0, 0
        self.lengths = []
        until = time.monotonic() + seconds
        while time.monotonic() < until or not tokens:
            while self._worker.num_running + self._worker.num_waiting < batch:
                self._worker.add_request(self._request())
            facts = self._worker.step().facts
            if facts is None or facts.batch.num_prefill_tokens or facts.batch.size != batch:
                continue
            num_steps += 1
            if num_steps > LEFT_OUT:
                spent += facts.step_s
                tokens += int(facts.num_emitted.sum())
                self.lengths.append(float(facts.num_drafted.mean()))
        return spent, tokens


def show_costs(rows: list[dict[str, float]]) -> None:
    sizes = sorted({row["tokens"] for row in rows})
    table = Table("context", "requests", *(f"{size:.0f} each" for size in sizes), title="ms a pass")
    by = {(row["context"], row["batch"], row["tokens"]): row["ms"] for row in rows}
    for context, batch in dict.fromkeys((row["context"], row["batch"]) for row in rows):
        cells = (f"{by[context, batch, size]:.2f}" for size in sizes)
        table.add_row(f"{context:.0f}", f"{batch:.0f}", *cells)
    Console(width=100).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--turn-s", type=float, default=1.5)
    parser.add_argument("--raw", type=Path, default=FOLDER / "accelerator.jsonl")
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"{args.shape} shape on {name}, torch {torch.__version__}", flush=True)
    longest = max(*shape.contexts, shape.max_model_len) + MOST + 1
    target, draft = (make(sizes, device, longest) for sizes in (shape.target, shape.draft))
    raw: list[dict[str, Any]] = [{"device": name, "shape": args.shape, "torch": torch.__version__}]
    rows = costs(target, shape, device)
    show_costs(rows)
    raw += rows
    most = max(shape.batches)
    drafter = DraftModel(ModelRunner(draft, most, shape.max_model_len), MOST)
    worker = Worker(
        target,
        proposer=drafter,
        max_num_running=most,
        max_model_len=shape.max_model_len,
        max_prefill_tokens=2048,
    )
    script(target, draft)
    facts = Ready(
        model=f"random-{args.shape}",
        proposer=drafter.name,
        draft_model=f"random-{args.shape}-draft",
        engine_version="bench",
        device=name,
        dtype=str(target.dtype),
        max_length=MOST,
        max_num_running=most,
        max_model_len=shape.max_model_len,
        own_length=3,
        features=worker.features,
    )
    figures: dict[str, float] = {"num_rounds": args.rounds}
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(prefix="smartspec-") as folder:
        daemon = DaemonProcess(Path(folder), FOLDER / "accelerator_daemon.log")
        try:
            daemon.wait_ready()
            link = link_to(daemon.endpoint, "bench")(facts)
            turns = Turns(worker, shape, target.config.vocab_size, link)
            for batch in shape.batches:
                turns.run(None, batch, WARM_UP_S)
                cost: dict[int | None, list[float]] = {arm: [] for arm in (*STATIC, None)}
                lengths: list[float] = []
                for number in range(args.rounds):
                    for at in rng.permutation(len(cost)).tolist():
                        arm = list(cost)[at]
                        spent, tokens = turns.run(arm, batch, args.turn_s)
                        cost[arm].append(spent / tokens)
                        raw.append(
                            {
                                "batch": batch,
                                "round": number,
                                "length": arm,
                                "s": spent,
                                "tokens": tokens,
                            }
                        )
                        if arm is None:
                            lengths += turns.lengths
                figures[f"batch_{batch}_smartspec_mean_length"] = float(np.mean(lengths))
                figures[f"batch_{batch}_smartspec_tokens_per_s"] = 1 / float(np.mean(cost[None]))
                for length in STATIC:
                    ratio = paired_ratio(cost[None], cost[length])
                    figures[f"batch_{batch}_static_{length}_tokens_per_s"] = 1 / float(
                        np.mean(cost[length])
                    )
                    figures |= ratio.figures(f"batch_{batch}_time_over_static_{length}")
                print(f"batch {batch} done", flush=True)
            link.close()
        finally:
            daemon.stop()
    args.raw.parent.mkdir(parents=True, exist_ok=True)
    args.raw.write_text("".join(json.dumps(row) + "\n" for row in raw))
    record("accelerator", figures, notes={"device": name, "shape": args.shape})


if __name__ == "__main__":
    main()
