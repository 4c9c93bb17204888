"""A draft model's trees, with what a copy has to say as one more of their branches.

All that may come next is in one tree of candidates (candidates.py): the draft model's likeliest
tokens after each node that it has run, and what prompt lookup would copy, which costs no pass. The
nodes of the greatest chances are drafted, whoever has proposed them (SpecInfer, Miao et al. 2023,
merges such trees). A tree is as deep as its drafts are certain, and where a copy is certain the
draft model is not run.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from smartspec.engine_adapter.base import FEATURE_DRAFT_CONFIDENCE
from smartspec.engine_adapter.prices import Prices
from smartspec.engine_adapter.reference.candidates import Children
from smartspec.engine_adapter.reference.draft_model import DraftModel
from smartspec.engine_adapter.reference.draft_tree import MAX_NODES
from smartspec.engine_adapter.reference.growth import Growth
from smartspec.engine_adapter.reference.model_runner import ModelRunner
from smartspec.engine_adapter.reference.prompt_lookup import Copy, PromptLookup
from smartspec.engine_adapter.reference.proposer import Availability, Proposal
from smartspec.engine_adapter.reference.sampling import likeliest
from smartspec.engine_adapter.reference.sequence import Sequence


class TreeDraftModel(DraftModel):
    """Drafts trees with a model that shares the target's vocabulary, and its noise when sampling.

    Its cache is kept in step as by `DraftModel`; what was accepted of a tree is moved together in
    it too. Requests of which the latest tokens occurred before are not looked at beforehand.

    With `trees` False and one child of each node it drafts chains: one path of the candidates.

    Parameters
    ----------
    runner, max_length, max_pass_tokens : those of `DraftModel`; lengths are numbers of nodes
    copies : whether copies are candidates too
    """

    name = "draft-tree"
    trees = True
    num_children = 8  #: of a node that was run; the ninth likeliest is seldom among the best

    def __init__(
        self,
        runner: ModelRunner,
        max_length: int = 16,
        max_pass_tokens: int = 512,
        copies: bool = True,
    ) -> None:
        if not 1 <= max_length <= MAX_NODES:
            raise ValueError(f"max_length must be in [1, {MAX_NODES}], got {max_length}")
        super().__init__(runner, max_length, max_pass_tokens)
        self._lookup = PromptLookup(max_length) if copies else None
        self._copies: list[Copy] = []  # by sequence, in this step
        self._token_ids: torch.Tensor | None = None  # of the logits' columns, where not all

    def available(self, sequences: list[Sequence]) -> Availability:
        if self._lookup is None:
            return super().available(sequences)
        self._lookup.available(sequences)
        self._copies = self._lookup.copies(sequences)
        found = [place for place, (tokens, _) in enumerate(self._copies) if tokens]
        self._goes_on -= {sequences[place].id for place in found}
        offer = super().available(sequences)
        if not self.trees:  # of a chain it tells that a pass was run, which is paid for
            return offer
        confidence = offer.features[self.features.index(FEATURE_DRAFT_CONFIDENCE)]
        confidence[found] = [self._copies[place][1][0] for place in found]
        return offer

    def propose(self, sequences: list[Sequence], lengths: npt.NDArray[np.int64]) -> Proposal:
        self._goes_on = {s.id for s, size in zip(sequences, lengths, strict=True) if size}
        return self._grow(sequences, self._growth(sequences, lengths, None))._replace(cut=None)

    def _growth(
        self, sequences: list[Sequence], lengths: npt.NDArray[np.int64], prices: Prices | None
    ) -> Growth:
        growth = super()._growth(sequences, lengths, prices)
        if self._lookup is not None:
            tokens = [text for text, _ in self._copies]
            growth.candidates.copy(tokens, [likely for _, likely in self._copies])
        return growth

    def _children(
        self, logits: torch.Tensor, sequences: list[Sequence], positions: list[list[int]]
    ) -> Children:
        draws = self._draws(sequences, positions)
        return Children.of(*likeliest(logits, draws, self.num_children, self._token_ids))

    def accepted(self, sequences: list[Sequence], paths: list[list[int]]) -> None:
        super().accepted(sequences, paths)
        if self._lookup is not None:
            self._lookup.accepted(sequences, paths)

    def forget(self, sequence: Sequence) -> None:
        super().forget(sequence)
        if self._lookup is not None:
            self._lookup.forget(sequence)
