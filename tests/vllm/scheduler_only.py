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
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from serve import RandomLengths  # first: it sets vLLM's environment
from vllm_models import draft_dir, model_dir

BLOCK_SIZE = 16
MAX_LENGTH = 5
#: Methods, and steps in flight. vLLM does not offer async scheduling for ngram, only for ngram_gpu,
#: whose drafts the scheduler knows as little as a draft model's.
PLAYS = (("draft_model", 1), ("ngram", 1), ("draft_model", 2), ("draft_model", 3), ("ngram_gpu", 2))
COMPARED = (("draft_model", 2), ("ngram", 1))
FAILING = ("choose", "prepare", "ready", "report")
ADAPTERS = 3  #: LoRA, of which a step may hold `MAX_ADAPTERS`
MAX_ADAPTERS = 2


def token(name: str, position: int) -> int:
    """The answer of the request ``name`` at ``position``; prompts lie before 0."""
    sibling, _, number = name.rpartition("_")
    drawn = 5 * int(sibling or 0) if position >= 0 else 0  # siblings share the prompt
    return (31 * int(number) + drawn + 7 * position) % 997 + 3


@cache
def configuration(
    method: str, is_async: bool, max_num_seqs: int, max_batched: int, endpoint: str = ""
) -> Any:
    """Of an engine that speculates. The CPU's platform turns async scheduling off: on again."""
    from vllm.config import LoRAConfig
    from vllm.engine.arg_utils import EngineArgs

    speculation = {"method": method, "num_speculative_tokens": MAX_LENGTH}
    if method == "draft_model":
        speculation["model"] = str(draft_dir())
    else:
        speculation |= {"prompt_lookup_min": 2, "prompt_lookup_max": 5}

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
        speculative_config=speculation,
        additional_config={"smartspec": {"endpoint": endpoint}} if endpoint else {},
    ).create_engine_config()
    config.scheduler_config.async_scheduling = is_async
    config.lora_config = LoRAConfig(max_loras=MAX_ADAPTERS)
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
    """Runs steps by counting; raises AssertionError for one that no worker could run.

    ``is_lookup``: it finds 0 to all drafts by itself, and not as many as it is asked for.
    """

    def __init__(
        self, rng: np.random.Generator, is_lookup: bool = False, acceptance: float = 0.6
    ) -> None:
        self._rng = rng
        self._is_lookup = is_lookup
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
        for name in names:
            found = int(self._rng.integers(length + 1)) if self._is_lookup else length
            self._drafted[name] = found
        index = {name: i for i, name in enumerate(names)}
        return ModelRunnerOutput(req_ids=names, req_id_to_index=index, sampled_token_ids=sampled)

    def drafts(self, name: str) -> list[int]:
        """What the last step drafted for a request."""
        return [9] * self._drafted[name]

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
        return [token(name, first + i) for i in range(accepted + 1)]


class Rig:
    """A scheduler and its worker, with ``depth`` steps in flight."""

    def __init__(
        self, scheduler: Any, depth: int, rng: np.random.Generator, is_lookup: bool = False
    ) -> None:
        self.scheduler = scheduler
        self.worker = Worker(rng, is_lookup)
        self._depth = depth
        self._in_flight: deque[tuple[Any, Any]] = deque()
        self.requests: dict[str, Any] = {}
        self.answered: dict[str, int] = {}  #: tokens of answers before the last `schedule()`
        #: vLLM does once the model runs, in every step but of pooling models
        self.asks_for_masks: Callable[[], bool] = lambda: True

    def add(
        self, number: int, num_prompt: int, max_tokens: int, n: int = 1, adapter: int = 0
    ) -> None:
        """Add ``n`` requests, as vLLM makes them of one that asks for ``n`` answers.

        ``adapter``: of LoRA, from 1 on; 0: none.
        """
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest
        from vllm.v1.engine import EngineCoreRequest
        from vllm.v1.engine.parallel_sampling import ParentRequest
        from vllm.v1.request import Request

        asked = EngineCoreRequest(
            request_id=str(number),
            prompt_token_ids=[token(str(number), -1 - i) for i in range(num_prompt)],
            mm_features=None,
            sampling_params=SamplingParams(max_tokens=max_tokens, ignore_eos=True, n=n),
            pooling_params=None,
            arrival_time=0.0,
            lora_request=LoRARequest(f"a{adapter}", adapter, "nowhere") if adapter else None,
            cache_salt=None,
            data_parallel_rank=None,
            external_req_id=str(number),
        )
        children = [(asked.request_id, asked.sampling_params)]
        if n > 1:
            parent = ParentRequest(asked)
            children = [parent.get_child_info(i) for i in range(n)]
        for name, params in children:
            request = Request(
                request_id=name,
                prompt_token_ids=asked.prompt_token_ids,
                sampling_params=params,
                pooling_params=None,
                lora_request=asked.lora_request,
            )
            self.requests[name] = request
            self.scheduler.add_request(request)

    def abort(self, name: str) -> None:
        from vllm.v1.request import RequestStatus

        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    @property
    def is_busy(self) -> bool:
        return bool(self._in_flight) or self.scheduler.has_unfinished_requests()

    def step(self) -> Any:
        """Begin a step if there is room for one, end the oldest if there is none."""
        begun = self.begin()
        if self._in_flight and (
            len(self._in_flight) >= self._depth or not begun or not begun.num_scheduled_tokens
        ):
            self.end()
        return begun

    def begin(self) -> Any:
        """Schedule a step, if there is anything to schedule, and run it."""
        if not self.scheduler.has_requests():
            return None
        self.answered = {n: r.num_output_tokens for n, r in self.requests.items()}
        begun = self.scheduler.schedule()
        if self.asks_for_masks():
            self.scheduler.get_grammar_bitmask(begun)
        self._in_flight.append((begun, self.worker.run(begun)))
        return begun

    def end(self) -> None:
        """Take in the results of the oldest step."""
        from vllm.v1.outputs import DraftTokenIds

        output, result = self._in_flight.popleft()
        # A real worker's lists are made, or unpickled, right before they are taken in.
        result.sampled_token_ids = [tokens.copy() for tokens in result.sampled_token_ids]
        self.scheduler.update_from_output(output, result)
        if self._depth == 1:
            drafts = list(map(self.worker.drafts, result.req_ids))
            self.scheduler.update_draft_token_ids(DraftTokenIds(result.req_ids, drafts))


