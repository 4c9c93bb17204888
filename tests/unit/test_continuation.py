"""Where answers go on: what an accepted draft is worth there."""

from __future__ import annotations

import numpy as np
import pytest

from smartspec.estimators.continuation import MEMORY, MOST_BUCKETS, Continuation, Pace

SURVIVAL = np.array([[0.9, 0.2], [0.8, 0.05], [0.7, 0.0]])  #: a copied passage, and other text
PACE = Pace(1.0, 0.2)
COPIED, OTHER, NOWHERE = 0, 1, -1

Row = tuple[int, bool, int]  #: bucket, something to draft, bucket behind


def seen(steps: int, *rows: Row) -> Continuation:
    where = Continuation(num_buckets=2)
    for _ in range(steps):
        where.note(*columns(*rows))
    return where


def columns(*rows: Row) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    buckets, able, behind = zip(*rows, strict=True)
    return np.array(buckets), np.array(able), np.array(behind)


def worth(where: Continuation, pace: Pace = PACE) -> list[float]:
    places = where.places(SURVIVAL, pace)
    assert places is not None
    return [float(one) for one in places.worth]


def test_nothing_is_said_before_anything_is_known() -> None:
    assert Continuation(num_buckets=2).places(SURVIVAL, PACE) is None
    rejected = seen(10, (COPIED, True, NOWHERE), (OTHER, True, NOWHERE))
    assert rejected.places(SURVIVAL, PACE) is None


def test_draft_is_worth_a_token_when_it_leads_to_where_all_drafts_lead() -> None:
    alike = [(to, True, behind) for to in (COPIED, OTHER) for behind in (COPIED, OTHER)]
    assert worth(seen(100, *alike)) == pytest.approx([1.0, 1.0])


def test_draft_is_worth_what_tokens_take_where_it_leads() -> None:
    # Copied: 3 drafts of 0.2 s, of which 2.4 are accepted. In other text a draft of 0.2 does not
    # pay. Together, half of the steps each, tokens take (1 + 0.3) / (1 + 1.2) s.
    stays = seen(3000, (COPIED, True, COPIED), (OTHER, True, OTHER))
    copied, other, every = 1.6 / 3.4, 1.0, 1.3 / 2.2
    assert worth(stays) == pytest.approx([copied / every, other / every], rel=0.02)


def test_draft_is_worth_much_when_it_leads_to_where_nothing_is_found() -> None:
    ends = seen(3000, (COPIED, False, COPIED), (COPIED, True, OTHER))
    assert worth(ends) == pytest.approx([1.0 / (1.3 / 2.2), (1.6 / 3.4) / (1.3 / 2.2)], rel=0.02)


def test_draft_is_worth_a_token_when_no_draft_pays() -> None:
    stays = seen(100, (COPIED, True, COPIED), (OTHER, True, OTHER))
    assert worth(stays, Pace(1.0, 10.0)) == [1.0, 1.0]


def test_few_steps_say_little() -> None:
    rows = (COPIED, True, COPIED), (OTHER, True, OTHER)
    (few, _), (many, _) = (worth(seen(steps, *rows)) for steps in (1, 1000))
    assert many < 0.9 < few < 1.0


def test_place_of_the_batch_is_told_against_all_places() -> None:
    places = seen(3000, (COPIED, True, COPIED), (OTHER, True, OTHER)).places(SURVIVAL, PACE)
    assert places is not None
    all_found = np.ones(1)
    assert places.ease(np.array([COPIED]), all_found) == pytest.approx((1.6 / 3.4) / (1.3 / 2.2))
    assert places.ease(np.array([OTHER]), all_found) == pytest.approx(1.0 / (1.3 / 2.2))
    assert places.ease(np.array([COPIED, OTHER]), np.ones(2)) == pytest.approx(1.0)
    assert places.ease(np.array([COPIED]), np.zeros(1)) == pytest.approx(1.0 / (1.3 / 2.2))


def test_place_of_the_batch_is_that_of_weighted_tokens_by_plain_seconds() -> None:
    places = seen(3000, (COPIED, True, COPIED), (OTHER, True, OTHER)).places(SURVIVAL, PACE)
    assert places is not None
    both, all_found, weight = np.array([COPIED, OTHER]), np.ones(2), np.array([6.0, 2.0])
    # (1 + 0.2 * 3 / 2) s a request, in which one of mean weight brings 1 + 2.4 * 6 / 8 tokens.
    assert places.ease(both, all_found, weight) == pytest.approx((1.3 / 2.8) / (1.3 / 2.2))
    alike = np.array([COPIED, COPIED])  # where weights change nothing
    assert places.ease(alike, all_found, weight) == pytest.approx(places.ease(alike, all_found))
    assert places.ease(both, all_found, np.full(2, 3.0)) == pytest.approx(1.0)


def test_what_is_older_than_the_memory_is_forgotten() -> None:
    where = seen(int(MEMORY), (COPIED, True, COPIED), (OTHER, True, OTHER))
    for _ in range(int(5 * MEMORY)):  # half of the steps each, wherever the step before was
        where.note(*columns((COPIED, True, OTHER), (OTHER, True, COPIED)))
        where.note(*columns((COPIED, True, COPIED), (OTHER, True, OTHER)))
    assert worth(where) == pytest.approx([1.0, 1.0], abs=0.02)


def test_step_of_nobody_changes_nothing() -> None:
    where = seen(100, (COPIED, True, COPIED), (OTHER, True, OTHER))
    before = worth(where)
    where.note(np.zeros(0, np.int64), np.zeros(0, bool), np.zeros(0, np.int64))
    assert worth(where) == before


@pytest.mark.parametrize("num_buckets", [1, MOST_BUCKETS + 1])
def test_one_bucket_says_nothing_and_too_many_are_not_counted(num_buckets: int) -> None:
    where = Continuation(num_buckets)
    where.note(*columns((0, True, 0)))
    assert where.places(np.full((3, num_buckets), 0.5), PACE) is None
