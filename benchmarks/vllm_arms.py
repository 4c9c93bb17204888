"""One vLLM engine in this process, under arms by turns. Run with vLLM's Python.

By bench_vllm_accelerator.py, which says what is measured, with a JSON object as only argument
(`Stage`). Facts go to a file as JSON lines, at once: what follows may be cut short.

What is stepped is vLLM's `EngineCore`, as its own loop does. Its front end (detokenizing, HTTP),
which runs in another process as a rule, is left out.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from smartspec.engine_adapter.lengths import Choice
from smartspec.engine_adapter.vllm.steering import LiveLengths

LEFT_OUT = 4  #: steps after a change: begun, or drafted for, under the arm before
FEWEST = 8  #: steps that a turn counts, however long they take
AT_ONCE = 16  #: requests, where answers are compared
NO_ROUND = -1  #: the number of the turn in which the daemon learns


class Stage(msgspec.Struct, kw_only=True):
    """What to run."""

    name: str
    raw: str  #: file that facts are appended to
    engine: dict[str, Any]  #: for vLLM's `EngineArgs`
    own_class: bool = False  #: vLLM's scheduler, without our class
    endpoint: str = ""  #: of the daemon
    arms: list[str]  #: see `Source.take`
    # turns
    batches: list[int] = []
    acceptance: list[float] = []  #: of each draft, by vLLM's synthetic sampling; empty: as it comes
    rounds: int = 0
    turn_s: float = 0.0
    warm_up_s: float = 0.0
    prompt: int = 0  #: tokens
    budget_s: float = 1e9  #: since the start; no round begins after that
    # answers
    prompts: list[str] = []
    max_tokens: int = 0
    tokenizer: str = ""


class Source:
    """Lengths by whoever has the turn."""

    may_steer = True

    def __init__(self, link: Any, longest: int) -> None:
        self.link = link
        self.longest = longest
        self.arm = ""
        self.length = 0
        self._rng = np.random.default_rng(0)

    def take(self, arm: str) -> None:
        """Let ``arm`` decide from now on.

        *smartspec*: the daemon; *K*: the length K for all, that of the configuration by leaving
        vLLM alone; *random*: a length for each request and step; *shadow_K*: as SmartSpec in all
        but the lengths, which are K.
        """
        self.arm, _, length = arm.partition("_") if not arm.isdigit() else ("fixed", "", arm)
        self.length = int(length or 0)
        self.may_steer = self.arm != "fixed" or self.length < self.longest

    @property
    def _asks(self) -> bool:
        return self.arm in ("smartspec", "shadow")

    def choose(self, batch: Any) -> Choice:
        if self.arm == "smartspec":
            return self.link.choose(batch)
        ceiling = batch.ceiling.astype(np.int64)
        if self.arm == "random":
            return Choice(self._rng.integers(0, ceiling + 1), "ragged", source="policy")
        source = "policy" if self.may_steer else "own"
        return Choice.fixed(np.minimum(ceiling, self.length), source)

    def prepare(self, batch: Any, features: Any = None) -> None:
        if self._asks:
            self.link.prepare(batch, features)

    def ready(self) -> Any:
        found = self.link.ready() if self._asks else None
        return found if self.arm == "smartspec" else None

    def report(self, facts: Any) -> None:
        if self._asks:
            self.link.report(facts)

    def idle(self) -> None:
        self.link.idle()

    def close(self) -> None:
        self.link.close()


def scheduler_class(is_async: bool) -> type:
    from smartspec.engine_adapter.vllm import SmartSpecAsyncScheduler, SmartSpecScheduler

    base: Any = SmartSpecAsyncScheduler if is_async else SmartSpecScheduler

    class Switched(base):  # type: ignore[misc]
        def make_source(self, wanted: Any) -> Any:
            return Source(super().make_source(wanted), self.num_spec_tokens)

    return Switched


class Engine:
    """vLLM's engine core with a clock at its scheduler."""

    def __init__(self, stage: Stage) -> None:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        options = dict(stage.engine)
        if not stage.own_class:
            options["scheduler_cls"] = scheduler_class(bool(options.get("async_scheduling")))
            options["additional_config"] = {"smartspec": {"endpoint": stage.endpoint}}
        self._engine = LLMEngine.from_engine_args(EngineArgs(**options))
        self.core = self._engine.engine_core.engine_core  # type: ignore[attr-defined]
        self.config = self._engine.vllm_config
        self.scheduler = self.core.scheduler
        self.steering = getattr(self.scheduler, "steering", None)
        if not stage.own_class and self.steering is None:
            raise RuntimeError(f"not steered: {self.scheduler.smartspec_refusal}")
        self.spent: dict[str, float] = dict.fromkeys(("calls", "own", "meanwhile"), 0.0)
        for method in ("schedule", "update_from_output"):
            self._time(self.scheduler, method, "calls")
        if self.steering is not None:
            for method in ("before_schedule", "after_schedule", "before_update", "after_update"):
                self._time(self.steering, method, "own")
            self._time(self.steering, "while_running", "meanwhile")
        self.num_to_draft = 0  #: sum over steps of the length that the drafter was asked for
        schedule = self.scheduler.schedule

        def counted(*args: Any) -> Any:
            output = schedule(*args)
            self.num_to_draft += output.num_spec_tokens_to_schedule
            return output

        self.scheduler.schedule = counted
        self._num_requests = 0

    def _time(self, owner: Any, method: str, name: str) -> None:
        inner = getattr(owner, method)

        def timed(*args: Any) -> Any:
            began = time.perf_counter()
            try:
                return inner(*args)
            finally:
                self.spent[name] += time.perf_counter() - began

        setattr(owner, method, timed)

    def add(self, prompt: list[int], max_tokens: int, *, ignore_eos: bool) -> str:
        from vllm import SamplingParams

        self._num_requests += 1
        parameters = SamplingParams(
            temperature=0.0, max_tokens=max_tokens, ignore_eos=ignore_eos, detokenize=False
        )
        name: str = self._engine.add_request(
            str(self._num_requests), {"prompt_token_ids": prompt}, parameters
        )
        return name

    def abort(self, names: list[str]) -> None:
        self.core.abort_requests(names)

    def step(self) -> Any:
        """vLLM's outputs of a step; under async scheduling, of an earlier one, or nothing."""
        return self._engine.engine_core.get_output()

    def take(self, arm: str) -> None:
        """See `Source.take`; *off_K*: vLLM's own dynamic length K, with nothing of ours."""
        if self.steering is None:
            return
        source = self.steering.source
        if arm.startswith("off_"):
            self.scheduler.steering = None
            length = int(arm.removeprefix("off_"))
            size = self.scheduler.max_num_running_reqs + 1
            self.scheduler.dynamic_sd_lookup = LiveLengths(size, length)
        else:
            if self.scheduler.steering is None:
                self.steering._steps.clear()  # their ends were never seen
                self.scheduler.steering = self.steering
            source.take(arm)
        source.idle()  # so that the daemon has heard of us while others decide

    def accept(self, rate: float) -> None:
        """Let vLLM's synthetic sampling accept each draft with this probability."""
        worker = self.core.model_executor.driver_worker
        runner = getattr(worker, "worker", worker).model_runner
        runner.rejection_sampler.synthetic_conditional_rates.fill_(rate)

    def close(self) -> None:
        self.core.shutdown()


