"""Prompt lookup: propose what followed the last time that the latest tokens occurred.

Saxena 2023, "Prompt lookup decoding". Good where the answer copies from the prompt or from itself;
costs microseconds and no model.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from smartspec.engine_adapter.base import (
    FEATURE_MATCH_AGREEMENT,
    FEATURE_SECOND_ACCEPTANCE,
    FEATURE_TOKEN_ACCEPTANCE,
)
from smartspec.engine_adapter.reference.draft_tree import DraftTree
from smartspec.engine_adapter.reference.kv_cache import KvCache
from smartspec.engine_adapter.reference.proposer import Availability, Proposal
from smartspec.engine_adapter.reference.sequence import Sequence
from smartspec.engine_adapter.token_acceptance import CopyAcceptance

#: Occurrences of the shortest n-gram that are compared, latest first: bounds a lookup's time in
#: text that repeats itself over and over.
MAX_OCCURRENCES = 64
MAX_VOTES = 16  #: of these, the latest that are asked what they would go on with


Copy = tuple[list[int], list[float]]  #: tokens, and how likely each is, given those before


class Match(NamedTuple):
    """An earlier occurrence of the latest tokens."""

    length: int  #: tokens that agree, 0 without a match
    end: int  #: position after them: where the copy begins
    #: how far the earlier occurrences go on alike, 0 to 1: (a + 1/2) / (n + 2), a of the n tokens
    #: matched beyond the shortest n-gram's last but one being of those that go on as this one does
    agreement: float = 0.0


NO_MATCH = Match(0, 0)


class NgramIndex:
    """Finds the longest earlier occurrence of a sequence's end; grows with the sequence.

    A dictionary holds the latest position of every n-gram of the shortest length, and a list links
    each position to the one before with the same n-gram. A new token costs one dictionary
    operation, a lookup a walk along the links.

    Parameters
    ----------
    min_tokens, max_tokens : shortest and longest match that counts, 1 <= min <= max

    >>> index = NgramIndex(2, 8)
    >>> index.find([1, 2, 3, 4, 1, 2, 3])
    Match(length=3, end=3, agreement=0.625)
    """

    def __init__(self, min_tokens: int, max_tokens: int) -> None:
        self._min = min_tokens
        self._max = max_tokens
        self._latest: dict[tuple[int, ...], int] = {}  # n-gram -> position after it
        self._earlier: list[int] = []  # by position after an n-gram: the one before, or -1

    def extend(self, text: list[int]) -> None:
        """Take in what has been added to a text.

        Its end itself is left out: it would match itself, and nothing follows it yet.
        """
        shortest = self._min
        for end in range(len(self._earlier), len(text)):
            if end < shortest:
                self._earlier.append(-1)
                continue
            ngram = tuple(text[end - shortest : end])
            self._earlier.append(self._latest.get(ngram, -1))
            self._latest[ngram] = end

    def find(self, tokens: list[int]) -> Match:
        """The longest match of the end of ``tokens``, the latest among equals.

        ``tokens`` must begin with those of the last call.
        """
        self.extend(tokens)
        best = NO_MATCH
        votes: list[tuple[int, int]] = []  # (tokens beyond the shortest n-gram, plus one; next)
        for count, match in enumerate(self.occurrences(tokens, tokens)):
            if best.length == self._max and count >= MAX_VOTES:
                break
            if count < MAX_VOTES:
                votes.append((match.length - self._min + 1, tokens[match.end]))
            if match.length > best.length:
                best = match
        if not best.length:
            return NO_MATCH
        copied = tokens[best.end]
        agreeing = sum(weight for weight, token in votes if token == copied)
        agreement = (agreeing + 0.5) / (sum(weight for weight, _ in votes) + 2.0)
        return best._replace(agreement=agreement)

    def occurrences(self, text: list[int], tokens: list[int]) -> Iterator[Match]:
        """Where the end of ``tokens`` occurs in ``text``, which is indexed; latest first."""
        shortest, size = self._min, len(tokens)
        if size < shortest:
            return
        end = self._latest.get(tuple(tokens[size - shortest :]), -1)
        for _ in range(MAX_OCCURRENCES):
            if end < 0:
                return
            length = shortest
            longest = min(self._max, end, size)
            while length < longest and text[end - 1 - length] == tokens[size - 1 - length]:
                length += 1
            yield Match(length, end)
            end = self._earlier[end]


def copied(tokens: list[int], end: int, place: int) -> int:
    """Draft ``place`` (0 the first) of a copy that begins at ``end``.

    A match near the end is a repetition: the copy runs on into itself.

    >>> [copied([7, 8, 9, 8, 9], 3, place) for place in range(4)]
    [8, 9, 8, 9]
    """
    return tokens[end + place % (len(tokens) - end)]


class PromptLookup:
    """Copies from the request's own prompt and answer.

    Parameters
    ----------
    max_length : longest proposal, in tokens
    min_ngram, max_ngram : tokens that must and can agree before the copy
    """

    name = "lookup"
    trees = False
    features: tuple[str, ...] = (
        FEATURE_MATCH_AGREEMENT,
        FEATURE_TOKEN_ACCEPTANCE,
        FEATURE_SECOND_ACCEPTANCE,
    )
    caches: tuple[KvCache, ...] = ()

    def __init__(self, max_length: int = 8, min_ngram: int = 2, max_ngram: int = 8) -> None:
        if not 1 <= min_ngram <= max_ngram:
            raise ValueError(f"need 1 <= min_ngram <= max_ngram, got {min_ngram} and {max_ngram}")
        if not 1 <= max_length <= 255:
            raise ValueError(f"max_length must be in [1, 255], got {max_length}")
        self.max_length = max_length
        self.min_ngram = min_ngram
        self.max_ngram = max_ngram
        self._indexes: dict[int, NgramIndex] = {}
        self._matches: dict[int, Match] = {}
        self._num_tokens: dict[int, int] = {}  # of each sequence when it was looked up
        self._rates = CopyAcceptance()

    def available(self, sequences: list[Sequence]) -> Availability:
        matches = []
        for sequence in sequences:
            index = self._indexes.get(sequence.id)
            if index is None:
                index = self._indexes[sequence.id] = NgramIndex(self.min_ngram, self.max_ngram)
            match = self._matches[sequence.id] = index.find(sequence.tokens)
            self._num_tokens[sequence.id] = sequence.num_tokens
            matches.append(match)
        agreement = np.array([match.agreement for match in matches], np.float32)
        # Without a match the rates are of no use; any token will do.
        ends = [
            (sequence.tokens, match.end) for sequence, match in zip(sequences, matches, strict=True)
        ]
        last = [tokens[-1] for tokens, _ in ends]
        first = [copied(tokens, end, 0) for tokens, end in ends]
        second = [copied(tokens, end, 1) for tokens, end in ends]
        rates = self._rates.rates(last + first, first + second).reshape(2, -1)
        ceiling = np.where(agreement > 0, self.max_length, 0).astype(np.uint8)
        return Availability(ceiling, np.vstack((agreement, rates)))

    def propose(self, sequences: list[Sequence], lengths: npt.NDArray[np.int64]) -> Proposal:
        drafts = []
        for sequence, length in zip(sequences, lengths.tolist(), strict=True):
            end = self._matches[sequence.id].end
            draft = [copied(sequence.tokens, end, place) for place in range(length)]
            drafts.append(DraftTree.chain(draft))
        return Proposal(drafts)

    def copies(self, sequences: list[Sequence]) -> list[Copy]:
        """All that `propose` could copy for each, and how likely each token is, given those before.

        By how often copies were right after such tokens, and of such tokens, joined with how far
        the earlier occurrences agree on the first as if these were independent.
        """
        texts: list[list[int]] = []
        before: list[int] = []
        for sequence in sequences:
            match = self._matches[sequence.id]
            size = self.max_length if match.length else 0
            text = [copied(sequence.tokens, match.end, place) for place in range(size)]
            texts.append(text)
            before += [sequence.tokens[-1], *text][:size]
        flat = list(itertools.chain.from_iterable(texts))
        sizes = [len(text) for text in texts]
        agreement = np.repeat([self._matches[s.id].agreement for s in sequences], sizes)
        likely = self._rates.rates(before, flat, agreement).tolist()
        rest = iter(likely)
        return [(text, list(itertools.islice(rest, len(text)))) for text in texts]

    def accepted(self, sequences: list[Sequence], paths: list[list[int]]) -> None:
        # The index follows the tokens. What the copy would have been is known without a draft.
        before: list[int] = []
        drafted: list[int] = []
        outcome: list[bool] = []
        for sequence in sequences:
            match, tokens = self._matches[sequence.id], sequence.tokens
            if not match.length:
                continue
            begin = self._num_tokens[sequence.id]
            # While it is right, a copy that runs on into itself is the sequence as it now is.
            for source, place in enumerate(range(begin, len(tokens)), match.end):
                before.append(tokens[place - 1])
                drafted.append(tokens[source])
                outcome.append(tokens[source] == tokens[place])
                if not outcome[-1]:
                    break
        self._rates.learn(before, drafted, outcome)

    def forget(self, sequence: Sequence) -> None:
        self._indexes.pop(sequence.id, None)
        self._matches.pop(sequence.id, None)
        self._num_tokens.pop(sequence.id, None)