def play(seed: int, depth: int, method: str) -> dict[str, int]:
    """40 requests that join, leave and are aborted under random lengths, in too little KV room.

    Some ask for several answers, some for an adapter.
    """
    from smartspec.engine_adapter.vllm.scheduler import SmartSpecAsyncScheduler, SmartSpecScheduler

    rng = np.random.default_rng(seed)
    source = RandomLengths(seed)
    base: Any = SmartSpecScheduler if depth == 1 else SmartSpecAsyncScheduler

    counted = "steps", "checked", "too_long", "useless", "deepest", "grown", "emitted", "adapters"
    told = dict.fromkeys((*counted, "featureless"), 0)

    class Random(base):  # type: ignore[misc]
        def make_source(self, wanted: Any) -> Any:
            return source

        def update_from_output(self, output: Any, result: Any) -> Any:
            step = self.steering._steps.get(id(output))
            requests = step.group.requests if step else []
            before = sum(request.num_output_tokens for request in requests)
            outputs = super().update_from_output(output, result)
            told["grown"] += sum(request.num_output_tokens for request in requests) - before
            return outputs

    def report(facts: Any) -> None:
        told["emitted"] += int(facts.num_emitted.sum())
        told["featureless"] += len(facts.batch.features) == 0

    source.report = report  # type: ignore[method-assign]
    config = configuration(method, depth > 1, 12, 64)
    scheduler = make_scheduler(Random, config, num_blocks=40)
    free = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    rig = Rig(scheduler, depth, rng, is_lookup=method == "ngram")
    rig.asks_for_masks = lambda: bool(rng.random() < 0.9)
    aborted: set[str] = set()
    while len(rig.requests) < 40 or rig.is_busy:
        if len(rig.requests) < 40 and rng.random() < 0.4:
            # Of a prompt of one token vLLM itself verifies drafts that were never asked for.
            rig.add(
                len(rig.requests),
                int(rng.integers(2, 100)),
                int(rng.integers(1, 60)),
                n=int(rng.integers(1, 4)) if rng.random() < 0.3 else 1,
                adapter=int(rng.integers(ADAPTERS + 1)),
            )
        if rig.requests and rng.random() < 0.03:
            name = str(rng.choice(list(rig.requests)))
            if not rig.requests[name].is_finished():
                rig.abort(name)
                aborted.add(name)
        source.chosen, source.steered = {}, False
        begun = rig.step()
        told["steps"] += 1
        assert told["steps"] < 10_000, "it does not end"
        if begun is not None:  # the override is there in steered steps, and in no other
            assert (scheduler.dynamic_sd_lookup is not None) == source.steered
            held = {rig.requests[name].lora_request for name in begun.num_scheduled_tokens}
            told["adapters"] = max(told["adapters"], len(held - {None}))
        if begun is None or not source.steered:
            continue
        for name in begun.num_scheduled_tokens:
            length = source.chosen.get(scheduler.steering._numbers.get(name, -1))
            if length is not None:
                drafts = len(begun.scheduled_spec_decode_tokens.get(name, ()))
                told["checked"] += 1
                told["too_long"] += drafts > length[0]
                request = rig.requests[name]
                told["useless"] += drafts >= request.max_tokens - rig.answered[name]
                told["deepest"] = max(told["deepest"], drafts)
    for name, request in rig.requests.items():
        answer = list(request.output_token_ids)
        assert answer == [token(name, i) for i in range(len(answer))], f"{name}: {answer}"
        assert name in aborted or len(answer) == request.max_tokens, name
    stats = scheduler.smartspec_stats
    leaked = free - scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    preempted = sum(request.num_preemptions for request in rig.requests.values())
    return told | {
        "aborted": len(aborted),
        "siblings": sum("_" in name for name in rig.requests),
        "preempted": preempted,
        "leaked": leaked,
        "errors": stats.num_errors,
        "steered": stats.num_steered_steps,
        "drafted": rig.worker.num_drafted,
        "accepted": rig.worker.num_accepted,
        "counted": stats.num_drafted,
        "left": len(scheduler.steering._steps) if scheduler.steering else -1,
    }