def turns(engine: Engine, stage: Stage, keep: Callable[..., None], began: float) -> None:
    """Arms by turns, at each batch size and acceptance; see `Turns`."""
    rng = np.random.default_rng(0)
    for batch in stage.batches:
        for rate in stage.acceptance or [None]:
            if rate is not None:
                engine.accept(rate)
            place = {"batch": batch, "acceptance": rate}
            driver = Turns(engine, stage, batch)
            if engine.steering is not None and "smartspec" in stage.arms:
                warm = driver.run("smartspec", stage.warm_up_s)
                keep(**place, round=NO_ROUND, arm="smartspec", **warm)
            for number in range(stage.rounds):
                if time.monotonic() - began > stage.budget_s:
                    print(f"out of time at batch {batch}, round {number}", flush=True)
                    return
                driver.begin_round()
                for at in rng.permutation(len(stage.arms)).tolist():
                    arm = stage.arms[at]
                    keep(**place, round=number, arm=arm, **driver.run(arm, stage.turn_s))
            reason = ""
            if engine.steering is not None:
                reason = engine.steering.source.link.stats.last_reason
            print(f"batch {batch}, acceptance {rate}: done; {reason}", flush=True)
            driver.clear()


class Turns:
    """Requests that decode on and on, under one arm after the other."""

    def __init__(self, engine: Engine, stage: Stage, batch: int) -> None:
        self._engine = engine
        self._stage = stage
        self._batch = batch
        self._names: list[str] = []
        self._longest = self._round_tokens = 0
        self._max_tokens = engine.config.model_config.max_model_len - stage.prompt - 16
        self.renew()

    def _length(self) -> int:
        requests = map(self._engine.scheduler.requests.get, self._names)
        return max((len(r._output_token_ids) for r in requests if r is not None), default=0)

    def begin_round(self) -> None:
        """New requests, where those there might end in this round."""
        longest = self._length()
        self._round_tokens = max(self._round_tokens, longest - self._longest)
        if longest + 1.5 * self._round_tokens > self._max_tokens:
            self.renew()
        self._longest = self._length()

    def clear(self) -> None:
        self._engine.abort(self._names)
        while self._engine.scheduler.has_requests() or self._engine.core.batch_queue:
            self._engine.step()

    def renew(self) -> None:
        """Nobody but new requests, all of them past their prompts."""
        engine = self._engine
        self.clear()
        rng = np.random.default_rng(self._batch)
        words = engine.config.model_config.get_vocab_size()
        self._names = [
            engine.add(
                rng.integers(3, words, self._stage.prompt).tolist(),
                self._max_tokens,
                ignore_eos=True,
            )
            for _ in range(self._batch)
        ]
        engine.take("0")
        requests = engine.scheduler.requests
        while not all(len(requests[name]._output_token_ids) > 1 for name in self._names):
            engine.step()

    def run(self, arm: str, seconds: float) -> dict[str, Any]:
        """The next ``seconds`` of steps; what they did and took."""
        engine = self._engine
        if self._length() > self._max_tokens // 2 and seconds > 2:
            self.renew()
        engine.take(arm)
        for _ in range(LEFT_OUT):
            engine.step()
        stats = engine.scheduler.smartspec_stats if engine.steering is not None else None
        before = (stats.num_drafted, stats.num_accepted) if stats else (0, 0)
        to_draft, spent = engine.num_to_draft, dict(engine.spent)
        steps: list[float] = []
        own: list[float] = []
        meanwhile: list[float] = []
        drafted = accepted = tokens = 0
        began = now = time.perf_counter()
        while now - began < seconds or len(steps) < FEWEST:
            if now - began > 3 * seconds and steps:
                break
            last, last_spent = now, dict(engine.spent)
            outputs = engine.step()
            now = time.perf_counter()
            emitted = sum(len(output.new_token_ids) for output in outputs.outputs)
            if not emitted and not engine.scheduler.running:
                raise RuntimeError("all requests have ended")
            told = outputs.scheduler_stats and outputs.scheduler_stats.spec_decoding_stats
            if told:
                drafted += told.num_draft_tokens
                accepted += told.num_accepted_tokens
            tokens += emitted
            steps.append(now - last)
            own.append(engine.spent["own"] - last_spent["own"])
            meanwhile.append(engine.spent["meanwhile"] - last_spent["meanwhile"])
        ours = (stats.num_drafted, stats.num_accepted) if stats else (0, 0)
        return {
            "s": now - began,
            "steps": len(steps),
            "tokens": tokens,
            "drafted": drafted,
            "accepted": accepted,
            "ours": [ours[0] - before[0], ours[1] - before[1]],
            "to_draft": engine.num_to_draft - to_draft,
            "context": self._stage.prompt + self._length(),
            "step_ms": 1e3 * float(np.median(steps)),
            "own_us": 1e6 * float(np.median(own)),
            "meanwhile_us": 1e6 * float(np.median(meanwhile)),
            "calls_us": 1e6 * (engine.spent["calls"] - spent["calls"]) / len(steps),
        }


