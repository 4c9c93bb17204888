"""What a step of vLLM's scheduler held, and what came of it.

While vLLM schedules a step, or takes in its results, its device stands still. So a step is noted
then with as little work as can be (`Step.take_results`), and what it did is made of the notes while
the device runs a later one (`Step.facts`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass
from itertools import repeat
from operator import attrgetter
from typing import Any

import numpy as np
import numpy.typing as npt

from smartspec.engine_adapter.base import U64, DecodeBatch, StepFacts
from smartspec.engine_adapter.lengths import I64, RAGGED, UNIFORM, Choice
from smartspec.engine_adapter.vllm.compatibility import STALE_TOKENS
from smartspec.engine_adapter.vllm.copies import Found
from smartspec.engine_adapter.vllm.facts import Method

_computed = attrgetter("num_computed_tokens")


def sizes(lists: Iterable[Sized], count: int) -> I64:
    """Lengths of ``count`` lists, read at C's speed: at 256 requests every pass counts."""
    return np.fromiter(map(len, lists), np.int64, count)


@dataclass(frozen=True, slots=True)
class Group:
    """Requests that decode together: what stays the same for as long as nobody joins or leaves."""

    requests: list[Any]  #: [B]
    names: list[str]  #: [B]
    ids: U64  #: [B]
    most_drafts: I64  #: [B], of the whole answer: k drafts bring k + 1 tokens at most

    @classmethod
    def of(cls, requests: list[Any], numbers: dict[str, int]) -> Group:
        """``numbers``: of requests, by name."""
        names = [request.request_id for request in requests]
        return cls(
            requests,
            names,
            np.array([numbers[name] for name in names], np.uint64),
            np.array([request.max_tokens - 1 for request in requests], np.int64),
        )

    def take(self, rows: npt.NDArray[np.intp]) -> Group:
        kept = rows.tolist()
        return Group(
            [self.requests[i] for i in kept],
            [self.names[i] for i in kept],
            self.ids[rows],
            self.most_drafts[rows],
        )


@dataclass(slots=True)
class Step:
    """A step, from the end of ``schedule()`` to its report."""

    output: Any  #: vLLM's, of ``schedule()``
    group: Group  #: that decodes in it
    batch: DecodeBatch  #: that lengths were chosen for
    choice: Choice
    running: list[Any]  #: whoever runs, decoding or not
    scheduled_s: float
    found: Found | None = None  #: of the group, by a lookup; None: not noted yet
    ceiling: Any = None  #: [B], of the group; None: not weighed yet
    features: Any = None  #: [F, B], of the group
    context_tokens: int = 0
    num_decode_tokens: int = 0  #: of the group, in the pass
    ended_s: float = 0.0  #: when its results came
    _result: Any = None  #: vLLM's, of the worker
    _num_sampled: Sequence[int] = ()  #: of its tokens, before vLLM took them in
    _counts: npt.NDArray[np.bool_] | None = None  #: [B], what vLLM takes in; None: everything

    def weigh(self) -> None:
        """Note who is in the pass and what it reads."""
        self.ceiling, self.features = self.batch.ceiling, self.batch.features
        scheduled = self.output.num_scheduled_tokens
        if not all(map(scheduled.__contains__, self.group.names)):  # no KV room, or token budget
            rows = np.flatnonzero([name in scheduled for name in self.group.names])
            self.group, self.ceiling = self.group.take(rows), self.ceiling[rows]
            self.features = self.features[:, rows]
            self.found = self.found and self.found.take(rows)
        self.num_decode_tokens = sum(map(scheduled.__getitem__, self.group.names))
        computed = sum(map(_computed, self.group.requests))  # this step is counted in
        self.context_tokens = max(computed - self.num_decode_tokens, 0)

    def bound(self) -> None:
        """Let ceilings be no higher than what was found."""
        assert self.found is not None
        num_found = sizes(self.found.whole, len(self.found.whole))
        self.ceiling = np.minimum(self.ceiling, num_found).astype(np.uint8)

    def take_results(self, result: Any, is_last: bool) -> None:
        """Note what the worker brought, before vLLM takes it in, and cuts it where answers end.

        ``is_last``: no step was scheduled since, and nobody has left.
        """
        self._result = result
        self._num_sampled = list(map(len, result.sampled_token_ids))
        if not is_last:  # vLLM drops results of requests that are gone, or were preempted
            self._counts = np.array([not _is_dropped(r) for r in self.group.requests], bool)

    def _places(self) -> list[int]:
        """Of the group in what the worker brought, [B]; -1, where nothing follows: not in it."""
        places = self._result.req_id_to_index if self._num_sampled else {}
        return list(map(places.get, self.group.names, repeat(-1)))

    def came(self) -> list[list[int]]:
        """Tokens that the step brought, [B] of the group."""
        sampled = [*self._result.sampled_token_ids, []]
        return [sampled[place] for place in self._places()]

    def facts(self, method: Method, begun_s: float, num_waiting: int, kv_usage: float) -> StepFacts:
        """What there is to report, once vLLM has taken the results in; load as it is by then."""
        group, ceiling, features = self.group, self.ceiling, self.features
        names, size = group.names, len(group.names)
        places = self._places()
        num_sampled = np.array([*self._num_sampled, 0])[places]
        # vLLM has cut these very lists to what went into the answers.
        num_emitted = np.array([*map(len, self._result.sampled_token_ids), 0])[places]
        output = self.output
        drafts = output.scheduled_spec_decode_tokens
        num_drafted = sizes(map(drafts.get, names, repeat(())), size)
        if invalid := output.num_invalid_spec_tokens:
            num_drafted -= np.array([invalid.get(name, 0) for name in names], np.int64)
        counts = num_sampled > 0
        if self._counts is not None:
            counts &= self._counts
        if not counts.all():
            rows = np.flatnonzero(counts)
            group, ceiling, features = group.take(rows), ceiling[rows], features[:, rows]
            num_sampled, num_drafted = num_sampled[rows], num_drafted[rows]
            num_emitted = num_emitted[rows]
        num_prefill = output.total_num_scheduled_tokens - self.num_decode_tokens
        is_uniform = not num_prefill and bool((num_drafted == num_drafted[:1]).all())
        forwards, num_draft_tokens = _drafting(output, method)
        return StepFacts(
            batch=DecodeBatch(group.ids, ceiling, features, num_prefill),
            num_drafted=num_drafted.astype(np.uint8),
            num_accepted=np.minimum(num_sampled - 1, num_drafted).astype(np.uint8),
            num_emitted=num_emitted.astype(np.uint8),
            step_s=max(self.ended_s - begun_s, 1e-9),
            target_s=None,
            draft_s=None,
            context_tokens=self.context_tokens,
            num_draft_forwards=forwards,
            num_draft_tokens=num_draft_tokens,
            num_waiting=num_waiting,
            kv_usage=kv_usage,
            mode=UNIFORM if is_uniform else RAGGED,
            choice=self.choice,
        )


def _is_dropped(request: Any) -> bool:
    """Whether vLLM drops what a step in flight brings for this request."""
    stale = any(getattr(request, name, 0) for name in STALE_TOKENS)
    return stale or bool(request.is_finished())


def _drafting(output: Any, method: Method) -> tuple[int, int]:
    """Sequential passes of the drafter, and tokens drafted in them."""
    if method.is_lookup:
        return 0, 0
    length = output.num_spec_tokens_to_schedule
    forwards = min(length, 1) if method.one_pass else length
    return forwards, length * len(output.num_scheduled_tokens)
