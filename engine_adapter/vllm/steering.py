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
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from smartspec.engine_adapter.base import F32, U64, DecodeBatch, LengthSource, StepFacts
from smartspec.engine_adapter.lengths import I64, RAGGED, UNIFORM, Choice
from smartspec.engine_adapter.vllm.facts import Method

STEERED = ("policy", "probe", "fallback")  #: sources of lengths that are put into force
MAX_STEPS_IN_FLIGHT = 64  #: a step that never ends is forgotten after so many others
NUMBERS_KEPT = 1024  #: beyond twice as many as there are requests


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


class _Step(NamedTuple):
    """A step between ``schedule()`` and ``update_from_output()``."""

    requests: list[Any]  #: [B] that decode in it
    batch: DecodeBatch
    choice: Choice
    context_tokens: int
    scheduled_s: float


class _Ending(NamedTuple):
    """A step whose results are there, before vLLM has taken them in."""

    step: _Step
    rows: npt.NDArray[np.intp] | None  #: of the batch, that have results; None: all
    requests: list[Any]
    num_drafted: list[int]
    num_accepted: list[int]
    num_output: list[int]  #: tokens of each answer so far
    step_s: float


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
        self._numbers: dict[str, int] = {}
        self._num_seen = 0
        self._excluded: set[str] = set()
        self._ids: list[str] = []
        self._id_column: U64 = np.zeros(0, np.uint64)
        self._features: F32 = np.zeros((0, 0), np.float32)
        self._probed: dict[str, int] = {}
        self._pending: tuple[list[Any], DecodeBatch, Choice, list[int]] | None = None
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
        decoding = [request for request in running if not request.is_prefill_chunk]
        ids = [request.request_id for request in decoding]
        if ids != self._ids:
            self._follow(ids, decoding)
        if self._excluded:
            decoding = [request for request in decoding if request.request_id in self._numbers]
        available = [len(request.spec_token_ids) for request in decoding]
        ceiling = self._ceiling(decoding, available)
        batch = DecodeBatch(
            request_ids=self._id_column,
            ceiling=ceiling,
            features=self._features,
            num_prefill_tokens=self._expected_prefill(len(decoding)),
        )
        choice = self.source.choose(batch)
        if choice.source in STEERED:
            choice = self._put_in(decoding, available, batch, choice)
        else:
            self._probed = {}
            self._scheduler.dynamic_sd_lookup = self._original
        context = [request.num_computed_tokens for request in decoding]
        self._pending = decoding, batch, choice, context

    def _follow(self, ids: list[str], decoding: list[Any]) -> None:
        """The batch has changed: who is in it, by number."""
        self._ids = ids
        self._excluded = set()
        numbers = self._numbers
        for request in decoding:
            name = request.request_id
            if name in numbers:
                continue
            reason = why_excluded(request)
            if reason is None:
                self._num_seen += 1
                numbers[name] = self._num_seen
            else:
                self._excluded.add(name)
                self.stats.num_excluded[reason] += 1
        if len(numbers) > 2 * len(self._scheduler.requests) + NUMBERS_KEPT:
            alive = self._scheduler.requests
            self._numbers = numbers = {n: i for n, i in numbers.items() if n in alive}
        self._id_column = np.array([numbers[n] for n in ids if n in numbers], np.uint64)
        self._features = np.zeros((0, len(self._id_column)), np.float32)

    def _ceiling(self, decoding: list[Any], available: list[int]) -> npt.NDArray[np.uint8]:
        """Drafts that there are, or can be, and that could still end up in the answer."""
        # k drafts bring k + 1 tokens at most; of a step in flight, all may still be accepted.
        room = [
            request.max_tokens - request.num_output_tokens - request.num_output_placeholders
            for request in decoding
        ]
        if self._method.is_lookup:
            most = np.minimum(available, np.subtract(room, 1)) if room else np.zeros(0)
        else:
            most = np.minimum(np.subtract(room, 1), self._max_length)
        return np.clip(most, 0, self._max_length).astype(np.uint8)

    def _expected_prefill(self, num_decoding: int) -> int:
        """Prompt tokens that will share the pass: of chunks under way, and of the next prompt."""
        scheduler = self._scheduler
        tokens = 0
        if num_decoding < len(scheduler.running):
            tokens = sum(
                request.num_tokens - request.num_computed_tokens
                for request in scheduler.running
                if request.is_prefill_chunk
            )
        if scheduler.waiting and len(scheduler.running) < scheduler.max_num_running_reqs:
            tokens += scheduler.waiting.peek_request().num_tokens
        return int(min(tokens, scheduler.max_num_scheduled_tokens))

    def _put_in(
        self, decoding: list[Any], available: list[int], batch: DecodeBatch, choice: Choice
    ) -> Choice:
        """Cut drafts to what is chosen, and set what is drafted next."""
        lengths: I64 = np.minimum(choice.lengths, batch.ceiling)
        if not self._method.is_lookup:
            if len(decoding):  # else the length of the last batch stands for the next
                self._live.length = int(lengths.max())
            lengths, choice = self._with_probed(lengths, choice)
        for i in np.flatnonzero(np.less(lengths, available)).tolist():
            # A new list: under the async scheduler all requests share one.
            request = decoding[i]
            request.spec_token_ids = request.spec_token_ids[: lengths[i]]
        self._scheduler.dynamic_sd_lookup = self._live
        return choice

    def _with_probed(self, lengths: I64, choice: Choice) -> tuple[I64, Choice]:
        """A probe's drafts are there one step after it was asked for: then they are verified."""
        probed, self._probed = self._probed, {}
        if choice.source == "probe":
            names = [name for name in self._ids if name not in self._excluded]
            self._probed = dict(zip(names, lengths.tolist(), strict=True))
        if not probed:
            return lengths, choice
        names = [name for name in self._ids if name not in self._excluded]
        held = np.array([probed.get(name, 0) for name in names], np.int64)
        return np.maximum(lengths, held), choice._replace(source="probe")

    # -- after a step ---------------------------------------------------------------------------

    def after_schedule(self, output: Any) -> None:
        """Remember what the step holds, until its results come."""
        if self._pending is None or not output.total_num_scheduled_tokens:
            return
        decoding, batch, choice, context = self._pending
        self._pending = None
        scheduled = output.num_scheduled_tokens
        rows = [i for i, r in enumerate(decoding) if r.request_id in scheduled]
        if len(rows) < len(decoding):  # out of KV room or token budget
            context = [context[i] for i in rows]
            decoding = [decoding[i] for i in rows]
            batch = _take(batch, np.array(rows, np.intp))
        self._steps[id(output)] = _Step(decoding, batch, choice, sum(context), self._clock())
        while len(self._steps) > MAX_STEPS_IN_FLIGHT:
            self._steps.popitem(last=False)

    def before_update(self, output: Any, result: Any) -> _Ending | None:
        """Read a step's results, before vLLM takes them in; None: not a step of ours."""
        now = self._clock()
        step = self._steps.pop(id(output), None)
        if step is None:
            return None
        step_s = now - max(step.scheduled_s, self._ended_s)
        self._ended_s = now
        sampled, at = result.sampled_token_ids, result.req_id_to_index
        drafts = output.scheduled_spec_decode_tokens
        invalid = output.num_invalid_spec_tokens or {}
        requests, rows = step.requests, None
        names = [request.request_id for request in requests]
        counts = [len(sampled[at[name]]) if name in at else 0 for name in names] if sampled else []
        # Results that vLLM will drop: of requests gone or preempted since.
        lost = [
            i
            for i, request in enumerate(requests)
            if not counts
            or not counts[i]
            or request.num_stale_output_tokens
            or request.is_finished()
        ]
        if lost:
            rows = np.delete(np.arange(len(requests)), lost)
            kept = rows.tolist()
            requests = [requests[i] for i in kept]
            names = [names[i] for i in kept]
            counts = [counts[i] for i in kept]
        drafted = [len(drafts.get(name, ())) for name in names]
        if invalid:
            drafted = [d - invalid.get(n, 0) for d, n in zip(drafted, names, strict=True)]
        accepted = [min(c - 1, d) for c, d in zip(counts, drafted, strict=True)]
        num_output = [request.num_output_tokens for request in requests]
        return _Ending(step, rows, requests, drafted, accepted, num_output, step_s)

    def after_update(self, output: Any, ending: _Ending | None) -> None:
        """Report a step, after vLLM has taken it in."""
        if ending is None:
            return
        step = ending.step
        emitted = [
            request.num_output_tokens - before
            for request, before in zip(ending.requests, ending.num_output, strict=True)
        ]
        scheduler, stats = self._scheduler, self.stats
        stats.num_steps += 1
        stats.num_steered_steps += step.choice.source in STEERED
        stats.num_drafted += sum(ending.num_drafted)
        stats.num_accepted += sum(ending.num_accepted)
        scheduled = output.num_scheduled_tokens
        decoded = sum([scheduled[request.request_id] for request in step.requests])
        num_prefill = output.total_num_scheduled_tokens - decoded
        batch = _take(step.batch, ending.rows, num_prefill)
        forwards, drafts, catch_up = self._drafting(output)
        self.source.report(
            StepFacts(
                batch=batch,
                num_drafted=np.array(ending.num_drafted, np.uint8),
                num_accepted=np.array(ending.num_accepted, np.uint8),
                num_emitted=np.array(emitted, np.uint8),
                step_s=max(ending.step_s, 1e-9),
                target_s=None,
                draft_s=None,
                context_tokens=step.context_tokens,
                num_draft_forwards=forwards,
                num_draft_tokens=drafts,
                num_catch_up_tokens=catch_up,
                num_waiting=len(scheduler.waiting),
                kv_usage=min(max(scheduler.kv_cache_manager.usage, 0.0), 1.0),
                mode=UNIFORM if _is_uniform(ending.num_drafted, num_prefill) else RAGGED,
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


def _is_uniform(num_drafted: list[int], num_prefill: int) -> bool:
    return not num_prefill and len(set(num_drafted)) <= 1


def _take(
    batch: DecodeBatch, rows: npt.NDArray[np.intp] | None, num_prefill: int | None = None
) -> DecodeBatch:
    """Some rows of a batch (None: all), with another count of prompt tokens if one is given."""
    every = rows is None
    return DecodeBatch(
        request_ids=batch.request_ids if every else batch.request_ids[rows],
        ceiling=batch.ceiling if every else batch.ceiling[rows],
        features=batch.features if every else batch.features[:, rows],
        num_prefill_tokens=batch.num_prefill_tokens if num_prefill is None else num_prefill,
    )
