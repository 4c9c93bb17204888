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
out, policies come in, and lengths are chosen for the batch as it is then. They are those of the
next ``schedule()``, also when requests have left by then. How many of the best drafts are taken is
found in it, if other prompts share its pass than was expected, and for a lookup, whose drafts are
not there before.

A step's time is what lies between ``schedule()``'s end (or the end of the step before, where steps
overlap) and ``update_from_output()``: verification of this step, drafting for the next.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import repeat
from operator import attrgetter
from typing import Any, Protocol

import numpy as np

from smartspec.engine_adapter.base import F32, DecodeBatch, LengthSource
from smartspec.engine_adapter.lengths import Choice
from smartspec.engine_adapter.levels import Levels
from smartspec.engine_adapter.link import Ready
from smartspec.engine_adapter.vllm.copies import Copies, Found
from smartspec.engine_adapter.vllm.facts import Method
from smartspec.engine_adapter.vllm.step import Group, Step, sizes

IN_FORCE = ("policy", "probe", "fallback")  #: sources of lengths that are put into force
MAX_STEPS_IN_FLIGHT = 64  #: a step that never ends is forgotten after so many others
NUMBERS_KEPT = 1024  #: beyond twice as many as there are requests
CACHED_MEMORY = 8  #: prompts whose cached share is remembered
EXCLUDED = 0  #: in the place of the number of a request that is not controlled

_answer = attrgetter("_output_token_ids")  # Request.num_output_tokens is its length
_in_flight = attrgetter("num_output_placeholders")


class Source(LengthSource, Protocol):
    """What decides lengths, and can be told beforehand what for."""

    @property
    def may_steer(self) -> bool:
        """Whether a policy may decide the next `choose`; if not, ids and ceilings will do."""

    def prepare(self, batch: DecodeBatch, features: F32 | None = None) -> None:
        """Do now what the next `choose` for ``batch`` would; with ``features``: as of the link."""

    def ready(self) -> Ready | None:
        """What was prepared for the next step; None: it is `choose` that knows."""


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


