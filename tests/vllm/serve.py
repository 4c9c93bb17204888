"""One vLLM engine in one process, stepped by hand: requests come, leave and are aborted.

Run with vLLM's Python by test_lossless.py and test_faults.py; writes what happened as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_LOGGING_LEVEL="WARNING",
)
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from vllm_models import draft_dir, model_dir

NUM_REQUESTS = 64
MOST_AT_ONCE = 16
MAX_BATCHED = 96  #: small, so that prompts come in chunks and drafts can run out of room
NUM_BLOCKS = 26  #: of 32 tokens: too few for all, so that requests are preempted
SHARED = 7  #: of eight prompts: the long one, which is always the same
ABORT_AFTER = 12  #: tokens of an answer
SPECULATION: dict[str, dict[str, Any]] = {
    "none": {},
    "ngram": {
        "method": "ngram",
        "num_speculative_tokens": 5,
        "prompt_lookup_min": 2,
        "prompt_lookup_max": 5,
    },
    "draft_model": {"method": "draft_model", "num_speculative_tokens": 4},
    "custom_class": {
        "method": "custom_class",
        "model": "proposer.Oracle",
        "num_speculative_tokens": 5,
    },
}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "number": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "number"],
    "additionalProperties": False,
}
PROMPTS = (
    "Repeat: the quick brown fox jumps over the lazy dog. the quick brown fox",
    "Count: 1 2 3 4 5 6 7 8 9",
    "def add(a, b):\n    return a + b\n\ndef sub(a, b):",
    "A person as JSON, with name and number:",
    "Once upon a time there was a fox and a dog. The fox and the dog",
    "a b c a b c a b c a b",
    "List of fruits: apple, banana, apple, banana,",
    "Notes. "
    + "The river runs to the sea, and the sea sends rain to the hills. " * 9
    + "The river",
)


def parameters(number: int) -> Any:
    """What request ``number`` asks for: some plain, some JSON, some with log-probabilities."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    kind = number % 8
    return SamplingParams(
        temperature=0.0,
        max_tokens=48 if kind == 3 else 20 + (number * 7) % 25,
        logprobs=2 if kind == 6 else None,
        structured_outputs=StructuredOutputsParams(json=SCHEMA) if kind == 3 else None,
    )


def is_aborted(number: int) -> bool:
    return number % 16 == 4


class RandomLengths:
    """A source that changes every length at every step, and is now and then not there."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        #: length and ceiling, by request; None: the lookup may have found less
        self.chosen: dict[int, tuple[int, int | None]] = {}
        self.steered = False
        self.may_steer = True
        self.prepared: Any = None

    def choose(self, batch: Any) -> Any:
        from smartspec.engine_adapter.lengths import Choice

        self.steered = self.may_steer and self.rng.random() < 0.97
        self.may_steer = self.rng.random() < 0.93
        if not self.steered:
            return Choice.fixed(batch.ceiling.astype(np.int64), "own")
        lengths = self.rng.integers(0, batch.ceiling.astype(np.int64) + 1)
        pairs = zip(lengths.tolist(), batch.ceiling.tolist(), strict=True)
        self.chosen = dict(zip(batch.request_ids.tolist(), pairs, strict=True))
        return Choice(lengths, "ragged", source="policy")

    def prepare(self, batch: Any, features: Any = None) -> None:
        self.prepared = batch, features

    def ready(self) -> Any:
        """Every other time, lengths as a link has them: drawn, of a drawn table, or its own."""
        from smartspec.engine_adapter.lengths import Choice, CostCurve, DraftCost
        from smartspec.engine_adapter.levels import Levels
        from smartspec.engine_adapter.link import Known, Ready

        batch, features = self.prepared
        if self.rng.random() < 0.5:
            return None
        ceiling = batch.ceiling.tolist()
        if not self.may_steer:
            return Ready(Choice.fixed(batch.ceiling.astype(np.int64), "own"), Known(ceiling))
        self.steered = True
        source = "fallback" if self.rng.random() < 0.3 else "policy"
        by = Choice(np.zeros(0, np.int64), source=source)

        def note(lengths: list[int]) -> None:
            pairs = zip(lengths, ceiling, strict=True)
            self.chosen = dict(zip(batch.request_ids.tolist(), pairs, strict=True))

        if features is None or source == "fallback":
            lengths = self.rng.integers(0, batch.ceiling.astype(np.int64) + 1).tolist()
            note(lengths)
            if features is not None:
                self.chosen = {
                    number: (length, None) for number, (length, _) in self.chosen.items()
                }
            return Ready(by, Known(lengths))

        class Noted(Levels):
            def split(self, found: Any, num_other_tokens: int) -> tuple[int, int]:
                split, surplus = best = super().split(found, num_other_tokens)
                lengths = []
                for levels in found:
                    more = min(levels.count(split), surplus)
                    lengths.append(sum(level < split for level in levels) + more)
                    surplus -= more
                note(lengths)
                return best

        table = np.log(np.cumprod(self.rng.uniform(0.1, 1.0, (5, 3)), axis=0))
        curve = CostCurve("ragged", [1.0, 16.0, 40.0], np.sort(self.rng.uniform(0, 9, 3)))
        correction = self.rng.uniform(0.5, 2.0, batch.size)
        given = correction, None, self.rng.uniform(0.5, 1.5, 3), int(batch.ceiling.max(initial=0))
        levels = Noted(table, *given, float(self.rng.uniform(0, 3)), 5, curve, DraftCost())
        levels.expect((features[0] > 0.3).astype(np.int64) + (features[0] > 0.6))
        return Ready(by, levels)

    def report(self, facts: Any) -> None:
        pass

    def idle(self) -> None:
        pass

    def close(self) -> None:
        pass


def checked_scheduler(source: RandomLengths, seen: dict[str, int]) -> type:
    """The adapter's scheduler under ``source``; counts steps that did not obey."""
    from smartspec.engine_adapter.vllm import SmartSpecScheduler

    class Checked(SmartSpecScheduler):
        def make_source(self, wanted: Any) -> Any:
            return source

        def schedule(self, *args: Any, **kwargs: Any) -> Any:
            output = super().schedule(*args, **kwargs)
            if self.steering is None or not source.steered:
                return output
            full = output.total_num_scheduled_tokens >= MAX_BATCHED
            for name in output.num_scheduled_tokens:
                number = self.steering._numbers.get(name)
                if number not in source.chosen:
                    continue
                length, ceiling = source.chosen[number]
                request = self.requests[name]
                left = request.max_tokens - request.num_output_tokens - 1
                drafts = len(output.scheduled_spec_decode_tokens.get(name, ()))
                seen["checked"] += 1
                seen["too_long"] += drafts > length
                if ceiling is None:
                    continue
                seen["shortened"] += length < ceiling
                known = self.vllm_config.speculative_config.method != "draft_model"
                seen["too_short"] += known and drafts < min(length, left) and not full
            source.chosen = {}
            return output

    return Checked


