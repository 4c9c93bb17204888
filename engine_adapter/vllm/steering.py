"""Lengths into vLLM's scheduler, and what came of them out of it: around every step.

vLLM drafts at the end of a step and verifies in the next, so one step has two lengths:

* *verified*: before ``schedule()`` each request's drafts are cut to the length that the policy in
  force gives it now;
* *drafted*: the longest of these lengths is what the drafter is run to at the end of this step. It
  reaches the drafter through ``Scheduler.dynamic_sd_lookup``, vLLM's own table of lengths, in whose
  place stands one that answers with it.

A lower length acts at once, a higher one in the next step. Where drafts come from a lookup, which
costs next to nothing, all are looked up and only verification is cut. The table is put in with the
first steered step and taken out with the first that is not: else vLLM runs as it would without us.

What can wait is done while the device runs (`Steering.while_running`): reports of earlier steps go
out, policies come in, and lengths are chosen for the batch as it is then. If it is the same at the
next ``schedule()``, these are its lengths.

A step's time is what lies between ``schedule()``'s end (or the end of the step before, where steps
overlap) and ``update_from_output()``: verification of this step, drafting for the next.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import repeat
from operator import attrgetter
from typing import Any, Protocol

import numpy as np

from smartspec.engine_adapter.base import DecodeBatch, LengthSource
from smartspec.engine_adapter.lengths import I64, Choice
from smartspec.engine_adapter.vllm.facts import Method
from smartspec.engine_adapter.vllm.step import Group, Step, sizes

STEERED = ("policy", "probe", "fallback")  #: sources of lengths that are put into force
MAX_STEPS_IN_FLIGHT = 64  #: a step that never ends is forgotten after so many others
NUMBERS_KEPT = 1024  #: beyond twice as many as there are requests
EXCLUDED = 0  #: in the place of the number of a request that is not controlled

_drafts = attrgetter("spec_token_ids")
_answer = attrgetter("_output_token_ids")  # Request.num_output_tokens is its length
_in_flight = attrgetter("num_output_placeholders")


class Source(LengthSource, Protocol):
    """What decides lengths, and can be told beforehand what for."""

    def prepare(self, batch: DecodeBatch | None) -> None:
        """Do now what `choose` would have to do, for ``batch`` if it is known."""


@dataclass(slots=True)
class SteeringStats:
    """Counters since the engine started, over the requests that are under control."""

    num_steps: int = 0
    num_steered_steps: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    num_errors: int = 0
    #: requests left out, by reason
    num_excluded: Counter[str] = field(default_factory=Counter)


class LiveLengths(list[int]):
    """In the place of vLLM's table by batch size: the same live length for every size."""

    def __init__(self, size: int, length: int) -> None:
        super().__init__([length] * size)
        self.length = length

    def __getitem__(self, batch_size: Any) -> Any:
        return self.length


def why_excluded(request: Any) -> str | None:
    """Why a request is not controlled; None: it is."""
    if request.sampling_params is None:
        return "pooling: nothing is decoded"
    if request.resumable:
        return "streaming input: its turns restart the counts that drafts are checked by"
    return None


