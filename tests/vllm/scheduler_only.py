"""vLLM's schedulers without a model: a worker that is told what to run, and knows all answers.

The worker keeps its own account of every request, as a real one does, and refuses what a real one
could not run: drafts that it was never asked for, or tokens that are not there. Under the async
scheduler several steps are in flight: each is run at once and its results are handed over later.

Run with vLLM's Python by test_vllm_scheduler.py; writes what happened as JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from serve import RandomLengths  # first: it sets vLLM's environment
from vllm_models import draft_dir, model_dir

BLOCK_SIZE = 16
MAX_LENGTH = 5


def token(number: int, position: int) -> int:
    """The answer of request ``number`` at ``position``."""
    return (31 * number + 7 * position) % 997 + 3


def configuration(is_async: bool, max_num_seqs: int, max_batched: int, **additional: Any) -> Any:
    """Of an engine with a draft model. The CPU's platform turns async scheduling off: on again."""
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(
        model=str(model_dir()),
        dtype="float32",
        max_model_len=2048,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_batched,
        block_size=BLOCK_SIZE,
        enable_prefix_caching=False,
        enforce_eager=True,
        seed=0,
        speculative_config={
            "method": "draft_model",
            "model": str(draft_dir()),
            "num_speculative_tokens": MAX_LENGTH,
        },
        additional_config=additional,
    ).create_engine_config()
    config.scheduler_config.async_scheduling = is_async
    return config


def make_scheduler(kind: type, config: Any, num_blocks: int) -> Any:
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    spec = FullAttentionSpec(
        block_size=BLOCK_SIZE, num_kv_heads=1, head_size=1, dtype=torch.float32
    )
    config.cache_config.num_gpu_blocks = num_blocks
    kv_cache = KVCacheConfig(
        num_blocks=num_blocks,
        kv_cache_tensors=[],
        kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
    )
    return kind(config, kv_cache, StructuredOutputManager(config), BLOCK_SIZE, log_stats=True)


class Worker:
    """Runs steps by counting; raises AssertionError for one that no worker could run."""

    def __init__(self, rng: np.random.Generator, acceptance: float = 0.6) -> None:
        self._rng = rng
        self._acceptance = acceptance
        self._prompt: dict[str, int] = {}
        self._known: dict[str, int] = {}  # tokens of prompt and answer
        self._computed: dict[str, int] = {}
        self._drafted: dict[str, int] = {}  # by the last step that held it
        self.num_drafted = self.num_accepted = 0

    def run(self, output: Any) -> Any:
        from vllm.v1.outputs import ModelRunnerOutput

        for new in output.scheduled_new_reqs:
            self._prompt[new.req_id] = self._known[new.req_id] = len(new.prompt_token_ids)
            self._computed[new.req_id] = new.num_computed_tokens
        cached = output.scheduled_cached_reqs
        for name, computed, num_output in zip(
            cached.req_ids, cached.num_computed_tokens, cached.num_output_tokens, strict=True
        ):
            if name in cached.resumed_req_ids:
                self._known[name] = self._prompt[name] + num_output
                self._computed[name] = computed
                self._drafted.pop(name, None)
        names = list(output.num_scheduled_tokens)
        sampled = [
            self._step(
                name,
                output.num_scheduled_tokens[name],
                len(output.scheduled_spec_decode_tokens.get(name, ())),
            )
            for name in names
        ]
        length = output.num_spec_tokens_to_schedule
        # Who sits a step out keeps its drafts: so vLLM has it, steered or not.
        self._drafted.update(dict.fromkeys(names, length))
        index = {name: i for i, name in enumerate(names)}
        return ModelRunnerOutput(req_ids=names, req_id_to_index=index, sampled_token_ids=sampled)

    def _step(self, name: str, scheduled: int, drafts: int) -> list[int]:
        known, computed = self._known[name], self._computed[name]
        assert computed + scheduled - drafts <= known, f"{name}: tokens that are not there"
        assert drafts <= self._drafted.get(name, 0), f"{name}: drafts that were not asked for"
        if computed + scheduled - drafts < known:
            assert not drafts, f"{name}: drafts after a part of a prompt"
            self._computed[name] += scheduled
            return []
        refused = self._rng.random(drafts) >= self._acceptance
        accepted = int(refused.argmax()) if refused.any() else drafts
        self.num_drafted += drafts
        self.num_accepted += accepted
        self._known[name] = known + accepted + 1
        self._computed[name] = computed + scheduled - (drafts - accepted)
        first = known - self._prompt[name]
        return [token(int(name), first + i) for i in range(accepted + 1)]