def run(options: argparse.Namespace) -> dict[str, Any]:
    from vllm import LLM

    seen = {"checked": 0, "shortened": 0, "too_long": 0, "too_short": 0}
    more: dict[str, Any] = {}
    speculation = dict(SPECULATION[options.method])
    if options.method == "draft_model":
        speculation["model"] = str(draft_dir())
    if speculation:
        more["speculative_config"] = speculation
    if options.source == "random":
        more["scheduler_cls"] = checked_scheduler(RandomLengths(options.seed), seen)
    elif options.source == "daemon":
        more["scheduler_cls"] = "smartspec.engine_adapter.vllm.SmartSpecScheduler"
        more["additional_config"] = {"smartspec": {"endpoint": options.endpoint}}
    llm = LLM(
        model=str(model_dir()),
        dtype="float32",
        max_model_len=320,
        max_num_seqs=MOST_AT_ONCE,
        max_num_batched_tokens=MAX_BATCHED,
        block_size=32,
        num_gpu_blocks_override=NUM_BLOCKS,
        enforce_eager=True,
        enable_prefix_caching=True,
        async_scheduling=False,
        disable_log_stats=False,
        seed=0,
        **more,
    )
    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    rng = np.random.default_rng(options.seed)
    answers: dict[str, Any] = {}
    logprobs: dict[str, Any] = {}
    prompts: dict[str, list[int]] = {}
    active: set[str] = set()
    steps = coming = round_ = 0
    while active or coming < NUM_REQUESTS:
        while coming < NUM_REQUESTS and len(active) < 20 and rng.random() < 0.5:
            name = f"{coming}.{round_}"
            prompt = PROMPTS[coming % 8]
            if coming % 3 and coming % 8 != SHARED:
                prompt = f"{coming}. {prompt}"
            engine.add_request(name, prompt, parameters(coming))
            active.add(name)
            coming += 1
        for output in engine.step():
            name = output.request_id
            answers[name] = [list(one.token_ids) for one in output.outputs]
            prompts[name] = list(output.prompt_token_ids)
            if output.outputs[0].logprobs:
                logprobs[name] = [
                    {str(k): v.logprob for k, v in at.items()} for at in output.outputs[0].logprobs
                ]
            number = int(name.split(".")[0])
            enough = is_aborted(number) and len(answers[name][0]) >= ABORT_AFTER
            if enough and not output.finished:
                engine.abort_request([name])
            if enough or output.finished:
                active.discard(name)
        steps += 1
        steering = getattr(scheduler, "steering", None)
        if options.source == "daemon" and steering is not None:
            print(f"step {steps} {steering.source.stats.state}", flush=True)
        if options.until and not active and coming == NUM_REQUESTS and not options.until.exists():
            coming, round_ = 0, round_ + 1
    theirs = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    stats = getattr(scheduler, "smartspec_stats", None)
    link = getattr(getattr(scheduler, "steering", None), "source", None)
    num_link_errors = link.stats.num_errors if options.source == "daemon" and link else 0
    return {
        "answers": answers,
        "logprobs": logprobs,
        "prompts": prompts,
        "steps": steps,
        "seen": seen,
        "steered_steps": stats.num_steered_steps if stats else 0,
        "errors": (stats.num_errors if stats else 0) + num_link_errors,
        "refusal": getattr(scheduler, "smartspec_refusal", ""),
        "ours": [stats.num_drafted, stats.num_accepted] if stats else None,
        "theirs": [
            theirs.get("vllm:spec_decode_num_draft_tokens"),
            theirs.get("vllm:spec_decode_num_accepted_tokens"),
        ],
        "prefix_hits": theirs.get("vllm:prefix_cache_hits"),
        "preemptions": theirs.get("vllm:num_preemptions"),
        "blocks_free": scheduler.kv_cache_manager.block_pool.get_num_free_blocks(),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("method", choices=SPECULATION)
    parser.add_argument("source", choices=("own", "random", "daemon"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--endpoint", default="")
    parser.add_argument("--until", type=Path, help="go on in rounds until this file exists")
    chosen = parser.parse_args()
    chosen.out.write_text(json.dumps(run(chosen)))