@dataclass(frozen=True, slots=True)
class Plan:
    """A step to come."""

    group: Group  #: who is to decode in it; who has left by then is found out when it runs
    batch: DecodeBatch  #: the same, for the source of lengths
    near: list[tuple[int, Any, int]]  #: who may be at the answer's end: row, request, most drafts


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
        self._probed: dict[str, int] = {}
        self._plan: Plan | None = None  #: of the next step
        self._head: Any = None  #: of the queue, where there is a place for it in the batch
        #: The head that a step left waiting, though it could have begun; and how many ran then.
        self._left: tuple[Any, int] = None, 0
        self._cached = 0.0  #: share of the latest prompts that was in vLLM's prefix cache
        self._copies = Copies()  #: of a lookup
        self._pending: tuple[Group, DecodeBatch, Choice, Found | None] | None = None
        self._steps: dict[int, Step] = {}  #: scheduled
        self._ended: list[Step] = []  #: to be reported
        self._ended_s = -math.inf  #: when the last step ended that was reported

    def close(self) -> None:
        """Take everything out again; idempotent."""
        self._scheduler.dynamic_sd_lookup = self._original
        self.source.close()

    # -- before a step --------------------------------------------------------------------------

    def before_schedule(self) -> None:
        """Choose lengths for the requests that will decode, and put them into force."""
        self._pending = None  # a step that failed in between leaves nothing behind
        plan, self._plan = self._plan, None
        ready = None
        if plan is None:
            self._follow()
            plan = self._make_plan()
        else:
            ready = self.source.ready()
        if ready is None:
            self._pending = self._choose(plan)
        elif isinstance(ready.lengths, Levels):
            found = self._cut_found(plan, ready.lengths)
            self._pending = plan.group, plan.batch, ready.by, found
        elif ready.by.source not in IN_FORCE:
            self._leave()
            self._pending = plan.group, plan.batch, ready.by, None
        else:
            lengths = ready.lengths.choose(self._expected_prefill()).lengths.copy()
            choice = self._put_in(plan, ready.by, lengths)
            self._pending = plan.group, plan.batch, choice, None

    def _choose(self, plan: Plan) -> tuple[Group, DecodeBatch, Choice, Found | None]:
        """By the source, for a batch that it was not asked to prepare, or does not steer."""
        found = None
        if self._method.is_lookup and self.source.may_steer:
            found = Found.of(plan.group.requests)
        batch = self._as_it_is_now(plan, found)
        choice = self.source.choose(batch)
        if choice.source in IN_FORCE:
            choice = self._put_in(plan, choice, choice.lengths.tolist())
        else:
            self._leave()
        return plan.group, batch, choice, found

    def _leave(self) -> None:
        """Leave a step to the engine as it is configured."""
        self._probed = {}
        self._scheduler.dynamic_sd_lookup = self._original

    def _make_plan(self) -> Plan:
        """What lengths are to be chosen for in the next step, as far as it is known now."""
        group = self._group
        room = group.most_drafts - sizes(map(_answer, group.requests), len(group.requests))
        if self._is_async:
            room -= np.fromiter(map(_in_flight, group.requests), np.int64, len(room))
        ceiling = np.minimum(np.maximum(room, 0), self._max_length).astype(np.uint8)
        features = np.zeros((0, len(room)), np.float32)
        batch = DecodeBatch(group.ids, ceiling, features, self._expected_prefill())
        # The step in between brings one token more than drafts at most.
        near = np.flatnonzero(room < 2 * self._max_length + 1).tolist()
        most = group.most_drafts[near].tolist()
        ending = zip(near, [group.requests[i] for i in near], most, strict=True)
        return Plan(group, batch, list(ending))

    def _as_it_is_now(self, plan: Plan, found: Found | None) -> DecodeBatch:
        """The plan's batch with what has changed since: prompts that have come, drafts found."""
        batch, ceiling, features = plan.batch, plan.batch.ceiling, plan.batch.features
        prefill = self._expected_prefill()
        if found is not None:
            ceiling = np.minimum(ceiling, sizes(found.drafts, batch.size)).astype(np.uint8)
            features = self._copies.features(found)
        elif prefill == batch.num_prefill_tokens:
            return batch
        return DecodeBatch(batch.request_ids, ceiling, features, prefill)

    def _follow(self, last: Group | None = None) -> None:
        """Who is in the batch now, by number. ``last``: who was in the step before."""
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
        if last is not None and controlled == last.requests:
            self._group = last
        if controlled == self._group.requests:
            return
        if len(numbers) > 2 * len(self._scheduler.requests) + NUMBERS_KEPT:
            alive = self._scheduler.requests
            self._numbers = numbers = {n: i for n, i in numbers.items() if n in alive}
        self._group = Group.of(controlled, numbers)

    def _expected_prefill(self) -> int:
        """Prompt tokens that will share the pass: of chunks under way, and of the next prompt.

        A part of it may be cached, which vLLM finds out only when it schedules it: as much as of
        the latest ones. Of a prompt that the last step left waiting none are expected until
        somebody has left: it lacks KV room, a slot for its adapter, or what else may take hundreds
        of steps to come.
        """
        scheduler = self._scheduler
        tokens, head, num_running = 0, None, len(scheduler.running)
        if self._has_prefill:
            tokens = sum(
                request.num_tokens - request.num_computed_tokens
                for request in scheduler.running
                if request.is_prefill_chunk
            )
        if num_running < scheduler.max_num_running_reqs and scheduler.waiting:
            head = scheduler.waiting.peek_request()
            left, num_ran = self._left
            if head is not left or num_running < num_ran:
                tokens += round(head.num_tokens * (1.0 - self._cached))
        self._head = head
        return int(min(tokens, scheduler.max_num_scheduled_tokens))

    def _note_head(self, step: Step) -> None:
        """Note whether a step left the queue's head waiting, though it could have begun."""
        scheduler, head = self._scheduler, self._head
        if (
            head is not None
            and step.output.total_num_scheduled_tokens < scheduler.max_num_scheduled_tokens
            and scheduler.waiting
            and scheduler.waiting.peek_request() is head
        ):
            self._left = head, len(step.running)

    def _room(self, request: Any, most: int) -> int:
        """Drafts that still fit into a request's answer, ``most`` into all of it."""
        room = most - len(_answer(request))
        if self._is_async:  # of a step in flight, all drafts may still be accepted
            room -= _in_flight(request)
        return max(room, 0)

    def _put_in(self, plan: Plan, choice: Choice, lengths: list[int]) -> Choice:
        """Cut drafts to what is chosen, and set what is drafted next."""
        group = plan.group
        for i, request, most in plan.near:
            room = self._room(request, most)
            if lengths[i] > room:
                lengths[i] = room
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
        longest = self._max_length
        for request, length in zip(group.requests, lengths, strict=True):
            if length < longest and len(drafts := request.spec_token_ids) > length:
                # A new list: under the async scheduler all requests share one.
                request.spec_token_ids = drafts[:length]
        self._scheduler.dynamic_sd_lookup = self._live
        return choice

    def _cut_found(self, plan: Plan, levels: Levels) -> Found:
        """Cut what a lookup has found to what is worth its verification."""
        requests = plan.group.requests
        for _, request, most in plan.near:
            room = self._room(request, most)
            if len(request.spec_token_ids) > room:
                request.spec_token_ids = request.spec_token_ids[:room]
        if not self._method.fresh_lists:  # they are cut in place
            for request in requests:
                request.spec_token_ids = request.spec_token_ids.copy()
        found = self._copies.cut(requests, levels, self._expected_prefill())
        self._scheduler.dynamic_sd_lookup = self._live
        return found

    def after_schedule(self, output: Any) -> None:
        """Remember what the step holds, until its results come."""
        if self._pending is None or not output.total_num_scheduled_tokens:
            return
        group, batch, choice, found = self._pending
        self._pending = None
        running = self._scheduler.running.copy()
        step = Step(output, group, batch, choice, running, self._clock(), found)
        self._steps[id(output)] = step
        while len(self._steps) > MAX_STEPS_IN_FLIGHT:
            del self._steps[next(iter(self._steps))]

    # -- during a step --------------------------------------------------------------------------

    def while_running(self, output: Any) -> None:
        """Do all that can wait until the device runs."""
        for new in output.scheduled_new_reqs:
            if prompt := len(new.prompt_token_ids or ()):
                self._cached += (new.num_computed_tokens / prompt - self._cached) / CACHED_MEMORY
        step = self._steps.get(id(output))
        if step is not None:
            if step.ceiling is None:
                self._weigh(step)
            self._note_head(step)
        self._report()
        self._follow(step.group if step is not None else None)
        # Until the next step requests may leave, or wait to join; nobody else will decode in it.
        self._plan = self._make_plan()
        features = self._copies.rates() if self._method.is_lookup else None
        self.source.prepare(self._plan.batch, features)

    def _weigh(self, step: Step) -> None:
        """Note who is in the pass and what it reads; once, before the next ``schedule()``."""
        if step.found is not None:
            step.found = step.found.noted(step.group.requests)
        step.weigh()
        if self._method.is_lookup:
            if step.found is None:
                step.found = Found.scheduled(step.group.requests, step.output)
            step.bound()
            step.features = self._copies.features(step.found)

    def _report(self) -> None:
        """Tell what the steps did that have ended."""
        ended, self._ended = self._ended, []
        _, num_waiting = self._scheduler.get_request_counts()
        kv_usage = min(max(self._scheduler.kv_cache_manager.usage, 0.0), 1.0)
        for step in ended:
            if step.found is not None:
                self._copies.learn(step.found, step.came())
            begun_s = max(step.scheduled_s, self._ended_s)
            self._ended_s = step.ended_s
            facts = step.facts(self._method, begun_s, num_waiting, kv_usage)
            self.stats.num_steps += 1
            self.stats.num_steered_steps += step.choice.source in IN_FORCE
            self.stats.num_drafted += int(facts.num_drafted.sum())
            self.stats.num_accepted += int(facts.num_accepted.sum())
            self.source.report(facts)

    # -- after a step ---------------------------------------------------------------------------

    def before_update(self, output: Any, result: Any) -> Step | None:
        """Read a step's results, before vLLM takes them in; None: not a step of ours."""
        now = self._clock()
        if self._ended:
            self._report()  # no masks were asked for in between
        step = self._steps.pop(id(output), None)
        if step is None:
            return None
        step.ended_s = now
        if step.ceiling is None:  # no masks were asked for
            self._weigh(step)
        step.take_results(result, not self._steps and self._scheduler.running == step.running)
        return step

    def after_update(self, step: Step | None) -> None:
        """Note a step's end, after vLLM has taken it in."""
        if step is None:
            return
        self._ended.append(step)
        if not self._scheduler.running:
            self._report()  # there may be no step that masks are asked for
