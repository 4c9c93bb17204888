"""What verification costs on an accelerator, and none, static lengths and SmartSpec side by side.

Target and draft model have random weights: what a pass costs does not depend on them. What they
say is scripted (`Script`): the target's next token follows from the one before and its position,
so that outputs do not depend on what else is in the pass, and drafts are right as often as their
request's class has it, with calibrated confidences. So acceptance is made up, and costs are real.

First the target's pass alone: requests at a context, so many tokens each, median of some passes.
Then, at each batch size, rounds of turns: in a round all arms, in random order, decode the same
requests on from one another, none of which begins or ends meanwhile. So the arms of a round differ
by lengths alone, not by who was there or whose prompts came, and a round is a comparison within
seconds. What counts is seconds over tokens emitted, of whole steps with what is sent and received
in them. Prompts cost every arm the same per token and are left out: as served, with prompts among
the steps, ratios are nearer to 1. Were steps with prompts alone left out, few would be left: of
128 requests one or two end in each step. The daemon is a process of its own and begins knowing
nothing; batch sizes come one after the other, as when load rises.

Run: python benchmarks/bench_accelerator.py [--shape wide] [--raw FILE]; FIGURES_FOLDER=... for
another folder than build/figures
"""

from __future__ import annotations

import argparse
import json
import math
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

from smartspec.engine_adapter.base import FixedLength, StepFacts
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
REPEATS = 5  #: passes timed for each cell of the cost table
LEFT_OUT = 2  #: steps after a change: begun, or drafted for, under the arm before
FEWEST = 8  #: steps that a turn counts, however long they take,
AT_MOST = 3  #: but for turns that take so many times their seconds


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
    # 12 of 80 layers of the sizes of Llama-3-70B, as one of several stages of a pipeline has them:
    # 12.4 billion weights, random like all here. Wide and shallow: the pass of a deep and narrow
    # model takes as long as starting its kernels one by one, however many tokens it verifies. The
    # draft model is that of "1b".
    "wide": Shape(
        llama(8192, 12, 64, 8, 28_672, 128_256),
        llama(2048, 1, 32, 8, 8192, 128_256),
        (1, 8, 32, 64, 128),
        (128, 1024),
        2048,
        (64, 512),
        1536,
    ),
    # Llama-3.2-1B's; the draft is of its width and vocabulary, with one layer.
    "1b": Shape(
        llama(2048, 16, 32, 8, 8192, 128_256),
        llama(2048, 1, 32, 8, 8192, 128_256),
        (1, 8, 32, 64, 128),
        (128, 1024, 4096),
        2048,
        (64, 512),
        1536,
    ),
    "tiny": Shape(
        llama(64, 4, 4, 2, 128, 512),
        llama(64, 1, 4, 2, 128, 512),
        (1, 4),
        (32, 128),
        1024,
        (8, 32),
        960,
    ),
}


