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
    return copies.features(Found.uncut(before, [[draft] for draft in first]))[0].tolist()


def test_drafts_are_told_apart_by_the_token_before_and_by_themselves() -> None:
    copies = Copies()
    for _ in range(50):
        copies.learn(Found.uncut([EASY, HARD], [[AFTER], [AFTER]]), [[AFTER], [EASY]])
    easy, hard, unseen = rates(copies, [EASY, HARD, 1], [AFTER, AFTER, 2])
    assert easy > 0.9 > 0.1 > hard
    assert unseen == pytest.approx(0.5, abs=0.01)


def test_what_was_cut_off_is_learned_from_as_far_as_the_text_goes() -> None:
    copies = Copies()
    for _ in range(50):  # nothing was verified: one token came, and it was the draft
        copies.learn(Found.uncut([EASY], [[AFTER, 1, 2]]), [[AFTER]])
    assert rates(copies, [EASY], [AFTER])[0] > 0.9
    assert rates(copies, [AFTER], [1]) == pytest.approx(rates(copies, [3], [4]))


def test_nothing_is_learned_past_the_first_draft_that_is_wrong() -> None:
    copies = Copies()
    for _ in range(50):
        copies.learn(Found.uncut([1], [[2, EASY, AFTER]]), [[3]])
        copies.learn(Found.uncut([1], [[2, EASY, AFTER]]), [[3, EASY, AFTER]])  # by chance
    assert rates(copies, [EASY], [AFTER]) == pytest.approx(rates(copies, [20], [21]), abs=1e-6)


def test_a_request_without_drafts_has_a_rate_too_and_teaches_nothing() -> None:
    copies = Copies()
    before = copies.features(Found.uncut([5], [[]]))
    copies.learn(Found.uncut([5, 6], [[], [1]]), [[4], []])
    assert np.array_equal(copies.features(Found.uncut([5], [[]])), before)
    assert before.shape == (1, 1)


def test_drafts_are_read_from_requests_and_taken_along_by_rows() -> None:
    requests = [
        SimpleNamespace(_all_token_ids=[1, 2, 3], spec_token_ids=[4]),
        SimpleNamespace(_all_token_ids=[5], spec_token_ids=[]),
    ]
    found = Found.of(requests)
    assert found == Found.uncut([3, 5], [[4], []])
    assert found.take(np.array([1])) == Found.uncut([5], [[]])


def _request(*drafts: int, last: int = 3) -> SimpleNamespace:
    return SimpleNamespace(_all_token_ids=[last], spec_token_ids=list(drafts))


def _levels(size: int, copies: Copies, price: float = 0.0) -> Levels:
    """Of three buckets, by two edges; a draft costs ``price`` tokens."""
    edges = [np.array([0.3, 0.7], np.float32)]
    table = np.log([[0.2, 0.5, 0.9], [0.1, 0.3, 0.8]])
    correction = np.array([1.0, 2.0, 1.0, 0.5])[:size]
    curve = CostCurve("ragged", [0.0, 100.0], [0.0, 100.0 * price])
    levels = Levels(table, correction, None, None, 2, 1.0, 2, curve, DraftCost())
    levels.expect(bucket_index(edges, copies.rates()))
    return levels


def _taught() -> Copies:
    copies = Copies()
    for _ in range(50):
        copies.learn(Found.uncut([EASY, HARD], [[AFTER], [AFTER]]), [[AFTER], [EASY]])
    return copies


def test_drafts_are_cut_by_the_bucket_of_what_was_found() -> None:
    copies, unseen = _taught(), 70_000
    requests = [_request(AFTER, 1, last=EASY), _request(), _request(AFTER, last=HARD)]
    requests.append(_request(unseen, unseen, last=unseen))
    rates = copies.features(Found.of(requests))[0].tolist()
    assert rates[0] > 0.7 > rates[3] > 0.3 > rates[2]
    for one in (copies, _taught()):  # to the second no token above those taught is known
        levels = _levels(4, one, price=0.6)
        again = [_request(*r.spec_token_ids, last=r._all_token_ids[0]) for r in requests]
        found = one.cut(again, levels, 0)
        # 0.9 and 0.8; nothing; 0.2; 0.5 and 0.3 to the power of a half, 0.71 and 0.55
        assert [r.spec_token_ids for r in again] == [[AFTER, 1], [], [], [unseen]]
        assert found.beyond == [None, None, AFTER, unseen]
        assert list(map(len, found.whole)) == [2, 0, 1, 2]
        assert found.first() == [AFTER, 0, AFTER, unseen]


def test_more_drafts_than_there_should_be_do_no_harm() -> None:
    copies = _taught()
    requests = [_request(AFTER, 1, 2, 3, last=EASY), _request(AFTER, 1, 2, last=HARD)]
    found = copies.cut(requests, _levels(2, copies, price=0.6), 0)
    assert requests[1].spec_token_ids == [] and found.first() == [AFTER, AFTER]


def test_what_was_cut_teaches_what_it_would_have_taught_uncut() -> None:
    came = [[AFTER, 1, 2], [AFTER], [4], [8, 9]]

    def requests() -> list[SimpleNamespace]:
        lasts = (EASY, HARD, HARD, 1)
        return [_request(AFTER, 1, last=last) for last in lasts]

    taught, untaught = _taught(), _taught()
    batch = requests()
    found = taught.cut(batch, _levels(4, taught, price=0.6), 0).noted(batch)
    assert found.beyond != [None] * 4
    taught.learn(found, came)
    untaught.learn(Found.of(requests()), came)
    pairs = Found.uncut([EASY, HARD, 1, AFTER], [[AFTER], [AFTER], [1], [1]])
    assert np.array_equal(taught.features(pairs), untaught.features(pairs))
    fresh = _taught().features(pairs)
    assert not np.array_equal(taught.features(pairs), fresh)


def test_drafts_are_cut_to_the_best_levels_and_a_part_of_the_next() -> None:
    drafts = [[1, 2, 3], [4, 5], [], [6, 7], [8]]
    levels = [bytes([0, 1, 1]), bytes([1, 2]), b"", bytes([1, 1]), bytes([0])]
    assert cut(drafts, levels, 1, 3) == [None, 5, None, 6, None]
    assert drafts == [[1, 2, 3], [4], [], [], [8]]
    drafts = [[1, 2, 3], [4, 5]]
    assert cut(drafts, levels[:2], 2, 0) == [None, 5]
    assert drafts == [[1, 2, 3], [4]]
