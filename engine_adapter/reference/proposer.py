"""What guesses the next tokens: the interface between the worker and its proposers.

Each step has three moments: `available` says, before anything is drafted, how far each request
could be drafted for and what is known about it; then somebody chooses lengths; then `propose`
drafts to these lengths. A proposer learns what was accepted from the sequences themselves: their
tokens are the truth, and it keeps what it remembers in step with them.

A proposal is a tree per sequence, of which a chain is the simplest (draft_tree.py). A length is the
number of its nodes: what the target has to verify.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from torch import Tensor

from smartspec.engine_adapter.base import F32, U8
from smartspec.engine_adapter.prices import Prices
from smartspec.engine_adapter.reference.draft_tree import NO_DRAFTS, DraftTree
from smartspec.engine_adapter.reference.growth import Cut
from smartspec.engine_adapter.reference.kv_cache import KvCache
from smartspec.engine_adapter.reference.sequence import Sequence


class Availability(NamedTuple):
    """What could be drafted, before drafting."""

    ceiling: U8  #: [B], draft tokens that can be had
    features: F32  #: [F, B], rows as in `Proposer.features`


class Proposal(NamedTuple):
    """Drafts, and what they took."""

    drafts: list[DraftTree]  #: by sequence, of its length at most; less where there was no more
    num_forwards: int = 0  #: sequential passes of a draft model
    num_draft_tokens: int = 0  #: tokens drafted in them
    num_catch_up_tokens: int = 0  #: tokens fed only to bring the draft model up to date
    cut: Cut | None = None  #: by confidence: all that was drafted, with what is not verified


class Proposer(Protocol):
    """Guesses the next tokens of sequences."""

    name: str
    max_length: int  #: longest speculation length
    trees: bool  #: drafts are trees, whose nodes come in falling order of probability
    features: tuple[str, ...]  #: names of the feature rows
    caches: tuple[KvCache, ...]  #: row caches that move with the sequences

    def available(self, sequences: list[Sequence]) -> Availability: ...

    def propose(self, sequences: list[Sequence], lengths: npt.NDArray[np.int64]) -> Proposal:
        """Draft ``lengths`` [B] tokens, each at most the sequence's ceiling."""

    def accepted(self, sequences: list[Sequence], paths: list[list[int]]) -> None:
        """The tokens of this step are in ``sequences``; ``paths``: the drafts that were right."""

    def forget(self, sequence: Sequence) -> None:
        """The sequence has left."""


@runtime_checkable
class ReadsFeatures(Protocol):
    """A proposer that drafts from the target's hidden states."""

    feature_layers: tuple[int, ...]  #: after how many of the target's layers

    def read(self, sequences: list[Sequence], features: list[Tensor]) -> None:
        """What the target's layers held at each sequence's tokens that are new in its cache.

        ``features`` : by sequence [new tokens, layers * hidden_size]; those of a sequence that is
        still at its prompt too
        """


@runtime_checkable
class ConfidentProposer(Proposer, Protocol):
    """One that knows how sure it is of its drafts, and can stop and cut by that."""

    def propose_at(
        self, sequences: list[Sequence], lengths: npt.NDArray[np.int64], prices: Prices
    ) -> Proposal:
        """Draft as far as it pays, at most ``lengths`` [B], and keep what is worth verifying."""


class NoProposer:
    """Never proposes: plain decoding."""

    name = "none"
    max_length = 0
    trees = False
    features: tuple[str, ...] = ()
    caches: tuple[KvCache, ...] = ()

    def available(self, sequences: list[Sequence]) -> Availability:
        size = len(sequences)
        return Availability(np.zeros(size, np.uint8), np.empty((0, size), np.float32))

    def propose(self, sequences: list[Sequence], lengths: npt.NDArray[np.int64]) -> Proposal:
        return Proposal([NO_DRAFTS for _ in sequences])

    def accepted(self, sequences: list[Sequence], paths: list[list[int]]) -> None:
        pass

    def forget(self, sequence: Sequence) -> None:
        pass
