"""Drafts with a head that reads the target's hidden states, token after token, for the batch.

Where the answer repeats what stands in the request already, a copy is better and costs nothing. So
a request of which the latest tokens, `MIN_COPIED` or more, occurred before is drafted for as prompt
lookup would, and by the head otherwise.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from smartspec.engine_adapter.base import FEATURE_DRAFT_CONFIDENCE
from smartspec.engine_adapter.reference.draft_model import DraftModel
from smartspec.engine_adapter.reference.draft_tree import DraftTree
from smartspec.engine_adapter.reference.feature_head import FeatureHead, HeadRunner
from smartspec.engine_adapter.reference.model_runner import Segment
from smartspec.engine_adapter.reference.prompt_lookup import Match, NgramIndex, copied
from smartspec.engine_adapter.reference.proposer import Availability, Proposal
from smartspec.engine_adapter.reference.sequence import Sequence

MIN_COPIED = 2  #: latest tokens that must have occurred before, for a copy
MAX_COPIED = 16  #: that are looked at


class FeatureDraft(DraftModel):
    """Drafts chains as a draft model does, with a head (feature_head.py) in its place.

    Slot p of the head's cache is made from the token at p and the target's states at p - 1. States
    wait here until a request is next drafted for; of those who never are, they are fed whenever
    more wait than one pass takes. Drafts are fed again once they are accepted: by then the
    target's own states are known, in place of the head's guesses at them.

    Parameters
    ----------
    head : made for the worker's target
    num_rows, max_model_len : as of the target's cache
    max_length, max_pass_tokens : as of `DraftModel`
    copies : whether to draft by copying where that is better
    """

    name = "eagle"

    def __init__(
        self,
        head: FeatureHead,
        num_rows: int,
        max_model_len: int,
        max_length: int = 8,
        max_pass_tokens: int = 512,
        copies: bool = True,
    ) -> None:
        self._heads = HeadRunner(head, num_rows, max_model_len)
        super().__init__(self._heads, max_length, max_pass_tokens)
        self.feature_layers = head.config.layers
        self._head = head
        self._waiting: dict[int, list[Tensor]] = {}  # states of slots that were not fed yet
        self._copies = copies
        self._indexes: dict[int, NgramIndex] = {}
        self._copied: dict[int, Match] = {}  # requests that are copied for in this step
        self._state: dict[int, Tensor] = {}  # the head's own, after its latest draft

    def available(self, sequences: list[Sequence]) -> Availability:
        self._copied = {}
        for sequence in sequences if self._copies else ():
            if sequence.id not in self._indexes:
                self._indexes[sequence.id] = NgramIndex(MIN_COPIED, MAX_COPIED)
            match = self._indexes[sequence.id].find(sequence.tokens)
            if match.length:
                self._copied[sequence.id] = match
                self._goes_on.discard(sequence.id)  # no first draft of the head's
        offer = super().available(sequences)
        confidence = offer.features[self.features.index(FEATURE_DRAFT_CONFIDENCE)]
        for place, sequence in enumerate(sequences):
            if sequence.id in self._copied:
                confidence[place] = self._copied[sequence.id].agreement
        return offer

    def propose(self, sequences: list[Sequence], lengths: npt.NDArray[np.int64]) -> Proposal:
        copying = np.array([sequence.id in self._copied for sequence in sequences], bool)
        proposal = super().propose(sequences, np.where(copying, 0, lengths))
        for place in np.flatnonzero(copying & (lengths > 0)):
            sequence = sequences[place]
            end = self._copied[sequence.id].end
            text = [copied(sequence.tokens, end, i) for i in range(lengths[place])]
            proposal.drafts[place] = DraftTree.chain(text)
        return proposal

    @torch.inference_mode()
    def read(self, sequences: list[Sequence], features: list[Tensor]) -> None:
        sizes = [len(part) for part in features]
        states = torch.split(self._head.state(torch.cat(features)), sizes)
        for sequence, part in zip(sequences, states, strict=True):
            if sequence.id not in self._waiting:  # nothing comes before the first token
                self._waiting[sequence.id] = [torch.zeros_like(part[:1])]
            self._waiting[sequence.id].append(part)
            if sum(map(len, self._waiting[sequence.id])) > 2 * self._max_pass_tokens:
                self._relieve(sequence)

    def forget(self, sequence: Sequence) -> None:
        super().forget(sequence)
        self._waiting.pop(sequence.id, None)
        self._state.pop(sequence.id, None)
        self._indexes.pop(sequence.id, None)

    def _relieve(self, sequence: Sequence) -> None:
        """Feed a pass of what waits."""
        start = self._num_computed.get(sequence.id, 0)
        size = self._max_pass_tokens
        tokens = sequence.tokens[start : start + size]
        self._feed([sequence], [Segment(sequence.row, start, tokens, 0)])
        self._num_computed[sequence.id] = start + size

    def _feed(self, sequences: list[Sequence], segments: list[Segment]) -> Tensor:
        parts = []
        for sequence, segment in zip(sequences, segments, strict=True):
            waiting = torch.cat(self._waiting[sequence.id])
            parts.append(waiting[: len(segment.tokens)])
            self._waiting[sequence.id] = [waiting[len(segment.tokens) :]]
        return self._advance(sequences, segments, torch.cat(parts))

    def _go_on(self, sequences: list[Sequence], segments: list[Segment], fresh: Tensor) -> Tensor:
        states = torch.stack([self._state[sequence.id] for sequence in sequences])
        return self._advance(sequences, segments, states, fresh)

    def _advance(
        self,
        sequences: list[Sequence],
        segments: list[Segment],
        states: Tensor,
        fresh: Tensor | None = None,
    ) -> Tensor:
        logits, after = self._heads.advance(segments, states, fresh)
        asked = [s.id for s, segment in zip(sequences, segments, strict=True) if segment.num_logits]
        self._state.update(zip(asked, after, strict=True))
        # What the head cannot draft has no chance; noise is keyed to the target's token ids.
        whole = logits.new_full((len(logits), self._head.vocabulary_size), -torch.inf)
        whole[:, self._head.token_ids] = logits
        return whole

    def _num_kept(self, num_fed: int) -> int:
        return 0  # they were fed with the head's own states, which are guesses
