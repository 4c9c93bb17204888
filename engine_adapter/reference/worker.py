"""The decode loop: continuous batching with speculative decoding, a length per request and step."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from smartspec.engine_adapter.base import (
    FEATURE_LAST_SHARE,
    U8,
    U64,
    DecodeBatch,
    FixedLength,
    LengthSource,
    StepFacts,
)
from smartspec.engine_adapter.lengths import I64
from smartspec.engine_adapter.prices import Prices
from smartspec.engine_adapter.reference.detokenizer import Decodes, Detokenizer
from smartspec.engine_adapter.reference.draft_tree import ROOT, agreeing_path
from smartspec.engine_adapter.reference.events import (
    Event,
    Finished,
    Refused,
    StepOutput,
    TokenLogprobs,
    Tokens,
)
from smartspec.engine_adapter.reference.model_runner import ModelRunner, Segment
from smartspec.engine_adapter.reference.proposer import (
    ConfidentProposer,
    NoProposer,
    Proposal,
    Proposer,
    ReadsFeatures,
)
from smartspec.engine_adapter.reference.sampling import Draws, sample, token_logprobs
from smartspec.engine_adapter.reference.scheduler import Schedule, Scheduler
from smartspec.engine_adapter.reference.sequence import Request, Sequence


class Worker:
    """Decodes requests together; requests join and leave at every step.

    Any lengths give the same output (see sampling.py), so a late or wrong length source can cost
    time but nothing else.

    Parameters
    ----------
    model : causal language model; its attention is replaced (see attention.py)
    tokenizer : for text and stop strings; None: token ids only
    proposer : guesses next tokens; None: plain decoding
    length_source : decides speculation lengths; may be replaced between steps
    max_num_running : requests decoded together
    max_model_len : tokens per request, prompt and answer
    max_prefill_tokens : prompt tokens per step
    eos_token_ids : tokens that end an answer
    seed : of the seeds of requests that bring none
    clock : seconds, monotonic

    Raises `ModelNotSupported` where the model cannot be run on a ragged batch.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Decodes | None = None,
        proposer: Proposer | None = None,
        length_source: LengthSource | None = None,
        *,
        max_num_running: int = 16,
        max_model_len: int = 1024,
        max_prefill_tokens: int = 256,
        eos_token_ids: frozenset[int] = frozenset(),
        seed: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.proposer: Proposer = proposer if proposer is not None else NoProposer()
        self._reader = self.proposer if isinstance(self.proposer, ReadsFeatures) else None
        self.length_source: LengthSource = length_source or FixedLength(self.proposer.max_length)
        self.features = (FEATURE_LAST_SHARE, *self.proposer.features)
        self._runner = ModelRunner(model, max_num_running, max_model_len)
        self.scheduler = Scheduler(
            max_num_running,
            max_model_len,
            max_prefill_tokens,
            (self._runner.cache, *self.proposer.caches),
        )
        self._tokenizer = tokenizer
        self._eos_token_ids = eos_token_ids
        self._vocabulary_size: int = model.config.get_text_config().vocab_size
        self._clock = clock
        self._rng = np.random.default_rng(seed)
        self._sequences: dict[int, Sequence] = {}
        self._num_added = 0
        self._pending: list[Event] = []

    @property
    def has_work(self) -> bool:
        """Whether `step` would do or say anything."""
        return bool(self._sequences or self._pending)

    @property
    def num_running(self) -> int:
        return len(self.scheduler.running)

    @property
    def num_waiting(self) -> int:
        return len(self.scheduler.waiting)

    def add_request(self, request: Request) -> int:
        """Queue a request and return its id. One that can never fit is refused in the next step."""
        self._num_added += 1
        room = self.scheduler.max_model_len - len(request.prompt)
        refusal = None
        if room < max(1, request.max_tokens or 1):
            refusal = (
                f"prompt of {len(request.prompt)} tokens and max_tokens={request.max_tokens} "
                f"exceed max_model_len={self.scheduler.max_model_len}"
            )
        elif not 0 <= min(request.prompt) <= max(request.prompt) < self._vocabulary_size:
            # It would fail in the model's pass, and take everybody else's request with it.
            refusal = f"the prompt's token ids must be in [0, {self._vocabulary_size})"
        elif request.stop and self._tokenizer is None:
            refusal = "stop strings need a tokenizer"
        if refusal is not None:
            self._pending.append(Refused(self._num_added, refusal))
            return self._num_added
        seed = request.sampling.seed
        sequence = Sequence(
            self._num_added,
            request,
            room if request.max_tokens is None else request.max_tokens,
            int(self._rng.integers(2**63)) if seed is None else seed % 2**64,
            self._clock(),
            None
            if self._tokenizer is None
            else Detokenizer(self._tokenizer, request.stop, request.prompt),
        )
        self._sequences[sequence.id] = sequence
        self.scheduler.add(sequence)
        return sequence.id

    def cancel(self, request_id: int) -> bool:
        """Stop a request, waiting or running. Returns False when it is unknown or done."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return False
        self._pending.append(self._finish(sequence, "cancelled"))
        return True

    def step(self) -> StepOutput:
        """Run one step: schedule, choose lengths, draft, verify, accept, report."""
        events, self._pending = self._pending, []
        begin = self._clock()
        schedule = self.scheduler.schedule(begin)
        decoding = schedule.decoding
        if not decoding and not schedule.prefilling:
            return StepOutput(events)

        look = self._clock()
        batch = self._describe(schedule)
        look_s = self._clock() - look
        choice = self.length_source.choose(batch)
        lengths = np.clip(choice.lengths, 0, batch.ceiling.astype(np.int64))

        draft = self._clock()
        proposal = self._propose(decoding, lengths, choice.prices)
        verify = self._clock()
        drawn, logprobs, features = self._verify(schedule, proposal)
        paths = [agreeing_path(t, d) for t, d in zip(proposal.drafts, drawn, strict=False)]
        self._runner.cache.compact(
            (s.row, s.num_tokens, path) for s, path in zip(decoding, paths, strict=True)
        )
        done = self._clock()

        cut = proposal.cut
        told = paths if cut is None else cut.accepted(drawn[: len(decoding)], paths)
        context_tokens = sum(sequence.num_tokens for sequence in decoding)
        self._hand_on(schedule, features, paths)
        emitted = self._accept(schedule, proposal, drawn, logprobs, paths, events)
        facts = StepFacts(
            batch=batch,
            num_drafted=np.array([tree.size for tree in proposal.drafts], np.uint8),
            num_accepted=_sizes(paths),
            num_emitted=np.array(emitted, np.uint8),
            step_s=self._clock() - begin,
            target_s=done - verify,
            draft_s=verify - draft + look_s,
            context_tokens=context_tokens,
            num_draft_forwards=proposal.num_forwards,
            num_draft_tokens=proposal.num_draft_tokens,
            num_catch_up_tokens=proposal.num_catch_up_tokens,
            num_waiting=self.num_waiting,
            kv_usage=self.scheduler.kv_usage,
            accepted_ranks=_ranks(told) if self.proposer.trees else None,
            num_cut=None if cut is None else cut.num_cut,
            num_cut_accepted=None if cut is None else _sizes(told) - _sizes(paths),
        )
        self.length_source.report(facts)
        if cut is not None:
            lengths = cut.num_verified
        return StepOutput(events, facts, lengths, choice.source)

    def _propose(self, decoding: list[Sequence], lengths: I64, prices: Prices | None) -> Proposal:
        if prices is not None and decoding and isinstance(self.proposer, ConfidentProposer):
            return self.proposer.propose_at(decoding, lengths, prices)
        return self.proposer.propose(decoding, lengths)

    def _describe(self, schedule: Schedule) -> DecodeBatch:
        """What is known about the decoding requests before anything is drafted."""
        decoding = schedule.decoding
        offer = self.proposer.available(decoding)
        ceiling = np.minimum(offer.ceiling, [self._room(s) for s in decoding]).astype(np.uint8)
        last_share = np.array([s.last_share for s in decoding], np.float32)
        weight = np.array([s.request.weight for s in decoding], np.float32)
        floor = np.array([min(s.request.floor, 255) for s in decoding], np.uint8)
        target = np.array([s.request.token_time_target_s or 0.0 for s in decoding], np.float32)
        return DecodeBatch(
            request_ids=np.array([s.id for s in decoding], np.uint64),
            ceiling=ceiling,
            features=np.concatenate([last_share[None], offer.features]),
            num_prefill_tokens=schedule.num_prefill_tokens,
            weight=weight if (weight != 1).any() else None,
            floor=floor if floor.any() else None,
            token_time_target_s=target if target.any() else None,
        )

    def _room(self, sequence: Sequence) -> int:
        """Drafts that there is room for, in the answer and so in the cache's row.

        A chain of k brings k + 1 tokens at most. A tree of k may bring fewer, but has a slot for
        every node until it is verified.
        """
        room = min(sequence.num_remaining - 1, self.proposer.max_length)
        limit = sequence.request.max_speculation_length
        return room if limit is None else min(room, limit)

    def _verify(
        self, schedule: Schedule, proposal: Proposal
    ) -> tuple[list[list[int]], dict[int, list[TokenLogprobs]], tuple[Tensor, ...]]:
        """The target's tokens after each known token and draft: decoding requests, then prompts.

        One pass, one transfer from the device. A prompt that is not finished yet has none. Then,
        by sequence id, the log-probabilities of these tokens, where they were asked for; and of
        each request the hidden states [its tokens, features], where the proposer reads them.
        """
        segments = []
        places: list[list[int]] = []
        for sequence, tree in zip(schedule.decoding, proposal.drafts, strict=True):
            tokens = [sequence.tokens[-1], *tree.tokens]
            parents = [ROOT, *(parent + 1 for parent in tree.parents)]
            segments.append(
                Segment(sequence.row, sequence.num_computed, tokens, len(tokens), parents)
            )
            places.append([sequence.num_tokens + depth for depth in (0, *tree.depths)])
        for sequence, size in schedule.prefilling:
            end = sequence.num_computed + size
            tokens = sequence.tokens[sequence.num_computed : end]
            last = int(end == sequence.num_prompt)
            segments.append(Segment(sequence.row, sequence.num_computed, tokens, last))
            places.append([end] * last)
        sequences = schedule.decoding + [sequence for sequence, _ in schedule.prefilling]
        features: tuple[Tensor, ...] = ()
        if self._reader is None:
            logits = self._runner.forward(segments)
        else:
            layers = self._reader.feature_layers
            logits, packed = self._runner.forward_with_features(segments, layers)
            features = torch.split(packed, [len(segment.tokens) for segment in segments])
        asked = zip(sequences, places, strict=True)
        draws = Draws.of((s.request.sampling, s.seed, place) for s, place in asked)
        flat = sample(logits, draws).tolist()
        ends = np.cumsum([segment.num_logits for segment in segments]).tolist()
        begins = [0, *ends[:-1]]
        drawn = [flat[b:e] for b, e in zip(begins, ends, strict=True)]
        logprobs = {}
        for sequence, tokens, begin, end in zip(sequences, drawn, begins, ends, strict=True):
            if tokens and (count := sequence.request.num_logprobs) is not None:
                logprobs[sequence.id] = token_logprobs(logits[begin:end], tokens, count)
        return drawn, logprobs, features

    def _hand_on(
        self, schedule: Schedule, features: tuple[Tensor, ...], paths: list[list[int]]
    ) -> None:
        """Tell a proposer that reads them the hidden states of all tokens but rejected drafts."""
        if self._reader is None:
            return
        sequences = schedule.decoding + [sequence for sequence, _ in schedule.prefilling]
        kept = [
            states[[0, *(node + 1 for node in path)]]
            for states, path in zip(features, paths, strict=False)
        ]
        self._reader.read(sequences, kept + list(features[len(paths) :]))

    def _accept(
        self,
        schedule: Schedule,
        proposal: Proposal,
        drawn: list[list[int]],
        logprobs: dict[int, list[TokenLogprobs]],
        paths: list[list[int]],
        events: list[Event],
    ) -> list[int]:
        """Add accepted drafts and the target's next token. Returns tokens emitted, [B]."""
        emitted = []
        finished: list[tuple[Sequence, str]] = []
        for i, sequence in enumerate(schedule.decoding):
            tree, path = proposal.drafts[i], paths[i]
            if tree.size:
                sequence.last_share = len(path) / tree.size
                sequence.num_drafted += tree.size
                sequence.num_accepted += len(path)
            sequence.num_computed += 1 + len(path)
            after = [0, *(node + 1 for node in path)]  # where the target draws what it says
            if sequence.id in logprobs:
                logprobs[sequence.id] = [logprobs[sequence.id][at] for at in after]
            tokens = [*(tree.tokens[node] for node in path), drawn[i][after[-1]]]
            emitted.append(self._emit(sequence, tokens, logprobs, events, finished))
        self.proposer.accepted(schedule.decoding, paths)
        for (sequence, size), tokens in zip(
            schedule.prefilling, drawn[len(schedule.decoding) :], strict=True
        ):
            sequence.num_computed += size
            if tokens:
                sequence.first_token_s = self._clock()
                self._emit(sequence, tokens, logprobs, events, finished)
        events += [self._finish(sequence, reason) for sequence, reason in finished]
        return emitted

    def _emit(
        self,
        sequence: Sequence,
        tokens: list[int],
        logprobs: dict[int, list[TokenLogprobs]],
        events: list[Event],
        finished: list[tuple[Sequence, str]],
    ) -> int:
        """Append tokens up to where the answer ends. Returns how many."""
        reason = None
        if len(tokens) >= sequence.num_remaining:
            tokens, reason = tokens[: sequence.num_remaining], "length"
        if not sequence.request.ignore_eos and not self._eos_token_ids.isdisjoint(tokens):
            first = next(i for i, token in enumerate(tokens) if token in self._eos_token_ids)
            tokens, reason = tokens[: first + 1], "eos"
        if sequence.detokenizer is not None:
            used = sequence.detokenizer.push(tokens)
            if used is not None:
                tokens, reason = tokens[:used], "stop"
        sequence.tokens += tokens
        text = ""
        if sequence.detokenizer is not None:
            text = sequence.detokenizer.take(final=reason is not None)
        known = logprobs.get(sequence.id)
        events.append(
            Tokens(
                sequence.id,
                tokens,
                text,
                sequence.num_output,
                None if known is None else known[: len(tokens)],
            )
        )
        if reason is not None:
            finished.append((sequence, reason))
        return len(tokens)

    def _finish(self, sequence: Sequence, reason: str) -> Finished:
        self.scheduler.remove(sequence)
        self.proposer.forget(sequence)
        del self._sequences[sequence.id]
        first, now = sequence.first_token_s, self._clock()
        num_later = sequence.num_output - 1
        return Finished(
            sequence.id,
            reason,
            sequence.tokens[sequence.num_prompt :],
            "" if sequence.detokenizer is None else sequence.detokenizer.text,
            sequence.num_drafted,
            sequence.num_accepted,
            None if first is None else first - sequence.added_s,
            now - sequence.added_s,
            (now - first) / num_later if first is not None and num_later > 0 else None,
        )


def _sizes(paths: list[list[int]]) -> U8:
    return np.array([len(path) for path in paths], np.uint8)


def _ranks(paths: list[list[int]]) -> U64:
    """Accepted nodes as bits: a node's place in its tree is its rank."""
    return np.array([sum(1 << node for node in path) for path in paths], np.uint64)
