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

A step's time is what lies between ``schedule()``'s end (or the end of the step before, where steps
overlap) and ``update_from_output()``: verification of this step, drafting for the next.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass, field
from itertools import repeat
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from smartspec.engine_adapter.base import F32, U8, U64, DecodeBatch, LengthSource, StepFacts
from smartspec.engine_adapter.lengths import I64, RAGGED, UNIFORM, Choice
from smartspec.engine_adapter.vllm.facts import Method

STEERED = ("policy", "probe", "fallback")  #: sources of lengths that are put into force
MAX_STEPS_IN_FLIGHT = 64  #: a step that never ends is forgotten after so many others
NUMBERS_KEPT = 1024  #: beyond twice as many as there are requests
EXCLUDED = 0  #: in the place of the number of a request that is not controlled


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


@dataclass(frozen=True, slots=True)
class _Group:
    """Requests that decode together: what stays the same for as long as nobody joins or leaves."""

    requests: list[Any]  #: [B]
    names: list[str]  #: [B]
    ids: U64  #: [B]
    max_tokens: I64  #: [B], of the answers
    features: F32  #: [0, B]

    def take(self, rows: npt.NDArray[np.intp]) -> _Group:
        kept = rows.tolist()
        return _Group(
            [self.requests[i] for i in kept],
            [self.names[i] for i in kept],
            self.ids[rows],
            self.max_tokens[rows],
            self.features[:, rows],
        )


NOBODY = _Group([], [], np.zeros(0, np.uint64), np.zeros(0, np.int64), np.zeros((0, 0), np.float32))


class _Step(NamedTuple):
    """A step between ``schedule()`` and ``update_from_output()``."""

    group: _Group  #: that decodes in it
    ceiling: U8
    choice: Choice
    context_tokens: int
    scheduled_s: float


class _Ending(NamedTuple):
    """A step whose results are there, before vLLM has taken them in."""

    step: _Step
    group: _Group  #: of it, those that have results
    ceiling: U8
    num_drafted: I64
    num_accepted: I64
    num_output: I64  #: tokens of each answer so far
    num_decode_tokens: int  #: in the pass, of the whole step
    step_s: float


# Columns of a batch are read by these at C's speed: at 256 requests every pass counts.
_drafts = attrgetter("spec_token_ids")
_answer = attrgetter("_output_token_ids")  # Request.num_output_tokens is its length
_in_flight = attrgetter("num_output_placeholders")
_computed = attrgetter("num_computed_tokens")
_stale = attrgetter("num_stale_output_tokens")
_status = attrgetter("status")


