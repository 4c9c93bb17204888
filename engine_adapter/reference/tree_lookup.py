"""Lookup of several continuations: of this request's text and of earlier answers, as one tree.

The latest tokens often occurred more than once, and what followed differed. All these
continuations are merged into one tree (SpecInfer's merge, Miao et al. 2023), in which each weighs
by the length of its match; n-grams of earlier requests are as good a source as the request's own
(ADED, Liu et al. 2024). No training and no model, as in prompt lookup.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from smartspec.engine_adapter.base import FEATURE_DRAFT_CONFIDENCE, FEATURE_MATCH_LENGTH
from smartspec.engine_adapter.reference.calibration import Calibration
from smartspec.engine_adapter.reference.draft_tree import (
    MAX_NODES,
    NO_DRAFTS,
    ROOT,
    DraftTree,
    most_probable,
)
from smartspec.engine_adapter.reference.kv_cache import KvCache
from smartspec.engine_adapter.reference.prompt_lookup import Match, NgramIndex
from smartspec.engine_adapter.reference.proposer import Availability, Proposal
from smartspec.engine_adapter.reference.sequence import Sequence

NUM_CONTINUATIONS = (
    8  #: merged into one tree: those of the longest matches, among equals the latest
)
WEIGHT_PER_TOKEN = 4.0  #: by so much a continuation weighs more for every further token matched
UNSEEN = 1.0  #: weight of what has not followed yet: that of one match of the shortest length
END = -1  #: after each answer of the history: no token


class Text(NamedTuple):
    """Tokens in which n-grams can be found."""

    tokens: list[int]
    ngrams: NgramIndex


class AnswerHistory:
    """The latest answers, up to a number of tokens.

    Two texts: answers are added to the newer, and when that holds half of what may be kept, the
    older is forgotten and another begun. So nothing is ever moved or taken out one by one.

    Parameters
    ----------
    capacity : tokens kept at most; at least half of it, once there were as many
    min_ngram, max_ngram : as in `NgramIndex`
    """

    def __init__(self, capacity: int, min_ngram: int, max_ngram: int) -> None:
        self._half = capacity // 2
        self._ngram = (min_ngram, max_ngram)
        self.texts: list[Text] = []  #: newest first

    @property
    def num_tokens(self) -> int:
        return sum(len(text.tokens) for text in self.texts)

    def add(self, answer: list[int]) -> None:
        """Remember an answer; of one that is longer than a text, the beginning."""
        addition = [*answer[: max(0, self._half - 1)], END]
        if len(addition) == 1:
            return
        if not self.texts or len(self.texts[0].tokens) + len(addition) > self._half:
            self.texts = [Text([], NgramIndex(*self._ngram)), *self.texts[:1]]
        newest = self.texts[0]
        newest.tokens.extend(addition)
        newest.ngrams.extend(newest.tokens)


class Continuations:
    """A tree of what has followed, with weights.

    >>> merged = Continuations()
    >>> merged.add([5, 6], 3.0)
    >>> merged.add([5, 7], 1.0)
    >>> merged.confidences()
    [0.8, 0.6, 0.2]
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self._weights: list[float] = []
        self._total = 0.0
        self._node: dict[tuple[int, int], int] = {}  # (parent, token)

    def add(self, tokens: list[int], weight: float) -> None:
        """Merge one continuation in."""
        self._total += weight
        parent = ROOT
        for token in tokens:
            node = self._node.get((parent, token))
            if node is None:
                node = self._node[parent, token] = len(self.tokens)
                self.tokens.append(token)
                self.parents.append(parent)
                self._weights.append(0.0)
            self._weights[node] += weight
            parent = node

    def confidences(self) -> list[float]:
        """Of each node, given its parent: its share of the weight that went through there."""
        return [
            weight / ((self._total if parent == ROOT else self._weights[parent]) + UNSEEN)
            for weight, parent in zip(self._weights, self.parents, strict=True)
        ]


class Draft(NamedTuple):
    """What was drafted for a request."""

    tree: DraftTree
    confidences: list[float]  #: of its nodes, each given its parent, before calibration
    chance: float  #: of the most probable node, after calibration

    def first(self, size: int) -> Draft:
        """Its ``size`` most probable nodes."""
        return Draft(self.tree.first(size), self.confidences[:size], self.chance)


NOTHING = Draft(NO_DRAFTS, [], 0.0)


