"""Prompt lookup finds what a plain search over all the tokens finds."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smartspec.engine_adapter.reference.draft_tree import NO_DRAFTS, DraftTree
from smartspec.engine_adapter.reference.prompt_lookup import (
    MAX_VOTES,
    NO_MATCH,
    Match,
    NgramIndex,
    PromptLookup,
)
from smartspec.engine_adapter.reference.sequence import Request, Sequence


def plain_search(tokens: list[int], shortest: int, longest: int) -> Match:
    def matched(end: int) -> int:
        sizes = range(1, min(longest, end) + 1)
        return max((n for n in sizes if tokens[end - n : end] == tokens[-n:]), default=0)

    ends = [end for end in range(len(tokens) - 1, 0, -1) if matched(end) >= shortest]
    if not ends:
        return NO_MATCH
    best = max(ends, key=lambda end: (matched(end), end))
    votes = [(matched(end) - shortest + 1, tokens[end]) for end in ends[:MAX_VOTES]]
    agreeing = sum(weight for weight, token in votes if token == tokens[best])
    agreement = (agreeing + 0.5) / (sum(weight for weight, _ in votes) + 2.0)
    return Match(matched(best), best, agreement)


def sequence_of(tokens: list[int], sequence_id: int = 1) -> Sequence:
    return Sequence(sequence_id, Request(tokens), max_tokens=50, seed=0, added_s=0.0)


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=60),
    st.integers(1, 3),
    st.integers(0, 5),
    st.lists(st.integers(1, 4), min_size=60, max_size=60),
)
def test_match_is_the_longest_and_latest_when_tokens_arrive_in_pieces(
    tokens: list[int], shortest: int, more: int, pieces: list[int]
) -> None:
    index = NgramIndex(shortest, shortest + more)
    size = 0
    for piece in pieces:
        size = min(size + piece, len(tokens))
        seen = tokens[:size]
        assert index.find(seen) == plain_search(seen, shortest, shortest + more)


def test_lookup_takes_microseconds_when_the_context_is_long() -> None:
    tokens = np.random.default_rng(0).integers(0, 200, 20_000).tolist()
    index = NgramIndex(2, 8)
    index.find(tokens)
    took = []
    for _ in range(300):
        tokens.append(tokens[-500])
        begin = time.perf_counter()
        index.find(tokens)
        took.append(time.perf_counter() - begin)
    assert np.median(took) < 100e-6


def test_lookup_is_bounded_when_the_text_repeats_itself() -> None:
    tokens = [1, 2] * 10_000 + [3, 2] * 20
    index = NgramIndex(1, 8)
    index.find(tokens)
    tokens += [1]  # thousands of occurrences, none of the whole 8 tokens
    begin = time.perf_counter()
    index.find(tokens)
    assert time.perf_counter() - begin < 5e-3


def test_copy_follows_the_match_when_there_is_one() -> None:
    proposer = PromptLookup(max_length=3)
    sequence = sequence_of([1, 2, 3, 4, 5, 6, 1, 2, 3])
    offer = proposer.available([sequence])
    assert offer.ceiling.tolist() == [3]
    assert offer.features.tolist() == [[0.625], [0.5], [0.5]]
    assert proposer.propose([sequence], np.array([2])).drafts == [DraftTree.chain([4, 5])]


def test_agreement_is_lower_when_earlier_occurrences_went_on_otherwise() -> None:
    index = NgramIndex(2, 8)
    alike = index.find([1, 2, 3, 9, 1, 2, 3, 8, 1, 2])
    index = NgramIndex(2, 8)
    unlike = index.find([1, 2, 4, 9, 1, 2, 3, 8, 1, 2])
    assert (alike.length, alike.end) == (unlike.length, unlike.end) == (2, 6)
    assert alike.agreement == pytest.approx(2.5 / 4) and unlike.agreement == pytest.approx(1.5 / 4)


def test_rate_tells_copied_tokens_apart_when_some_are_always_wrong() -> None:
    proposer = PromptLookup(max_length=1)
    for number in range(20):  # after 1 2 comes another token than the 3 of before
        wrong = sequence_of([1, 2, 3, 1, 2], 2 * number)
        right = sequence_of([5, 2, 4, 5, 2], 2 * number + 1)
        proposer.available([wrong, right])
        wrong.tokens.append(7)
        right.tokens.append(4)
        proposer.accepted([wrong, right], [[], [0]])
    offer = proposer.available([sequence_of([1, 2, 3, 1, 2], 98), sequence_of([5, 2, 4, 5, 2], 99)])
    rate = offer.features[1]
    assert rate[0] < 0.2 and rate[1] > 0.8


def test_second_rate_is_that_of_the_second_copied_token() -> None:
    proposer = PromptLookup(max_length=2)
    for number in range(20):  # after 1 2 comes 3 again, and then not the 4 of before
        sequence = sequence_of([1, 2, 3, 4, 1, 2], number)
        proposer.available([sequence])
        sequence.tokens += [3, 7]
        proposer.accepted([sequence], [[0]])
    first, second = proposer.available([sequence_of([1, 2, 3, 4, 1, 2], 98)]).features[1:, 0]
    assert first > 0.8 and second < 0.2


def test_copies_are_what_would_be_proposed_and_as_likely_as_such_tokens_were() -> None:
    proposer = PromptLookup(max_length=3)
    for number in range(20):  # after 1 2 comes 3 again, and then not the 4 of before
        sequence = sequence_of([1, 2, 3, 4, 1, 2], number)
        proposer.available([sequence])
        sequence.tokens += [3, 7]
        proposer.accepted([sequence], [[0]])
    pair = [sequence_of([1, 2, 3, 4, 1, 2], 98), sequence_of([7, 8, 9], 99)]
    offer = proposer.available(pair)
    (tokens, likely), nothing = proposer.copies(pair)
    assert tokens == proposer.propose(pair, np.array([3, 0])).drafts[0].tokens == [3, 4, 1]
    assert likely[0] > 0.8 and likely[1] < 0.2
    assert likely[0] > offer.features[0, 0]  # how far the earlier occurrences agree, by itself
    assert nothing == ([], [])


def test_a_copy_on_which_earlier_occurrences_disagree_is_less_likely() -> None:
    alike, unlike = [1, 2, 3, 5, 1, 2, 3, 6, 1, 2], [1, 2, 4, 5, 1, 2, 3, 6, 1, 2]
    proposer = PromptLookup(max_length=1)
    pair = [sequence_of(alike, 1), sequence_of(unlike, 2)]
    proposer.available(pair)
    (first, sure), (second, unsure) = proposer.copies(pair)
    assert first == second == [3]
    assert sure[0] > unsure[0]


def test_nothing_can_be_drafted_when_nothing_matches() -> None:
    proposer = PromptLookup(max_length=3)
    sequence = sequence_of([1, 2, 3])
    offer = proposer.available([sequence])
    assert offer.ceiling.tolist() == [0]
    assert offer.features.tolist() == [[0.0], [0.5], [0.5]]
    assert proposer.propose([sequence], np.array([0])).drafts == [NO_DRAFTS]


def test_copy_runs_on_into_itself_when_the_match_is_a_repetition() -> None:
    proposer = PromptLookup(max_length=7)
    sequence = sequence_of([9, 1, 2, 3, 1, 2, 3])
    proposer.available([sequence])
    drafts = proposer.propose([sequence], np.array([7])).drafts
    assert drafts == [DraftTree.chain([1, 2, 3, 1, 2, 3, 1])]


def test_nothing_is_remembered_when_a_sequence_has_left() -> None:
    proposer = PromptLookup()
    first = sequence_of([1, 2, 3, 1, 2])
    proposer.available([first])
    proposer.forget(first)
    again = sequence_of([5, 6, 7])  # the same id
    assert proposer.available([again]).ceiling.tolist() == [0]


@pytest.mark.parametrize(
    "bad", [{"max_length": 0}, {"max_length": 256}, {"min_ngram": 0}, {"min_ngram": 9}]
)
def test_settings_are_refused_when_out_of_range(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError):
        PromptLookup(**bad)