class Failing:
    """A source that leaves lengths to the engine, and after 20 calls of ``method`` fails.

    Every other time it has said so beforehand, as a link does.
    """

    may_steer = False

    def __init__(self, method: str) -> None:
        self.calls_left = {method: 20}
        self.prepared: Any = None
        self.num_asked = 0

    def _called(self, method: str) -> None:
        self.calls_left[method] = left = self.calls_left.get(method, 1 << 30) - 1
        if left < 0:
            raise RuntimeError(f"{method} fails, as it is meant to")

    def choose(self, batch: Any) -> Any:
        from smartspec.engine_adapter.lengths import Choice

        self._called("choose")
        return Choice.fixed(batch.ceiling.astype(np.int64), "own")

    def prepare(self, batch: Any, features: Any = None) -> None:
        self._called("prepare")
        self.prepared = batch

    def ready(self) -> Any:
        from smartspec.engine_adapter.lengths import Choice
        from smartspec.engine_adapter.link import Known, Ready

        self._called("ready")
        self.num_asked += 1
        if self.num_asked % 2:
            return None
        ceiling = self.prepared.ceiling
        return Ready(Choice.fixed(ceiling.astype(np.int64), "own"), Known(ceiling.tolist()))

    def report(self, facts: Any) -> None:
        self._called("report")

    def close(self) -> None:
        self._called("close")


def compare(seed: int, depth: int, method: str, fails: str) -> dict[str, int]:
    """Every step of vLLM's own class beside the same step of ours, which nobody steers, and whose
    source fails in the method ``fails``: after 20 calls, and then for ever.
    """
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    from smartspec.engine_adapter.vllm.scheduler import SmartSpecAsyncScheduler, SmartSpecScheduler

    base: Any = SmartSpecScheduler if depth == 1 else SmartSpecAsyncScheduler
    source = Failing(fails)
    source.calls_left["close"] = 0  # the way out fails as well

    class Ours(base):  # type: ignore[misc]
        def make_source(self, wanted: Any) -> Any:
            return source

    rigs = []
    for kind in (Scheduler if depth == 1 else AsyncScheduler, Ours):
        scheduler = make_scheduler(kind, configuration(method, depth > 1, 12, 64), num_blocks=40)
        rng = np.random.default_rng(seed)
        rigs.append(Rig(scheduler, depth, rng, is_lookup=method == "ngram"))
    rng = np.random.default_rng(seed)
    steps = different = 0
    while len(rigs[0].requests) < 40 or any(rig.is_busy for rig in rigs):
        joins = len(rigs[0].requests) < 40 and rng.random() < 0.4
        size = int(rng.integers(2, 100)), int(rng.integers(1, 60))
        held = []
        for rig in rigs:
            if joins:
                rig.add(len(rig.requests), *size)
            begun = rig.step()
            drafts = begun and {n: len(d) for n, d in begun.scheduled_spec_decode_tokens.items()}
            asked = begun and begun.num_spec_tokens_to_schedule
            held.append((begun and begun.num_scheduled_tokens, drafts, asked))
        steps += 1
        different += held[0] != held[1]
    ours = rigs[1].scheduler
    return {
        "steps": steps,
        "different": different,
        "errors": ours.smartspec_stats.num_errors,
        "steered_at_end": ours.steering is not None,
        "drafted": rigs[1].worker.num_drafted,
    }


def main() -> None:
    """All plays, in one process: vLLM takes longer to import than any of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=20)
    chosen = parser.parse_args()
    told: dict[str, list[dict[str, int]]] = {}
    for method, depth in PLAYS:
        told[f"{method} {depth}"] = [play(seed, depth, method) for seed in range(chosen.seeds)]
    for method, depth in COMPARED:
        for fails in FAILING:
            told[f"{method} {fails}"] = [compare(seed, depth, method, fails) for seed in range(3)]
    chosen.out.write_text(json.dumps(told))


if __name__ == "__main__":
    main()
