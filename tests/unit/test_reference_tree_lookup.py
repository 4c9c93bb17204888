"""What followed the latest tokens, here and in earlier answers, becomes one tree."""

from __future__ import annotations

import numpy as np
import pytest

from smartspec.engine_adapter.reference.draft_tree import NO_DRAFTS, ROOT, DraftTree
from smartspec.engine_adapter.reference.sequence import Request, Sequence
from smartspec.engine_adapter.reference.tree_lookup import END, AnswerHistory, TreeLookup


def sequence_of(tokens: list[int], answer: list[int] | None = None, number: int = 1) -> Sequence:
    sequence = Sequence(number, Request(tokens), max_tokens=50, seed=0, added_s=0.0)
    sequence.tokens += answer or []
    return sequence


def drafted(proposer: TreeLookup, sequence: Sequence, size: int) -> DraftTree:
    length = min(size, int(proposer.available([sequence]).ceiling[0]))
    return proposer.propose([sequence], np.array([length])).drafts[0]


def test_continuations_share_their_beginning_when_they_differ_later() -> None:
    proposer = TreeLookup(max_length=6, history_tokens=0)
    tokens = [1, 2, 5, 6, 9, 4, 1, 2, 5, 6, 8, 4, 1, 2, 5, 7, 3, 1, 2]
    tree = drafted(proposer, sequence_of(tokens), 4)
    # 5 follows all three times, then 6 twice; then the latest comes first.
    assert tree == DraftTree([5, 6, 7, 8], [ROOT, 0, 0, 1])


def test_longest_match_comes_first_when_continuations_disagree() -> None:
    proposer = TreeLookup(max_length=6, history_tokens=0)
    tokens = [8, 3, 1, 2, 5, 4, 1, 2, 6, 8, 3, 1, 2]
    tree = drafted(proposer, sequence_of(tokens), 2)
    assert tree.tokens[0] == 5  # after 8 3 1 2; 6 came later, but after 1 2 alone


def test_earlier_answers_are_drafted_from_when_their_request_has_left() -> None:
    proposer = TreeLookup(max_length=4, history_tokens=100)
    first = sequence_of([9, 9, 9], [1, 2, 3, 4, 5])
    proposer.available([first])
    proposer.forget(first)
    second = sequence_of([7, 1, 2], number=2)
    assert drafted(proposer, second, 4).tokens == [3, 4, 5]
    # Not from prompts, and not at all where no history is kept.
    assert drafted(proposer, sequence_of([7, 9, 9], number=3), 4) == NO_DRAFTS
    without = TreeLookup(max_length=4, history_tokens=0)
    without.available([first])
    without.forget(first)
    assert drafted(without, second, 4) == NO_DRAFTS


def test_history_is_bounded_and_keeps_the_latest() -> None:
    history = AnswerHistory(capacity=100, min_ngram=2, max_ngram=4)
    rng = np.random.default_rng(0)
    for _ in range(200):
        answer = rng.integers(0, 50, rng.integers(1, 80)).tolist()
        history.add(answer)
        kept = history.texts[0].tokens
        assert kept[-len(answer[:49]) - 1 :] == [*answer[:49], END]
        assert history.num_tokens <= 100
    assert len(history.texts) == 2


def test_nothing_is_drafted_when_nothing_matches() -> None:
    proposer = TreeLookup(max_length=3)
    assert drafted(proposer, sequence_of([1, 2, 3]), 3) == NO_DRAFTS


def test_confidence_follows_what_became_of_drafts() -> None:
    """Copies of long matches never hold, those of short ones do: short ones come first then."""
    long_match, short_match = [8, 3, 1, 2, 5, 4], [1, 2, 6]
    tokens = [*long_match, *short_match, 8, 3, 1, 2]
    proposer = TreeLookup(max_length=2, history_tokens=0)
    before = drafted(proposer, sequence_of(tokens), 2)
    assert before.tokens[0] == 5
    for number in range(2, 400):
        sequence = sequence_of(tokens, number=number)
        tree = drafted(proposer, sequence, 2)
        right = tree.tokens.index(6) if 6 in tree.tokens else None
        sequence.tokens.append(6)
        proposer.accepted([sequence], [[] if right is None else [right]])
        proposer.forget(sequence)
    after = drafted(proposer, sequence_of(tokens, number=99), 2)
    assert after.tokens[0] == 6


def test_ceiling_is_the_number_of_nodes_that_there_are() -> None:
    proposer = TreeLookup(max_length=6, history_tokens=0)
    few = sequence_of([7, 3, 1, 2, 5, 1, 2])  # 5 1 2, and on into itself
    many = sequence_of([1, 2, 5, 6, 9, 4, 1, 2, 5, 7, 3, 1, 2], number=2)
    none = sequence_of([1, 2, 3], number=3)
    for sequence in (few, many, none):
        [ceiling] = proposer.available([sequence]).ceiling.tolist()
        tree = proposer.propose([sequence], np.array([ceiling])).drafts[0]
        assert tree.size == ceiling
    history = TreeLookup(max_length=6, history_tokens=100)
    history.available([first := sequence_of([9], [1, 2, 3, 4])])
    history.forget(first)
    ends = [sequence_of(end, number=2) for end in ([1, 2], [3, 4])]
    assert history.available(ends[:1]).ceiling.tolist() == [2]  # 3 4, no more
    assert history.available(ends[1:]).ceiling.tolist() == [0]


def test_smaller_trees_are_the_first_nodes_of_larger_ones() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        proposer = TreeLookup(max_length=12, min_ngram=1, history_tokens=0)
        sequence = sequence_of(rng.integers(0, 4, 40).tolist())
        whole = drafted(proposer, sequence, 12)
        for size in range(whole.size + 1):
            assert drafted(proposer, sequence, size) == whole.first(size)


@pytest.mark.parametrize(
    "bad",
    [{"max_length": 0}, {"max_length": 256}, {"min_ngram": 0}, {"min_ngram": 9},
     {"history_tokens": -1}],
)  # fmt: skip
def test_settings_are_refused_when_out_of_range(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError):
        TreeLookup(**bad)
