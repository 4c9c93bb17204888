"""What is learned of the drafts that vLLM's lookups find."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from smartspec.engine_adapter.lengths import CostCurve, DraftCost, bucket_index
from smartspec.engine_adapter.levels import Levels
from smartspec.engine_adapter.vllm.copies import Copies, Found, cut

EASY, HARD, AFTER = 7, 8, 9


def rates(copies: Copies, before: list[int], first: list[int]) -> list[float]:
    return copies.features(Found(before, [[draft] for draft in first]))[0].tolist()


def test_drafts_are_told_apart_by_the_token_before_and_by_themselves() -> None:
    copies = Copies()
    for _ in range(50):
        copies.learn(Found([EASY, HARD], [[AFTER], [AFTER]]), [[AFTER], [EASY]])
    easy, hard, unseen = rates(copies, [EASY, HARD, 1], [AFTER, AFTER, 2])
    assert easy > 0.9 > 0.1 > hard
    assert unseen == pytest.approx(0.5, abs=0.01)


def test_what_was_cut_off_is_learned_from_as_far_as_the_text_goes() -> None:
    copies = Copies()
    for _ in range(50):  # nothing was verified: one token came, and it was the draft
        copies.learn(Found([EASY], [[AFTER, 1, 2]]), [[AFTER]])
    assert rates(copies, [EASY], [AFTER])[0] > 0.9
    assert rates(copies, [AFTER], [1]) == pytest.approx(rates(copies, [3], [4]))


def test_nothing_is_learned_past_the_first_draft_that_is_wrong() -> None:
    copies = Copies()
    for _ in range(50):
        copies.learn(Found([1], [[2, EASY, AFTER]]), [[3]])
        copies.learn(Found([1], [[2, EASY, AFTER]]), [[3, EASY, AFTER]])  # by chance
    assert rates(copies, [EASY], [AFTER]) == pytest.approx(rates(copies, [20], [21]), abs=1e-6)


def test_a_request_without_drafts_has_a_rate_too_and_teaches_nothing() -> None:
    copies = Copies()
    before = copies.features(Found([5], [[]]))
    copies.learn(Found([5, 6], [[], [1]]), [[4], []])
    assert np.array_equal(copies.features(Found([5], [[]])), before)
    assert before.shape == (1, 1)


def test_drafts_are_read_from_requests_and_taken_along_by_rows() -> None:
    requests = [
        SimpleNamespace(_all_token_ids=[1, 2, 3], spec_token_ids=[4]),
        SimpleNamespace(_all_token_ids=[5], spec_token_ids=[]),
    ]
    found = Found.of(requests)
    assert found == Found([3, 5], [[4], []])
    assert found.take(np.array([1])) == Found([5], [[]])


def _request(*drafts: int, last: int = 3) -> SimpleNamespace:
    return SimpleNamespace(_all_token_ids=[last], spec_token_ids=list(drafts))


def test_levels_are_those_of_the_bucket_of_what_was_found() -> None:
    copies = Copies()
    for _ in range(50):
        copies.learn(Found([EASY, HARD], [[AFTER], [AFTER]]), [[AFTER], [EASY]])
    edges = [np.array([0.3, 0.7], np.float32)]
    table = np.log([[0.2, 0.5, 0.9], [0.1, 0.3, 0.8]])
    curve = CostCurve("ragged", [1.0], [1.0])
    levels = Levels(
        table, np.array([1.0, 2.0, 1.0, 0.5]), None, None, 2, 1.0, 2, curve, DraftCost()
    )
    levels.expect(bucket_index(edges, copies.rates()))
    unseen = 70_000
    requests = [_request(AFTER, 1, last=EASY), _request(), _request(AFTER, last=HARD)]
    found = Found.of([*requests, _request(unseen, unseen, last=unseen)])
    assert copies.features(found)[0].tolist()[0] > 0.7 > 0.3 > copies.features(found)[0].tolist()[2]
    expected = [levels.of(0, 2 * 255, 2), b"", levels.of(2, 0, 1), levels.of(3, 256, 2)]
    assert copies.levels(found, levels) == expected
    assert Copies().levels(found, levels)[3] == levels.of(3, 256, 2)  # nothing was learned yet


def test_drafts_are_cut_to_the_best_levels_and_a_part_of_the_next() -> None:
    requests = [_request(1, 2, 3), _request(4, 5), _request(), _request(6, 7), _request(8)]
    levels = [bytes([0, 1, 1]), bytes([1, 2]), b"", bytes([1, 1]), bytes([0])]
    found = Found.of(requests)
    cut(requests, found, levels, 1, 3)
    assert [r.spec_token_ids for r in requests] == [[1, 2, 3], [4], [], [], [8]]
    assert found.drafts == [[1, 2, 3], [4, 5], [], [6, 7], [8]]  # what it learns from
    requests = [_request(1, 2, 3), _request(4, 5)]
    cut(requests, Found.of(requests), levels[:2], 2, 0)
    assert [r.spec_token_ids for r in requests] == [[1, 2, 3], [4]]