class TreeLookup:
    """Drafts trees of what followed the latest tokens before.

    Parameters
    ----------
    max_length : largest tree, in nodes
    min_ngram, max_ngram : tokens that must and can agree before a continuation
    history_tokens : of earlier answers, kept at most; 0: none
    """

    name = "lookup-tree"
    trees = True
    features: tuple[str, ...] = (FEATURE_MATCH_LENGTH, FEATURE_DRAFT_CONFIDENCE)
    caches: tuple[KvCache, ...] = ()

    def __init__(
        self,
        max_length: int = 16,
        min_ngram: int = 2,
        max_ngram: int = 8,
        history_tokens: int = 1 << 16,
    ) -> None:
        if not 1 <= min_ngram <= max_ngram:
            raise ValueError(f"need 1 <= min_ngram <= max_ngram, got {min_ngram} and {max_ngram}")
        if not 1 <= max_length <= MAX_NODES:
            raise ValueError(f"max_length must be in [1, {MAX_NODES}], got {max_length}")
        if history_tokens < 0:
            raise ValueError(f"history_tokens must be >= 0, got {history_tokens}")
        self.max_length = max_length
        self._ngram = (min_ngram, max_ngram)
        self._history = AnswerHistory(history_tokens, min_ngram, max_ngram)
        self._indexes: dict[int, NgramIndex] = {}
        self._drafts: dict[int, Draft] = {}  # the last; while lengths are chosen, the largest
        self._calibration = Calibration()

    def available(self, sequences: list[Sequence]) -> Availability:
        """Builds the largest trees: lengths are chosen knowing how many nodes there are."""
        self._drafts = {}
        ceiling, length, chance = [], [], []
        for sequence in sequences:
            index = self._indexes.get(sequence.id)
            if index is None:
                index = self._indexes[sequence.id] = NgramIndex(*self._ngram)
            index.extend(sequence.tokens)
            texts = [Text(sequence.tokens, index), *self._history.texts]
            found = [(match, text.tokens) for match, text in self._occurrences(texts, sequence)]
            found.sort(key=lambda pair: -pair[0].length)
            draft = self._draft(found[:NUM_CONTINUATIONS]) if found else NOTHING
            self._drafts[sequence.id] = draft
            ceiling.append(draft.tree.size)
            length.append(found[0][0].length if found else 0)
            chance.append(draft.chance)
        return Availability(np.array(ceiling, np.uint8), np.array((length, chance), np.float32))

    @staticmethod
    def _occurrences(texts: list[Text], sequence: Sequence) -> Iterator[tuple[Match, Text]]:
        for text in texts:
            for match in text.ngrams.occurrences(text.tokens, sequence.tokens):
                yield match, text

    def propose(self, sequences: list[Sequence], lengths: npt.NDArray[np.int64]) -> Proposal:
        known, self._drafts = self._drafts, {}
        for sequence, length in zip(sequences, lengths.tolist(), strict=True):
            if length:
                self._drafts[sequence.id] = known[sequence.id].first(length)
        trees = [self._drafts[s.id].tree if s.id in self._drafts else NO_DRAFTS for s in sequences]
        return Proposal(trees)

    def _draft(self, found: list[tuple[Match, list[int]]]) -> Draft:
        """The best nodes of what has followed the matches, each in its text."""
        size = self.max_length
        merged = Continuations()
        for match, text in found:
            merged.add(continuation(text, match.end, size), WEIGHT_PER_TOKEN**match.length)
        own = merged.confidences()
        rates = self._calibration.rates(own).tolist()
        chances: list[float] = []
        for parent, rate in zip(merged.parents, rates, strict=True):
            chances.append(rate if parent == ROOT else rate * chances[parent])
        tree, best = most_probable(merged.tokens, merged.parents, chances, size)
        chance = chances[best[0]] if best else 0.0  # of a match at an answer's end nothing follows
        return Draft(tree, [own[node] for node in best], chance)

    def accepted(self, sequences: list[Sequence], paths: list[list[int]]) -> None:
        for sequence, path in zip(sequences, paths, strict=True):
            if (last := self._drafts.get(sequence.id)) is None:
                continue
            reached = {ROOT, *path}
            tried = [node for node, parent in enumerate(last.tree.parents) if parent in reached]
            own = [last.confidences[node] for node in tried]
            self._calibration.learn(own, [node in reached for node in tried])

    def forget(self, sequence: Sequence) -> None:
        self._history.add(sequence.tokens[sequence.num_prompt :])
        self._indexes.pop(sequence.id, None)
        self._drafts.pop(sequence.id, None)


def continuation(text: list[int], begin: int, size: int) -> list[int]:
    """Up to ``size`` tokens from ``begin`` on, running on into themselves at the text's end.

    >>> continuation([9, 1, 2, 3], 2, 5)
    [2, 3, 2, 3, 2]
    >>> continuation([1, 2, END, 3], 1, 5)
    [2]
    """
    tokens = text[begin : begin + size]
    if END in tokens:
        return tokens[: tokens.index(END)]
    return [tokens[i % len(tokens)] for i in range(size)]
