"""What is put into vLLM's scheduler, without vLLM."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from smartspec.engine_adapter.lengths import Choice, CostCurve, DraftCost
from smartspec.engine_adapter.levels import Levels
from smartspec.engine_adapter.link import Ready
from smartspec.engine_adapter.vllm.facts import METHODS, SEQUENTIAL
from smartspec.engine_adapter.vllm.steering import Steering


class Dear:
    """A source by which no draft is worth its verification."""

    may_steer = True

    def prepare(self, batch: Any, features: Any = None) -> None:
        curve = CostCurve("ragged", [0.0, 100.0], [0.0, 100.0])
        self.levels = Levels(
            np.log([[0.5]]), np.ones(batch.size), None, None, 3, 1.0, 1, curve, DraftCost()
        )
        self.levels.expect(np.zeros(features.shape[1], np.intp))

    def ready(self) -> Ready:
        return Ready(Choice(np.empty(0, np.int64)), self.levels)


class Asked:
    """A source that leaves lengths alone, and notes for what prompts it is asked."""

    may_steer = False

    def __init__(self) -> None:
        self.prompts: list[int] = []

    def prepare(self, batch: Any, features: Any = None) -> None:
        pass

    def ready(self) -> None:
        return None

    def choose(self, batch: Any) -> Choice:
        self.prompts.append(batch.num_prefill_tokens)
        return Choice.fixed(batch.ceiling.astype(np.int64), "own")


class Queue(deque[Any]):
    """vLLM's, as far as it is looked at."""

    def peek_request(self) -> Any:
        return self[0]


def _scheduler(running: list[Any], waiting: list[Any], max_num_running: int) -> SimpleNamespace:
    return SimpleNamespace(
        running=running,
        waiting=Queue(waiting),
        requests={request.request_id: request for request in (*running, *waiting)},
        num_spec_tokens=3,
        max_num_running_reqs=max_num_running,
        max_num_scheduled_tokens=64,
        dynamic_sd_lookup=None,
        scheduler_config=SimpleNamespace(async_scheduling=False),
        kv_cache_manager=SimpleNamespace(usage=0.0),
        get_request_counts=lambda: (len(running), len(waiting)),
    )


def _request(name: str, drafts: list[int]) -> SimpleNamespace:
    return SimpleNamespace(
        request_id=name,
        is_prefill_chunk=False,
        sampling_params=object(),
        resumable=False,
        max_tokens=100,
        num_tokens=30,
        num_computed_tokens=4,
        _output_token_ids=[5],
        _all_token_ids=[3, 4, 5],
        spec_token_ids=drafts,
    )


@pytest.mark.parametrize("method", ["custom_class", "suffix", "ngram"])
def test_lists_that_a_proposer_may_keep_are_not_cut_in_place(method: str) -> None:
    drafts = [1, 2, 3]
    requests = [_request("a", drafts), _request("b", drafts if method == "custom_class" else [4])]
    scheduler = _scheduler(requests, [], 2)
    source: Any = Dear()
    steering = Steering(scheduler, source, METHODS[method])
    steering.while_running(SimpleNamespace(scheduled_new_reqs=[]))
    steering.before_schedule()
    assert [request.spec_token_ids for request in requests] == [[], []]
    assert drafts == ([] if method == "ngram" else [1, 2, 3])
    assert scheduler.dynamic_sd_lookup is not None


class Engine:
    """Steps of a scheduler that is told who joins; nobody is ever done."""

    def __init__(self, num_running: int, waiting: list[str]) -> None:
        running = [_request(str(i), []) for i in range(num_running)]
        self.scheduler = _scheduler(running, [_request(name, []) for name in waiting], 4)
        self.source = Asked()
        source: Any = self.source
        self.steering = Steering(self.scheduler, source, SEQUENTIAL)

    def step(self, joins: int = 0, other_tokens: int = 0, num_cached: int = 0) -> int:
        """Run a step in which so many join; returns the prompt tokens that were expected of it.

        ``num_cached`` : tokens of each prompt that joins, in the prefix cache
        """
        scheduler = self.scheduler
        self.steering.before_schedule()
        joined = [scheduler.waiting.popleft() for _ in range(joins)]
        scheduler.running += joined
        new = [
            SimpleNamespace(prompt_token_ids=[0] * one.num_tokens, num_computed_tokens=num_cached)
            for one in joined
        ]
        tokens = {request.request_id: 1 for request in scheduler.running}
        total = len(tokens) + other_tokens
        output = SimpleNamespace(
            num_scheduled_tokens=tokens,
            total_num_scheduled_tokens=total,
            scheduled_new_reqs=new,
        )
        self.steering.after_schedule(output)
        self.steering.while_running(output)
        return self.source.prompts[-1]


def test_prompt_is_expected_once_when_it_is_left_waiting_though_there_is_a_place() -> None:
    engine = Engine(2, ["head"])
    assert [engine.step() for _ in range(5)] == [30, 0, 0, 0, 0]
    engine.scheduler.waiting.append(_request("behind", []))
    assert engine.step() == 0


def test_prompt_that_was_left_waiting_is_expected_again_when_somebody_has_left() -> None:
    engine = Engine(3, ["head", "next"])
    assert [engine.step() for _ in range(3)] == [30, 0, 0]
    del engine.scheduler.running[0]
    assert engine.step() == 30  # and in vain
    assert [engine.step() for _ in range(2)] == [0, 0]
    del engine.scheduler.running[0]
    assert engine.step(joins=1) == 30
    assert engine.step() == 30  # the next one's
    assert engine.step() == 0


def test_prompt_is_expected_when_another_one_was_left_waiting() -> None:
    engine = Engine(2, ["head"])
    engine.step()
    assert engine.step() == 0
    engine.scheduler.waiting.appendleft(_request("preempted", []))
    assert engine.step() == 30


def test_prompt_is_expected_when_it_was_left_for_want_of_a_place_or_of_tokens() -> None:
    full = Engine(4, ["head"])
    assert [full.step() for _ in range(2)] == [0, 0]
    del full.scheduler.running[0]
    assert full.step() == 30
    busy = Engine(2, ["head"])
    assert [busy.step(other_tokens=62) for _ in range(3)] == [30, 30, 30]


def test_prompt_is_expected_when_it_came_to_the_queue_after_the_last_step() -> None:
    engine = Engine(2, [])
    assert engine.step() == 0
    engine.scheduler.waiting.append(_request("new", []))
    assert engine.step() == 30


def test_prompts_are_expected_less_what_the_prefix_cache_held_of_the_latest() -> None:
    engine = Engine(0, [str(i) for i in range(100, 140)])
    engine.scheduler.max_num_running_reqs = 100
    assert engine.step(joins=1, num_cached=20) == 30
    for _ in range(30):
        expected = engine.step(joins=1, num_cached=20)
    assert expected == 10
    for _ in range(4):
        engine.step(joins=1)
    assert 10 < engine.step() < 30