class Script:
    """Who says what: a token's class is its remainder, which an answer keeps from its prompt on.

    What is said is a hash of the token and its position, looked up: little work for the device,
    since each pass pays for it.

    Parameters
    ----------
    num_words : of the vocabulary
    num_positions : of a request
    """

    def __init__(self, num_words: int, num_positions: int, device: str = "cpu") -> None:
        self._num_words = num_words // len(ACCURACY)  # of a class
        luck = torch.Generator().manual_seed(0)
        self._of_token = torch.randint(2**62, (num_words,), generator=luck).to(device)
        self._of_position = torch.randint(2**62, (num_positions,), generator=luck).to(device)
        moods = [mean + SPREAD * mood for mean in ACCURACY for mood in (-1, 1)]
        self._sure = torch.tensor(moods, dtype=torch.float32, device=device)

    def following(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """What the target says after each of ``tokens``, all [M]."""
        return self._said(tokens, self._hash(tokens, positions))

    def drafted(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """What the draft model says, and how sure it is, which is how often it is right."""
        mixed = self._hash(tokens, positions)
        said = self._said(tokens, mixed)
        sure = self._sure[tokens % len(ACCURACY) * 2 + (mixed >> 40 & 1)]
        wrong = (mixed >> 41) / 2**21 >= sure
        beside = (said + len(ACCURACY)) % (self._num_words * len(ACCURACY))
        return torch.where(wrong, beside, said), sure

    def _hash(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """In [0, 2**62): as good as drawn, and always the same."""
        return self._of_token[tokens] ^ self._of_position[positions]

    def _said(self, tokens: Tensor, mixed: Tensor) -> Tensor:
        return mixed % self._num_words * len(ACCURACY) + tokens % len(ACCURACY)


def say(model: LlamaForCausalLM, speak: Callable[[Tensor, Tensor, Tensor], None]) -> None:
    """Let ``speak(tokens, positions, logits)`` change what each pass gives, in place."""

    def hook(_module: Any, _args: Any, options: dict[str, Any], output: Any) -> None:
        keep = options["logits_to_keep"]
        speak(options["input_ids"][0][keep], options["position_ids"][0][keep], output.logits[0])

    model.register_forward_hook(hook, with_kwargs=True)


def script(target: LlamaForCausalLM, draft: LlamaForCausalLM, shape: Shape) -> None:
    num_words = target.config.vocab_size
    words = Script(num_words, shape.max_model_len, str(target.device))

    def of_target(tokens: Tensor, positions: Tensor, logits: Tensor) -> None:
        logits.scatter_(1, words.following(tokens, positions)[:, None], SAID)

    def of_draft(tokens: Tensor, positions: Tensor, logits: Tensor) -> None:
        said, sure = words.drafted(tokens, positions)
        own = torch.logit(sure) + math.log(num_words - 1)  # where all others are 0
        logits.zero_().scatter_(1, said[:, None], own.to(logits.dtype)[:, None])

    say(target, of_target)
    say(draft, of_draft)


def make(sizes: dict[str, int], device: str, max_model_len: int) -> Any:
    """A model of random weights, made where and as it stays: bfloat16 on an accelerator."""
    torch.manual_seed(0)
    config = LlamaConfig(max_position_embeddings=max_model_len, **sizes)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if device == "cpu" else torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


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


class Turn(NamedTuple):
    """What an arm did in its turn, in the steps that count."""

    num_steps: int = 0
    s: float = 0.0
    tokens: int = 0
    num_verified: int = 0  #: drafts
    num_forwards: int = 0  #: of the draft model
    target_s: float = 0.0
    draft_s: float = 0.0

    def plus(self, facts: StepFacts, step_s: float) -> Turn:
        return Turn(
            self.num_steps + 1,
            self.s + step_s,
            self.tokens + int(facts.num_emitted.sum()),
            self.num_verified + int(facts.num_drafted.sum()),
            self.num_forwards + facts.num_draft_forwards,
            self.target_s + (facts.target_s or 0.0),
            self.draft_s + (facts.draft_s or 0.0),
        )


class Turns:
    """A worker whose batch never empties, under one arm after the other."""

    def __init__(self, worker: Worker, shape: Shape, num_words: int, link: EngineLink) -> None:
        self._worker = worker
        self._shape = shape
        self._num_words = num_words
        self._link = link
        self._rng = np.random.default_rng(0)
        self._num_requests = 0
        self._longest = 0  # answer when this round began,
        self._round_tokens = 0  # and by how much it grew in the round before

    def _request(self) -> Request:
        """The next; of `ACCURACY`'s classes by turns."""
        low, high = self._shape.prompt
        prompt = self._rng.integers(0, self._num_words, int(self._rng.integers(low, high + 1)))
        last = int(prompt[-1]) // len(ACCURACY) * len(ACCURACY)
        prompt[-1] = last + self._num_requests % len(ACCURACY)
        self._num_requests += 1
        return Request(prompt.tolist(), self._shape.max_tokens)

    def begin_round(self, batch: int) -> None:
        """New requests, where those there might end in this round, or are not of all classes."""
        running = self._worker.scheduler.running
        longest = max((s.num_output for s in running), default=0)
        self._round_tokens = max(0, longest - self._longest)
        fits = longest + 1.5 * self._round_tokens < self._shape.max_tokens
        if not fits or len(running) != batch or batch < len(ACCURACY):
            self.renew(batch)
        self._longest = max(s.num_output for s in running)

    def renew(self, batch: int) -> None:
        """Nobody but new requests, all of them past their prompts."""
        scheduler = self._worker.scheduler
        for sequence in [*scheduler.running, *scheduler.waiting]:
            self._worker.cancel(sequence.id)
        for _ in range(batch):
            self._worker.add_request(self._request())
        self._worker.length_source = FixedLength(0)
        while not all(s.decoding for s in scheduler.running) or scheduler.waiting:
            self._worker.step()
        # The draft model reads the prompts now, and not in the first turn.
        self._worker.length_source = FixedLength(1)
        self._worker.step()

    def run(self, length: int | None, batch: int, seconds: float) -> Turn:
        """The next ``seconds`` of steps; length None: SmartSpec's."""
        self._link.idle()  # so that the daemon has heard of us while others decided
        self._worker.length_source = self._link if length is None else FixedLength(length)
        turn, left_out, began = Turn(), 0, time.monotonic()
        while not turn.num_steps or (
            time.monotonic() - began < AT_MOST * seconds
            and (turn.s < seconds or turn.num_steps < FEWEST)
        ):
            while self._worker.num_running + self._worker.num_waiting < batch:
                self._worker.add_request(self._request())
            begin = time.perf_counter()
            facts = self._worker.step().facts
            step_s = time.perf_counter() - begin
            if facts is None or facts.batch.num_prefill_tokens or facts.batch.size != batch:
                continue
            if left_out < LEFT_OUT:
                left_out += 1
            else:
                turn = turn.plus(facts, step_s)
        return turn


def show_costs(rows: list[dict[str, float]]) -> None:
    sizes = sorted({row["tokens"] for row in rows})
    table = Table("context", "requests", *(f"{size:.0f} each" for size in sizes), title="ms a pass")
    by = {(row["context"], row["batch"], row["tokens"]): row["ms"] for row in rows}
    for context, batch in dict.fromkeys((row["context"], row["batch"]) for row in rows):
        cells = (f"{by[context, batch, size]:.2f}" for size in sizes)
        table.add_row(f"{context:.0f}", f"{batch:.0f}", *cells)
    Console(width=100).print(table)


def compare(
    turns: Turns, batch: int, rounds: int, turn_s: float, rng: np.random.Generator
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Figures of one batch size, and all turns."""
    arms = (*STATIC, None)
    done: dict[int | None, list[Turn]] = {arm: [] for arm in arms}
    raw: list[dict[str, Any]] = []
    for number in range(rounds):
        turns.begin_round(batch)
        for at in rng.permutation(len(arms)).tolist():
            turn = turns.run(arms[at], batch, turn_s)
            done[arms[at]].append(turn)
            raw.append({"batch": batch, "round": number, "length": arms[at], **turn._asdict()})
    cost = {arm: [turn.s / turn.tokens for turn in of] for arm, of in done.items()}
    speed = {arm: 1 / float(np.mean(values)) for arm, values in cost.items()}
    verified, steps = (
        sum(getattr(turn, name) for turn in done[None]) for name in ("num_verified", "num_steps")
    )
    figures = {
        f"batch_{batch}_smartspec_mean_length": verified / (steps * batch),
        f"batch_{batch}_smartspec_tokens_per_s": speed[None],
    }
    told = []
    for length in STATIC:
        ratio = paired_ratio(cost[None], cost[length])
        figures[f"batch_{batch}_static_{length}_tokens_per_s"] = speed[length]
        figures |= ratio.figures(f"batch_{batch}_time_over_static_{length}")
        told.append(f"{length}: {speed[length]:.0f} ({ratio.value:.3f}, {ratio.upper95:.3f})")
    print(
        f"batch {batch}, tokens/s by static length (SmartSpec's time over its, at most): "
        f"{', '.join(told)}; SmartSpec: {speed[None]:.0f}, "
        f"mean length {verified / (steps * batch):.2f}",
        flush=True,
    )
    return figures, raw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, help="default: wide; tiny on a CPU")
    parser.add_argument("--batches", type=int, nargs="+", help="default: the shape's")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--turn-s", type=float, default=0.35)
    parser.add_argument("--warm-up-s", type=float, default=5.0, help="at each batch size")
    parser.add_argument("--raw", type=Path, default=FOLDER / "accelerator.jsonl")
    args = parser.parse_args()
    began = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = args.shape or ("tiny" if device == "cpu" else "wide")
    shape = SHAPES[kind]
    if args.batches:
        shape = shape._replace(batches=tuple(args.batches))
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"{kind} shape on {name}, torch {torch.__version__}", flush=True)
    raw: list[dict[str, Any]] = []

    def keep(rows: list[dict[str, Any]], what: str) -> None:
        """On disk at once: what follows may be cut short."""
        raw.extend(rows)
        args.raw.write_text("".join(json.dumps(row) + "\n" for row in raw))
        print(f"{time.monotonic() - began:.0f} s: {what}", flush=True)

    for folder in (FOLDER, args.raw.parent):
        folder.mkdir(parents=True, exist_ok=True)
    longest = max(*shape.contexts, shape.max_model_len) + MOST + 1
    target, draft = (make(sizes, device, longest) for sizes in (shape.target, shape.draft))
    wait(device)
    num = sum(weights.numel() for weights in target.parameters())
    keep(
        [{"device": name, "shape": kind, "torch": torch.__version__, "parameters": num}],
        f"models made, the target of {num / 1e9:.2f} billion weights",
    )
    rows = costs(target, shape, device)
    show_costs(rows)
    keep(rows, "costs known")
    most = max(shape.batches)
    drafter = DraftModel(ModelRunner(draft, most, shape.max_model_len), MOST)
    worker = Worker(
        target,
        proposer=drafter,
        max_num_running=most,
        max_model_len=shape.max_model_len,
        max_prefill_tokens=2048,
    )
    script(target, draft, shape)
    facts = Ready(
        model=f"random-{kind}",
        proposer=drafter.name,
        draft_model=f"random-{kind}-draft",
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
                turns.renew(batch)
                turns.run(None, batch, args.warm_up_s)
                print(f"batch {batch}, warm: {link.stats.last_reason}", flush=True)
                found, rows = compare(turns, batch, args.rounds, args.turn_s, rng)
                figures |= found
                keep(rows, f"batch {batch} done; {link.stats}")
            link.close()
        finally:
            daemon.stop()
    if device == "cuda":
        figures["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    record("accelerator", figures, notes={"device": name, "shape": kind})


if __name__ == "__main__":
    main()