class Steering:
    """Steers one scheduler.

    Parameters
    ----------
    scheduler : vLLM's
    source : decides lengths
    method : kind of the drafter
    clock : monotonic seconds
    """

    def __init__(
        self,
        scheduler: Any,
        source: Source,
        method: Method,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.stats = SteeringStats()
        self.source = source
        self._scheduler = scheduler
        self._method = method
        self._clock = clock
        self._max_length: int = scheduler.num_spec_tokens
        self._original = scheduler.dynamic_sd_lookup
        self._live = LiveLengths(scheduler.max_num_running_reqs + 1, self._max_length)
        self._is_async = bool(scheduler.scheduler_config.async_scheduling)
        self._numbers: dict[str, int] = {}
        self._num_seen = 0
        self._running: list[Any] = []
        self._has_prefill = False
        self._group = Group.of([], {})
        self._lengths_of_answers: tuple[Group, I64] | None = None  #: None: to be read anew
        self._probed: dict[str, int] = {}
        self._next: DecodeBatch | None = None  #: of the next step, if nobody joins or leaves
        self._pending: tuple[DecodeBatch, Choice] | None = None
        self._steps: OrderedDict[int, Step] = OrderedDict()  #: scheduled
        self._ended: list[Step] = []  #: to be reported
        self._ended_s = -np.inf

    def close(self) -> None:
        """Take everything out again; idempotent."""
        self._scheduler.dynamic_sd_lookup = self._original
        self.source.close()

    # -- before a step --------------------------------------------------------------------------

    def before_schedule(self) -> None:
        """Choose lengths for the requests that will decode, and put them into force."""
        self._pending = None  # a step that failed in between leaves nothing behind
        self._follow()
        available = list(map(len, map(_drafts, self._group.requests)))
        batch, self._next = self._next, None
        if (
            batch is None
            or batch.request_ids is not self._group.ids
            or batch.num_prefill_tokens != self._expected_prefill()
        ):
            batch = self._batch(self._room(available))
        choice = self.source.choose(batch)
        if choice.source in STEERED:
            choice = self._put_in(available, choice)
        else:
            self._probed = {}
            self._scheduler.dynamic_sd_lookup = self._original
        self._pending = batch, choice

    def _follow(self) -> None:
        """Who is in the batch now, by number."""
        running = self._scheduler.running
        if not self._has_prefill and running == self._running:
            return
        decoding = [request for request in running if not request.is_prefill_chunk]
        self._running = running.copy()
        self._has_prefill = len(decoding) < len(running)
        numbers = self._numbers
        controlled = []
        for request in decoding:
            name = request.request_id
            if name not in numbers:
                reason = why_excluded(request)
                self._num_seen += 1
                numbers[name] = self._num_seen if reason is None else EXCLUDED
                if reason is not None:
                    self.stats.num_excluded[reason] += 1
            if numbers[name] != EXCLUDED:
                controlled.append(request)
        if controlled == self._group.requests:
            return
        if len(numbers) > 2 * len(self._scheduler.requests) + NUMBERS_KEPT:
            alive = self._scheduler.requests
            self._numbers = numbers = {n: i for n, i in numbers.items() if n in alive}
        self._group = Group.of(controlled, numbers)

    def _room(self, available: list[int] | None = None) -> I64:
        """Drafts that each request could still use, [B]; below 0 at an answer's last token.

        ``available``: [B], drafts that a lookup found.
        """
        group = self._group
        # Of a step in flight, all drafts may still be accepted.
        room = group.most_drafts - self._num_output(group)
        if self._is_async:
            room -= np.fromiter(map(_in_flight, group.requests), np.int64, len(room))
        if self._method.is_lookup and available is not None:
            room = np.minimum(room, np.array(available, np.int64))
        return room

    def _batch(self, room: I64) -> DecodeBatch:
        group = self._group
        ceiling = np.minimum(np.maximum(room, 0), self._max_length).astype(np.uint8)
        return DecodeBatch(group.ids, ceiling, group.features, self._expected_prefill())

    def _num_output(self, group: Group) -> I64:
        """Tokens of each answer so far."""
        if self._lengths_of_answers is None or self._lengths_of_answers[0] is not group:
            lengths = sizes(map(_answer, group.requests), len(group.requests))
            self._lengths_of_answers = group, lengths
        return self._lengths_of_answers[1]

    def _expected_prefill(self) -> int:
        """Prompt tokens that will share the pass: of chunks under way, and of the next prompt."""
        scheduler = self._scheduler
        tokens = 0
        if self._has_prefill:
            tokens = sum(
                request.num_tokens - request.num_computed_tokens
                for request in scheduler.running
                if request.is_prefill_chunk
            )
        if scheduler.waiting and len(scheduler.running) < scheduler.max_num_running_reqs:
            tokens += scheduler.waiting.peek_request().num_tokens
        return int(min(tokens, scheduler.max_num_scheduled_tokens))

    def _put_in(self, available: list[int], choice: Choice) -> Choice:
        """Cut drafts to what is chosen, and set what is drafted next."""
        group, lengths = self._group, choice.lengths.tolist()
        if not self._method.is_lookup:
            if lengths:  # else the length of the last batch stands for the next
                self._live.length = max(lengths)
            # A probe's drafts are there one step after it was asked for: then they are verified.
            probed, self._probed = self._probed, {}
            if choice.source == "probe":
                self._probed = dict(zip(group.names, lengths, strict=True))
            if probed:
                lengths = list(map(max, lengths, map(probed.get, group.names, repeat(0))))
                choice = choice._replace(source="probe")
        for request, length, there in zip(group.requests, lengths, available, strict=True):
            if length < there:
                # A new list: under the async scheduler all requests share one.
                request.spec_token_ids = request.spec_token_ids[:length]
        self._scheduler.dynamic_sd_lookup = self._live
        return choice

    def after_schedule(self, output: Any) -> None:
        """Remember what the step holds, until its results come."""
        if self._pending is None or not output.total_num_scheduled_tokens:
            return
        batch, choice = self._pending
        self._pending = None
        running = self._scheduler.running.copy()
        step = Step(output, self._group, batch, choice, running, self._clock())
        self._steps[id(output)] = step
        while len(self._steps) > MAX_STEPS_IN_FLIGHT:
            self._steps.popitem(last=False)

    # -- during a step --------------------------------------------------------------------------

    def while_running(self, output: Any) -> None:
        """Do all that can wait until the device runs."""
        step = self._steps.get(id(output))
        if step is not None:
            step.weigh()
        self._report()
        self._follow()
        if self._method.is_lookup:  # what it finds is not known yet
            self.source.prepare(None)
            return
        room = self._room()
        batch = self._batch(room)
        self.source.prepare(batch)
        # Where nobody is near the end, the batch is the same whatever this step brings.
        self._next = batch if room.min(initial=0x7FFF) > 2 * self._max_length else None

    def _report(self) -> None:
        """Tell what the steps did that have ended."""
        ended, self._ended = self._ended, []
        num_waiting = len(self._scheduler.waiting)
        kv_usage = min(max(self._scheduler.kv_cache_manager.usage, 0.0), 1.0)
        for step in ended:
            facts = step.facts(self._method, num_waiting, kv_usage)
            self.stats.num_steps += 1
            self.stats.num_steered_steps += step.choice.source in STEERED
            self.stats.num_drafted += int(facts.num_drafted.sum())
            self.stats.num_accepted += int(facts.num_accepted.sum())
            self.source.report(facts)

    # -- after a step ---------------------------------------------------------------------------

    def before_update(self, output: Any, result: Any) -> Step | None:
        """Read a step's results, before vLLM takes them in; None: not a step of ours."""
        now = self._clock()
        step = self._steps.pop(id(output), None)
        if step is None:
            self._lengths_of_answers = None
            return None
        step.step_s = max(now - max(step.scheduled_s, self._ended_s), 1e-9)
        self._ended_s = now
        step.weigh()
        is_last = not self._steps and self._scheduler.running == step.running
        step.take_results(result, is_last)
        before = self._num_output(step.group)
        step.num_output = before, before
        self._lengths_of_answers = None
        return step

    def after_update(self, step: Step | None) -> None:
        """Note a step's end, after vLLM has taken it in."""
        if step is None:
            return
        assert step.num_output is not None
        step.num_output = step.num_output[0], self._num_output(step.group)
        self._ended.append(step)
        if len(self._ended) > 1 or not self._scheduler.running:
            self._report()  # no masks were asked for, or there may be no step that they are for
