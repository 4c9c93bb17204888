"""A policy made ready to run: what it refuses, and what it does at step time."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fakes import decode_batch, policy

from smartspec.engine_adapter import messages as wire
from smartspec.engine_adapter.lengths import CostCurve, DraftCost, Ladder, choose_lengths
from smartspec.engine_adapter.messages import FEATURE_DRAFT_CONFIDENCE
from smartspec.engine_adapter.optimum import NIMBLE
from smartspec.engine_adapter.program import LARGEST, MAX_AXES, MAX_CURVES, Program

FEATURES = ("last_accepted_share", "match_length")
NAN, INF = float("nan"), float("inf")


def program(roster: Any = None, features: tuple[str, ...] = FEATURES, **more: Any) -> Program:
    """What an engine makes of a policy that came over the wire."""
    ids = None if roster is None else np.array(roster, np.uint64)
    received = wire.decode_daemon_message(wire.encode(policy(**more)))
    assert isinstance(received, wire.Policy)
    return Program(received, features, ids)


def curve(num_tokens: list[float], seconds: list[float], mode: str = "ragged") -> wire.Curve:
    return wire.Curve(mode=mode, num_tokens=tuple(num_tokens), seconds=tuple(seconds))


def axis(*edges: float, feature: str = "match_length") -> wire.BucketAxis:
    return wire.BucketAxis(feature=feature, edges=edges)


def table(*buckets: list[float]) -> bytes:
    return wire.pack(np.transpose(buckets), "f32")


BAD: dict[str, dict[str, Any]] = {
    "max_length": {"max_length": 65, "log_survival": table([-1.0] * 65)},
    "probe_length": {"probe_length": 300},
    "ttl_s": {"ttl_s": 0.0},
    "[.]ttl_s": {"ttl_s": -1.0},
    "> 0.0 - at `[$].ttl_s": {"ttl_s": NAN},
    "<= 1000000000000.0 - at `[$].ttl_s": {"ttl_s": INF},
    "fallback_s": {"fallback_s": NAN},
    "value_of_time": {"value_of_time": -1.0},
    ">= 0.0 - at `[$].value_of_time": {"value_of_time": NAN},
    "<= 1000000000000.0 - at `[$].value_of_time": {"value_of_time": 1e300},
    "draft_fixed_s": {"draft_fixed_s": NAN},
    "draft_per_forward_s": {"draft_per_forward_s": INF},
    "draft_per_token_s": {"draft_per_token_s": -0.1},
    "draft_per_catch_up_s": {"draft_per_catch_up_s": -0.1},
    "curves: 0 given": {"curves": ()},
    "curves: 9 given": {"curves": (curve([1], [1]),) * (MAX_CURVES + 1)},
    "curves: 0 breakpoints": {"curves": (curve([], []),)},
    "num_tokens must rise": {"curves": (curve([1, 1], [1, 2]),)},
    "curves.*num_tokens": {"curves": (curve([1, 1e30], [1, 2]),)},
    "curves.*seconds": {"curves": (curve([1, 2], [1, -2]),)},
    "seconds must be as many": {"curves": (curve([1, 2], [1]),)},
    ">= 0.0 - at `[$].curves.*num_tokens": {"curves": (curve([1, NAN], [1, 2]),)},
    "log_survival: holds a": {"log_survival": table([0.1, 0, -1, -2, -3])},
    "log_survival: must not rise": {"log_survival": table([-3, -2, -3, -3, -3])},
    "log_survival: 16 bytes": {"log_survival": table([-3, -3, -3, -3])},
    "log_survival: holds": {"log_survival": table([-1, -2, -3, -4, -INF])},
    "log_survival: holds a value": {"log_survival": table([-1, -2, -3, -4, -1e30])},
    "worth: 8 bytes": {"worth": wire.pack([1, 1], "f32")},
    "worth: holds a": {"worth": wire.pack([-1], "f32")},
    "worth: holds a value": {"worth": wire.pack([NAN], "f32")},
    "axes: edges": {"axes": (axis(5.0, 4.0),)},
    "axes: edges must be": {"axes": (axis(NAN),)},
    "axes: more than 16": {"axes": (axis(),) * (MAX_AXES + 1)},
    "more than 4096 buckets": {"axes": (axis(1, 2, 3, 4, 5, 6, 7),) * 5},
    "correction: 8 bytes": {"correction": wire.pack([1, 1], "f32")},
    "correction: holds a": {"correction": wire.pack([1, 1, -1], "f32")},
    "correction: holds a value": {"correction": wire.pack([1, 1, 1e30], "f32")},
    "correction: holds": {"correction": wire.pack([1, 1, NAN], "f32")},
    "fallback: one": {"fallback_batch": (1,)},
    "fallback_batch: must rise": {"fallback_batch": (8, 1)},
    "fallback_batch: over": {"fallback_batch": (1, 2**63)},
    "fallback_length": {"fallback_length": (2**63, 1)},
}


@pytest.mark.parametrize("message", BAD)
def test_policy_is_refused_by_field_when_it_cannot_be_run(message: str) -> None:
    with pytest.raises(wire.MessageError, match=message):
        program(roster=[1, 2, 3], **BAD[message])


def test_extreme_but_allowed_numbers_give_lengths_without_warnings() -> None:
    extreme = program(
        roster=[1, 2, 3],
        value_of_time=LARGEST,
        draft_fixed_s=LARGEST,
        curves=(curve([1, 2, 1e12], [0, LARGEST, 0]), curve([0, 5], [1, 1])),
        log_survival=table([0, 0, -1, -1e9, -9.9e11]),
        correction=wire.pack([0, 1, 9.9e11], "f32"),
        depth=2**60,
        num_probes=2**60,
        probe_length=64,
    )
    batch = decode_batch()
    choice = extreme.with_probes(extreme.choose(batch), batch)
    assert (choice.lengths == 5).all()  # the probe's 64, up to each ceiling


def test_lengths_are_those_of_the_policy_s_numbers() -> None:
    ready = program(
        axes=(axis(3.0, 5.0),),
        log_survival=table(*(np.log(a) * np.arange(1, 6) for a in (0.1, 0.6, 0.95))),
        draft_fixed_s=0.001,
        draft_per_forward_s=0.002,
        draft_per_token_s=0.0001,
        value_of_time=60.0,
        depth=4,
    )
    batch = decode_batch(range(1, 7), num_prefill_tokens=40, weight=np.full(6, 2.0, np.float32))
    batch.features[1] = [0, 3, 4, 5, 8, 2]
    acceptance = np.array([0.1, 0.6, 0.6, 0.95, 0.95, 0.1])
    survival = acceptance ** np.arange(1.0, 6.0)[:, None]
    expected = choose_lengths(
        Ladder(survival, np.full(6, 2.0), None, batch.ceiling),
        60.0,
        4,
        [CostCurve("ragged", [1.0, 1000.0], [0.02, 0.03])],
        DraftCost(0.001, 0.002, 0.0001),
        40,
    )
    choice = ready.choose(batch)
    assert choice.lengths.tolist() == expected.lengths.tolist()
    assert len(set(choice.lengths.tolist())) > 1
    assert choice.gain == pytest.approx(expected.gain, rel=1e-5)


def test_drafts_count_for_what_they_are_worth_in_their_bucket() -> None:
    policies = {
        "axes": (axis(4.0),),
        "log_survival": table(*[np.log(0.6) * np.arange(1, 6)] * 2),
        "curves": (curve([1, 101], [0.01, 0.11]),),  # a draft costs 1 ms: 0.2 tokens
        "value_of_time": 200.0,
        "depth": 5,
    }
    features = np.array([[0.0, 0.0], [2.0, 8.0]], np.float32)
    batch = replace(decode_batch([1, 2]), features=features)
    assert program(**policies).choose(batch).lengths.tolist() == [3, 3]
    worth = wire.pack([2.0, 0.5], "f32")
    ready = program(worth=worth, **policies)
    assert ready.choose(batch).lengths.tolist() == [4, 1]
    heavy = replace(batch, weight=np.array([0.5, 2.0], np.float32))
    assert ready.choose(heavy).lengths.tolist() == [3, 3]


def test_feature_reads_zero_when_the_engine_lacks_it() -> None:
    values: dict[str, Any] = {"axes": (axis(1.0),), "log_survival": table([-9] * 5, [-0.01] * 5)}
    batch = decode_batch(num_features=1)
    assert (program(features=("last_accepted_share",), **values).survivals(batch) < 0.01).all()
    assert (program(**values).survivals(decode_batch()) > 0.9).all()


def test_corrections_follow_their_requests_when_the_batch_has_changed() -> None:
    ready = program(
        roster=[10, 11, 12],
        correction=wire.pack([0.0, 2.0, 1.0], "f32"),
        log_survival=wire.pack(np.log(0.5) * np.arange(1, 6), "f32"),
    )
    first = ready.survivals(decode_batch([12, 99, 10, 11]))[0]
    assert first == pytest.approx([0.5, 0.5, 1.0, 0.25])  # 99 is not known: as its bucket
    assert ready.survivals(decode_batch([10, 11, 12]))[0] == pytest.approx([1.0, 0.25, 0.5])


def test_corrections_are_left_out_when_their_roster_is_forgotten() -> None:
    ready = program(correction=wire.pack([0.0, 2.0], "f32"))
    assert ready.survivals(decode_batch())[0] == pytest.approx([0.9] * 3)


def test_probes_go_to_the_shortest_lengths_within_their_ceilings() -> None:
    ready = program(probe_length=4, num_probes=2)
    batch = decode_batch([1, 2, 3, 4])
    batch.ceiling[:] = [5, 0, 3, 5]
    choice = ready.choose(batch)._replace(lengths=np.array([3, 0, 1, 2]))
    probing = ready.with_probes(choice, batch)
    assert probing.lengths.tolist() == [3, 0, 3, 4]  # request 2 has nothing to draft
    assert probing.source == "probe"
    assert choice.lengths.tolist() == [3, 0, 1, 2]
    batch.ceiling[:] = choice.lengths
    assert ready.with_probes(choice, batch).source == "policy"


def test_lengths_are_left_to_the_confidences_when_the_policy_says_so() -> None:
    weight = np.array([1.0, 2.0, 1.0], np.float32)
    batch = decode_batch(num_prefill_tokens=7, weight=weight)
    choice = program(by_confidence=True, depth=4, draft_per_forward_s=0.002).choose(batch)
    assert choice.lengths.tolist() == [4, 4, 4]
    assert choice.prices is not None and choice.source == "policy"
    assert (choice.prices.value_of_time, choice.prices.num_other_tokens) == (100.0, 7)
    assert choice.prices.draft == DraftCost(0.0, 0.002)
    assert choice.prices.weight is weight
    assert program(depth=4).choose(batch).prices is None


def test_targets_are_kept_by_lengths_chosen_beforehand() -> None:
    target = np.array([0.1, 0.0, 0.0], np.float32)
    batch = decode_batch(token_time_target_s=target)
    assert program(by_confidence=True, meet_targets=True).choose(batch).prices is None
    assert program(by_confidence=True).choose(batch).prices is not None


def test_probes_are_verified_whatever_their_confidences_when_these_choose() -> None:
    ready = program(by_confidence=True, depth=2, probe_length=4, num_probes=2)
    batch = decode_batch(floor=np.array([0, 0, 3], np.uint8))
    choice = ready.choose(batch)
    probing = ready.with_probes(choice, batch)
    assert probing.source == "probe"
    assert probing.prices is not None and probing.prices.floor is not None
    assert sorted(probing.prices.floor.tolist()) == [3, 4, 4]
    assert probing.lengths.tolist() == [4, 4, 3]
    assert choice.prices is not None and choice.prices.floor is batch.floor


def test_fallback_length_is_that_of_the_batch_size() -> None:
    ready = program(fallback_batch=(2, 8, 32), fallback_length=(5, 3, 0))
    for size, length in ((1, 5), (2, 5), (7, 5), (8, 3), (31, 3), (32, 0), (500, 0)):
        choice = ready.fallback(decode_batch(range(size)))
        assert choice is not None
        assert choice.source == "fallback"
        assert choice.lengths.tolist() == [length] * size


def test_fallback_keeps_ceilings_and_floors() -> None:
    ready = program(fallback_batch=(1,), fallback_length=(2,))
    batch = decode_batch(floor=np.array([4, 0, 4], np.uint8))
    batch.ceiling[:] = [5, 1, 3]
    choice = ready.fallback(batch)
    assert choice is not None and choice.lengths.tolist() == [4, 1, 3]


def test_there_is_no_fallback_when_the_policy_brought_no_table() -> None:
    assert program(fallback_batch=(), fallback_length=()).fallback(decode_batch()) is None


@pytest.mark.parametrize("ids", [[], [7]])
def test_smallest_batches_get_lengths(ids: list[int]) -> None:
    for ready in (program(), program(axes=(axis(1.0),), log_survival=table([-1] * 5, [-1] * 5))):
        assert len(ready.choose(decode_batch(ids)).lengths) == len(ids)


def test_lengths_are_chosen_anew_when_anything_about_the_batch_has_changed() -> None:
    ready = program(meet_targets=True)
    batch = decode_batch([1, 2, 3], floor=np.zeros(3, np.uint8))
    first = ready.choose(batch)
    assert ready.choose(batch) is first  # and not worked out again
    assert not first.lengths.flags.writeable
    assert batch.floor is not None
    for column, value in (
        (batch.ceiling, 1),
        (batch.features, 7.0),
        (batch.request_ids, 9),
        (batch.floor, 1),
    ):
        before = ready.choose(batch)
        column[..., 0] = value  # in place: engines use their arrays again
        assert ready.choose(batch) is not before
    before = ready.choose(batch)
    with_prompts = replace(batch, num_prefill_tokens=100)
    assert ready.choose(with_prompts) is not before
    alone = program(meet_targets=True).choose(with_prompts)
    assert ready.choose(with_prompts).lengths.tolist() == alone.lengths.tolist()
    assert ready.choose(with_prompts).seconds == alone.seconds != before.seconds
    assert ready.choose(batch).lengths.tolist() == before.lengths.tolist()
    assert ready.fallback(batch) is not ready.choose(batch)


def test_lengths_of_a_ranked_batch_are_those_of_one_that_was_not() -> None:
    curves = (curve([1, 20, 40, 1000], [0.02, 0.02, 0.26, 9.0]),)
    terms: dict[str, Any] = {"curves": curves, "value_of_time": 60.0}
    ready, batch = program(**terms), decode_batch(range(1, 7))
    ranking = ready.rank(batch)
    assert ranking is not None and ready.rank(batch) is ranking  # nothing has changed
    seen = set()
    for num_prompt_tokens in range(0, 60, 4):
        with_prompts = replace(batch, num_prefill_tokens=num_prompt_tokens)
        alone = program(**terms).choose(with_prompts).lengths.tolist()
        assert ranking.choose(num_prompt_tokens).lengths == alone
        seen.add(tuple(alone))
    assert len(seen) > 1
    batch.ceiling[:] = 1
    assert ready.rank(batch) is not ranking


def test_lengths_of_what_is_yet_to_be_found_are_those_of_what_was() -> None:
    rises = table([-0.1, -0.2, -0.3, -0.4, -0.5], [-1.0, -1.2, -1.4, -1.6, -1.8])
    terms: dict[str, Any] = {
        "axes": (axis(0.5),),
        "log_survival": rises,
        "curves": (curve([1, 6, 12, 40], [0.02, 0.02, 0.05, 0.9]),),
        "value_of_time": 60.0,
        "correction": wire.pack([0.5, 1.0, 1.5], "f32"),
    }
    ready, batch = program(**terms), decode_batch([1, 2, 3])
    values = np.repeat(np.array([[0.2, 0.7]], np.float32), len(batch.features), axis=0)
    levels = ready.level(batch, values)
    assert levels is not None and ready.level(batch, values) is levels
    drafts, seen = [5, 2, 4], set()
    for turn in range(2):
        found = [levels.of(row, (row + turn) % 2, count) for row, count in enumerate(drafts)]
        features = values[:, [(row + turn) % 2 for row in range(3)]]
        batch_found = replace(batch, features=features, ceiling=np.array(drafts, np.uint8))
        for num_prompt_tokens in range(0, 30, 3):
            split, surplus = levels.split(found, num_prompt_tokens)
            alone = program(**terms).choose(
                replace(batch_found, num_prefill_tokens=num_prompt_tokens)
            )
            assert sum(bisect_left(one, split) for one in found) + surplus == alone.lengths.sum()
            if not surplus:
                assert [bisect_left(one, split) for one in found] == alone.lengths.tolist()
            seen.add(tuple(alone.lengths.tolist()))
    assert len(seen) > 2


@pytest.mark.parametrize("special", ["by_confidence", "meet_targets", "floor", "uniform"])
def test_nothing_is_prepared_when_lengths_take_more_than_that(special: str) -> None:
    values: dict[str, Any] = {special: True} if special in ("by_confidence", "meet_targets") else {}
    if special == "uniform":
        values["curves"] = (curve([1, 9], [0.02, 0.03]), curve([1, 9], [0.02, 0.03], "uniform"))
    batch = decode_batch(
        token_time_target_s=np.array([0.1, 0.0, 0.0], np.float32),
        floor=np.ones(3, np.uint8) if special == "floor" else None,
    )
    ready = program(**values)
    assert ready.level(batch, np.zeros((len(batch.features), 2), np.float32)) is None
    assert (ready.rank(batch) is None) == (special in ("by_confidence", "meet_targets"))


def test_lengths_are_zero_when_the_engine_cannot_speculate() -> None:
    ready = program(max_length=0, log_survival=b"")
    assert ready.choose(decode_batch()).lengths.tolist() == [0, 0, 0]


def test_successor_chooses_as_if_made_alone() -> None:
    """What is taken over from the previous program must not leak into a different policy."""
    first = program()
    roster = np.array([1, 2, 3], np.uint64)
    for more in (
        {},
        {"log_survival": wire.pack(np.log(0.2) * np.arange(1, 6), "f32")},
        {"fallback_length": (5, 5)},
        {"axes": (axis(1.0),), "log_survival": table([-9] * 5, [-0.01] * 5)},
        {"value_of_time": 1e6, "correction": wire.pack([0, 1, 2], "f32")},
    ):
        alone = Program(policy(2, **more), FEATURES, roster)
        after = Program(policy(2, **more), FEATURES, roster, first)
        batch = decode_batch(range(1, 12))
        for a, b in (
            (alone.choose(batch), after.choose(batch)),
            (alone.fallback(batch), after.fallback(batch)),
        ):
            assert a is not None and b is not None
            assert a.lengths.tolist() == b.lengths.tolist()


# -- depths, and first drafts that have been run --------------------------------------------------

#: 0.9, 0.81, ... of drafts whose forwards cost as much as half a pass.
DEEP: dict[str, Any] = {
    "log_survival": table(np.log(0.9) * np.arange(1, 6)),
    "draft_per_forward_s": 0.01,
    "value_of_time": 60.0,
}


def test_small_batch_is_drafted_for_as_deep_as_is_best_for_itself() -> None:
    for told in (0, 1, 5):
        nimble = program(**DEEP, depth=told, deepest=5)
        assert nimble.choose(decode_batch(range(1, 3))).lengths.tolist() == [5, 5]
        assert (nimble.choose(decode_batch(range(1, NIMBLE + 2))).lengths == told).all()


def test_no_batch_is_drafted_for_deeper_than_told_when_the_policy_does_not_allow_it() -> None:
    bound = program(**DEEP, depth=1)
    assert bound.choose(decode_batch(range(1, 3))).lengths.tolist() == [1, 1]
    limited = program(**DEEP, depth=1, deepest=3)
    assert limited.choose(decode_batch(range(1, 3))).lengths.tolist() == [3, 3]


def test_depth_is_found_without_failing_when_costs_are_extreme() -> None:
    free = program(**{**DEEP, "curves": (curve([1, 9], [0, 0]),), "deepest": 64})
    assert (free.choose(decode_batch(range(1, 3))).lengths <= 5).all()
    dear = program(**{**DEEP, "draft_per_forward_s": LARGEST, "value_of_time": LARGEST})
    assert not dear.choose(decode_batch(range(1, 3))).lengths.any()


def test_preparing_changes_nothing_when_the_batch_is_small() -> None:
    prepared, plain = (program(**DEEP, depth=1, deepest=5) for _ in range(2))
    batch = decode_batch(range(1, 3))
    assert prepared.rank(batch) is None
    assert (prepared.choose(batch).lengths == plain.choose(batch).lengths).all()


@pytest.mark.parametrize(("goes_on", "run", "lengths"), [
    (True, True, [1]),  # the pass is paid: the draft costs its token only
    (False, True, [0]),  # the daemon would not start again, so that this pass would be the last
    (True, False, [0]),  # nothing has been paid yet
])  # fmt: skip
def test_first_draft_that_was_run_costs_its_token_only(
    goes_on: bool, run: bool, lengths: list[int]
) -> None:
    steered = program(
        features=("last_accepted_share", FEATURE_DRAFT_CONFIDENCE),
        log_survival=table(np.log(0.15) * np.arange(1, 6)),
        draft_per_forward_s=0.004,
        value_of_time=50.0,
        deepest=5,
        goes_on=goes_on,
    )
    batch = decode_batch([1])
    batch.features[1] = 0.1 if run else wire.NOT_RUN
    assert steered.choose(batch).lengths.tolist() == lengths