class Rig:
    """A scheduler and its worker, with ``depth`` steps in flight."""

    def __init__(self, scheduler: Any, depth: int, rng: np.random.Generator) -> None:
        self.scheduler = scheduler
        self.worker = Worker(rng)
        self._depth = depth
        self._in_flight: deque[tuple[Any, Any]] = deque()
        self.requests: dict[str, Any] = {}
        #: vLLM does once the model runs, in every step but of pooling models
        self.asks_for_masks: Callable[[], bool] = lambda: True

    def add(self, number: int, num_prompt: int, max_tokens: int) -> None:
        from vllm import SamplingParams
        from vllm.v1.request import Request

        request = Request(
            request_id=str(number),
            prompt_token_ids=[token(number, -1 - i) for i in range(num_prompt)],
            sampling_params=SamplingParams(max_tokens=max_tokens, ignore_eos=True),
            pooling_params=None,
        )
        self.requests[request.request_id] = request
        self.scheduler.add_request(request)

    def abort(self, number: int) -> None:
        from vllm.v1.request import RequestStatus

        self.scheduler.finish_requests(str(number), RequestStatus.FINISHED_ABORTED)

    @property
    def is_busy(self) -> bool:
        return bool(self._in_flight) or self.scheduler.has_unfinished_requests()

    def step(self) -> Any:
        """Begin a step if there is room for one, end the oldest if there is none."""
        begun = None
        if self.scheduler.has_requests():
            begun = self.scheduler.schedule()
            if self.asks_for_masks():
                self.scheduler.get_grammar_bitmask(begun)
            self._in_flight.append((begun, self.worker.run(begun)))
        if self._in_flight and (
            len(self._in_flight) >= self._depth or not begun or not begun.num_scheduled_tokens
        ):
            self.end()
        return begun

    def end(self) -> None:
        from vllm.v1.outputs import DraftTokenIds

        output, result = self._in_flight.popleft()
        self.scheduler.update_from_output(output, result)
        if self._depth == 1:
            drafts = [[9] * output.num_spec_tokens_to_schedule for _ in result.req_ids]
            self.scheduler.update_draft_token_ids(DraftTokenIds(result.req_ids, drafts))


def play(seed: int, depth: int) -> dict[str, int]:
    """40 requests that join, leave and are aborted under random lengths, in too little KV room."""
    from smartspec.engine_adapter.vllm.scheduler import SmartSpecAsyncScheduler, SmartSpecScheduler

    rng = np.random.default_rng(seed)
    source = RandomLengths(seed)
    base: Any = SmartSpecScheduler if depth == 1 else SmartSpecAsyncScheduler

    class Random(base):  # type: ignore[misc]
        def make_source(self, wanted: Any) -> Any:
            return source

    scheduler = make_scheduler(Random, configuration(depth > 1, 12, 64), num_blocks=40)
    free = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    rig = Rig(scheduler, depth, rng)
    rig.asks_for_masks = lambda: bool(rng.random() < 0.9)
    aborted: set[str] = set()
    told = {"steps": 0, "checked": 0, "too_long": 0, "deepest": 0}
    while len(rig.requests) < 40 or rig.is_busy:
        if len(rig.requests) < 40 and rng.random() < 0.4:
            # Of a prompt of one token vLLM itself verifies drafts that were never asked for.
            rig.add(len(rig.requests), int(rng.integers(2, 100)), int(rng.integers(1, 60)))
        if rig.requests and rng.random() < 0.03:
            number = int(rng.integers(len(rig.requests)))
            if not rig.requests[str(number)].is_finished():
                rig.abort(number)
                aborted.add(str(number))
        source.chosen, source.steered = {}, False
        begun = rig.step()
        told["steps"] += 1
        assert told["steps"] < 10_000, "it does not end"
        if begun is None or not source.steered:
            continue
        for name in begun.num_scheduled_tokens:
            length = source.chosen.get(scheduler.steering._numbers.get(name, -1))
            if length is not None:
                drafts = len(begun.scheduled_spec_decode_tokens.get(name, ()))
                told["checked"] += 1
                told["too_long"] += drafts > length[0]
                told["deepest"] = max(told["deepest"], drafts)
    for name, request in rig.requests.items():
        answer = list(request.output_token_ids)
        assert answer == [token(int(name), i) for i in range(len(answer))], f"{name}: {answer}"
        assert name in aborted or len(answer) == request.max_tokens, name
    stats = scheduler.smartspec_stats
    leaked = free - scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    preempted = sum(request.num_preemptions for request in rig.requests.values())
    return told | {
        "aborted": len(aborted),
        "preempted": preempted,
        "leaked": leaked,
        "errors": stats.num_errors,
        "steered": stats.num_steered_steps,
        "drafted": rig.worker.num_drafted,
        "accepted": rig.worker.num_accepted,
        "counted": stats.num_drafted,
        "left": len(scheduler.steering._steps) if scheduler.steering else -1,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--depth", type=int, required=True)
    parser.add_argument("--seeds", type=int, default=20)
    chosen = parser.parse_args()
    chosen.out.write_text(json.dumps([play(seed, chosen.depth) for seed in range(chosen.seeds)]))
