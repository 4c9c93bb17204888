"""A small language model that drafts for a large one, token after token, for the whole batch."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from smartspec.engine_adapter.base import FEATURE_TOKEN_ACCEPTANCE
from smartspec.engine_adapter.reference.kv_cache import KvCache
from smartspec.engine_adapter.reference.model_runner import ModelRunner, Segment
from smartspec.engine_adapter.reference.proposer import Availability, Proposal
from smartspec.engine_adapter.reference.sampling import Draws, sample
from smartspec.engine_adapter.reference.sequence import Sequence
from smartspec.engine_adapter.token_acceptance import TokenAcceptance


class DraftModel:
    """Drafts with a model that shares the target's vocabulary, and its noise when sampling.

    Its KV cache is kept in step lazily: what it has not seen yet (the prompt, tokens decoded at
    length 0, the target's own token after a rejection) is fed when a request is next drafted for,
    and counted as catch-up. A rejection only moves the mark back: later tokens overwrite.

    Parameters
    ----------
    runner : the draft model, with as many cache rows as the target, and as long
    max_length : longest proposal, in tokens
    max_pass_tokens : tokens of one catch-up pass, so that long prompts do not blow up memory
    """

    name = "draft"
    features: tuple[str, ...] = (FEATURE_TOKEN_ACCEPTANCE,)

    def __init__(
        self, runner: ModelRunner, max_length: int = 8, max_pass_tokens: int = 512
    ) -> None:
        if not 1 <= max_length <= 255:
            raise ValueError(f"max_length must be in [1, 255], got {max_length}")
        self.max_length = max_length
        self.caches: tuple[KvCache, ...] = (runner.cache,)
        self._runner = runner
        self._max_pass_tokens = max_pass_tokens
        self._num_computed: dict[int, int] = {}  # true tokens in the draft model's cache
        self._rates = TokenAcceptance()
        self._num_fed: dict[int, int] = {}  # of this step's drafts, how many are in it too

    def available(self, sequences: list[Sequence]) -> Availability:
        ceiling = np.full(len(sequences), self.max_length, np.uint8)
        return Availability(ceiling, self._rates.rates([s.tokens[-1] for s in sequences])[None])

    def propose(self, sequences: list[Sequence], lengths: npt.NDArray[np.int64]) -> Proposal:
        drafts: list[list[int]] = [[] for _ in sequences]
        active = np.flatnonzero(lengths)
        self._num_fed = {}
        if len(active) == 0:
            return Proposal(drafts)
        num_catch_up, num_forwards = self._catch_up([sequences[i] for i in active])
        passes: list[tuple[npt.NDArray[np.intp], torch.Tensor]] = []
        depth = 0
        while len(active):
            chosen = [sequences[i] for i in active]
            if depth == 0:
                segments = [self._unseen(s) for s in chosen]
                fresh = None
            else:
                before, tokens = passes[-1]
                stayed = torch.from_numpy(np.flatnonzero(np.isin(before, active)))
                fresh = tokens[stayed.to(tokens.device)]
                segments = [Segment(s.row, s.num_tokens + depth - 1, [0], 1) for s in chosen]
            logits = self._runner.forward(segments, fresh)
            draws = Draws.of(
                (s.request.sampling, s.seed, range(s.num_tokens + depth, s.num_tokens + depth + 1))
                for s in chosen
            )
            passes.append((active, sample(logits, draws)))
            for sequence in chosen:
                self._num_computed[sequence.id] = sequence.num_tokens
                self._num_fed[sequence.id] = depth
            depth += 1
            active = active[lengths[active] > depth]
        drawn = torch.cat([tokens for _, tokens in passes]).tolist()
        rows = np.concatenate([rows for rows, _ in passes]).tolist()
        for row, token in zip(rows, drawn, strict=True):
            drafts[row].append(token)
        return Proposal(drafts, num_forwards + len(passes), len(drawn), num_catch_up)

    def accepted(self, sequences: list[Sequence], num_accepted: list[int]) -> None:
        before: list[int] = []
        outcome: list[bool] = []
        for sequence, count in zip(sequences, num_accepted, strict=True):
            if sequence.id in self._num_fed:
                num_fed = self._num_fed[sequence.id]
                start = self._num_computed[sequence.id]  # tokens before its drafts
                reached = sequence.tokens[start - 1 : start + min(count, num_fed)]
                before += reached
                outcome += [depth < count for depth in range(len(reached))]
                self._num_computed[sequence.id] += min(count, num_fed)
        self._rates.learn(before, outcome)

    def forget(self, sequence: Sequence) -> None:
        self._num_computed.pop(sequence.id, None)
        self._num_fed.pop(sequence.id, None)

    def _unseen(self, sequence: Sequence) -> Segment:
        start = self._num_computed.get(sequence.id, 0)
        return Segment(sequence.row, start, sequence.tokens[start:], 1)

    def _catch_up(self, sequences: list[Sequence]) -> tuple[int, int]:
        """Feed what was missed, but for the pass that drafts. Returns (tokens, extra passes).

        Passes are filled to `max_pass_tokens`; what is left at the end, a few tokens per request,
        goes with the first drafting pass.
        """
        lag = {s.id: s.num_tokens - self._num_computed.get(s.id, 0) - 1 for s in sequences}
        num_tokens = sum(lag.values())
        num_passes = 0
        left = num_tokens
        while left > self._max_pass_tokens:
            room = self._max_pass_tokens
            segments = []
            for sequence in sequences:
                if (size := min(room, lag[sequence.id])) > 0:
                    start = self._num_computed.get(sequence.id, 0)
                    tokens = sequence.tokens[start : start + size]
                    segments.append(Segment(sequence.row, start, tokens, 0))
                    self._num_computed[sequence.id] = start + size
                    lag[sequence.id] -= size
                    room -= size
            self._runner.forward(segments)
            left = sum(lag.values())
            num_passes += 1
        return num_tokens, num_passes
