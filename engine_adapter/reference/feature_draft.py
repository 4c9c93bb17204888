"""Drafts with a head that reads the target's hidden states: the cheapest of draft models."""

from __future__ import annotations

import torch
from torch import Tensor

from smartspec.engine_adapter.reference.draft_tree import ROOT
from smartspec.engine_adapter.reference.feature_head import FeatureHead, HeadRunner
from smartspec.engine_adapter.reference.model_runner import Segment
from smartspec.engine_adapter.reference.sequence import Sequence
from smartspec.engine_adapter.reference.tree_draft_model import TreeDraftModel

MAX_PARTS = 64  #: of a request's waiting states: one tensor per step is slow to count and to join


class FeatureDraft(TreeDraftModel):
    """Drafts trees as a draft model does, with a head (feature_head.py) in its place.

    Slot p of the head's cache is made from the token at p and the target's states at p - 1; of a
    draft, from the head's own state at its parent. The target's states wait here, as they are,
    until a request is next drafted for: for the head to mix them is part of what it costs to catch
    up. Of those who never are, they are fed whenever more wait than two passes take. Drafts are fed
    again once they are accepted: by then the target's own states are known, in place of the head's
    guesses at them.

    Parameters
    ----------
    head : made for the worker's target
    num_rows, max_model_len : as of the target's cache
    max_length, max_pass_tokens, copies : as of `TreeDraftModel`
    """

    name = "eagle"

    def __init__(
        self,
        head: FeatureHead,
        num_rows: int,
        max_model_len: int,
        max_length: int = 16,
        max_pass_tokens: int = 512,
        copies: bool = True,
    ) -> None:
        self._heads = HeadRunner(head, num_rows, max_model_len)
        super().__init__(self._heads, max_length, max_pass_tokens, copies)
        self.feature_layers = head.config.layers
        self._head, self._token_ids = head, head.token_ids
        self._waiting: dict[int, list[Tensor]] = {}  # target's, of slots that were not fed yet
        self._states: dict[int, dict[int, Tensor]] = {}  # the head's own, by request and node

    @torch.inference_mode()
    def read(self, sequences: list[Sequence], features: list[Tensor]) -> None:
        for sequence, part in zip(sequences, features, strict=True):
            if sequence.id not in self._waiting:  # nothing comes before the first token
                self._waiting[sequence.id] = [torch.zeros_like(part[:1])]
            waiting = self._waiting[sequence.id]
            waiting.append(part)
            if len(waiting) > MAX_PARTS:
                self._waiting[sequence.id] = [torch.cat(waiting)]
            while sum(map(len, self._waiting[sequence.id])) > 2 * self._max_pass_tokens:
                self._relieve(sequence)

    def forget(self, sequence: Sequence) -> None:
        super().forget(sequence)
        self._waiting.pop(sequence.id, None)
        self._states.pop(sequence.id, None)

    def _relieve(self, sequence: Sequence) -> None:
        """Feed a pass of what waits."""
        start = self._num_computed.get(sequence.id, 0)
        size = self._max_pass_tokens
        tokens = sequence.tokens[start : start + size]
        self._feed([sequence], [Segment(sequence.row, start, tokens, 0)])
        self._num_computed[sequence.id] = start + size

    @torch.inference_mode()
    def _feed(self, sequences: list[Sequence], segments: list[Segment]) -> Tensor:
        parts = []
        for sequence, segment in zip(sequences, segments, strict=True):
            waiting = torch.cat(self._waiting[sequence.id])
            parts.append(waiting[: len(segment.tokens)])
            rest = waiting[len(segment.tokens) :]
            self._waiting[sequence.id] = [rest.clone()] if len(rest) else []  # a view keeps it all
        logits, after = self._heads.advance(segments, self._head.state(torch.cat(parts)))
        asked = [s.id for s, segment in zip(sequences, segments, strict=True) if segment.num_logits]
        self._states.update((i, {ROOT: state}) for i, state in zip(asked, after, strict=True))
        return logits

    def _forward(self, segments: list[Segment], nodes: list[tuple[int, int, int]]) -> Tensor:
        before = torch.stack([self._states[request][parent] for request, _, parent in nodes])
        logits, after = self._heads.advance(segments, before)
        for (request, node, _), state in zip(nodes, after, strict=True):
            self._states[request][node] = state
        return logits

    def _keep(self, kept: list[tuple[Sequence, int, list[int]]]) -> None:
        """Nothing: drafts were fed with the head's own states, which are guesses."""


class FeatureChain(FeatureDraft):
    """Drafts chains: after each token the head's first choice, or what a copy has if likelier.

    The head goes on from whichever was taken.
    """

    name = "eagle-chain"
    trees = False
    num_children = 1