def _sizes(lists: Iterable[Sized], count: int) -> I64:
    return np.fromiter(map(len, lists), np.int64, count)


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
        source: LengthSource,
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
        self._group = NOBODY
        self._lengths_of_answers: tuple[_Group, I64] | None = None  #: None: to be read anew
        self._probed: dict[str, int] = {}
        self._pending: tuple[_Group, U8, Choice, int] | None = None
        self._steps: OrderedDict[int, _Step] = OrderedDict()
        self._ended_s = -np.inf

    def close(self) -> None:
        """Take everything out again; idempotent."""
        self._scheduler.dynamic_sd_lookup = self._original
        self.source.close()

    # -- before a step --------------------------------------------------------------------------

    def before_schedule(self) -> None:
        """Choose lengths for the requests that will decode, and put them into force."""
        self._pending = None  # a step that failed in between leaves nothing behind
        running = self._scheduler.running
        if self._has_prefill or running != self._running:
            self._follow(running)
        group = self._group
        available = _sizes(map(_drafts, group.requests), len(group.requests))
        ceiling = self._ceiling(group, available)
        batch = DecodeBatch(
            request_ids=group.ids,
            ceiling=ceiling,
            features=group.features,
            num_prefill_tokens=self._expected_prefill(),
        )
        choice = self.source.choose(batch)
        if choice.source in STEERED:
            choice = self._put_in(group, available, batch, choice)
        else:
            self._probed = {}
            self._scheduler.dynamic_sd_lookup = self._original
        self._pending = group, ceiling, choice, sum(map(_computed, group.requests))

    def _follow(self, running: list[Any]) -> None:
        """The batch may have changed: who is in it, by number."""
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
        names = [request.request_id for request in controlled]
        self._group = _Group(
            controlled,
            names,
            np.array([numbers[name] for name in names], np.uint64),
            np.array([request.max_tokens for request in controlled], np.int64),
            np.zeros((0, len(names)), np.float32),
        )

    def _ceiling(self, group: _Group, available: I64) -> U8:
        """Drafts that there are, or can be, and that could still end up in the answer."""
        # k drafts bring k + 1 tokens at most; of a step in flight, all may still be accepted.
        most = group.max_tokens - self._num_output(group)
        most -= 1
        if self._is_async:
            most -= np.fromiter(map(_in_flight, group.requests), np.int64, len(group.requests))
        if self._method.is_lookup:
            np.minimum(most, available, out=most)
        ceiling: U8 = np.clip(most, 0, self._max_length).astype(np.uint8)
        return ceiling

    def _num_output(self, group: _Group) -> I64:
        """Tokens of each answer so far."""
        if self._lengths_of_answers is None or self._lengths_of_answers[0] is not group:
            lengths = _sizes(map(_answer, group.requests), len(group.requests))
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

    def _put_in(self, group: _Group, available: I64, batch: DecodeBatch, choice: Choice) -> Choice:
        """Cut drafts to what is chosen, and set what is drafted next."""
        lengths: I64 = np.minimum(choice.lengths, batch.ceiling)
        if not self._method.is_lookup:
            if len(lengths):  # else the length of the last batch stands for the next
                self._live.length = int(lengths.max())
            lengths, choice = self._with_probed(group.names, lengths, choice)
        for i in np.flatnonzero(lengths < available).tolist():
            # A new list: under the async scheduler all requests share one.
            request = group.requests[i]
            request.spec_token_ids = request.spec_token_ids[: lengths[i]]
        self._scheduler.dynamic_sd_lookup = self._live
        return choice

    def _with_probed(self, names: list[str], lengths: I64, choice: Choice) -> tuple[I64, Choice]:
        """A probe's drafts are there one step after it was asked for: then they are verified."""
        probed, self._probed = self._probed, {}
        if choice.source == "probe":
            self._probed = dict(zip(names, lengths.tolist(), strict=True))
        if not probed:
            return lengths, choice
        held = np.array([probed.get(name, 0) for name in names], np.int64)
        return np.maximum(lengths, held), choice._replace(source="probe")

    # -- after a step ---------------------------------------------------------------------------

    def after_schedule(self, output: Any) -> None:
        """Remember what the step holds, until its results come."""
        if self._pending is None or not output.total_num_scheduled_tokens:
            return
        group, ceiling, choice, context_tokens = self._pending
        self._pending = None
        scheduled = output.num_scheduled_tokens
        if not all(map(scheduled.__contains__, group.names)):  # out of KV room or token budget
            rows = np.flatnonzero([name in scheduled for name in group.names])
            group, ceiling = group.take(rows), ceiling[rows]
            # As it was before this step was counted in.
            context_tokens = sum(map(_computed, group.requests)) - sum(
                map(scheduled.__getitem__, group.names)
            )
        step = _Step(group, ceiling, choice, context_tokens, self._clock())
        self._steps[id(output)] = step
        while len(self._steps) > MAX_STEPS_IN_FLIGHT:
            self._steps.popitem(last=False)

    def before_update(self, output: Any, result: Any) -> _Ending | None:
        """Read a step's results, before vLLM takes them in; None: not a step of ours."""
        now = self._clock()
        step = self._steps.pop(id(output), None)
        if step is None:
            self._lengths_of_answers = None
            return None
        step_s = now - max(step.scheduled_s, self._ended_s)
        self._ended_s = now
        group, ceiling = step.group, step.ceiling
        size = len(group.names)
        num_sampled = self._num_sampled(result, group)
        drafts = output.scheduled_spec_decode_tokens
        num_drafted = _sizes(map(drafts.get, group.names, repeat(())), size)
        num_decode_tokens = sum(map(output.num_scheduled_tokens.__getitem__, group.names))
        if invalid := output.num_invalid_spec_tokens:
            num_drafted -= np.array([invalid.get(name, 0) for name in group.names], np.int64)
        counts = num_sampled > 0
        # Statuses of finished requests are the highest.
        if size and (
            any(map(_stale, group.requests)) or max(group.requests, key=_status).is_finished()
        ):
            # Results that vLLM will drop: of requests gone or preempted since.
            counts &= np.array(
                [not (r.num_stale_output_tokens or r.is_finished()) for r in group.requests], bool
            )
        if not counts.all():
            rows = np.flatnonzero(counts)
            group, ceiling = group.take(rows), ceiling[rows]
            num_sampled, num_drafted = num_sampled[rows], num_drafted[rows]
        num_accepted = np.minimum(num_sampled - 1, num_drafted)
        num_output = self._num_output(group)
        self._lengths_of_answers = None
        return _Ending(
            step, group, ceiling, num_drafted, num_accepted, num_output, num_decode_tokens, step_s
        )

    @staticmethod
    def _num_sampled(result: Any, group: _Group) -> I64:
        """Tokens that the step brought each request; 0 for one without a result."""
        sampled, at = result.sampled_token_ids, result.req_id_to_index
        size = len(group.names)
        if not sampled:
            return np.zeros(size, np.int64)
        try:
            return _sizes(map(sampled.__getitem__, map(at.__getitem__, group.names)), size)
        except KeyError:
            return np.array([len(sampled[at[n]]) if n in at else 0 for n in group.names], np.int64)

    def after_update(self, output: Any, ending: _Ending | None) -> None:
        """Report a step, after vLLM has taken it in."""
        if ending is None:
            return
        step, group, num_drafted = ending.step, ending.group, ending.num_drafted
        num_output = self._num_output(group)
        scheduler, stats = self._scheduler, self.stats
        stats.num_steps += 1
        stats.num_steered_steps += step.choice.source in STEERED
        stats.num_drafted += int(num_drafted.sum())
        stats.num_accepted += int(ending.num_accepted.sum())
        num_prefill = output.total_num_scheduled_tokens - ending.num_decode_tokens
        forwards, drafts, catch_up = self._drafting(output)
        is_uniform = not num_prefill and bool((num_drafted == num_drafted[:1]).all())
        self.source.report(
            StepFacts(
                batch=DecodeBatch(group.ids, ending.ceiling, group.features, num_prefill),
                num_drafted=num_drafted.astype(np.uint8),
                num_accepted=ending.num_accepted.astype(np.uint8),
                num_emitted=(num_output - ending.num_output).astype(np.uint8),
                step_s=max(ending.step_s, 1e-9),
                target_s=None,
                draft_s=None,
                context_tokens=step.context_tokens,
                num_draft_forwards=forwards,
                num_draft_tokens=drafts,
                num_catch_up_tokens=catch_up,
                num_waiting=len(scheduler.waiting),
                kv_usage=min(max(scheduler.kv_cache_manager.usage, 0.0), 1.0),
                mode=UNIFORM if is_uniform else RAGGED,
                choice=step.choice,
            )
        )

    def _drafting(self, output: Any) -> tuple[int, int, int]:
        """Sequential passes of the drafter, tokens drafted in them, tokens it caught up on."""
        if self._method.is_lookup:
            return 0, 0, 0
        length = output.num_spec_tokens_to_schedule
        forwards = min(length, 1) if self._method.one_pass else length
        catch_up = output.total_num_scheduled_tokens if length == 0 else 0
        return forwards, length * len(output.num_scheduled_tokens), catch_up