def answers(engine: Engine, stage: Stage, keep: Callable[..., None], began: float) -> None:
    """The same prompts under each arm: what was answered, drafted and accepted."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(stage.tokenizer)
    prompts = [tokenizer(prompt)["input_ids"] for prompt in stage.prompts]
    for arm in stage.arms:
        if time.monotonic() - began > stage.budget_s:
            print(f"out of time before {arm}", flush=True)
            return
        told: dict[str, Any] = {"drafted": 0, "accepted": 0}
        lengths: list[int] = []
        at = time.monotonic()
        said = dict(_answered(engine, stage, arm, prompts, told, lengths))
        seconds = time.monotonic() - at
        keep(
            arm=arm,
            answers=[said[number] for number in range(len(prompts))],
            s=seconds,
            **told,
            steps_at_length=np.bincount(lengths).tolist() if lengths else [],
        )
        print(f"{arm}: {len(said)} answers, {told}, {seconds:.1f} s", flush=True)


def _answered(
    engine: Engine,
    stage: Stage,
    arm: str,
    prompts: list[list[int]],
    told: dict[str, Any],
    lengths: list[int],
) -> Iterator[tuple[int, list[int]]]:
    """Number and answer of each prompt; what else there is goes into ``told`` and ``lengths``."""
    engine.take(arm)
    stats = engine.scheduler.smartspec_stats if engine.steering is not None else None
    before = (stats.num_drafted, stats.num_accepted, stats.num_steered_steps) if stats else ()
    numbers: dict[str, int] = {}
    said: dict[str, list[int]] = {}
    coming = step = 0
    while coming < len(prompts) or numbers:
        if coming < len(prompts) and len(numbers) < AT_ONCE and step % 2 == 0:
            name = engine.add(prompts[coming], stage.max_tokens, ignore_eos=False)
            numbers[name], said[name] = coming, []
            coming += 1
        step += 1
        to_draft = engine.num_to_draft
        outputs = engine.step()
        lengths.append(engine.num_to_draft - to_draft)
        stepped = outputs.scheduler_stats and outputs.scheduler_stats.spec_decoding_stats
        if stepped:
            told["drafted"] += stepped.num_draft_tokens
            told["accepted"] += stepped.num_accepted_tokens
        for output in outputs.outputs:
            said[output.request_id] += output.new_token_ids
            if output.finished:
                yield numbers.pop(output.request_id), said[output.request_id]
    while engine.scheduler.has_requests() or engine.core.batch_queue:
        engine.step()
    if stats:
        after = (stats.num_drafted, stats.num_accepted, stats.num_steered_steps)
        told["ours"] = [now - then for now, then in zip(after, before, strict=True)]


def main() -> None:
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", HF_HUB_OFFLINE="1")
    stage = msgspec.json.decode(sys.argv[1], type=Stage)
    began = time.monotonic()

    def keep(**row: Any) -> None:
        with Path(stage.raw).open("a", encoding="utf-8") as sink:
            sink.write(json.dumps({"stage": stage.name, **row}) + "\n")

    engine = Engine(stage)
    config = engine.config
    import torch
    from vllm.platforms import current_platform

    kinds = type(engine.scheduler).__mro__
    facts = {
        "device": str(current_platform.device_type)
        if current_platform.is_cpu()
        else current_platform.get_device_name(),
        "torch": torch.__version__,
        "vllm": sys.modules["vllm"].__version__,
        "scheduler": next(c.__name__ for c in kinds if c.__name__ != "Switched"),
        "is_async": bool(config.scheduler_config.async_scheduling),
        "cuda_graphs": str(config.compilation_config.cudagraph_mode),
        "graph_sizes": len(config.compilation_config.cudagraph_capture_sizes or ()),
        "runner_v2": bool(getattr(config, "use_v2_model_runner", False)),
        "dtype": str(config.model_config.dtype),
        "attention": sorted(
            {
                str(getattr(layer, "attn_backend", layer))
                for layer in config.compilation_config.static_forward_context.values()
            }
        )[:3],
        "kv_blocks": config.cache_config.num_gpu_blocks,
        "start_s": time.monotonic() - began,
    }
    keep(facts=facts)
    print(f"{time.monotonic() - began:.0f} s: {json.dumps(facts)}", flush=True)
    (answers if stage.prompts else turns)(engine, stage, keep, began)
    ends: dict[str, Any] = {"s": time.monotonic() - began}
    if engine.steering is not None:
        ends["errors"] = engine.scheduler.smartspec_stats.num_errors
        ends["link"] = repr(engine.steering.source.link.stats)
    if not current_platform.is_cpu():
        ends["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    keep(end=ends)
    print(f"{time.monotonic() - began:.0f} s: {json.dumps(ends)}", flush=True)
    engine.close()


if __name__ == "__main__":
    main()
